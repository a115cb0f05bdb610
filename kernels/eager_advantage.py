"""Group advantages in vectorised torch: one dense matrix where groups are equally long and in order, else scatter and gather.

Both forms offer the same three sums over a member's group, so that every estimator is written once. Arithmetic is float64.
"""

from __future__ import annotations

import torch

GUARD_FLOOR = 1e-6
"""Added to the token-level spread, as the method's code has it."""


class Scattered:
    """Groups of any size and order: ``index_N`` is each member's group number."""

    def __init__(self, label_N: torch.Tensor, valid_N: torch.Tensor) -> None:
        self.labels, self.index_N = torch.unique(label_N, return_inverse=True)
        self.valid_N = valid_N

    def total(self, value_N: torch.Tensor) -> torch.Tensor:
        """Each member's group sum over valid members, (N)."""
        value_N = torch.where(self.valid_N, value_N, 0.0)
        return value_N.new_zeros(self.labels.numel()).index_add_(0, self.index_N, value_N)[self.index_N]

    def extreme(self, value_N: torch.Tensor, *, largest: bool) -> torch.Tensor:
        """Each member's group maximum (or minimum) over valid members, (N)."""
        fill = -torch.inf if largest else torch.inf
        value_N = torch.where(self.valid_N, value_N, fill)
        start = value_N.new_full((self.labels.numel(),), fill)
        return start.scatter_reduce_(0, self.index_N, value_N, "amax" if largest else "amin")[self.index_N]

    def subgroup_mean(self, value_N: torch.Tensor, budget_N: torch.Tensor) -> torch.Tensor:
        """Mean over the valid members of a member's group that have its budget, (N)."""
        budgets, budget_index_N = torch.unique(budget_N, return_inverse=True)
        same = Scattered(self.index_N * budgets.numel() + budget_index_N, self.valid_N)
        return same.total(value_N) / same.total(torch.ones_like(value_N)).clamp(min=1.0)


class Dense:
    """Groups of one size, one after the other: row g of a matrix is group g."""

    def __init__(self, groups: int, valid_N: torch.Tensor) -> None:
        self.groups, self.valid_N = groups, valid_N
        self.valid_GN = valid_N.view(groups, -1)

    def _rows(self, value_N: torch.Tensor, fill: float) -> torch.Tensor:
        return torch.where(self.valid_GN, value_N.view(self.groups, -1), fill)

    def _spread(self, value_G: torch.Tensor) -> torch.Tensor:
        return value_G[:, None].expand_as(self.valid_GN).reshape(-1)

    def total(self, value_N: torch.Tensor) -> torch.Tensor:
        """See :class:`Scattered`."""
        return self._spread(self._rows(value_N, 0.0).sum(dim=1))

    def extreme(self, value_N: torch.Tensor, *, largest: bool) -> torch.Tensor:
        """See :class:`Scattered`."""
        rows = self._rows(value_N, -torch.inf if largest else torch.inf)
        return self._spread(rows.amax(dim=1) if largest else rows.amin(dim=1))

    def subgroup_mean(self, value_N: torch.Tensor, budget_N: torch.Tensor) -> torch.Tensor:
        """See :class:`Scattered`; one product with the matrix of equal budgets."""
        budget_GN = budget_N.view(self.groups, -1)
        same_GNN = (budget_GN[:, :, None] == budget_GN[:, None, :]).to(value_N.dtype)
        both = torch.stack([self._rows(value_N, 0.0), self.valid_GN.to(value_N.dtype)], dim=-1)
        total, count = torch.bmm(same_GNN, both).unbind(dim=-1)
        return (total / count.clamp_(min=1.0)).reshape(-1)


Groups = Scattered | Dense

LARGEST_DENSE = 64
"""Members of a group up to which the matrix of equal budgets is cheaper than sorting budgets."""


def find_groups(group_N: torch.Tensor, valid_N: torch.Tensor) -> Groups:
    """The cheapest form that holds these groups."""
    count = group_N.numel()
    if count and group_N.device.type == "cpu":
        change = torch.nonzero(group_N[1:] != group_N[:-1]).squeeze(-1)
        groups = change.numel() + 1
        size = count // groups
        if groups * size == count and size <= LARGEST_DENSE and torch.equal(change, torch.arange(size - 1, count - 1, size)):
            first_G = group_N[::size]
            if first_G.unique().numel() == groups:  # no group comes back later
                return Dense(groups, valid_N)
    return Scattered(group_N, valid_N)


def spread(reward_N: torch.Tensor, groups: Groups, size_N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Each member's deviation from its group's mean and its group's sample standard deviation.

    A group of equal rewards deviates by exactly 0: rounding must not look like a difference.
    """
    deviation_N = reward_N - groups.total(reward_N) / size_N.clamp(min=1.0)
    flat_N = groups.extreme(reward_N, largest=True) <= groups.extreme(reward_N, largest=False)
    deviation_N = torch.where(flat_N, 0.0, deviation_N)
    return deviation_N, (groups.total(deviation_N.square()) / (size_N - 1.0).clamp(min=1.0)).sqrt()


def group_normalised(reward_N: torch.Tensor, group_N: torch.Tensor, std_floor: float) -> torch.Tensor:
    """See `kernels.group_normalised_advantage`."""
    valid_N = ~torch.isnan(reward_N)
    groups = find_groups(group_N, valid_N)
    deviation_N, std_N = spread(reward_N, groups, groups.total(torch.ones_like(reward_N)))
    return torch.where(valid_N, deviation_N / (std_N + std_floor), 0.0)


def hierarchical(
    reward_N: torch.Tensor,
    group_N: torch.Tensor,
    budget_N: torch.Tensor,
    ceiling_N: torch.Tensor,
    intra_coef: float,
    std_floor: float,
    spread_scaled: bool,
) -> torch.Tensor:
    """See `kernels.hierarchical_advantage`."""
    valid_N = ~torch.isnan(reward_N)
    groups = find_groups(group_N, valid_N)
    size_N = groups.total(torch.ones_like(reward_N))
    deviation_N, std_N = spread(reward_N, groups, size_N)
    intra_N = groups.subgroup_mean(reward_N, budget_N) - ceiling_N.double()
    if spread_scaled:
        bound_N = (size_N - 1.0).clamp(min=0.0) / size_N.clamp(min=1.0).sqrt()
        intra_N = (intra_N / (std_N + std_floor)).clamp(-bound_N, bound_N)
        intra_N = torch.where(std_N > std_floor, intra_N, 0.0)
    intra_N = torch.where(torch.isnan(ceiling_N), 0.0, intra_N)
    return torch.where(valid_N, deviation_N / (std_N + std_floor) + intra_coef * intra_N, 0.0)


def token_level(reward_N: torch.Tensor, length_N: torch.Tensor, group_N: torch.Tensor, guard: float | None) -> torch.Tensor:
    """See `kernels.token_level_group_average_advantage`."""
    valid_N = ~torch.isnan(reward_N)
    groups = find_groups(group_N, valid_N)
    length_N = length_N.double()
    tokens_N = groups.total(length_N).clamp(min=1.0)
    deviation_N = reward_N - groups.total(length_N * reward_N) / tokens_N
    flat_N = groups.extreme(reward_N, largest=True) <= groups.extreme(reward_N, largest=False)
    deviation_N = torch.where(flat_N, 0.0, deviation_N)
    advantage_N = deviation_N / ((groups.total(length_N * deviation_N.square()) / tokens_N).sqrt() + GUARD_FLOOR)
    if guard is not None:
        counted_N = torch.where(length_N > 0, advantage_N.abs(), 0.0)
        plain_N = group_normalised(reward_N, group_N, GUARD_FLOOR)
        advantage_N = torch.where(groups.extreme(counted_N, largest=True) >= guard, plain_N, advantage_N)
    return torch.where(valid_N, advantage_N, 0.0)


def to_tokens(advantage_N: torch.Tensor, start_N: torch.Tensor, tokens: int) -> torch.Tensor:
    """Each rollout's advantage at all its packed tokens, (tokens)."""
    return torch.repeat_interleave(advantage_N, start_N.diff(), output_size=tokens)
