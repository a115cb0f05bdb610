"""Our logits processors for vLLM: one class for both of its interfaces, thin over `rollout.slots.shape_rows_`.

Give vLLM the path: ``--logits-processors rollout.processor:ShapingProcessor``. Requests say what they want in flat keys
(`rollout/parameters.py`); those that say nothing are not touched. Each of vLLM's model runners builds the class with
arguments of its own (V1: device and pinned memory, V2: its request state), which is how the two are told apart.

vLLM's order makes the total ``(z + bias) / (factor * base)``: this comes first, hard thinking budgets after it win, and the
sampler divides by the request's own temperature last.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm.v1.sample.logits_processor import LogitsProcessor as LogitsProcessorV1
from vllm.v1.sample.logits_processor import MoveDirectionality
from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as LogitsProcessorV2

from rl.rollout_settings import REFLECTION_WORDS
from rollout.markers import END_THINK
from rollout.parameters import from_extra_args
from rollout.reflex import end_id, reflection_ids
from rollout.slots import SlotNumbers, shape_rows_

if TYPE_CHECKING:
    from vllm import SamplingParams
    from vllm.config import VllmConfig
    from vllm.v1.sample.logits_processor import BatchUpdate
    from vllm.v1.worker.gpu.sample.logits_processor import LogitsContext, LogitsProcRequestState

CONFIG_KEY = "budget_rl"
"""Of vLLM's additional_config: ``{"budget_rl": {"words": [...], "leading_space": false, "end": "</think>"}}``."""


class _Rows:
    """V1: a slot is a row of the batch; vLLM says which requests were removed, added and moved."""

    def __init__(self, slots: int, ids: torch.Tensor | None, end: int) -> None:
        self.numbers = SlotNumbers(slots, torch.device("cpu"))
        self.ids, self.end = ids, end
        self.outputs: dict[int, list[int]] = {}
        """Slot -> vLLM's own list of the tokens generated so far, for shaped requests."""
        self.closed = np.zeros(slots, dtype=bool)
        self.scanned = np.zeros(slots, dtype=np.int64)

    def update(self, change: BatchUpdate) -> None:
        for slot in change.removed:
            self._forget(slot)
        for slot, params, prompt, output in change.added:
            self._enter(slot, params, prompt, output)
        for one, other, direction in change.moved:
            if direction == MoveDirectionality.SWAP:
                self._swap(one, other)
            else:
                self._forget(other)
                self._swap(one, other)

    def _enter(self, slot: int, params: SamplingParams, prompt: list[int] | None, output: list[int]) -> None:
        self._forget(slot)
        shaping = from_extra_args(params.extra_args)
        if shaping.is_plain:
            return
        self.numbers.fill(slot, shaping)
        self.outputs[slot] = output
        if shaping.generated and prompt:
            self.closed[slot] = self.end in prompt[-shaping.generated :]

    def _forget(self, slot: int) -> None:
        self.outputs.pop(slot, None)
        self.numbers.clear(slot)
        self.closed[slot], self.scanned[slot] = False, 0

    def _swap(self, one: int, other: int) -> None:
        self.numbers.swap(one, other)
        first, second = self.outputs.pop(one, None), self.outputs.pop(other, None)
        if first is not None:
            self.outputs[other] = first
        if second is not None:
            self.outputs[one] = second
        pair, swapped = [one, other], [other, one]
        self.closed[pair], self.scanned[pair] = self.closed[swapped], self.scanned[swapped]

    def _is_closed(self, slot: int, output: list[int]) -> bool:
        """Whether `</think>` was generated; only tokens not looked at before are looked at."""
        position = int(self.scanned[slot])
        while position < len(output) and output[position] >= 0:  # -1 stands for a token that is not known yet
            if output[position] == self.end:
                self.closed[slot] = True
            position += 1
        self.scanned[slot] = position
        return bool(self.closed[slot])

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        rows = sorted(slot for slot in self.outputs if slot < logits.shape[0])
        if not rows:
            return logits
        numbers = self.numbers.host[rows]
        generated = numbers[:, -1].long() + torch.tensor([len(self.outputs[slot]) for slot in rows])
        closed = torch.tensor([self._is_closed(slot, self.outputs[slot]) for slot in rows])
        whole = len(rows) == logits.shape[0]
        index = None if whole else torch.tensor(rows, device=logits.device)
        part = logits if index is None else logits[index]
        shape_rows_(
            part,
            numbers.to(logits.device),
            generated.to(logits.device),
            closed.to(logits.device),
            bias_ids=self.ids,
            reflexive=bool(self.numbers.reflexive[rows].any()),
            adaptive=bool(self.numbers.adaptive[rows].any()),
        )
        if index is not None:
            logits[index] = part
        return logits


class _Slots:
    """V2: a slot is a request; a row is a token to verify, several per request under speculative decoding.

    All that changes with tokens stays on the device: reading it here would make the host wait at every step.
    """

    def __init__(self, state: LogitsProcRequestState, ids: torch.Tensor | None, end: int, *, drafts: int) -> None:
        self.state, self.ids, self.end = state, ids, end
        self.numbers = SlotNumbers(state.max_num_reqs, state.device)
        self.closed = torch.zeros(state.max_num_reqs, dtype=torch.bool, device=state.device)
        self.recent = torch.arange(1, drafts + 2, device=state.device)
        """How far back a step may have committed tokens: each draft, and one more."""
        self.entered: list[int] = []

    def enter(self, slot: int, params: SamplingParams) -> bool:
        shaping = from_extra_args(params.extra_args)
        self.numbers.fill(slot, shaping)
        self.entered.append(slot)
        return not shaping.is_plain

    def flush(self) -> None:
        """Bring the requests that entered to the device, and look for `</think>` in what they had generated before."""
        if not self.entered:
            return
        slots = sorted(set(self.entered))
        self.entered.clear()
        state, device = self.state, self.state.device
        index = _sent(torch.tensor(slots), device)
        numbers = _sent(self.numbers.host[slots], device)
        self.numbers.device_copy[index] = numbers
        tokens = state.all_token_ids.gpu[index]
        place = torch.arange(tokens.shape[1], device=device)[None, :]
        begin = state.prompt_len.gpu[index].long() - numbers[:, -1].long()
        inside = (place >= begin[:, None]) & (place < state.prefill_len.gpu[index].long()[:, None])
        self.closed[index] = ((tokens == self.end) & inside).any(dim=1)

    def apply(self, logits: torch.Tensor, context: LogitsContext) -> torch.Tensor:
        present = context.idx_mapping_np
        if not self.numbers.shaped[present].any():
            return logits
        self._close_finished(context.idx_mapping.long())
        slots = context.expanded_idx_mapping.long()
        numbers = self.numbers.device_copy[slots]
        generated = context.pos.long() + 1 - self.state.prompt_len.gpu[slots].long() + numbers[:, -1].long()
        return shape_rows_(
            logits,
            numbers,
            generated,
            self.closed[slots] | self._closed_by_drafts(context),
            bias_ids=self.ids,
            reflexive=bool(self.numbers.reflexive[present].any()),
            adaptive=bool(self.numbers.adaptive[present].any()),
        )

    def _close_finished(self, slots: torch.Tensor) -> None:
        """Remember which requests committed `</think>` in the last step; doing it twice in a step changes nothing."""
        place = self.state.total_len.gpu[slots].long()[:, None] - self.recent[None, :]
        inside = place >= self.state.prompt_len.gpu[slots].long()[:, None]
        tokens = self.state.all_token_ids.gpu[slots[:, None], place.clamp(min=0)]
        self.closed[slots] |= ((tokens == self.end) & inside).any(dim=1)

    def _closed_by_drafts(self, context: LogitsContext) -> torch.Tensor:
        """Whether a draft token before a row, in the same request and step, is `</think>`: not committed, so not remembered."""
        local = context.expanded_local_pos.long()
        # At local position 0 stands the last committed token, from there on the drafts.
        seen = ((context.input_ids == self.end) & (local > 0)).long().cumsum(dim=0)
        first = torch.arange(local.numel(), device=local.device) - local
        return seen - seen[first.clamp(min=0)] > 0


def _sent(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor on the device; from pinned memory, so that the host does not wait for a GPU."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


class TemperatureProcessor(LogitsProcessorV1, LogitsProcessorV2):
    """Temperature by entropy (HAPO) alone; for models whose vocabulary lacks the reflection words."""

    allows_reflex = False

    def __init__(self, vllm_config: VllmConfig, *arguments: Any) -> None:
        state = arguments[0] if len(arguments) == 1 else None
        device = torch.device(arguments[0]) if state is None else state.device
        ids, end = self._vocabulary(vllm_config, device)
        self._rows: Any = None
        self._slots: Any = None
        if state is None:
            self._rows = _Rows(vllm_config.scheduler_config.max_num_seqs, ids, end)
        else:
            speculative = vllm_config.speculative_config
            drafts = 0 if speculative is None else int(speculative.num_speculative_tokens or 0)
            self._slots = _Slots(state, ids, end, drafts=drafts)

    def _vocabulary(self, vllm_config: VllmConfig, device: torch.device) -> tuple[torch.Tensor | None, int]:
        return None, -1

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Raise ValueError, over HTTP status 400, for a wrong key, type or range, and for what this processor cannot do."""
        shaping = from_extra_args(sampling_params.extra_args)
        if shaping.reflex is not None and not cls.allows_reflex:
            raise ValueError(
                "reflex_* needs the server's --logits-processors rollout.processor:ShapingProcessor; this one shapes the "
                "temperature only"
            )

    def is_argmax_invariant(self) -> bool:
        """False: a bias changes which token is most likely."""
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """V1: follow the batch."""
        if batch_update is not None:
            self._rows.update(batch_update)

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        """V2: a request enters a slot, which may hold another's numbers; returns whether it is shaped."""
        return self._slots.enter(req_idx, sampling_params)

    def apply_staged_writes(self) -> None:
        """V2: once a step, before the model runs."""
        self._slots.flush()

    def apply(self, logits: torch.Tensor, ctx: LogitsContext | None = None) -> torch.Tensor:
        """Shape the rows of shaped requests in place."""
        return self._rows.apply(logits) if ctx is None else self._slots.apply(logits, ctx)


class ShapingProcessor(TemperatureProcessor):
    """Temperature by entropy and a bias on reflection words; the words are found when the engine starts."""

    allows_reflex = True

    def _vocabulary(self, vllm_config: VllmConfig, device: torch.device) -> tuple[torch.Tensor | None, int]:
        from transformers import AutoTokenizer

        model = vllm_config.model_config
        tokenizer = AutoTokenizer.from_pretrained(
            model.tokenizer, revision=model.tokenizer_revision, trust_remote_code=model.trust_remote_code
        )
        additional = vllm_config.additional_config
        chosen = additional.get(CONFIG_KEY, {}) if isinstance(additional, dict) else {}
        unknown = set(chosen) - {"words", "leading_space", "end"}
        if unknown:
            raise ValueError(
                f"additional_config.{CONFIG_KEY} has unknown keys {sorted(unknown)}; it takes words, leading_space, end"
            )
        words, spaced = chosen.get("words", REFLECTION_WORDS), bool(chosen.get("leading_space", False))
        ids = reflection_ids(tokenizer, words, leading_space=spaced)
        return torch.tensor(ids, device=device), end_id(tokenizer, chosen.get("end", END_THINK))
