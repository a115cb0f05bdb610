"""The worker that scores answers by one frozen model; asked under two prompts, it gives T-REG's token rewards."""

from __future__ import annotations

from pathlib import Path

import torch

from reward.frozen import FrozenModel
from rl.guidance import TeacherRequest


class ContrastActor:
    """Log-probs of response tokens under one frozen model; `start` before anything else. The driver makes it a Ray actor.

    The same response ids are scored once after a prompt that asks for a better answer and once after one that asks for a worse:
    only the prompts of the two requests differ, so their answers agree in length and order.
    """

    def __init__(self, *, dtype: str, tokens_per_pass: int = 8192, trust_remote_code: bool = False, device: str = "cpu") -> None:
        self._dtype = dtype
        self._tokens_per_pass = tokens_per_pass
        self._trust_remote_code = trust_remote_code
        self._device = device
        self._model: FrozenModel | None = None

    def start(self, folder: str) -> int:
        """Load the model; returns its number of parameters. Raises ConfigError for a folder that holds no usable model."""
        self._model = FrozenModel.load(
            Path(folder),
            dtype=self._dtype,
            device=self._device,
            trust_remote_code=self._trust_remote_code,
            tokens_per_pass=self._tokens_per_pass,
        )
        return self._model.parameters

    def score(self, request: TeacherRequest) -> torch.Tensor:
        """Log-prob of each response token of the request, float32 (R) in nats, on CPU.

        Raises ValueError for lengths that disagree, BudgetRLError for a sequence longer than the model's context or a token
        that the tokenizer does not have.
        """
        if self._model is None:
            raise RuntimeError("ContrastActor.start must come first: no model is loaded")
        return self._model.logp(request.token_T, request.start_N, request.prompt_length_N).cpu()
