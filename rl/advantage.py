"""Advantages: the named estimators (the papers' formulas) and the one entry point the trainer uses."""

from __future__ import annotations

from collections.abc import Callable

import torch

import kernels
from rl.settings import AdvantageSettings


def group_normalised(reward_N: torch.Tensor, group_N: torch.Tensor, *, std_floor: float = 1e-6) -> torch.Tensor:
    """GRPO's advantage ``(R - mean) / (std + std_floor)`` per group, sample std; see `kernels.group_normalised_advantage`."""
    return kernels.group_normalised_advantage(reward_N, group_N, std_floor=std_floor)


def hierarchical(
    reward_N: torch.Tensor,
    group_N: torch.Tensor,
    budget_N: torch.Tensor,
    ceiling_N: torch.Tensor,
    *,
    intra_coef: float = 1.0,
    std_floor: float = 1e-6,
) -> torch.Tensor:
    """HBPO's advantage, group term plus subgroup term, exactly as in the paper; see `kernels.hierarchical_advantage`."""
    return kernels.hierarchical_advantage(reward_N, group_N, budget_N, ceiling_N, intra_coef=intra_coef, std_floor=std_floor)


def token_level_group_average(
    reward_N: torch.Tensor, length_N: torch.Tensor, group_N: torch.Tensor, *, guard: float | None = 5.0
) -> torch.Tensor:
    """HAPO's token-weighted group advantage; see `kernels.token_level_group_average_advantage`."""
    return kernels.token_level_group_average_advantage(reward_N, length_N, group_N, guard=guard)


Estimator = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, AdvantageSettings], torch.Tensor]


def _group_normalised(
    reward_N: torch.Tensor, group_N: torch.Tensor, budget_N: torch.Tensor, ceiling_N: torch.Tensor, settings: AdvantageSettings
) -> torch.Tensor:
    return group_normalised(reward_N, group_N, std_floor=settings.std_floor)


def _hierarchical(
    reward_N: torch.Tensor, group_N: torch.Tensor, budget_N: torch.Tensor, ceiling_N: torch.Tensor, settings: AdvantageSettings
) -> torch.Tensor:
    return kernels.hierarchical_advantage(
        reward_N,
        group_N,
        budget_N,
        ceiling_N,
        intra_coef=settings.intra_coef,
        std_floor=settings.std_floor,
        intra_scale=settings.intra_scale,
    )


ADVANTAGES: dict[str, Estimator] = {"group_normalised": _group_normalised, "hierarchical": _hierarchical}
"""Estimator by its name in `advantage.estimator`."""


def compute(
    reward_N: torch.Tensor,
    group_N: torch.Tensor,
    budget_N: torch.Tensor,
    ceiling_N: torch.Tensor,
    settings: AdvantageSettings,
) -> torch.Tensor:
    """The advantage of every rollout of a step under the run's settings, centred if they say so.

    Shapes: all (N); reward_N NaN for a rollout without a verdict (advantage 0, in no statistic); group_N integer ids;
    budget_N in tokens, inf for members without a budget; ceiling_N NaN where there is none. Returns float32 (N).
    Raises KeyError for an estimator that is not in ADVANTAGES and ValueError for inputs the kernels refuse.
    """
    advantage_N = ADVANTAGES[settings.estimator](reward_N, group_N, budget_N, ceiling_N, settings)
    if settings.centre == "none":
        return advantage_N
    return kernels.centred_advantage(advantage_N, ~torch.isnan(reward_N), group_N if settings.centre == "group" else None)
