"""From verdicts to rewards: one pure function per method, each giving the named parts that the total is the sum of."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch

from reward.budget import hbpo, overlong
from rl.settings import RewardSettings
from rl.types import Budget, Reward, Verdict, VerdictStatus


@dataclass(frozen=True)
class ScoredAnswers:
    """What a reward may depend on, for the N answers that could be scored."""

    correct_N: torch.Tensor
    """bool (N)."""
    malformed_N: torch.Tensor
    """bool (N)."""
    length_N: torch.Tensor
    """float64 (N), response tokens, prefill and end of sequence included."""
    budget_N: torch.Tensor
    """float64 (N), tokens; inf for a member without a budget."""
    max_length: int
    """L_max in tokens."""


Parts = dict[str, torch.Tensor]
RewardFunction = Callable[[ScoredAnswers, RewardSettings], Parts]


def rewards(
    verdicts: Sequence[Verdict], budgets: Sequence[Budget], lengths: Sequence[int], *, settings: RewardSettings, max_length: int
) -> list[Reward | None]:
    """Reward of every answer by ``REWARDS[settings.method]``; None exactly where the verdict carries no score.

    ``total = sum of parts``; MALFORMED earns ``settings.bad_format``, TRUNCATED counts as wrong. Lengths are response tokens,
    ``max_length`` is L_max. Raises ValueError when the three sequences differ in length.
    """
    if not len(verdicts) == len(budgets) == len(lengths):
        counts = f"{len(verdicts)} verdicts, {len(budgets)} budgets and {len(lengths)} lengths"
        raise ValueError(f"got {counts}; give one of each per answer")
    scored = [i for i, verdict in enumerate(verdicts) if verdict.is_scored]
    answers = ScoredAnswers(
        correct_N=torch.tensor([verdicts[i].is_correct for i in scored], dtype=torch.bool),
        malformed_N=torch.tensor([verdicts[i].status is VerdictStatus.MALFORMED for i in scored], dtype=torch.bool),
        length_N=torch.tensor([lengths[i] for i in scored], dtype=torch.float64),
        budget_N=torch.tensor([math.inf if budgets[i].is_free else budgets[i].tokens for i in scored], dtype=torch.float64),
        max_length=max_length,
    )
    parts = REWARDS[settings.method](answers, settings)
    parts["format"] = answers.malformed_N * settings.bad_format
    result: list[Reward | None] = [None] * len(verdicts)
    columns = {name: part_N.tolist() for name, part_N in parts.items()}
    for row, i in enumerate(scored):
        values = {name: float(column[row]) for name, column in columns.items()}
        result[i] = Reward(total=math.fsum(values.values()), parts=values)  # a plain dict: it travels between actors
    return result


def correct_reward(answers: ScoredAnswers, settings: RewardSettings) -> Parts:
    """1 for a correct answer, else 0 (GRPO's outcome reward)."""
    return {"correct": answers.correct_N.double()}


def hbpo_reward(answers: ScoredAnswers, settings: RewardSettings) -> Parts:
    """HBPO's budget reward (arXiv 2507.15844, equations 2-3); see ``reward.budget.hbpo``."""
    reward_N = hbpo(
        answers.correct_N,
        answers.length_N,
        answers.budget_N,
        max_length=answers.max_length,
        beta=settings.beta,
        alpha=settings.alpha,
        form=settings.form,
    )
    return {"budget": reward_N}


def dapo_reward(answers: ScoredAnswers, settings: RewardSettings) -> Parts:
    """Correctness plus DAPO's penalty, which falls to -1 over the last ``overlong_buffer`` tokens before L_max (0: none)."""
    penalty_N = overlong(answers.length_N, max_length=answers.max_length, buffer=settings.overlong_buffer)
    return {"correct": answers.correct_N.double(), "overlong": penalty_N}


REWARDS: Mapping[str, RewardFunction] = MappingProxyType({"correct": correct_reward, "hbpo": hbpo_reward, "dapo": dapo_reward})
"""``reward.method`` -> function."""
