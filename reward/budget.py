"""Rewards of answers given under a token budget, as pure functions of correctness, length and budget.

Those that also compare an answer with its group, its prompt's history or the start policy live in reward/relative.py and can be
imported from here too.
"""

from __future__ import annotations

import math

import torch

from reward.checks import (
    check_flags,
    check_like,
    check_max_length,
    checked_answers,
    checked_lengths,
    checked_positive,
)
from reward.relative import (
    adaptthink,
    adlp,
    aec,
    alp,
    dast,
    dast_budget,
    difficulty_bands,
    efficient,
    group_mean_length,
    grpo_lead,
    history_min,
    kimi,
    lead_weight,
    o1_pruner,
    s_grpo,
    shorterbetter,
)

__all__ = [
    "adaptthink",
    "adlp",
    "aec",
    "alp",
    "budget_ceiling",
    "budgetthinker",
    "classic",
    "cosine",
    "dast",
    "dast_budget",
    "difficulty_bands",
    "efficient",
    "group_mean_length",
    "grpo_lead",
    "hbpo",
    "history_min",
    "kimi",
    "laser",
    "laser_de",
    "lcpo_exact",
    "lcpo_max",
    "lead_weight",
    "o1_pruner",
    "overlong",
    "s_grpo",
    "shorterbetter",
    "triangle",
    "triangle_mix",
]

NO_BUDGET = "a rollout without a budget"
LOOSE_BUDGET = 1500
"""BudgetThinker: from this many tokens on, a wrong answer is hardly blamed for stopping early."""


def classic(correct_N: torch.Tensor, length_N: torch.Tensor, *, max_length: int) -> torch.Tensor:
    """HBPO's first ablation, no length signal but the cap: ``1[ok] 1[n <= L]``.

    Shapes: all (N); correct_N bool; length_N n and max_length L in response tokens. Returns float32 (N).
    Raises ValueError or TypeError naming the argument. Source: HBPO (arXiv 2507.15844, ablation of the reward).
    """
    check_max_length(max_length)
    length_N = checked_answers(correct_N, length_N)
    return (correct_N & (length_N <= max_length)).float()


def cosine(correct_N: torch.Tensor, length_N: torch.Tensor, *, max_length: int, beta: float = 4.0) -> torch.Tensor:
    """HBPO's second ablation, shorter is better whatever the budget: ``1[ok] 1[n <= L] beta cos(pi n / 2L)``.

    Not rounded; the published code rounds it to two digits.

    Shapes: all (N); correct_N bool; length_N n and max_length L in response tokens. Returns float32 (N), in [0, beta].
    Raises ValueError or TypeError naming the argument. Source: HBPO (arXiv 2507.15844, ablation of the reward).
    """
    check_max_length(max_length)
    length_N = checked_answers(correct_N, length_N)
    reward_N = beta * torch.cos(math.pi * length_N / (2.0 * max_length))
    return torch.where(correct_N & (length_N <= max_length), reward_N, 0.0).float()


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
    check_max_length(max_length)
    length_N = checked_answers(correct_N, length_N)
    check_like("budget_N", budget_N, "length_N", length_N)
    budget_N = checked_positive("budget_N", budget_N, endless=NO_BUDGET)
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
    check_max_length(max_length)
    budget_N = checked_positive("budget_N", budget_N, endless=NO_BUDGET)
    ceiling_N = beta * torch.cos(math.pi * budget_N / (2.0 * max_length))
    return torch.where(torch.isinf(budget_N), torch.nan, ceiling_N).float()


def lcpo_exact(correct_N: torch.Tensor, length_N: torch.Tensor, target_N: torch.Tensor, *, alpha: float = 3e-4) -> torch.Tensor:
    """LCPO-Exact: ``1[ok] - alpha |n* - n|``, for wrong answers too.

    Shapes: all (N); correct_N bool; length_N n and target_N n* in tokens, n* above 0 and finite; alpha in reward per token.
    Returns float32 (N). Raises ValueError or TypeError naming the argument. Source: L1 (arXiv 2503.04697, equation 1).
    """
    length_N = checked_answers(correct_N, length_N)
    check_like("target_N", target_N, "length_N", length_N)
    target_N = checked_positive("target_N", target_N)
    return (correct_N.double() - alpha * (target_N - length_N).abs()).float()


def lcpo_max(
    correct_N: torch.Tensor, length_N: torch.Tensor, target_N: torch.Tensor, *, alpha: float = 3e-4, delta: float = 0.5
) -> torch.Tensor:
    """LCPO-Max: ``1[ok] clamp(alpha (n* - n) + delta, 0, 1)``, so a slight overrun still pays.

    The paper's formula. The released code halves the slope and, unless a flag is set, adds the clamped term to 1[ok].

    Shapes: all (N); correct_N bool; length_N n and target_N n* in tokens, n* above 0 and finite; alpha in reward per token.
    Returns float32 (N), in [0, 1]. Raises ValueError or TypeError naming the argument. Source: L1 (arXiv 2503.04697, equation 2).
    """
    length_N = checked_answers(correct_N, length_N)
    check_like("target_N", target_N, "length_N", length_N)
    target_N = checked_positive("target_N", target_N)
    return torch.where(correct_N, (alpha * (target_N - length_N) + delta).clamp(0.0, 1.0), 0.0).float()


def laser(
    correct_N: torch.Tensor, length_N: torch.Tensor, target_N: torch.Tensor, *, bonus: float = 0.5, wrong: float = -0.5
) -> torch.Tensor:
    """LASER's step: ``1 + bonus 1[n <= n*]`` for a correct answer, ``wrong`` for any other.

    With targets by difficulty (`difficulty_bands`, `reward.controllers.laser_targets`) it is LASER-D. The code gives malformed
    answers -1; that is the caller's choice.

    Shapes: all (N); correct_N bool; length_N n and target_N n* in tokens, n* above 0, inf for no target. Returns float32 (N).
    Raises ValueError or TypeError naming the argument. Source: LASER (arXiv 2505.15612).
    """
    length_N = checked_answers(correct_N, length_N)
    check_like("target_N", target_N, "length_N", length_N)
    target_N = checked_positive("target_N", target_N, endless="a rollout without a target")
    return torch.where(correct_N, 1.0 + bonus * (length_N <= target_N).double(), wrong).float()


def laser_de(
    correct_N: torch.Tensor,
    length_N: torch.Tensor,
    target_N: torch.Tensor,
    repetitive_N: torch.Tensor,
    *,
    bonus: float = 0.5,
    wrong: float = -0.5,
) -> torch.Tensor:
    """LASER-DE: `laser`, and ``wrong + bonus`` for a wrong answer that explores: ``n > n*`` and not repetitive.

    Shapes: all (N); correct_N and repetitive_N bool (`reward.repetition.is_repetitive`); length_N n and target_N n* in tokens.
    Returns float32 (N). Raises ValueError or TypeError naming the argument. Source: LASER (arXiv 2505.15612).
    """
    reward_N = laser(correct_N, length_N, target_N, bonus=bonus, wrong=wrong)
    check_flags("repetitive_N", repetitive_N)
    check_like("repetitive_N", repetitive_N, "length_N", length_N)
    explores_N = ~correct_N & ~repetitive_N & (length_N.double() > target_N.double())
    return torch.where(explores_N, wrong + bonus, reward_N)


def overlong(length_N: torch.Tensor, *, max_length: int, buffer: int, factor: float = 1.0) -> torch.Tensor:
    """DAPO's soft penalty on the last ``buffer`` tokens before the cap, to be added to the reward.

    ``-factor * clamp((n - (L - buffer)) / buffer, 0, 1)``; 0 everywhere for ``buffer=0``, which switches it off.

    Shapes: length_N (N) n in response tokens; max_length L. Returns float32 (N), in [-factor, 0].
    Raises ValueError for a buffer outside [0, max_length] and for lengths that are none.
    Source: DAPO (arXiv 2503.14476, equation 13).
    """
    check_max_length(max_length)
    length_N = checked_lengths("length_N", length_N)
    if not 0 <= buffer <= max_length:
        raise ValueError(f"buffer must be in [0, max_length={max_length}], got {buffer}")
    if buffer == 0:
        return torch.zeros_like(length_N, dtype=torch.float32)
    return (-factor * ((length_N - (max_length - buffer)) / buffer).clamp(0.0, 1.0)).float()


def triangle(length_N: torch.Tensor, budget_N: torch.Tensor, *, r_max: float = 1.0) -> torch.Tensor:
    """RMT's triangle, where too short costs as much as too long: ``r_max max(0, 1 - |n - b| / b)``.

    0 at n = 0, r_max at n = b, 0 again from n = 2b on.

    Shapes: all (N); length_N n and budget_N b in tokens, b above 0 and finite. Returns float32 (N), in [0, r_max].
    Raises ValueError or TypeError naming the argument. Source: Reinforcement Mid-Training (arXiv 2509.24375).
    """
    return _triangle(length_N, budget_N, r_max).float()


def triangle_mix(
    correct_N: torch.Tensor, length_N: torch.Tensor, budget_N: torch.Tensor, *, weight: float = 0.2, r_max: float = 1.0
) -> torch.Tensor:
    """RMT's whole reward: ``(1 - weight) 1[ok] + weight triangle(n, b)``. Weight and r_max are ours: the paper gives neither.

    Shapes: all (N); correct_N bool; length_N n and budget_N b in tokens, b above 0 and finite; weight in [0, 1].
    Returns float32 (N). Raises ValueError or TypeError naming the argument.
    Source: Reinforcement Mid-Training (arXiv 2509.24375).
    """
    if not 0.0 <= weight <= 1.0:
        raise ValueError(f"weight must be in [0, 1], got {weight}")
    check_flags("correct_N", correct_N)
    check_like("length_N", length_N, "correct_N", correct_N)
    return ((1.0 - weight) * correct_N.double() + weight * _triangle(length_N, budget_N, r_max)).float()


def budgetthinker(
    correct_N: torch.Tensor, length_N: torch.Tensor, budget_N: torch.Tensor, well_formed_N: torch.Tensor | None = None
) -> torch.Tensor:
    """BudgetThinker: ``0.7 1[ok] + 0.15 1[well formed] + 0.15 l``, where l says how well the budget was used.

    ``l = 1`` for a correct answer with n <= b; else ``max(0, 1 - s d^2)`` with d = (n - b) / b, and s = 16 but 1 for an
    answer that stays below a budget of 1500 or more. (Below smaller budgets the code's s is 16 too.)

    Shapes: all (N); correct_N and well_formed_N bool, None when all are; length_N n and budget_N b in tokens, b above 0 and
    finite. Returns float32 (N), in [0, 1]. Raises ValueError or TypeError naming the argument.
    Source: BudgetThinker (arXiv 2508.17196) and its code.
    """
    length_N = checked_answers(correct_N, length_N)
    check_like("budget_N", budget_N, "length_N", length_N)
    budget_N = checked_positive("budget_N", budget_N)
    well_formed_N = torch.ones_like(correct_N) if well_formed_N is None else well_formed_N
    check_flags("well_formed_N", well_formed_N)
    check_like("well_formed_N", well_formed_N, "length_N", length_N)
    steepness_N = torch.where((length_N < budget_N) & (budget_N >= LOOSE_BUDGET), 1.0, 16.0)
    used_N = (1.0 - steepness_N * ((length_N - budget_N) / budget_N) ** 2).clamp(min=0.0)
    used_N = torch.where(correct_N & (length_N <= budget_N), 1.0, used_N)
    return (0.7 * correct_N.double() + 0.15 * well_formed_N.double() + 0.15 * used_N).float()


def _triangle(length_N: torch.Tensor, budget_N: torch.Tensor, r_max: float) -> torch.Tensor:
    """`triangle` in float64."""
    length_N = checked_lengths("length_N", length_N)
    check_like("budget_N", budget_N, "length_N", length_N)
    budget_N = checked_positive("budget_N", budget_N)
    return r_max * (1.0 - (length_N - budget_N).abs() / budget_N).clamp(min=0.0)
