"""Figures that put accuracy and tokens of a trained model beside those of the model it started from; pure.

Shapes: ``_N`` one value per held-out answer, ``_L`` one per cap of 1, 2, ..., max_length tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rl.types import BudgetKind

Array = NDArray[np.float64]


def accuracy_efficiency(
    accuracy: float,
    tokens: float,
    *,
    start_accuracy: float,
    start_tokens: float,
    alpha: float = 1.0,
    beta: float = 3.0,
    gamma: float = 5.0,
) -> float:
    """Accuracy-Efficiency Score (AES): tokens saved, with accuracy gained worth three times and accuracy lost five times as much.

        AES = alpha dL + beta |dA|   where dA >= 0,   else   alpha dL - gamma |dA|
        dL = (L0 - L) / L0,   dA = (A - A0) / A0

    A, L: accuracy (share) and mean response length (tokens); A0, L0: those of the start model, whose own score is 0.
    Raises ValueError where A0 or L0 is not above 0. Source: O1-Pruner (arXiv 2501.12570), with its constants 1, 3 and 5.
    """
    if start_accuracy <= 0 or start_tokens <= 0:
        raise ValueError(f"AES needs a start with accuracy and tokens above 0, not {start_accuracy} and {start_tokens}")
    shortened = (start_tokens - tokens) / start_tokens
    gained = (accuracy - start_accuracy) / start_accuracy
    return alpha * shortened + (beta if gained >= 0 else gamma) * gained


def tokens_per_correct(accuracy: float, tokens: float) -> float:
    """``L / A``: response tokens spent for one correct answer; infinite where nothing is correct.

    accuracy: share; tokens: mean response length.
    """
    return tokens / accuracy if accuracy > 0 else float("inf")


def accuracy_within(correct_N: ArrayLike, length_N: ArrayLike, *, max_length: int) -> Array:
    """``J(L)``: share of the answers that are correct and at most L tokens long, for L = 1, ..., max_length.

    Returns float64 (max_length,). correct_N: bool or 0/1; length_N: integer tokens. Raises ValueError for no answers, shapes that
    differ, or a length outside 0 ... max_length.
    """
    correct, length = np.asarray(correct_N, dtype=bool), np.asarray(length_N, dtype=np.int64)
    if correct.shape != length.shape or correct.ndim != 1 or correct.size == 0:
        raise ValueError(f"correct_N {correct.shape} and length_N {length.shape} must be the same non-empty list of answers")
    if length.min() < 0 or length.max() > max_length:
        raise ValueError(f"lengths from {length.min()} to {length.max()} do not lie between 0 and max_length={max_length}")
    count = np.bincount(length[correct], minlength=max_length + 1)
    return count.cumsum()[1:] / length.size


def efficiency_frontier(within_KL: Sequence[Array]) -> Array:
    """``max over models of J(L)``: the best accuracy that any model of a pool reaches within each cap; float64 (max_length,).

    Raises ValueError for an empty pool. Source: REO-RL (arXiv 2506.07104), whose pool is many fine-tunes of one model.
    """
    if not within_KL:
        raise ValueError("a frontier needs at least one model")
    return np.max(np.stack(within_KL), axis=0)


def efficiency_gap(within_L: Array, frontier_L: Array) -> float:
    """Reasoning Efficiency Gap as a mean: ``1/max_length * sum over L of (frontier(L) - J(L))``, a share between 0 and 1.

    The paper sums; the mean does not grow with max_length. 0 where the model is the frontier. It is relative to the pool behind
    the frontier and cannot be compared across pools. Raises ValueError for shapes that differ. Source: REO-RL (arXiv 2506.07104).
    """
    if within_L.shape != frontier_L.shape:
        raise ValueError(f"{within_L.shape} and {frontier_L.shape} are not the same caps")
    return float((frontier_L - within_L).mean())


def adherence(lengths: Mapping[int, Sequence[int]], kind: BudgetKind) -> float:
    """How answers kept the budgets they were asked under: share within an AT_MOST one, mean distance from an EXACT one.

    lengths: budget (tokens) -> response lengths (tokens); every answer counts once. Raises ValueError for no answers or another
    kind of budget.
    """
    pairs = [(length, budget) for budget, answers in lengths.items() for length in answers]
    if not pairs or kind not in (BudgetKind.AT_MOST, BudgetKind.EXACT):
        raise ValueError(f"{len(pairs)} answers under a budget of kind {kind.value} cannot have kept it")
    if kind is BudgetKind.AT_MOST:
        return sum(length <= budget for length, budget in pairs) / len(pairs)
    return sum(abs(length - budget) for length, budget in pairs) / len(pairs)
