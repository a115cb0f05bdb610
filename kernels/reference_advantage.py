"""Group advantages as their definitions read: one group after the other, one member after the other."""

from __future__ import annotations

import torch


def _members(group_N: torch.Tensor, reward_N: torch.Tensor) -> list[list[int]]:
    groups: dict[int, list[int]] = {}
    for i, (group, reward) in enumerate(zip(group_N.tolist(), reward_N.tolist(), strict=True)):
        if reward == reward:  # NaN is a missing member
            groups.setdefault(group, []).append(i)
    return list(groups.values())


def _std(value: torch.Tensor) -> torch.Tensor:
    return value.std() if value.numel() > 1 and bool((value != value[0]).any()) else torch.zeros_like(value[0])


def group_normalised(reward_N: torch.Tensor, group_N: torch.Tensor, std_floor: float) -> torch.Tensor:
    """See `kernels.group_normalised_advantage`."""
    result = torch.zeros_like(reward_N)
    for members in _members(group_N, reward_N):
        reward = reward_N[members]
        std = _std(reward)
        result[members] = (reward - reward.mean()) / (std + std_floor) if std > 0 else 0.0
    return result


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
    result = group_normalised(reward_N, group_N, std_floor)
    for members in _members(group_N, reward_N):
        n, std = len(members), float(_std(reward_N[members]))
        for i in members:
            same = [j for j in members if budget_N[j] == budget_N[i]]
            intra = float(reward_N[same].mean() - ceiling_N[i])
            if intra != intra:
                continue
            if spread_scaled:
                bound = (n - 1) / n**0.5
                intra = max(-bound, min(bound, intra / (std + std_floor))) if std > std_floor else 0.0
            result[i] += intra_coef * intra
    return result


def token_level(reward_N: torch.Tensor, length_N: torch.Tensor, group_N: torch.Tensor, guard: float | None) -> torch.Tensor:
    """See `kernels.token_level_group_average_advantage`."""
    result, plain = torch.zeros_like(reward_N), group_normalised(reward_N, group_N, 1e-6)
    for members in _members(group_N, reward_N):
        reward, length = reward_N[members], length_N[members].double()
        if bool((reward == reward[0]).all()):
            continue
        tokens = length.sum().clamp(min=1.0)
        deviation = reward - (length * reward).sum() / tokens
        value = deviation / (((length * deviation**2).sum() / tokens).sqrt() + 1e-6)
        guarded = guard is not None and bool((value[length > 0].abs() >= guard).any())
        result[members] = plain[members] if guarded else value
    return result


def to_tokens(advantage_N: torch.Tensor, start_N: torch.Tensor, tokens: int) -> torch.Tensor:
    """Each rollout's advantage at all its packed tokens, (tokens)."""
    result = advantage_N.new_zeros(tokens)
    for i, value in enumerate(advantage_N):
        result[int(start_N[i]) : int(start_N[i + 1])] = value
    return result
