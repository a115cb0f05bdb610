"""Group advantages in vectorised torch: one dense matrix where groups are equally long and in order, else scatter and gather.

Both forms offer the same three sums over a member's group, so that every estimator is written once. Arithmetic is float64.
"""

from __future__ import annotations

import torch

GUARD_FLOOR = 1e-6
"""Added to the token-level spread, as the method's code has it."""


class Scattered:
    """Groups of any size and order: ``index_N`` is each member's group number. Everything has shape (N)."""

    def __init__(self, label_N: torch.Tensor, valid_N: torch.Tensor) -> None:
        self.labels, self.index_N = torch.unique(label_N, return_inverse=True)
        self.valid_N = valid_N
        self.size = self.total(torch.ones_like(valid_N, dtype=torch.float64))

    def shaped(self, value_N: torch.Tensor) -> torch.Tensor:
        """The values in the shape in which the sums work."""
        return value_N

    def total(self, value_N: torch.Tensor) -> torch.Tensor:
        """Each member's group sum over valid members."""
        value_N = torch.where(self.valid_N, value_N, 0.0)
        return value_N.new_zeros(self.labels.numel()).index_add_(0, self.index_N, value_N)[self.index_N]

    def extreme(self, value_N: torch.Tensor, *, largest: bool) -> torch.Tensor:
        """Each member's group maximum (or minimum) over valid members."""
        fill = -torch.inf if largest else torch.inf
        value_N = torch.where(self.valid_N, value_N, fill)
        start = value_N.new_full((self.labels.numel(),), fill)
        return start.scatter_reduce_(0, self.index_N, value_N, "amax" if largest else "amin")[self.index_N]

    def subgroup_mean(self, value_N: torch.Tensor, budget_N: torch.Tensor) -> torch.Tensor:
        """Mean over the valid members of a member's group that have its budget."""
        budgets, budget_index_N = torch.unique(budget_N, return_inverse=True)
        same = Scattered(self.index_N * budgets.numel() + budget_index_N, self.valid_N)
        return same.total(value_N) / same.size.clamp(min=1.0)

    def result(self, value_N: torch.Tensor) -> torch.Tensor:
        """Back to (N), 0 for missing members."""
        return torch.where(self.valid_N, value_N, 0.0)


class Dense:
    """Groups of one size, one after the other: row g of a (G, n) matrix is group g; its sums have shape (G, 1)."""

    def __init__(self, groups: int, valid_N: torch.Tensor) -> None:
        self.groups = groups
        self.valid_GN = None if bool(valid_N.all()) else valid_N.view(groups, -1)
        count = valid_N.numel() // groups
        sizes_G = valid_N.new_full((1, 1), count, dtype=torch.float64)
        self.size = sizes_G if self.valid_GN is None else self.valid_GN.sum(dim=1, keepdim=True, dtype=torch.float64)

    def shaped(self, value_N: torch.Tensor) -> torch.Tensor:
        """See :class:`Scattered`."""
        return value_N.view(self.groups, -1)

    def _filled(self, value_GN: torch.Tensor, fill: float) -> torch.Tensor:
        return value_GN if self.valid_GN is None else torch.where(self.valid_GN, value_GN, fill)

    def total(self, value_GN: torch.Tensor) -> torch.Tensor:
        """See :class:`Scattered`."""
        return self._filled(value_GN, 0.0).sum(dim=1, keepdim=True)

    def extreme(self, value_GN: torch.Tensor, *, largest: bool) -> torch.Tensor:
        """See :class:`Scattered`."""
        filled = self._filled(value_GN, -torch.inf if largest else torch.inf)
        return filled.amax(dim=1, keepdim=True) if largest else filled.amin(dim=1, keepdim=True)

    def subgroup_mean(self, value_GN: torch.Tensor, budget_GN: torch.Tensor) -> torch.Tensor:
        """See :class:`Scattered`; one product with the matrix of equal budgets."""
        same_GNN = (budget_GN[:, :, None] == budget_GN[:, None, :]).to(value_GN.dtype)
        ones = torch.ones_like(value_GN) if self.valid_GN is None else self.valid_GN.to(value_GN.dtype)
        total, count = torch.bmm(same_GNN, torch.stack([self._filled(value_GN, 0.0), ones], dim=-1)).unbind(dim=-1)
        return total / count.clamp_(min=1.0)

    def result(self, value_GN: torch.Tensor) -> torch.Tensor:
        """See :class:`Scattered`."""
        return self._filled(value_GN, 0.0).reshape(-1)


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


def spread(reward: torch.Tensor, groups: Groups) -> tuple[torch.Tensor, torch.Tensor]:
    """Each member's deviation from its group's mean and its group's sample standard deviation.

    A group of equal rewards deviates by exactly 0: rounding must not look like a difference.
    """
    deviation = deviate(reward, groups.total(reward) / groups.size.clamp(min=1.0), groups)
    return deviation, (groups.total(deviation.square()) / (groups.size - 1.0).clamp(min=1.0)).sqrt()


def deviate(reward: torch.Tensor, mean: torch.Tensor, groups: Groups) -> torch.Tensor:
    """Rewards minus ``mean``, exactly 0 in a group of equal rewards."""
    flat = groups.extreme(reward, largest=True) <= groups.extreme(reward, largest=False)
    return torch.where(flat, 0.0, reward - mean)


def group_normalised(reward_N: torch.Tensor, group_N: torch.Tensor, std_floor: float) -> torch.Tensor:
    """See `kernels.group_normalised_advantage`."""
    groups = find_groups(group_N, ~torch.isnan(reward_N))
    deviation, std = spread(groups.shaped(reward_N), groups)
    return groups.result(deviation / (std + std_floor))


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
    groups = find_groups(group_N, ~torch.isnan(reward_N))
    reward, ceiling = groups.shaped(reward_N), groups.shaped(ceiling_N.double())
    deviation, std = spread(reward, groups)
    intra = groups.subgroup_mean(reward, groups.shaped(budget_N)) - ceiling
    if spread_scaled:
        bound = (groups.size - 1.0).clamp(min=0.0) / groups.size.clamp(min=1.0).sqrt()
        intra = torch.where(std > std_floor, (intra / (std + std_floor)).clamp(-bound, bound), 0.0)
    intra = torch.where(torch.isnan(ceiling), 0.0, intra)
    return groups.result(deviation / (std + std_floor) + intra_coef * intra)


def token_level(reward_N: torch.Tensor, length_N: torch.Tensor, group_N: torch.Tensor, guard: float | None) -> torch.Tensor:
    """See `kernels.token_level_group_average_advantage`."""
    groups = find_groups(group_N, ~torch.isnan(reward_N))
    reward, length = groups.shaped(reward_N), groups.shaped(length_N.double())
    tokens = groups.total(length).clamp(min=1.0)
    deviation = deviate(reward, groups.total(length * reward) / tokens, groups)
    advantage = deviation / ((groups.total(length * deviation.square()) / tokens).sqrt() + GUARD_FLOOR)
    if guard is not None:
        counted = torch.where(length > 0, advantage.abs(), 0.0)
        plain = groups.shaped(group_normalised(reward_N, group_N, GUARD_FLOOR))
        advantage = torch.where(groups.extreme(counted, largest=True) >= guard, plain, advantage)
    return groups.result(advantage)


def to_tokens(advantage_N: torch.Tensor, start_N: torch.Tensor, tokens: int) -> torch.Tensor:
    """Each rollout's advantage at all its packed tokens, float32 (tokens)."""
    advantage_N, length_N = advantage_N.float(), start_N.diff()
    if advantage_N.numel() and tokens and bool((length_N == length_N[0]).all()):
        return advantage_N[:, None].expand(-1, tokens // advantage_N.numel()).reshape(-1)
    return torch.repeat_interleave(advantage_N, length_N, output_size=tokens)
