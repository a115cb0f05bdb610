"""Rewards of answers given under a token budget, as pure functions of correctness, length and budget."""

from __future__ import annotations

import math

import torch


def hbpo(
    correct_N: torch.Tensor,
    length_N: torch.Tensor,
    budget_N: torch.Tensor,
    *,
    max_length: int,
    beta: float = 4.0,
    alpha: float | None = None,
    form: str = "piecewise",
) -> torch.Tensor:
    """HBPO's reward: flat up to the budget, falling beyond it, 0 for wrong or over-long answers.

    ``C(b) = beta cos(pi b / 2L)``, ``E(n, b) = beta cos(pi n / 2L) - alpha |n - b|``; for a correct answer with n <= L:
    ``piecewise``: C if n <= b else E; ``min``: min(C, E) (the published code); ``beta cos(pi n / 2L)`` without a budget.
    Below 0 for correct answers that overrun their budget by far, as in paper and code.

    Shapes: all (N); correct_N bool; length_N n in response tokens, prefill and end of sequence included; budget_N b in
    tokens, above 0, inf without a budget; max_length L; alpha in reward per token, None is 1/L. Returns float32 (N).
    Raises ValueError or TypeError naming the argument. A malformed answer's reward is the caller's choice.
    Source: HBPO (arXiv 2507.15844, section 3; alpha = 1/L and beta = 4 from its code).
    """
    length_N, budget_N = _checked(length_N, budget_N, max_length=max_length)
    if correct_N.dtype != torch.bool:
        raise TypeError(f"correct_N must be bool, got {correct_N.dtype}")
    if correct_N.shape != length_N.shape:
        raise ValueError(f"correct_N has shape {tuple(correct_N.shape)}, length_N has {tuple(length_N.shape)}")
    if form not in ("piecewise", "min"):
        raise ValueError(f"form must be 'piecewise' or 'min', got {form!r}")
    slope = 1.0 / max_length if alpha is None else alpha
    cosine_N = beta * torch.cos(math.pi * length_N / (2.0 * max_length))
    explore_N = cosine_N - slope * (length_N - budget_N).abs()
    ceiling_N = beta * torch.cos(math.pi * budget_N / (2.0 * max_length))
    if form == "piecewise":
        budgeted_N = torch.where(length_N <= budget_N, ceiling_N, explore_N)
    else:
        budgeted_N = torch.minimum(explore_N, ceiling_N)
    reward_N = torch.where(torch.isinf(budget_N), cosine_N, budgeted_N)
    return torch.where(correct_N & (length_N <= max_length), reward_N, 0.0).float()


def budget_ceiling(budget_N: torch.Tensor, *, max_length: int, beta: float = 4.0) -> torch.Tensor:
    """The most a correct answer earns under its budget: ``C(b) = beta cos(pi b / 2L)``.

    Shapes: budget_N (N) in tokens, above 0, inf without a budget. Returns float32 (N), NaN without a budget: there is no
    ceiling to compare with. Raises ValueError for budgets that are NaN or not above 0. Source: HBPO (arXiv 2507.15844).
    """
    _, budget_N = _checked(torch.zeros_like(budget_N), budget_N, max_length=max_length)
    ceiling_N = beta * torch.cos(math.pi * budget_N / (2.0 * max_length))
    return torch.where(torch.isinf(budget_N), torch.nan, ceiling_N).float()


def overlong(length_N: torch.Tensor, *, max_length: int, buffer: int, factor: float = 1.0) -> torch.Tensor:
    """DAPO's soft penalty on the last ``buffer`` tokens before the cap, to be added to the reward.

    ``-factor * clamp((n - (L - buffer)) / buffer, 0, 1)``; 0 everywhere for ``buffer=0``, which switches it off.

    Shapes: length_N (N) n in response tokens; max_length L. Returns float32 (N), in [-factor, 0].
    Raises ValueError for a buffer outside [0, max_length]. Source: DAPO (arXiv 2503.14476, equation 13).
    """
    if not 0 <= buffer <= max_length:
        raise ValueError(f"buffer must be in [0, max_length={max_length}], got {buffer}")
    if buffer == 0:
        return torch.zeros_like(length_N, dtype=torch.float32)
    excess_N = length_N.double() - (max_length - buffer)
    return (-factor * (excess_N / buffer).clamp(0.0, 1.0)).float()


def _checked(length_N: torch.Tensor, budget_N: torch.Tensor, *, max_length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Both as float64, after checking that budgets can be budgets."""
    if max_length <= 0:
        raise ValueError(f"max_length must be above 0, got {max_length}")
    if length_N.shape != budget_N.shape:
        raise ValueError(f"length_N has shape {tuple(length_N.shape)}, budget_N has {tuple(budget_N.shape)}")
    budget_N = budget_N.double()
    if not bool((budget_N > 0).all()):
        raise ValueError("budget_N must be above 0 everywhere; write inf for a rollout without a budget")
    return length_N.double(), budget_N
