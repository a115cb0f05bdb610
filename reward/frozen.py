"""A frozen language model that scores the response tokens of a ragged batch: final hidden states, or log-probs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kernels import linear_logprob_entropy
from reward.adapters import AdapterBase
from reward.heads import Head, refuse_head
from reward.teacher_files import load_tokenizer, vocabulary_size
from rl.batch import plan_microbatches
from rl.errors import BudgetRLError, ConfigError
from rl.models import longest_context

TRIAL_TOKENS = 4
"""Tokens whose logits are compared with the model's own when it is loaded."""


@dataclass(frozen=True)
class Pass:
    """Right-padded rows of one forward pass; P of the batch's R response tokens are in it.

    Nothing masks the padding: causal attention alone keeps real tokens from seeing what stands on their right.
    """

    token_BS: torch.Tensor
    """int64 (rows, width)."""
    position_P: torch.Tensor
    """int64: in the flattened grid, where a response token is predicted, which is the place before its own."""
    index_P: torch.Tensor
    """int64: the token's place among the batch's response tokens."""


def response_positions(start_N: torch.Tensor, prompt_length_N: torch.Tensor) -> torch.Tensor:
    """Places in token_T of the R response tokens, rollout after rollout: int64 (R)."""
    spans = zip((start_N[:-1] + prompt_length_N).tolist(), start_N[1:].tolist(), strict=True)
    pieces = [torch.arange(first, last) for first, last in spans]
    return torch.cat(pieces) if pieces else torch.zeros(0, dtype=torch.int64)


def plan_passes(
    token_T: torch.Tensor, start_N: torch.Tensor, prompt_length_N: torch.Tensor, tokens_per_pass: int
) -> Iterator[Pass]:
    """Lay ragged sequences out as rows of similar length, rows x longest at most ``tokens_per_pass`` (a longer row goes alone).

    The rows that matter are exactly those that predict response tokens 1 to the last: row prompt_length - 1 + j predicts token j.
    Raises ValueError for a prompt of no token, or one longer than its sequence.
    """
    starts, ends, prompts = start_N[:-1].tolist(), start_N[1:].tolist(), prompt_length_N.tolist()
    for n, (start, end, prompt) in enumerate(zip(starts, ends, prompts, strict=True)):
        if not 1 <= prompt <= end - start:
            raise ValueError(f"sequence {n} has {end - start} tokens, its prompt {prompt}: it needs 1, and has at most all")
    responses = [end - start - prompt for start, end, prompt in zip(starts, ends, prompts, strict=True)]
    offsets = torch.tensor([0, *responses]).cumsum(0).tolist()
    for rows in plan_microbatches([end - start for start, end in zip(starts, ends, strict=True)], tokens_per_pass):
        width = max(ends[n] - starts[n] for n in rows)
        token_BS = torch.zeros((len(rows), width), dtype=torch.int64)
        positions, indices = [], []
        for row, n in enumerate(rows):
            token_BS[row, : ends[n] - starts[n]] = token_T[starts[n] : ends[n]]
            first = row * width + prompts[n] - 1
            positions.append(torch.arange(first, first + responses[n]))
            indices.append(torch.arange(offsets[n], offsets[n] + responses[n]))
        yield Pass(token_BS, torch.cat(positions), torch.cat(indices))


class FrozenModel:
    """A causal model that never learns. Its head is cut to the tokenizer's size: padded rows belong to no token.

    Two adapters on one base share the base: see :meth:`beside`.
    """

    def __init__(
        self, base: AdapterBase, adapter: Path | None, *, name: str, vocabulary: int, tokens_per_pass: int, context: int | None
    ) -> None:
        self.name = name
        self.tokens_per_pass = tokens_per_pass
        self._base = base
        self._context = context
        self._choose = _nothing if adapter is None else base.add(adapter)
        self._lm = base.lm
        self._device = next(base.lm.parameters()).device
        self.output = _head(base.lm, name, vocabulary)
        _check_logits(self)

    @classmethod
    def load(
        cls,
        folder: Path,
        *,
        dtype: str = "float32",
        device: str = "cpu",
        trust_remote_code: bool = False,
        adapter: Path | None = None,
        tokens_per_pass: int = 8192,
        plain: bool = False,
    ) -> FrozenModel:
        """Load a Hugging Face folder, with ``adapter`` a LoRA folder on top of it; weights come from safetensors files only.

        ``dtype``: float32 or bfloat16. ``plain``: refuse a head with a bias or a softcap. Raises ConfigError for a folder that
        holds no such model, an adapter that does not fit, or a head that this class cannot compute.
        """
        lm = _load(folder, dtype=dtype, trust_remote_code=trust_remote_code)
        refuse_head(str(folder), lm.config, plain=plain)
        if plain and getattr(lm.get_output_embeddings(), "bias", None) is not None:
            raise ConfigError(
                f"{folder}: the head has a bias, and distil.teacher.mode=hidden takes a plain head only",
                fix="use distil.teacher.mode=scalar, or another model",
            )
        lm.requires_grad_(False).eval().to(device)
        tokenizer = load_tokenizer(str(folder), "frozen model", trust_remote_code=trust_remote_code)
        return cls(
            AdapterBase(lm),
            adapter,
            name=str(adapter or folder),
            vocabulary=vocabulary_size(tokenizer),
            tokens_per_pass=tokens_per_pass,
            context=longest_context(folder),
        )

    def beside(self, adapter: Path) -> FrozenModel:
        """A second adapter on the same base in memory; each pass switches to the adapter of its model."""
        return FrozenModel(
            self._base,
            adapter,
            name=str(adapter),
            vocabulary=self.vocab,
            tokens_per_pass=self.tokens_per_pass,
            context=self._context,
        )

    @property
    def head(self) -> torch.Tensor:
        """weight_VH of the output head, model dtype, cut to the tokenizer's size."""
        return self.output.weight_VH

    @property
    def vocab(self) -> int:
        """Tokens of the tokenizer."""
        return self.head.shape[0]

    @property
    def parameters(self) -> int:
        """Of the whole model, every adapter on it included; tied ones count once."""
        return sum(parameter.numel() for parameter in self._lm.parameters())

    def hidden(self, token_T: torch.Tensor, start_N: torch.Tensor, prompt_length_N: torch.Tensor) -> torch.Tensor:
        """Final hidden states at the positions that predict the response tokens: (R, H), model dtype, on the model's device.

        token_T int64 (T), prompt + response of each sequence; start_N int64 (N+1), first 0, last T; prompt_length_N int64 (N),
        each 1 or more. Raises ValueError for lengths that disagree, BudgetRLError for a sequence longer than the model's context
        or a token that the tokenizer does not have.
        """
        return self._collect(token_T, start_N, prompt_length_N, lambda hidden_PH, _: hidden_PH)

    def logp(self, token_T: torch.Tensor, start_N: torch.Tensor, prompt_length_N: torch.Tensor) -> torch.Tensor:
        """Log-probs of the response tokens, float32 (R), nats, on the model's device; arguments and errors of :meth:`hidden`.

        """
        target_R = token_T[response_positions(start_N, prompt_length_N)]
        head = self.output

        def score(hidden_PH: torch.Tensor, index_P: torch.Tensor) -> torch.Tensor:
            target_P = target_R[index_P].to(self._device)
            return linear_logprob_entropy(hidden_PH, head.weight_VH, target_P, head_bias_V=head.bias_V, softcap=head.softcap)[0]

        return self._collect(token_T, start_N, prompt_length_N, score)

    def _collect(
        self,
        token_T: torch.Tensor,
        start_N: torch.Tensor,
        prompt_length_N: torch.Tensor,
        make: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    ) -> torch.Tensor:
        """What ``make`` makes of the hidden states of each pass, in the order of the response tokens."""
        check_tokens(token_T, self.vocab)
        nowhere = torch.zeros(0, dtype=torch.int64)
        # No rows of the right kind first: there may be no pass at all. A head's rows are as wide as hidden states.
        found, places = [make(self.head[:0], nowhere)], [nowhere]
        for part in plan_passes(token_T, start_N, prompt_length_N, self.tokens_per_pass):
            found.append(make(self.states(part), part.index_P))
            places.append(part.index_P)
        return in_order(found, places)

    def states(self, part: Pass) -> torch.Tensor:
        """Final hidden states of one pass: (P, H), model dtype, on the model's device.

        No attention mask and no cache: transformers 5.10 would take a mask or a cache as a reason to treat rows as packed.
        """
        width = part.token_BS.shape[1]
        if self._context is not None and width > self._context:
            raise BudgetRLError(
                f"a sequence of {width} tokens is longer than the {self._context} that {self.name} takes",
                fix="shorten prompts and responses, or use a model with a longer context",
            )
        self._choose()
        with torch.inference_mode():
            output = self._lm.base_model(input_ids=part.token_BS.to(self._device), use_cache=False)
            hidden_PH = output.last_hidden_state.flatten(0, 1)[part.position_P.to(self._device)]
        return hidden_PH.clone()  # outside of inference mode: a tensor like any other


def in_order(found: list[torch.Tensor], places: list[torch.Tensor]) -> torch.Tensor:
    """Rows that were found pass by pass, put at their places."""
    rows = torch.cat(found)
    result = torch.empty_like(rows)
    result[torch.cat(places).to(rows.device)] = rows
    return result


def check_tokens(token_T: torch.Tensor, vocabulary: int) -> None:
    """Raise BudgetRLError for a token id that no token of the tokenizer has."""
    outside_T = token_T[(token_T < 0) | (token_T >= vocabulary)]
    if outside_T.numel():
        raise BudgetRLError(
            f"a sequence holds token id {int(outside_T[0])}, and the tokenizer's ids end at {vocabulary - 1}: as a rule a row "
            "that only pads the model's head was sampled",
            fix="resize the model's embeddings to its tokenizer (resize_token_embeddings), so that nothing can sample such ids",
        )


def _nothing() -> None:
    """There is no adapter to switch to."""


def _load(folder: Path, *, dtype: str, trust_remote_code: bool) -> Any:
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM.from_pretrained(
            str(folder), dtype=getattr(torch, dtype), trust_remote_code=trust_remote_code, use_safetensors=True
        )
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(
            f"{folder} holds no causal language model that can be read: {error}",
            fix="name a folder with config.json and safetensors weights",
        ) from error


def _head(lm: Any, name: str, vocabulary: int) -> Head:
    embedding = lm.get_output_embeddings()
    if embedding is None:
        raise ConfigError(f"{name}: the model has no output embedding, so it predicts nothing", fix="use a causal LM")
    rows = embedding.weight.shape[0]
    if rows < vocabulary:
        raise ConfigError(
            f"{name}: the head has {rows} rows and the tokenizer {vocabulary} tokens",
            fix="resize the model's embeddings to its tokenizer, or use the tokenizer it was saved with",
        )
    bias = getattr(embedding, "bias", None)
    softcap = getattr(lm.config.get_text_config(), "final_logit_softcapping", None)
    return Head(embedding.weight.detach()[:vocabulary], None if bias is None else bias.detach()[:vocabulary], softcap)


def _check_logits(model: FrozenModel) -> None:
    """Raise ConfigError where the model's own logits are not what the head makes of its hidden states (an unknown scaling)."""
    ids = torch.arange(min(TRIAL_TOKENS, model.vocab))[None]
    found = model.output.logits(model.states(Pass(ids, torch.arange(ids.numel()), torch.arange(ids.numel()))))
    with torch.inference_mode():
        own = model._lm(input_ids=ids.to(model._device), use_cache=False).logits[0, :, : model.vocab].float()
    allowed = (2e-2 if model.head.dtype == torch.bfloat16 else 1e-3) * own.abs().max() + 1e-4
    if float((found - own).abs().max()) > float(allowed):
        raise ConfigError(
            f"{model.name}: the model's logits are not its output embedding times its hidden states; it changes one of them in a "
            "way that this project does not know",
            fix="use a model with a plain head",
        )
