"""A batch of requests as vLLM's two model runners see it: V1 rows that move, V2 slots that are recycled, draft rows included."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import BatchUpdate, MoveDirectionality
from vllm.v1.worker.gpu.sample.logits_processor import LogitsContext, LogitsProcRequestState

from rl.behaviour import Vocabulary
from rl.embedded import tiny_tokenizer
from rl.types import AdaptiveTemperature, EntropyStatistics, Reflex, Shaping
from rollout.parameters import to_extra_args
from rollout.processor import ShapingProcessor
from rollout.reflex import end_id, reflection_ids, triangular_wave
from rollout.temperature import adaptive_temperature

SLOTS, LENGTH, DRAFTS = 6, 48, 2
STATISTICS = EntropyStatistics(pivot=0.4, spread=1.5, high=1.2, low=-2.5, deviation=1.1, tokens=100)


def stand_in_config(folder: Path, *, drafts: int = 0) -> Any:
    """The few fields of vLLM's configuration that a processor reads."""
    return SimpleNamespace(
        model_config=SimpleNamespace(tokenizer=str(folder), tokenizer_revision=None, trust_remote_code=False),
        scheduler_config=SimpleNamespace(max_num_seqs=SLOTS),
        speculative_config=SimpleNamespace(num_speculative_tokens=drafts) if drafts else None,
        additional_config={},
    )


def tiny_vocabulary() -> Vocabulary:
    tokenizer = tiny_tokenizer()
    return Vocabulary(reflection_ids(tokenizer, ("wait", "Wait", "but", "But", "Alternatively")), end_id(tokenizer))


@dataclass
class Request:
    """One request: what it asked for and every token it has."""

    shaping: Shaping
    prompt: list[int]
    output: list[int] = field(default_factory=list)
    resumed: int = 0
    """Tokens at the end of the prompt that were generated earlier."""

    @property
    def params(self) -> SamplingParams:
        arguments = to_extra_args(self.shaping) or {}
        if self.resumed:
            arguments["reflex_generated"] = self.resumed
        return SamplingParams(extra_args=arguments or None)

    def expected(self, raw: torch.Tensor, vocabulary: Vocabulary, drafts: list[int]) -> torch.Tensor:
        """The row to sample from after the drafts, by the rules themselves and this request's own tokens."""
        earlier = self.prompt[len(self.prompt) - self.resumed :] if self.resumed else []
        generated = [*earlier, *self.output, *drafts]
        row = raw.clone()
        reflex = self.shaping.reflex
        if reflex is not None and vocabulary.end not in generated and reflex.first <= len(generated) < (reflex.last or 10**9):
            if reflex.schedule == "wave":
                bias = triangular_wave(
                    len(generated), amplitude=reflex.amplitude, period=reflex.period, shift=reflex.shift
                )
            else:
                bias = reflex.amplitude
            row[list(vocabulary.words)] += bias
        if self.shaping.adaptive is not None:
            logp = torch.log_softmax(raw, -1)
            entropy = -(logp.exp() * logp).sum()
            row /= adaptive_temperature(entropy, self.shaping.adaptive.statistics, tau=self.shaping.adaptive.tau)
        return row


def random_request(random: Random, vocabulary: Vocabulary, tokens: int) -> Request:
    """Plain or shaped in any way; its prompt may hold `</think>`, which must not count."""
    kind = random.randrange(5)
    adaptive = AdaptiveTemperature(STATISTICS, tau=random.choice((0.05, 0.3))) if kind in (1, 3) else None
    reflex = None
    if kind in (2, 3):
        reflex = Reflex(amplitude=random.choice((1.0, 5.0)), period=random.choice((3.0, 7.5, 20.0)), first=random.choice((0, 2)))
    elif kind == 4:
        reflex = Reflex("constant", amplitude=-3.0, last=random.choice((None, 4)))
    prompt = [random.randrange(tokens) for _ in range(random.randrange(2, 8))]
    if random.random() < 0.3:
        prompt[0] = vocabulary.end
    resumed = random.choice((0, 0, 2)) if reflex is not None else 0
    return Request(Shaping(1.0, adaptive, reflex), prompt, resumed=resumed)


class RowsOfV1:
    """vLLM's persistent batch: requests leave, enter the holes, and are moved together; the processor hears of it once a step."""

    def __init__(self, processor: ShapingProcessor) -> None:
        self.processor = processor
        self.rows: list[Request] = []
        self.removed: list[int] = []
        self.holes: list[int] = []

    def leave(self, request: Request) -> None:
        self.holes.append(next(i for i, r in enumerate(self.rows) if r is request))

    def step(self, entering: list[Request], random: Random) -> None:
        """Apply what left and what enters, close the holes, maybe swap two rows."""
        removed, added, moved = sorted(self.holes, reverse=True), [], []
        rows: list[Request | None] = [None if i in self.holes else r for i, r in enumerate(self.rows)]
        for request in entering:
            if None in rows:
                place = rows.index(None)
                rows[place] = request
                removed = [i for i in removed if i != place]  # taken over: only the addition is told
            else:
                place = len(rows)
                rows.append(request)
            added.append((place, request.params, request.prompt, request.output))
        while None in rows:
            last = rows.pop()
            if last is None:
                continue
            hole = rows.index(None)
            moved.append((len(rows), hole, MoveDirectionality.UNIDIRECTIONAL))
            rows[hole] = last
        kept: list[Request] = [r for r in rows if r is not None]
        if len(kept) > 1 and random.random() < 0.5:
            one, other = random.sample(range(len(kept)), 2)
            kept[one], kept[other] = kept[other], kept[one]
            moved.append((one, other, MoveDirectionality.SWAP))
        changed = bool(removed or added or moved)
        self.rows, self.holes = kept, []
        self.processor.update_state(BatchUpdate(len(kept), removed, added, moved) if changed else None)


class SlotsOfV2:
    """vLLM's request state on the device, with tensors of this machine."""

    def __init__(self, folder: Path) -> None:
        def tensor(*shape: int) -> Any:
            return SimpleNamespace(gpu=torch.zeros(shape, dtype=torch.int32))

        self.state = LogitsProcRequestState(
            device=torch.device("cpu"), max_num_reqs=SLOTS, vocab_size=0, all_token_ids=tensor(SLOTS, LENGTH),
            prompt_len=tensor(SLOTS), prefill_len=tensor(SLOTS), total_len=tensor(SLOTS),
        )  # fmt: skip
        self.processor = ShapingProcessor(stand_in_config(folder, drafts=DRAFTS), self.state)
        self.slots: dict[int, Request] = {}

    def enter(self, request: Request, random: Random) -> None:
        slot = random.choice([s for s in range(SLOTS) if s not in self.slots])
        self.slots[slot] = request
        everything = [*request.prompt, *request.output]
        # What stood there before stays behind the new request's tokens, as on the device.
        self.state.all_token_ids.gpu[slot, : len(everything)] = torch.tensor(everything, dtype=torch.int32)
        self.state.prompt_len.gpu[slot] = len(request.prompt)
        self.state.prefill_len.gpu[slot] = self.state.total_len.gpu[slot] = len(everything)
        self.processor.add_request(slot, request.params)

    def leave(self, request: Request) -> None:
        del self.slots[self.slot_of(request)]

    def slot_of(self, request: Request) -> int:
        return next(slot for slot, r in self.slots.items() if r is request)

    def commit(self, request: Request, tokens: list[int]) -> None:
        """What the sampler accepted, written where the next step reads it."""
        slot = self.slot_of(request)
        begin = int(self.state.total_len.gpu[slot])
        self.state.all_token_ids.gpu[slot, begin : begin + len(tokens)] = torch.tensor(tokens, dtype=torch.int32)
        self.state.total_len.gpu[slot] = begin + len(tokens)

    def context(self, requests: list[Request], drafts: dict[int, list[int]]) -> LogitsContext:
        """The step's layout: for each request one row, and one more per draft token."""
        slots, local, ids, places = [], [], [], []
        for request in requests:
            slot = self.slot_of(request)
            everything = [*request.prompt, *request.output]
            for k, token in enumerate([everything[-1], *drafts[id(request)]]):
                slots.append(slot)
                local.append(k)
                ids.append(token)
                places.append(len(everything) - 1 + k)
        present = np.array([self.slot_of(r) for r in requests], dtype=np.int32)
        return LogitsContext(
            expanded_idx_mapping=torch.tensor(slots, dtype=torch.int32),
            idx_mapping=torch.from_numpy(present),
            idx_mapping_np=present,
            expanded_local_pos=torch.tensor(local, dtype=torch.int32),
            input_ids=torch.tensor(ids, dtype=torch.int32),
            pos=torch.tensor(places, dtype=torch.int64),
            seq_lens_upper_bound_np=np.zeros(len(requests), dtype=np.int32),
        )
