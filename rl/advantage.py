"""Advantages: the named estimators (the papers' formulas) and the one entry point the trainer uses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

import kernels
from reward.relative import lead_weight
from rl.settings import AdvantageSettings
from rl.types import Rollout


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


def group_centred(reward_N: torch.Tensor, group_N: torch.Tensor) -> torch.Tensor:
    """Reward minus its group's mean, ``A_k = R_k - mean R``: the size of a difference stays what the reward says it is.

    Shapes: reward_N (N), NaN for a missing member (advantage 0); group_N (N) integer ids. Returns float32 (N).
    Source: Dr. GRPO (arXiv 2503.20783, section 3.1).
    """
    return kernels.centred_advantage(reward_N.double().nan_to_num(), ~reward_N.isnan(), group_N)


def leave_one_out(reward_N: torch.Tensor, group_N: torch.Tensor) -> torch.Tensor:
    """Reward minus the mean of the other members, ``A_k = n / (n - 1) (R_k - mean R)``; 0 in a group of one.

    Shapes as `group_centred`. Source: RLOO (arXiv 2402.14740, section 3.3).
    """
    size_N = group_size(group_N, ~reward_N.isnan())
    return group_centred(reward_N, group_N) * (size_N / (size_N - 1).clamp(min=1)).float()


def batch_normalised(reward_N: torch.Tensor, *, std_floor: float = 1e-6) -> torch.Tensor:
    """Reward in standard deviations of the whole batch, ``(R - mean) / (std + std_floor)``, sample std, groups ignored.

    Shapes: reward_N (N), NaN for a missing member. Returns float32 (N). Source: O1-Pruner (arXiv 2501.12570), which standardises
    its rewards over a batch.
    """
    return group_normalised(reward_N, torch.zeros_like(reward_N, dtype=torch.int64), std_floor=std_floor)


def guarded(
    reward_N: torch.Tensor,
    length_reward_N: torch.Tensor,
    correct_N: torch.Tensor,
    group_N: torch.Tensor,
    *,
    std_floor: float = 1e-6,
) -> torch.Tensor:
    """GRPO's advantage in which a reward for length cannot pass for one for correctness.

    With R the reward and L its part that depends on the length: groups with right and wrong answers as in `group_normalised`; all
    right: ``GRPO(R - L) + L - mean L``, so that the length keeps its natural size; all wrong: ``GRPO(R - L)``.
    Dividing by a spread that is length alone would make a difference of a few tokens as large as that of right and wrong.

    Shapes: all (N); reward_N NaN for a missing member; correct_N bool; group_N integer ids. Returns float32 (N).
    """
    valid_N = ~reward_N.isnan()
    size_N = group_size(group_N, valid_N)
    right_N = group_size(group_N, valid_N & correct_N)
    plain_N = group_normalised(reward_N, group_N, std_floor=std_floor)
    without_N = group_normalised(reward_N - length_reward_N, group_N, std_floor=std_floor)
    length_N = group_centred(torch.where(valid_N, length_reward_N, torch.nan), group_N)
    flat_N = torch.where(right_N == size_N, without_N + length_N, without_N)
    return torch.where((right_N > 0) & (right_N < size_N), plain_N, flat_N)


def decoupled(
    correct_N: torch.Tensor,
    length_N: torch.Tensor,
    group_N: torch.Tensor,
    *,
    scale: float = 8192.0,
    tau: float = 0.5,
    std_floor: float = 1e-6,
) -> torch.Tensor:
    """An advantage whose sign is that of correctness whatever the length: length only shares out what correct answers earn.

    ``A = GRPO(correct)``, times ``w_i = exp((1 - n_i / scale) / tau) / mean over the group's correct answers of the same`` for
    correct ones. The mean weight is 1, and a correct answer is never pushed down in a group with wrong ones.

    Shapes: all (N); correct_N bool; length_N in tokens; group_N integer ids; scale in tokens. Returns float32 (N).
    Raises ValueError for scale or tau not above 0. Source: the diagnosis of DRPO (arXiv 2510.04474); the form is ours.
    """
    if scale <= 0 or tau <= 0:
        raise ValueError(f"scale={scale} and tau={tau} must be above 0")
    advantage_N = group_normalised(correct_N.double(), group_N, std_floor=std_floor)
    # Relative to the group's shortest, or exp underflows for answers many scales long.
    exponent_N = torch.where(correct_N, -length_N.double() / (scale * tau), -torch.inf)
    _, place_N = torch.unique(group_N, return_inverse=True)
    groups = int(place_N.max()) + 1 if place_N.numel() else 0
    highest_G = torch.full((groups,), -torch.inf, dtype=torch.float64, device=group_N.device)
    highest_G = highest_G.scatter_reduce(0, place_N, exponent_N, "amax")
    weight_N = torch.where(correct_N, (exponent_N - highest_G[place_N]).exp(), 0.0)
    total_G = torch.zeros_like(highest_G).index_add_(0, place_N, weight_N)
    count_G = torch.zeros_like(highest_G).index_add_(0, place_N, correct_N.double())
    share_N = weight_N * count_G[place_N] / total_G[place_N].clamp(min=1e-300)
    return torch.where(correct_N, advantage_N * share_N.float(), advantage_N)


def group_size(group_N: torch.Tensor, valid_N: torch.Tensor) -> torch.Tensor:
    """How many valid members the group of each rollout has: int64 (N)."""
    _, place_N = torch.unique(group_N, return_inverse=True)
    groups = int(place_N.max()) + 1 if place_N.numel() else 0
    count_G = torch.zeros(groups, dtype=torch.int64, device=group_N.device)
    return count_G.index_add_(0, place_N, valid_N.long())[place_N]


def loss_tokens(rollout: Rollout, *, train_prefix: bool) -> int:
    """Response tokens of a rollout that carry loss: its prefill only with ``train_prefix``, and none that a hard budget forced.

    The length |o_i| of HAPO; `rl.batch.pack_rollouts` marks the same tokens.
    """
    forced = {place for place in rollout.forced if place >= rollout.prefill_length}
    return rollout.length - len(forced) - (0 if train_prefix else rollout.prefill_length)


@dataclass(frozen=True)
class ScoredBatch:
    """What an advantage is computed from: one value per rollout of a step."""

    reward_N: torch.Tensor
    """float64 (N); NaN for a rollout that has none: advantage 0, in no statistic."""
    group_N: torch.Tensor
    """int64 (N): equal for rollouts that are compared with one another."""
    budget_N: torch.Tensor
    """Tokens, inf without a budget."""
    ceiling_N: torch.Tensor
    """Reward units, NaN where there is none."""
    length_reward_N: torch.Tensor
    """Reward units: the part of the reward that depends on the length."""
    correct_N: torch.Tensor
    """bool (N)."""
    length_N: torch.Tensor
    """Response tokens."""
    max_length: int
    """L_max in tokens."""
    loss_tokens_N: torch.Tensor | None = None
    """Response tokens that carry loss, see :func:`loss_tokens`; None: all of them, ``length_N``."""


Estimator = Callable[[ScoredBatch, AdvantageSettings], torch.Tensor]


def _group_normalised(batch: ScoredBatch, settings: AdvantageSettings) -> torch.Tensor:
    if not settings.length_guard:
        return group_normalised(batch.reward_N, batch.group_N, std_floor=settings.std_floor)
    columns = batch.reward_N, batch.length_reward_N, batch.correct_N, batch.group_N
    return guarded(*columns, std_floor=settings.std_floor)


def _hierarchical(batch: ScoredBatch, settings: AdvantageSettings) -> torch.Tensor:
    return kernels.hierarchical_advantage(
        batch.reward_N,
        batch.group_N,
        batch.budget_N,
        batch.ceiling_N,
        intra_coef=settings.intra_coef,
        std_floor=settings.std_floor,
        intra_scale=settings.intra_scale,
    )


def _decoupled(batch: ScoredBatch, settings: AdvantageSettings) -> torch.Tensor:
    scale = float(batch.max_length) if settings.scale is None else settings.scale
    columns = batch.correct_N, batch.length_N, batch.group_N
    return decoupled(*columns, scale=scale, tau=settings.tau, std_floor=settings.std_floor)


def _token_level_average(batch: ScoredBatch, settings: AdvantageSettings) -> torch.Tensor:
    length_N = batch.length_N if batch.loss_tokens_N is None else batch.loss_tokens_N
    return token_level_group_average(batch.reward_N, length_N, batch.group_N, guard=settings.guard)


ADVANTAGES: dict[str, Estimator] = {
    "group_normalised": _group_normalised,
    "hierarchical": _hierarchical,
    "token_level_average": _token_level_average,
    "group_centred": lambda batch, settings: group_centred(batch.reward_N, batch.group_N),
    "leave_one_out": lambda batch, settings: leave_one_out(batch.reward_N, batch.group_N),
    "batch_normalised": lambda batch, settings: batch_normalised(batch.reward_N, std_floor=settings.std_floor),
    "reward": lambda batch, settings: batch.reward_N.nan_to_num().float(),
    "decoupled": _decoupled,
}
"""Estimator by its name in `advantage.estimator`."""


def compute(batch: ScoredBatch, settings: AdvantageSettings) -> torch.Tensor:
    """The advantage of every rollout of a step under the run's settings, weighted and centred if they say so.

    Returns float32 (N). Raises KeyError for an estimator that is not in ADVANTAGES and ValueError for inputs the kernels refuse.
    """
    advantage_N = ADVANTAGES[settings.estimator](batch, settings)
    valid_N = ~batch.reward_N.isnan()
    if settings.difficulty_weight == "lead":
        rate_N = group_size(batch.group_N, valid_N & batch.correct_N) / group_size(batch.group_N, valid_N).clamp(min=1)
        # What is pushed up counts most where few are right, what is pushed down where many are.
        advantage_N = advantage_N * lead_weight(torch.where(advantage_N > 0, rate_N, 1.0 - rate_N)).float()
    if settings.centre == "none":
        return advantage_N
    return kernels.centred_advantage(advantage_N, valid_N, batch.group_N if settings.centre == "group" else None)
