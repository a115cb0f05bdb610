"""The driver's side of frozen models: who is asked about which rollouts, and what comes back beside the batch."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from rl.batch import select_rollouts
from rl.cluster import Workforce
from rl.guidance import Guidance, TeacherAnswer, TeacherRequest
from rl.learner_worker import to_data_proto
from rl.settings import Settings
from rl.types import TrainBatch
from rl.waiting import StopFlag, wait_for

PORTION_TOKENS = 200_000
"""Tokens whose log-probs are asked of the learner at once: a few megabytes of columns, and a wait that a deadline fits."""


def shared_by_tokens(lengths: Sequence[int], shares: int) -> list[list[int]]:
    """Indices dealt to ``shares`` workers, longest first, each to the one with the fewest tokens; empty shares are left out."""
    load = [0] * shares
    parts: list[list[int]] = [[] for _ in range(shares)]
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        least = load.index(min(load))
        parts[least].append(i)
        load[least] += lengths[i]
    return [sorted(part) for part in parts if part]


def response_places(batch: TrainBatch, index: Sequence[int]) -> torch.Tensor:
    """Where the response tokens of the given rollouts stand in the batch, rollout after rollout; int64 (R)."""
    starts, ends = batch.start_N[:-1].tolist(), batch.start_N[1:].tolist()
    parts = [torch.arange(starts[i] + int(batch.prompt_length_N[i]), ends[i]) for i in index]
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64)


def request_of(batch: TrainBatch, index: Sequence[int], id_TK: torch.Tensor | None = None) -> TeacherRequest:
    """The given rollouts as a request; ``id_TK`` (T, K): ids of the whole batch that the student asks about."""
    part = select_rollouts(replace(batch, guidance=Guidance()), index)
    ids = None if id_TK is None else id_TK[response_places(batch, index)]
    return TeacherRequest(part.token_T, part.start_N, part.prompt_length_N, ids)


def spread(values: Sequence[torch.Tensor], places: Sequence[torch.Tensor], tokens: int) -> torch.Tensor:
    """Rows of several workers put at their places among ``tokens`` rows; 0 elsewhere."""
    result = torch.zeros((tokens, *values[0].shape[1:]), dtype=values[0].dtype)
    for value, place_R in zip(values, places, strict=True):
        result[place_R] = value
    return result


@dataclass
class FrozenModels:
    """The teachers and the frozen start policy of a run, as far as it has them."""

    settings: Settings
    learners: Any
    teachers: list[Any]
    scorers: list[Any]
    vocabulary: int = 0
    """Ids of the tokenizer, which teacher and student are compared on."""
    stop: StopFlag | None = None

    @classmethod
    def of(cls, settings: Settings, workforce: Workforce, stop: StopFlag) -> FrozenModels:
        """Those that a started workforce holds."""
        return cls(settings, workforce.learners, workforce.teachers, workforce.frozen, workforce.vocabulary, stop)

    def teach(self, batch: TrainBatch, candidate_N: torch.Tensor) -> tuple[TrainBatch, dict[str, float]]:
        """The batch with what the teacher says of the response tokens of the candidates (bool, N), and figures of the traffic."""
        distil = self.settings.distil
        assert distil is not None
        started = time.monotonic()
        index = candidate_N.nonzero().squeeze(1).tolist()
        if not index:
            return replace(batch, guidance=self._nobody(batch)), {"distil/rollouts": 0.0}
        if distil.sstoken is not None:
            batch = replace(batch, guidance=replace(batch.guidance, reference_T=self.start_policy_logp(batch)))
        ids_TK = None
        if distil.teacher.mode == "topk" and distil.teacher.student_k:
            ids_TK = self._asked_of_learners("top_ids", batch, k=distil.teacher.student_k, vocabulary=self.vocabulary)
        lengths = batch.start_N.diff().tolist()
        shares = shared_by_tokens([lengths[i] for i in index], len(self.teachers))
        parts = [[index[j] for j in share] for share in shares]
        requests = [request_of(batch, part, ids_TK) for part in parts]
        refs = [teacher.score.remote(request) for teacher, request in zip(self.teachers, requests, strict=False)]
        answers: list[TeacherAnswer] = wait_for(
            refs, seconds=distil.teacher.deadline_s, what=f"teachers score {len(index)} rollouts", stop=self.stop
        )
        guidance = self._guidance(batch, parts, answers)
        return replace(batch, guidance=guidance), self._figures(batch, parts, answers, time.monotonic() - started)

    def _guidance(self, batch: TrainBatch, parts: list[list[int]], answers: list[TeacherAnswer]) -> Guidance:
        places = [response_places(batch, part) for part in parts]
        weight_T = torch.zeros(batch.tokens)
        weight_T[torch.cat(places)] = 1.0
        columns = {
            "teacher_logp_T": "teacher_logp_R",
            "alpha_T": "alpha_R",
            "id_TK": "id_RK",
            "teacher_logp_TK": "teacher_logp_RK",
            "tail_T": "tail_R",
            "dpo_hidden_TH": "dpo_hidden_RH",
            "reverse_hidden_TH": "reverse_hidden_RH",
        }
        found: dict[str, torch.Tensor] = {}
        for column, field in columns.items():
            values = [getattr(answer, field) for answer in answers]
            if values[0] is not None:
                found[column] = spread(values, places, batch.tokens)
        if "id_TK" in found:  # torch gathers by int64; the wire has half of that
            ids = found["id_TK"].long()
            unasked_T = weight_T == 0
            ids[unasked_T] = torch.arange(ids.shape[1])  # rows nobody asked about hold distinct ids too
            found["id_TK"] = ids
        return replace(batch.guidance, weight_T=weight_T, **found)

    def _nobody(self, batch: TrainBatch) -> Guidance:
        """Guidance of a batch without any candidate: weights 0 and nothing to compare with."""
        zeros_T = torch.zeros(batch.tokens)
        return replace(batch.guidance, weight_T=zeros_T, teacher_logp_T=zeros_T, alpha_T=torch.ones(batch.tokens))

    def _figures(
        self, batch: TrainBatch, parts: list[list[int]], answers: list[TeacherAnswer], seconds: float
    ) -> dict[str, float]:
        distil = self.settings.distil
        assert distil is not None
        places = [response_places(batch, part) for part in parts]
        tokens = sum(place_R.numel() for place_R in places)
        sent = sum(answer.bytes for answer in answers)
        figures = {
            "distil/rollouts": float(sum(len(part) for part in parts)),
            "distil/traffic_bytes": float(sent),
            "distil/traffic_bytes_per_token": sent / max(tokens, 1),
            "time/teach": seconds,
        }
        known = [(a.dpo_logp_R, a.reverse_logp_R) for a in answers]
        gains = [distil.scale * (dpo_R - reverse_R) for dpo_R, reverse_R in known if dpo_R is not None and reverse_R is not None]
        if gains:
            gain_R = torch.cat(gains)
            figures["distil/contrastive_reward"] = float(gain_R.sum()) / max(figures["distil/rollouts"], 1.0)
            figures["distil/contrastive_reward_per_token"] = float(gain_R.mean())
        return figures

    def start_policy_logp(self, batch: TrainBatch) -> torch.Tensor:
        """Log-prob (float32, nats) of every response token of the batch under the frozen start policy, 0 elsewhere; (T)."""
        lengths = batch.start_N.diff().tolist()
        parts = shared_by_tokens(lengths, len(self.scorers))
        refs = [
            scorer.score.remote(request_of(batch, part)) for scorer, part in zip(self.scorers, parts, strict=False)
        ]
        seconds = self.settings.scorer.deadline_s
        values = wait_for(refs, seconds=seconds, what=f"the start policy scores {batch.rollouts} answers", stop=self.stop)
        return spread(values, [response_places(batch, part) for part in parts], batch.tokens)

    def learner_logp(self, batch: TrainBatch) -> torch.Tensor:
        """Log-prob (float32, nats) of every response token under the learner's present weights, 0 elsewhere; (T)."""
        return self._asked_of_learners("score", batch)

    def _asked_of_learners(self, method: str, batch: TrainBatch, **arguments: Any) -> torch.Tensor:
        """One row per token of the batch from the learner ranks, a portion of rollouts at a time."""
        lengths = batch.start_N.diff().tolist()
        starts = batch.start_N.tolist()
        result: torch.Tensor | None = None
        for index in _portions(batch):
            # Numbered by their place in this batch, which may itself be a part of another (the chosen answers of pairs).
            part = replace(select_rollouts(batch, index), guidance=Guidance(), index_N=torch.tensor(index))
            data = to_data_proto(part, self.settings.learner.ranks)
            data.meta_info[method] = arguments
            refs = getattr(self.learners, method)(data)
            what = f"learner ranks score {len(index)} sequences"
            for rows, owner_N in wait_for(refs, seconds=self.settings.learner.deadline_s, what=what, stop=self.stop):
                if result is None:
                    result = torch.zeros((batch.tokens, *rows.shape[1:]), dtype=rows.dtype)
                offset = 0
                for owner in owner_N.tolist():
                    result[starts[owner] : starts[owner] + lengths[owner]] = rows[offset : offset + lengths[owner]]
                    offset += lengths[owner]
        assert result is not None
        return result


def _portions(batch: TrainBatch) -> list[list[int]]:
    """Rollouts in order, cut where a portion is full; both sides of a pair lie next to each other and stay so."""
    portions: list[list[int]] = [[]]
    tokens = 0
    for i, length in enumerate(batch.start_N.diff().tolist()):
        whole = batch.pair_N is None or i == 0 or int(batch.pair_N[i]) != int(batch.pair_N[i - 1])
        if portions[-1] and whole and tokens + length > PORTION_TOKENS:
            portions.append([])
            tokens = 0
        portions[-1].append(i)
        tokens += length
    return portions
