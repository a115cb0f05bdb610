"""Columns of a step for tests of advantages."""

from __future__ import annotations

from dataclasses import replace

import torch

from rl.advantage import ScoredBatch
from rl.types import Budget, BudgetKind, Lease


def scored_batch(
    reward_N: torch.Tensor,
    group_N: torch.Tensor,
    budget_N: torch.Tensor | None = None,
    ceiling_N: torch.Tensor | None = None,
    *,
    length_reward_N: torch.Tensor | None = None,
    correct_N: torch.Tensor | None = None,
    length_N: torch.Tensor | None = None,
    max_length: int = 4096,
) -> ScoredBatch:
    """Rewards that say nothing about length, of answers that are right where the reward is above 0, unless told otherwise."""
    like_N = reward_N.double()
    return ScoredBatch(
        reward_N=reward_N,
        group_N=group_N,
        budget_N=torch.full_like(like_N, torch.inf) if budget_N is None else budget_N,
        ceiling_N=torch.full_like(like_N, torch.nan) if ceiling_N is None else ceiling_N,
        length_reward_N=torch.zeros_like(like_N) if length_reward_N is None else length_reward_N,
        correct_N=reward_N > 0 if correct_N is None else correct_N,
        length_N=torch.ones_like(like_N) if length_N is None else length_N,
        max_length=max_length,
    )


def with_effort(lease: Lease, effort: float) -> Lease:
    """The lease of a member that was asked for an effort."""
    return replace(lease, budget=Budget(0, BudgetKind.EFFORT, " Effort {effort}.", place="suffix", effort=effort))
