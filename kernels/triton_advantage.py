"""Triton kernel for group advantages: statistics of a group and subgroup, and the broadcast to tokens, in one launch.

A program owns one rollout and compares its group and budget with everyone's, N^2 comparisons in all (1.7e7 for N = 4096, well
below a millisecond), so group ids need no sorting and the host is never asked how many groups there are. Arithmetic is float64.
"""

# Triton's decorator turns the functions below into launchers that pyright cannot follow.
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
# pyright: reportIndexIssue=false, reportOperatorIssue=false, reportAttributeAccessIssue=false
from __future__ import annotations

import torch
import triton
import triton.language as tl

TILE = 1024
FLOOR: tl.constexpr = tl.constexpr(1e-6)


@triton.jit
def _advantage(reward, group, budget, ceiling, length, start, out, count, intra_coef, std_floor, guard,
               HIERARCHICAL: tl.constexpr, SPREAD: tl.constexpr, TOKENS: tl.constexpr, PACKED: tl.constexpr,
               TILE: tl.constexpr):
    here = tl.program_id(0)
    mine, my_group, my_budget = tl.load(reward + here), tl.load(group + here), tl.load(budget + here)
    one = tl.zeros((1,), tl.float64)
    size, total, same, same_total, weight, weighted = one, one, one, one, one, one
    largest, smallest = one - float("inf"), one + float("inf")
    for first in range(0, count, TILE):
        index = first + tl.arange(0, TILE)
        value = tl.load(reward + index, mask=index < count, other=float("nan"))
        member = (tl.load(group + index, mask=index < count, other=0) == my_group) & (value == value)
        value = tl.where(member, value, 0.0)
        size += tl.sum(member.to(tl.float64), axis=0)
        total += tl.sum(value, axis=0)
        largest = tl.maximum(largest, tl.max(tl.where(member, value, -float("inf")), axis=0))
        smallest = tl.minimum(smallest, tl.min(tl.where(member, value, float("inf")), axis=0))
        if HIERARCHICAL:
            equal = member & (tl.load(budget + index, mask=index < count, other=0.0) == my_budget)
            same += tl.sum(equal.to(tl.float64), axis=0)
            same_total += tl.sum(tl.where(equal, value, 0.0), axis=0)
        if TOKENS:
            long = tl.where(member, tl.load(length + index, mask=index < count, other=0.0), 0.0)
            weight += tl.sum(long, axis=0)
            weighted += tl.sum(long * value, axis=0)
    mean = total / tl.maximum(size, 1.0)
    token_mean = weighted / tl.maximum(weight, 1.0)
    square, token_square, worst = one, one, one
    for first in range(0, count, TILE):
        index = first + tl.arange(0, TILE)
        value = tl.load(reward + index, mask=index < count, other=float("nan"))
        member = (tl.load(group + index, mask=index < count, other=0) == my_group) & (value == value)
        distance = tl.where(member, value - mean, 0.0)
        square += tl.sum(distance * distance, axis=0)
        if TOKENS:
            long = tl.where(member, tl.load(length + index, mask=index < count, other=0.0), 0.0)
            distance = tl.where(member, value - token_mean, 0.0)
            token_square += tl.sum(long * distance * distance, axis=0)
            worst = tl.maximum(worst, tl.max(tl.where(long > 0, tl.abs(distance), 0.0), axis=0))
    varies = largest > smallest
    std = tl.where(varies, tl.sqrt(square / tl.maximum(size - 1.0, 1.0)), 0.0)
    value = tl.where(varies, (mine - mean) / (std + std_floor), 0.0)
    if TOKENS:
        deviation = tl.sqrt(token_square / tl.maximum(weight, 1.0)) + FLOOR
        plain = (mine - mean) / (std + FLOOR)
        value = tl.where(worst / deviation >= guard, plain, (mine - token_mean) / deviation)
        value = tl.where(varies, value, 0.0)
    if HIERARCHICAL:
        top = tl.load(ceiling + here)
        intra = same_total / tl.maximum(same, 1.0) - top
        if SPREAD:
            bound = tl.maximum(size - 1.0, 0.0) / tl.sqrt(tl.maximum(size, 1.0))
            intra = tl.minimum(tl.maximum(intra / (std + std_floor), -bound), bound)
            intra = tl.where(std > std_floor, intra, 0.0)
        value += intra_coef * tl.where(top == top, intra, 0.0)
    value = tl.where(mine == mine, value, 0.0).to(tl.float32)
    if PACKED:
        end = tl.load(start + here + 1)
        for first in range(tl.load(start + here), end, TILE):
            index = first + tl.arange(0, TILE)
            tl.store(out + index, value + tl.zeros((TILE,), tl.float32), mask=index < end)
    else:
        tl.store(out + here + tl.arange(0, 1), value)


def _launch(
    reward_N: torch.Tensor,
    group_N: torch.Tensor,
    start_N: torch.Tensor | None,
    tokens: int,
    *,
    budget_N: torch.Tensor | None = None,
    ceiling_N: torch.Tensor | None = None,
    length_N: torch.Tensor | None = None,
    intra_coef: float = 0.0,
    std_floor: float = 1e-6,
    guard: float = float("inf"),
    spread_scaled: bool = False,
) -> torch.Tensor:
    count = reward_N.numel()
    reward_N = reward_N.double().contiguous()

    def column(value: torch.Tensor | None) -> torch.Tensor:
        return reward_N if value is None else value.double().contiguous()

    group_N = group_N.long().contiguous()
    packed = start_N is not None
    out = torch.empty(tokens if packed else count, dtype=torch.float32, device=reward_N.device)
    if count:
        _advantage[(count,)](
            reward_N, group_N, column(budget_N), column(ceiling_N), column(length_N), start_N if packed else group_N, out, count,
            intra_coef, std_floor, guard, HIERARCHICAL=budget_N is not None, SPREAD=spread_scaled, TOKENS=length_N is not None,
            PACKED=packed, TILE=TILE,
        )  # fmt: skip
    return out


def group_normalised(
    reward_N: torch.Tensor, group_N: torch.Tensor, std_floor: float, start_N: torch.Tensor | None, tokens: int
) -> torch.Tensor:
    """See `kernels.group_normalised_advantage`."""
    return _launch(reward_N, group_N, start_N, tokens, std_floor=std_floor)


def hierarchical(
    reward_N: torch.Tensor, group_N: torch.Tensor, budget_N: torch.Tensor, ceiling_N: torch.Tensor, intra_coef: float,
    std_floor: float, spread_scaled: bool, start_N: torch.Tensor | None, tokens: int,
) -> torch.Tensor:  # fmt: skip
    """See `kernels.hierarchical_advantage`."""
    return _launch(
        reward_N, group_N, start_N, tokens, budget_N=budget_N, ceiling_N=ceiling_N, intra_coef=intra_coef, std_floor=std_floor,
        spread_scaled=spread_scaled,
    )  # fmt: skip


def token_level(
    reward_N: torch.Tensor, length_N: torch.Tensor, group_N: torch.Tensor, guard: float | None, start_N: torch.Tensor | None,
    tokens: int,
) -> torch.Tensor:  # fmt: skip
    """See `kernels.token_level_group_average_advantage`."""
    return _launch(reward_N, group_N, start_N, tokens, length_N=length_N, guard=float("inf") if guard is None else guard)
