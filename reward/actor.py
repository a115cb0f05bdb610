"""The reward worker: rollouts in, verdicts and the values of reward functions out; the driver makes it a Ray actor."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence

from reward.function_pool import FunctionPool, function_request
from reward.function_verdicts import decided
from reward.pool import GraderPool, GradeTask
from reward.verdicts import answer_or_verdict, truncated
from rl.leases import MEASURING_FROM
from rl.settings import DataSettings, RewardSettings
from rl.types import FunctionScore, Rollout, Scored, Verdict

log = logging.getLogger("budget_rl")

REASONING_GYM = "reasoning_gym:"
BY_FUNCTION = "function"
"""data.grader under which the first of reward.functions decides."""


def chosen_grader(data: DataSettings) -> str:
    """The grader that ``data.grader`` means; ``auto`` is the task's own scorer for reasoning-gym, math for everything else."""
    if data.grader != "auto":
        return data.grader
    return "reasoning_gym" if data.source.startswith(REASONING_GYM) else "math"


def grader_options(data: DataSettings) -> str:
    """JSON of what the grader needs beside the row: its options, and of a reasoning-gym source the task and its parameters."""
    gym = data.source.startswith(REASONING_GYM)
    task = {"task": data.source.removeprefix(REASONING_GYM), "params": data.task} if gym else {}
    return json.dumps(data.grader_options | task)


class RewardActor:
    """Grades rollouts in killable child processes, in whatever portions they arrive.

    ``special_tokens``: texts of the tokenizer's special tokens, which are no part of an answer. ``chat``: whether prompts were
    made by a chat template. Raises RewardFunctionError where a reward function cannot be run.
    """

    def __init__(
        self, settings: RewardSettings, data: DataSettings, special_tokens: tuple[str, ...], *, chat: bool = False
    ) -> None:
        self._settings = settings
        self._extract = data.extract
        self._special_tokens = special_tokens
        self._template = "{question}" if data.template == "auto" else data.template
        self._grader = chosen_grader(data)
        self._options = grader_options(data)
        self._functions = FunctionPool(
            settings.functions,
            settings.function_deadline_s,
            data_source=data.source,
            chat=chat,
            system_prompt=data.system_prompt,
        )
        own = [] if self._grader == BY_FUNCTION else [self._grader]
        self._pool = GraderPool(settings.processes, settings.grade_deadline_s, preload=own)

    def ready(self) -> list[int]:
        """Wait (at most the children's start deadline) until all can grade; returns their process ids."""
        self._pool.wait_ready()
        if self._pool.refused:
            log.warning("graders are less confined than they could be here: %s", "; ".join(self._pool.refused))
        self._functions.wait_ready()
        return [*self._pool.pids, *self._functions.pids]

    def score(self, rollouts: Sequence[Rollout]) -> list[Scored]:
        """Every rollout with its verdict and what the reward functions said, in order.

        Rewards come when groups are complete (`reward.scoring.with_rewards`).
        """
        verdicts = self._verdicts(rollouts)
        scores = self._values(rollouts)
        return [
            Scored(rollout, decided(verdict, said, self._settings), functions=said)
            for rollout, verdict, said in zip(rollouts, verdicts, scores, strict=True)
        ]

    def close(self) -> None:
        """End the child processes."""
        self._pool.close()
        self._functions.close()

    def _verdicts(self, rollouts: Sequence[Rollout]) -> list[Verdict | None]:
        """The graders' verdicts; None where the first reward function is to decide."""
        if self._grader == BY_FUNCTION:
            return [truncated(rollout) for rollout in rollouts]
        found = [answer_or_verdict(r, extract=self._extract, special_tokens=self._special_tokens) for r in rollouts]
        tasks = [self._task(r, answer) for r, answer in zip(rollouts, found, strict=True) if isinstance(answer, str)]
        graded = iter(self._pool.grade(tasks))
        return [next(graded) if isinstance(answer, str) else answer for answer in found]

    def _values(self, rollouts: Sequence[Rollout]) -> list[tuple[FunctionScore, ...]]:
        step = int(rollouts[0].lease.ticket.partition(".")[0]) if rollouts else 0
        # Evaluations and other measurements need verdicts alone: no judge is paid for them unless it is the one that decides.
        wanted = step < MEASURING_FROM or self._grader == BY_FUNCTION
        if not self._settings.functions or not rollouts or not wanted:
            return [()] * len(rollouts)
        requests = [
            function_request(rollout, special_tokens=self._special_tokens, template=self._template) for rollout in rollouts
        ]
        scores = self._functions.score(requests, step=step)
        # Where nothing is rewarded, only the word of the one that decides counts, whatever happens to the others.
        return scores if step < MEASURING_FROM else [said[:1] for said in scores]

    def _task(self, rollout: Rollout, answer: str) -> GradeTask:
        prompt = rollout.lease.prompt
        return GradeTask(self._grader, answer, (prompt.answer, *prompt.other_answers), entry=prompt.entry, options=self._options)
