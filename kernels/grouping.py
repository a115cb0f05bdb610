"""Advantages of sampled groups: statistics per group by scatter and gather, for any number, size and order of groups.

NaN marks a missing member: it enters no statistic and its advantage is 0. Arithmetic is float64, results are float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class _Groups:
    """Members sorted into groups: ``index_N`` is each member's group number, ``valid_N`` says who counts."""

    index_N: torch.Tensor
    valid_N: torch.Tensor
    count: int

    @classmethod
    def of(cls, label_N: torch.Tensor, valid_N: torch.Tensor) -> _Groups:
        unique, index_N = torch.unique(label_N, return_inverse=True)
        return cls(index_N, valid_N, unique.numel())

    def total(self, value_N: torch.Tensor) -> torch.Tensor:
        """Each member's group sum over valid members, (N)."""
        value_N = torch.where(self.valid_N, value_N, 0.0)
        return value_N.new_zeros(self.count).index_add_(0, self.index_N, value_N)[self.index_N]

    def extreme(self, value_N: torch.Tensor, *, largest: bool) -> torch.Tensor:
        """Each member's group maximum (or minimum) over valid members, (N)."""
        fill = -torch.inf if largest else torch.inf
        value_N = torch.where(self.valid_N, value_N, fill)
        start = value_N.new_full((self.count,), fill)
        return start.scatter_reduce_(0, self.index_N, value_N, "amax" if largest else "amin")[self.index_N]

    def size(self) -> torch.Tensor:
        return self.total(torch.ones_like(self.valid_N, dtype=torch.float64))

    def flat(self, value_N: torch.Tensor) -> torch.Tensor:
        """Whether all valid members of each member's group share one value; rounding must not look like a difference."""
        return self.extreme(value_N, largest=True) <= self.extreme(value_N, largest=False)


def group_normalised_advantage(reward_N: torch.Tensor, group_N: torch.Tensor, *, std_floor: float = 1e-6) -> torch.Tensor:
    """Reward relative to its group, in sample standard deviations.

    ``A_k = (R_k - mean R) / (std R + std_floor)``, std with n - 1; 0 in a group of one or of equal rewards.

    Shapes: reward_N (N), NaN for a missing member; group_N (N) integer ids in any order. Returns float32 (N).
    Raises ValueError for shapes that differ or infinite rewards. Source: GRPO (Shao et al. 2024, section 4.1).
    """
    reward_N, groups = _prepare(reward_N, group_N)
    deviation_N, std_N = _spread(reward_N, groups)
    return _result(deviation_N / (std_N + std_floor), groups.valid_N)


def hierarchical_advantage(
    reward_N: torch.Tensor,
    group_N: torch.Tensor,
    budget_N: torch.Tensor,
    ceiling_N: torch.Tensor,
    *,
    intra_coef: float = 1.0,
    std_floor: float = 1e-6,
    intra_scale: str = "none",
) -> torch.Tensor:
    """Two-level advantage: a reward against its whole group, plus its budget's subgroup against the budget's ceiling.

    ``A_k = (R_k - mean R) / (std R + std_floor) + intra_coef * (mean_{j: b_j = b_k} R_j - C_k)``; the sum is not centred,
    so it is negative on average unless every subgroup reaches its ceiling.

    ``intra_scale="spread"`` (not in the paper) divides the second term by the same ``std R + std_floor``, leaves it out of
    flat groups, and bounds it by the largest value the first term can take, (n - 1) / sqrt(n): without the bound a group
    whose rewards differ by a hair would get a term of any size.

    Shapes: all (N); reward_N NaN for a missing member; group_N integer ids in any order; budget_N in tokens, equal values
    form a subgroup (inf for members without a budget); ceiling_N in reward units, NaN switches the second term off.
    Returns float32 (N). Raises ValueError for shapes that differ, infinite rewards, NaN budgets or an unknown intra_scale.
    Source: HBPO (arXiv 2507.15844, equation 5); sample std as in its published code.
    """
    if intra_scale not in ("none", "spread"):
        raise ValueError(f"intra_scale must be 'none' or 'spread', got {intra_scale!r}")
    reward_N, groups = _prepare(reward_N, group_N)
    _check_lengths(reward_N, budget_N=budget_N, ceiling_N=ceiling_N)
    if bool(torch.isnan(budget_N.double()).any()):
        raise ValueError("budget_N holds NaN; write inf for a member without a budget")
    deviation_N, std_N = _spread(reward_N, groups)
    subgroups = _subgroups(groups, budget_N)
    intra_N = subgroups.total(reward_N) / subgroups.size().clamp(min=1.0) - ceiling_N.double()
    if intra_scale == "spread":
        size_N = groups.size()
        bound_N = (size_N - 1.0).clamp(min=0.0) / size_N.clamp(min=1.0).sqrt()
        intra_N = (intra_N / (std_N + std_floor)).clamp(-bound_N, bound_N)
        intra_N = torch.where(std_N > std_floor, intra_N, 0.0)
    intra_N = torch.where(torch.isnan(ceiling_N), 0.0, intra_N)
    return _result(deviation_N / (std_N + std_floor) + intra_coef * intra_N, groups.valid_N)


def token_level_group_average_advantage(
    reward_N: torch.Tensor, length_N: torch.Tensor, group_N: torch.Tensor, *, guard: float | None = 5.0
) -> torch.Tensor:
    """Reward relative to its group where every token, not every response, has one vote.

    ``mu = sum_i l_i R_i / sum_i l_i``, ``s^2 = sum_i l_i (R_i - mu)^2 / sum_i l_i``, ``A_i = (R_i - mu) / (s + 1e-6)``;
    a group in which some ``|A_i| >= guard`` takes `group_normalised_advantage` instead (None: never).

    Shapes: reward_N (N), NaN for a missing member; length_N (N) in tokens, 0 or more; group_N (N) integer ids.
    Returns float32 (N), one value for all tokens of a response. Raises ValueError for shapes that differ, infinite
    rewards, or negative or non-finite lengths. Source: HAPO (arXiv 2509.16591), part B; the guard is in its code only.
    """
    reward_N, groups = _prepare(reward_N, group_N)
    _check_lengths(reward_N, length_N=length_N)
    length_N = length_N.double()
    if not bool((torch.isfinite(length_N) & (length_N >= 0)).all()):
        raise ValueError("length_N holds a negative or non-finite length")
    tokens_N = groups.total(length_N).clamp(min=1.0)
    deviation_N = reward_N - groups.total(length_N * reward_N) / tokens_N
    deviation_N = torch.where(groups.flat(reward_N), 0.0, deviation_N)
    std_N = (groups.total(length_N * deviation_N.square()) / tokens_N).sqrt()
    advantage_N = deviation_N / (std_N + 1e-6)
    if guard is not None:
        counted = _Groups(groups.index_N, groups.valid_N & (length_N > 0), groups.count)
        fallback_N = group_normalised_advantage(reward_N, groups.index_N).double()
        advantage_N = torch.where(counted.extreme(advantage_N.abs(), largest=True) >= guard, fallback_N, advantage_N)
    return _result(advantage_N, groups.valid_N)


def centred_advantage(advantage_N: torch.Tensor, valid_N: torch.Tensor, group_N: torch.Tensor | None = None) -> torch.Tensor:
    """Advantages minus their mean over valid members, of each group or (``group_N=None``) of the whole batch.

    Shapes: advantage_N (N); valid_N (N) bool; group_N (N) integer ids or None. Returns float32 (N), 0 where not valid.
    """
    value_N = advantage_N.double()
    group_N = torch.zeros_like(valid_N, dtype=torch.int64) if group_N is None else group_N
    _check_lengths(value_N, valid_N=valid_N, group_N=group_N)
    groups = _Groups.of(group_N, valid_N)
    return _result(value_N - groups.total(value_N) / groups.size().clamp(min=1.0), valid_N)


def _prepare(reward_N: torch.Tensor, group_N: torch.Tensor) -> tuple[torch.Tensor, _Groups]:
    if reward_N.dim() != 1:
        raise ValueError(f"reward_N must have one dimension, got shape {tuple(reward_N.shape)}")
    _check_lengths(reward_N, group_N=group_N)
    if group_N.is_floating_point():
        raise TypeError(f"group_N must hold integer ids, got {group_N.dtype}")
    reward_N = reward_N.detach().double()
    if bool(torch.isinf(reward_N).any()):
        raise ValueError("reward_N holds an infinite reward; NaN marks a missing member, anything else must be finite")
    return reward_N, _Groups.of(group_N, ~torch.isnan(reward_N))


def _check_lengths(like_N: torch.Tensor, **values: torch.Tensor) -> None:
    for name, value in values.items():
        if value.shape != like_N.shape:
            raise ValueError(f"{name} has shape {tuple(value.shape)}, expected {tuple(like_N.shape)}")


def _spread(reward_N: torch.Tensor, groups: _Groups) -> tuple[torch.Tensor, torch.Tensor]:
    """Each member's deviation from its group's mean and its group's sample standard deviation."""
    size_N = groups.size()
    deviation_N = reward_N - groups.total(reward_N) / size_N.clamp(min=1.0)
    deviation_N = torch.where(groups.flat(reward_N), 0.0, deviation_N)
    return deviation_N, (groups.total(deviation_N.square()) / (size_N - 1.0).clamp(min=1.0)).sqrt()


def _subgroups(groups: _Groups, budget_N: torch.Tensor) -> _Groups:
    """Members of one group with equal budgets."""
    unique, budget_index_N = torch.unique(budget_N, return_inverse=True)
    return _Groups.of(groups.index_N * unique.numel() + budget_index_N, groups.valid_N)


def _result(advantage_N: torch.Tensor, valid_N: torch.Tensor) -> torch.Tensor:
    return torch.where(valid_N, advantage_N, 0.0).float()
