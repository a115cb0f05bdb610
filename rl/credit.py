"""T-REG's token rewards of answers, from the frozen start policy's workers."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from reward.treg import reshape_advantage
from rl.contrast import ContrastEncoder, SignTest, check_sign, corrupt, number_ids, sign_test
from rl.guidance import Pair, TeacherRequest
from rl.guiding import response_places, shared_by_tokens, spread
from rl.pair_columns import Both
from rl.settings import Settings
from rl.types import Rollout, TrainBatch
from rl.waiting import StopFlag, wait_for

TESTED = 64
"""Most answers that the self-test corrupts."""


@dataclass
class Credits:
    """Asks the frozen start policy for log-probs of answers behind the two prompts of T-REG."""

    settings: Settings
    encoder: ContrastEncoder
    tokenizer: Any
    scorers: list[Any]
    stop: StopFlag | None = None

    def of_answers(
        self, questions: Sequence[str], answers: Sequence[Sequence[int]], prefill_N: Sequence[int]
    ) -> tuple[list[torch.Tensor | None], int]:
        """Token rewards (float32) of each answer, None for one without room in the model's context; and how many those were."""
        asked = self.encoder.requests(questions, answers, prefill_N=prefill_N)
        if not bool(asked.kept_N.any()):
            return [None] * len(answers), asked.too_long
        better_R, worse_R = (self._logp(request) for request in (asked.better, asked.worse))
        return asked.credits(better_R, worse_R), asked.too_long

    def reshaped(self, batch: TrainBatch, rollouts: Sequence[Rollout], *, weight: float) -> tuple[TrainBatch, dict[str, float]]:
        """The batch with ``A + weight |A| r`` for every A that is not 0, and figures; flat groups are not even scored."""
        started = time.monotonic()
        moves_N = _any_by_rollout(batch.advantage_T != 0, batch)
        index = moves_N.nonzero().squeeze(1).tolist()
        chosen = [rollouts[i] for i in index]
        credits, too_long = self.of_answers(
            [r.lease.prompt.question for r in chosen], [r.response_ids for r in chosen], [r.prefill_length for r in chosen]
        )
        credit_T = torch.zeros(batch.tokens)
        for i, credit in zip(index, credits, strict=True):
            if credit is not None:
                credit_T[response_places(batch, [i])] = credit
        used_T = credit_T[batch.loss_mask_T & (batch.advantage_T != 0)]
        figures = {
            "treg/credit_mean": float(used_T.mean()) if used_T.numel() else 0.0,
            "treg/credit_size": float(used_T.abs().mean()) if used_T.numel() else 0.0,
            "treg/rollouts": float(len(index) - too_long),
            "treg/too_long": float(too_long),
            "time/credit": time.monotonic() - started,
        }
        return replace(batch, advantage_T=reshape_advantage(batch.advantage_T, credit_T, weight=weight)), figures

    def of_pairs(self, pairs: Sequence[Pair], *, say: Callable[[str], None]) -> dict[str, Both]:
        """Token rewards of both answers of every pair; 0 for an answer without room in the model's context, said once."""
        questions = [pair.question for pair in pairs for _ in range(2)]
        answers = [ids for pair in pairs for ids in (pair.chosen_ids, pair.rejected_ids)]
        credits, too_long = self.of_answers(questions, answers, [0] * len(answers))
        if too_long:
            say(f"T-REG: {too_long} of {len(answers)} answers are too long to be scored behind its prompts and get no reward")
        filled = [torch.zeros(len(ids)) if c is None else c for c, ids in zip(credits, answers, strict=True)]
        return {pair.id: (filled[2 * i], filled[2 * i + 1]) for i, pair in enumerate(pairs)}

    def self_test(
        self, questions: Sequence[str], answers: Sequence[Sequence[int]], prefill_N: Sequence[int], *, section: str
    ) -> SignTest:
        """Corrupt some answers and compare the rewards of what was replaced with those of what replaced it.

        Raises BudgetRLError where the right token does not earn more often than chance allows.
        """
        count = min(len(answers), TESTED)
        questions, answers, prefill_N = questions[:count], answers[:count], prefill_N[:count]
        numbers, fixed = number_ids(self.tokenizer, answers), self.encoder.special_ids
        corrupted = corrupt(answers, number_ids=numbers, fixed_ids=fixed, prefill_N=prefill_N, seed=self.settings.seed)
        before, _ = self.of_answers(questions, answers, prefill_N)
        after, _ = self.of_answers(questions, [c.ids for c in corrupted], prefill_N)
        found = sign_test(before, after, [c.places for c in corrupted])
        check_sign(found, section=section)
        return found

    def _logp(self, request: TeacherRequest) -> torch.Tensor:
        """Log-probs of the response tokens of a request, shared out over the workers; float32 (R)."""
        lengths = request.start_N.diff()
        parts = shared_by_tokens(lengths.tolist(), len(self.scorers))
        refs = [scorer.score.remote(_part_of(request, part)) for scorer, part in zip(self.scorers, parts, strict=False)]
        what = f"the frozen start policy scores {lengths.numel()} answers"
        values = wait_for(refs, seconds=self.settings.scorer.deadline_s, what=what, stop=self.stop)
        count_N = lengths - request.prompt_length_N
        first_N = count_N.cumsum(0) - count_N
        places = [torch.cat([torch.arange(int(first_N[i]), int(first_N[i] + count_N[i])) for i in part]) for part in parts]
        return spread(values, places, int(count_N.sum()))


def _part_of(request: TeacherRequest, index: Sequence[int]) -> TeacherRequest:
    """Some of the sequences of a request."""
    starts = request.start_N.tolist()
    lengths = request.start_N.diff()[list(index)]
    return TeacherRequest(
        token_T=torch.cat([request.token_T[starts[i] : starts[i + 1]] for i in index]),
        start_N=torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]),
        prompt_length_N=request.prompt_length_N[list(index)],
    )


def _any_by_rollout(marked_T: torch.Tensor, batch: TrainBatch) -> torch.Tensor:
    """Whether any token of each rollout is marked; bool (N)."""
    owner_T = torch.repeat_interleave(torch.arange(batch.rollouts), batch.start_N.diff())
    return torch.zeros(batch.rollouts).index_add_(0, owner_T, marked_T.float()) > 0
