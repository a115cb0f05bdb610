"""What frozen models say about the tokens of a step, and pairs of answers: the types of token-level learning.

Legend as in rl/types.py; in addition ``_R``: one value per *response* token of a batch, rollout after rollout, and ``_K``: one
per token id that a teacher was asked about.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

import torch

TeacherMode = Literal["scalar", "topk", "hidden"]
"""What a teacher returns of each response token; see :class:`TeacherAnswer`."""


@dataclass(frozen=True)
class Guidance:
    """Columns beside a TrainBatch (first dimension T) or a micro-batch (first dimension R); None where a run needs none."""

    weight_T: torch.Tensor | None = None
    """float32: weight of the token in the distillation term; 0 where it has none."""
    credit_T: torch.Tensor | None = None
    """float32 in [-1/2, 1/2]: T-REG's token reward of a preferred or dispreferred answer; 0 elsewhere."""
    reference_T: torch.Tensor | None = None
    """float32, nats: log-prob of the token under the frozen start policy."""
    teacher_logp_T: torch.Tensor | None = None
    """float32, nats: log pi*(token) (scalar)."""
    alpha_T: torch.Tensor | None = None
    """float32: weight of the extrapolation (scalar and topk; the learner computes it for hidden)."""
    id_TK: torch.Tensor | None = None
    """int32: distinct token ids (topk)."""
    teacher_logp_TK: torch.Tensor | None = None
    """float32, nats: log pi* of those (topk)."""
    tail_T: torch.Tensor | None = None
    """float32, nats: log of the mass pi* gives to all other ids (topk)."""
    dpo_hidden_TH: torch.Tensor | None = None
    """Final hidden states of the DPO model at the positions that predict the tokens (hidden)."""
    reverse_hidden_TH: torch.Tensor | None = None
    """The same of the reverse-DPO model."""

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Guidance:
        """The columns there are, changed one by one."""
        return Guidance(**{name: change(value) for name, value in self.columns().items()})

    def columns(self) -> dict[str, torch.Tensor]:
        """The columns there are, by name."""
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in found.items() if value is not None}


@dataclass(frozen=True)
class TeacherRequest:
    """Sequences whose response tokens a teacher is to score: prompt + response of each, one after the other."""

    token_T: torch.Tensor
    """int64 (T)."""
    start_N: torch.Tensor
    """int64 (N+1), first 0, last T."""
    prompt_length_N: torch.Tensor
    """int64 (N)."""
    id_RK: torch.Tensor | None = None
    """int32 (R, K): token ids that the student asks about (topk), distinct in each row; None: the teacher's own alone."""


@dataclass(frozen=True)
class TeacherAnswer:
    """A teacher's finding, one row per response token of the request; which columns there are depends on the mode.

    scalar: teacher_logp_R, alpha_R, dpo_logp_R, reverse_logp_R. topk: id_RK, teacher_logp_RK, tail_R, alpha_R, and the two
    log-probs. hidden: the two hidden states and the two log-probs.
    """

    teacher_logp_R: torch.Tensor | None = None
    """float32, nats: log pi*(token)."""
    alpha_R: torch.Tensor | None = None
    """float32: ``r TVD + eps``."""
    dpo_logp_R: torch.Tensor | None = None
    """float32, nats: log pi_d(token). ``beta_0 (dpo - reverse)`` is the contrastive reward."""
    reverse_logp_R: torch.Tensor | None = None
    """float32, nats: log pi_r(token)."""
    id_RK: torch.Tensor | None = None
    """int32: the ids asked about, then the teacher's most probable of the rest; distinct in each row."""
    teacher_logp_RK: torch.Tensor | None = None
    """float32, nats: log pi* of these."""
    tail_R: torch.Tensor | None = None
    """float32, nats: log of the mass of all other ids, by log-sum-exp over them."""
    dpo_hidden_RH: torch.Tensor | None = None
    """Model dtype."""
    reverse_hidden_RH: torch.Tensor | None = None
    """Model dtype."""

    @property
    def bytes(self) -> int:
        """Size of what travels."""
        return sum(value.numel() * value.element_size() for value in vars(self).values() if value is not None)


@dataclass(frozen=True)
class HeadSources:
    """Where the learner finds the heads of a teacher's two models."""

    dpo: Path
    """A local model folder; that of the base where the models are adapters, which leave its head alone."""
    reverse: Path
    vocabulary: int
    """Rows to read: the ids that the tokenizer knows."""


@dataclass(frozen=True)
class Pair:
    """Two answers to one prompt, one better than the other; token ids are the truth."""

    id: str
    """Stable over runs: a hash of the three."""
    prompt_ids: tuple[int, ...]
    chosen_ids: tuple[int, ...]
    """The preferred response, its end-of-sequence token included."""
    rejected_ids: tuple[int, ...]
    question: str = ""
    """Text of the prompt as a person reads it; what T-REG's contrastive prompts are made of."""

    @property
    def tokens(self) -> int:
        """Response tokens of both."""
        return len(self.chosen_ids) + len(self.rejected_ids)
