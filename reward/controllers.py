"""What moves with training: running means, targets by difficulty, the weight of a token and caps in stages. Pure updates."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from reward.checks import check_like, checked_lengths

LASER_GRID = tuple(range(4096, 16384 + 1, 1024))
"""Lengths in tokens that LASER-D tries as targets."""
LASER_MULTIPLIERS = (1, 2, 5)
"""How many right answers of eight a prompt of low, medium and high pass rate is good for: 1, int(8/3) and int(16/3)."""


def ema(average: float, observed: float, *, decay: float = 0.9) -> float:
    """A running mean: ``decay * average + (1 - decay) * observed``. Raises ValueError for a decay outside [0, 1)."""
    if not 0.0 <= decay < 1.0:
        raise ValueError(f"decay must be in [0, 1), got {decay}")
    return decay * average + (1.0 - decay) * observed


def laser_targets(
    length_N: torch.Tensor,
    band_N: torch.Tensor,
    *,
    grid: Sequence[int] = LASER_GRID,
    multipliers: Sequence[int] = LASER_MULTIPLIERS,
) -> tuple[int, int, int]:
    """LASER-D's target length for prompts of low, medium and high pass rate: the shortest that lets one right answer through.

    The smallest l of the grid with ``int(coverage(l) * multiplier) >= 1``, coverage the share of *all* the band's responses with
    n <= l; the longest of the grid where no l suffices or the band is empty.

    Shapes: length_N (N) in tokens, of the monitor's responses; band_N (N) int64 from `difficulty_bands`; grid in tokens, rising;
    multipliers for band 0, 1 and 2. Returns three lengths. Raises ValueError naming the argument.
    Source: LASER (arXiv 2505.15612) and its code.
    """
    if len(multipliers) != 3 or min(multipliers) < 1:
        raise ValueError(f"multipliers must be three numbers of at least 1, for low, medium and high, got {list(multipliers)}")
    if not grid or grid[0] < 1 or any(a >= b for a, b in zip(grid, grid[1:], strict=False)):
        raise ValueError(f"grid must hold lengths of at least 1 in rising order, got {list(grid)}")
    check_like("band_N", band_N, "length_N", length_N)
    if not bool(((band_N >= 0) & (band_N <= 2)).all()):
        raise ValueError("band_N must hold 0 (low), 1 (medium) or 2 (high)")
    length_N = checked_lengths("length_N", length_N)
    low, medium, high = (_target(length_N[band_N == band], grid, multipliers[band]) for band in range(3))
    return low, medium, high


def _target(length_N: torch.Tensor, grid: Sequence[int], multiplier: int) -> int:
    for length in grid:
        # Counts instead of shares: exact where coverage * multiplier is 1.
        if 0 < length_N.numel() <= int((length_N <= length).sum()) * multiplier:
            return length
    return grid[-1]


def adlp_update(weight: float, accuracy: float, *, rate: float = 1e-3, target: float = 0.62) -> float:
    """A-DLP's next weight of a token: ``max(0, weight + rate * (accuracy - target))``: shorter while accuracy lasts.

    accuracy: of the step's answers, in [0, 1]. Raises ValueError for any other or a negative weight.
    Source: Thinking Fast and Right (arXiv 2505.18298).
    """
    if not 0.0 <= accuracy <= 1.0:
        raise ValueError(f"accuracy must be in [0, 1], got {accuracy}")
    if not weight >= 0.0:
        raise ValueError(f"weight must be at least 0, got {weight}")
    return max(0.0, weight + rate * (accuracy - target))
