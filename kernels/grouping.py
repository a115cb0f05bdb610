"""Advantages of sampled groups, one value per rollout or broadcast to the packed tokens of all rollouts.

NaN marks a missing member: it enters no statistic and its advantage is 0. Arithmetic is float64, results are float32 (float64
where ``backend="reference"`` gets float64 rewards). Groups may have any number, size and order.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch

from kernels import eager_advantage, reference_advantage
from kernels.backends import load_triton, pick_backend

_TORCH: dict[str, ModuleType] = {"reference": reference_advantage, "eager": eager_advantage}


def group_normalised_advantage(
    reward_N: torch.Tensor,
    group_N: torch.Tensor,
    *,
    std_floor: float = 1e-6,
    start_N: torch.Tensor | None = None,
    tokens: int | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Reward relative to its group, in sample standard deviations.

    ``A_k = (R_k - mean R) / (std R + std_floor)``, std with n - 1; 0 in a group of one or of equal rewards.

    Shapes: reward_N (N), NaN for a missing member; group_N (N) integer ids in any order. Returns float32 (N), or (tokens) when
    ``start_N`` (N+1), the offsets of each rollout's packed tokens, and their number are given. Raises ValueError for shapes that
    differ or infinite rewards (values are checked on CPU only). Source: GRPO (Shao et al. 2024, section 4.1).
    """
    _check(reward_N, group_N)
    return _run("group_normalised", backend, reward_N, (reward_N.detach(), group_N, std_floor), start_N, tokens)


def hierarchical_advantage(
    reward_N: torch.Tensor,
    group_N: torch.Tensor,
    budget_N: torch.Tensor,
    ceiling_N: torch.Tensor,
    *,
    intra_coef: float = 1.0,
    std_floor: float = 1e-6,
    intra_scale: str = "none",
    start_N: torch.Tensor | None = None,
    tokens: int | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Two-level advantage: a reward against its whole group, plus its budget's subgroup against the budget's ceiling.

    ``A_k = (R_k - mean R) / (std R + std_floor) + intra_coef * (mean_{j: b_j = b_k} R_j - C_k)``; the sum is not centred,
    so it is negative on average unless every subgroup reaches its ceiling.

    ``intra_scale="spread"`` (not in the paper) divides the second term by the same ``std R + std_floor``, leaves it out of
    flat groups, and bounds it by the largest value the first term can take, (n - 1) / sqrt(n): without the bound a group
    whose rewards differ by a hair would get a term of any size.

    Shapes: all (N); reward_N NaN for a missing member; group_N integer ids in any order; budget_N in tokens, equal values
    form a subgroup (inf for members without a budget); ceiling_N in reward units, NaN switches the second term off.
    Returns and packs like `group_normalised_advantage`. Raises ValueError for shapes that differ, an unknown intra_scale and, on
    CPU, infinite rewards or NaN budgets. Source: HBPO (arXiv 2507.15844, equation 5); sample std as in its published code.
    """
    if intra_scale not in ("none", "spread"):
        raise ValueError(f"intra_scale must be 'none' or 'spread', got {intra_scale!r}")
    _check(reward_N, group_N)
    _check_lengths(reward_N, budget_N=budget_N, ceiling_N=ceiling_N)
    if budget_N.device.type == "cpu" and bool(torch.isnan(budget_N.double()).any()):
        raise ValueError("budget_N holds NaN; write inf for a member without a budget")
    arguments = (reward_N.detach(), group_N, budget_N, ceiling_N, intra_coef, std_floor, intra_scale == "spread")
    return _run("hierarchical", backend, reward_N, arguments, start_N, tokens)


def token_level_group_average_advantage(
    reward_N: torch.Tensor,
    length_N: torch.Tensor,
    group_N: torch.Tensor,
    *,
    guard: float | None = 5.0,
    start_N: torch.Tensor | None = None,
    tokens: int | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Reward relative to its group where every token, not every response, has one vote.

    ``mu = sum_i l_i R_i / sum_i l_i``, ``s^2 = sum_i l_i (R_i - mu)^2 / sum_i l_i``, ``A_i = (R_i - mu) / (s + 1e-6)``;
    a group in which some ``|A_i| >= guard`` takes `group_normalised_advantage` instead (None: never).

    Shapes: reward_N (N), NaN for a missing member; length_N (N) in tokens, 0 or more; group_N (N) integer ids. Returns and packs
    like `group_normalised_advantage`; one value for all tokens of a response. Raises ValueError for shapes that differ and, on
    CPU, infinite rewards or negative or non-finite lengths. Source: HAPO (arXiv 2509.16591), part B; the guard is code only.
    """
    _check(reward_N, group_N)
    _check_lengths(reward_N, length_N=length_N)
    if length_N.device.type == "cpu" and not bool((torch.isfinite(length_N) & (length_N >= 0)).all()):
        raise ValueError("length_N holds a negative or non-finite length")
    return _run("token_level", backend, reward_N, (reward_N.detach(), length_N, group_N, guard), start_N, tokens)


def centred_advantage(advantage_N: torch.Tensor, valid_N: torch.Tensor, group_N: torch.Tensor | None = None) -> torch.Tensor:
    """Advantages minus their mean over valid members, of each group or (``group_N=None``) of the whole batch.

    Shapes: advantage_N (N); valid_N (N) bool; group_N (N) integer ids or None. Returns float32 (N), 0 where not valid.
    """
    value_N = advantage_N.double()
    group_N = torch.zeros_like(valid_N, dtype=torch.int64) if group_N is None else group_N
    _check_lengths(value_N, valid_N=valid_N, group_N=group_N)
    groups = eager_advantage.find_groups(group_N, valid_N)
    value = groups.shaped(value_N)
    return groups.result(value - groups.total(value) / groups.size.clamp(min=1.0)).float()


def _run(
    name: str, backend: str, reward_N: torch.Tensor, arguments: tuple[Any, ...], start_N: torch.Tensor | None, tokens: int | None
) -> torch.Tensor:
    """The estimator ``name`` of a backend, broadcast to tokens if asked for."""
    if (start_N is None) != (tokens is None):
        raise ValueError("start_N and tokens must be given together: the offsets of the packed tokens and their number")
    if start_N is not None and start_N.shape != (reward_N.numel() + 1,):
        raise ValueError(f"start_N has shape {tuple(start_N.shape)}, expected ({reward_N.numel() + 1},)")
    if start_N is not None and start_N.device.type == "cpu" and int(start_N[-1]) != tokens:
        raise ValueError(f"start_N ends at {int(start_N[-1])}, tokens is {tokens}; they must agree")
    chosen = pick_backend(backend, reward_N, ("reference", "eager", "triton"))
    if chosen == "triton":
        return getattr(load_triton("triton_advantage", reward_N), name)(*arguments, start_N, tokens or 0)
    module = _TORCH[chosen]
    result = getattr(module, name)(arguments[0].double(), *arguments[1:])
    if start_N is not None:
        result = module.to_tokens(result, start_N, tokens)
    return result if chosen == "reference" and reward_N.dtype == torch.float64 else result.float()


def _check(reward_N: torch.Tensor, group_N: torch.Tensor) -> None:
    if reward_N.dim() != 1:
        raise ValueError(f"reward_N must have one dimension, got shape {tuple(reward_N.shape)}")
    _check_lengths(reward_N, group_N=group_N)
    if group_N.is_floating_point():
        raise TypeError(f"group_N must hold integer ids, got {group_N.dtype}")
    if reward_N.device.type == "cpu" and bool(torch.isinf(reward_N).any()):
        raise ValueError("reward_N holds an infinite reward; NaN marks a missing member, anything else must be finite")


def _check_lengths(like_N: torch.Tensor, **values: torch.Tensor) -> None:
    for name, value in values.items():
        if value.shape != like_N.shape:
            raise ValueError(f"{name} has shape {tuple(value.shape)}, expected {tuple(like_N.shape)}")
