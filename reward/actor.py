"""The reward worker: rollouts in, scored rollouts out. A plain class; the driver makes it a Ray actor."""

from __future__ import annotations

import json
from collections.abc import Sequence

from reward.pool import GraderPool, GradeTask
from reward.scoring import rewards
from reward.verdicts import answer_or_verdict
from rl.settings import DataSettings, RewardSettings
from rl.types import Rollout, Scored, Verdict

REASONING_GYM = "reasoning_gym:"


def chosen_grader(data: DataSettings) -> str:
    """The grader that ``data.grader`` means; ``auto`` is the task's own scorer for reasoning-gym, math for everything else."""
    if data.grader != "auto":
        return data.grader
    return "reasoning_gym" if data.source.startswith(REASONING_GYM) else "math"


def grader_options(data: DataSettings) -> str:
    """JSON of what the grader needs beside the row: the reasoning-gym task and its parameters."""
    if not data.source.startswith(REASONING_GYM):
        return "{}"
    return json.dumps({"task": data.source.removeprefix(REASONING_GYM), "params": data.task})


class RewardActor:
    """Grades rollouts in killable child processes and turns verdicts into rewards.

    ``max_length``: L_max in tokens. ``special_tokens``: texts of the tokenizer's special tokens, which are no part of an answer.
    """

    def __init__(self, settings: RewardSettings, data: DataSettings, max_length: int, special_tokens: tuple[str, ...]) -> None:
        self._settings = settings
        self._extract = data.extract
        self._max_length = max_length
        self._special_tokens = special_tokens
        self._grader = chosen_grader(data)
        self._options = grader_options(data)
        self._pool = GraderPool(settings.processes, settings.grade_deadline_s, preload=(self._grader,))

    def ready(self) -> list[int]:
        """Wait (at most the children's start deadline) until all can grade; returns their process ids."""
        self._pool.wait_ready()
        return self._pool.pids

    def score(self, rollouts: Sequence[Rollout]) -> list[Scored]:
        """Every rollout with its verdict and reward, in order; the reward is None where the verdict carries no score."""
        verdicts = self._verdicts(rollouts)
        totals = rewards(
            verdicts,
            [rollout.lease.budget for rollout in rollouts],
            [rollout.length for rollout in rollouts],
            settings=self._settings,
            max_length=self._max_length,
        )
        return [Scored(r, v, reward) for r, v, reward in zip(rollouts, verdicts, totals, strict=True)]

    def close(self) -> None:
        """End the grader children."""
        self._pool.close()

    def _verdicts(self, rollouts: Sequence[Rollout]) -> list[Verdict]:
        found = [answer_or_verdict(r, extract=self._extract, special_tokens=self._special_tokens) for r in rollouts]
        tasks = [self._task(r, answer) for r, answer in zip(rollouts, found, strict=True) if isinstance(answer, str)]
        graded = iter(self._pool.grade(tasks))
        return [next(graded) if isinstance(answer, str) else answer for answer in found]

    def _task(self, rollout: Rollout, answer: str) -> GradeTask:
        prompt = rollout.lease.prompt
        return GradeTask(self._grader, answer, prompt.answer, entry=prompt.entry, options=self._options)
