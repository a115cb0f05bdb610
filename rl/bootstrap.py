"""Paired bootstrap of before/after measurements on the same problems over several training seeds; pure statistics.

Shapes: ``_SP`` one value per training seed and problem, ``_D`` one per bootstrap draw.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Statistic = Callable[[Array, Array], Array]
"""From the mean before and the mean after (one value per draw) to the figure of interest."""


@dataclass(frozen=True)
class Interval:
    """A figure and the percentile interval of its bootstrap draws."""

    estimate: float
    low: float
    high: float


def difference(before: Array, after: Array) -> Array:
    """``after - before``."""
    return after - before


def ratio(before: Array, after: Array) -> Array:
    """``after / before``."""
    return after / before


def paired_bootstrap(
    before_SP: Array, after_SP: Array, statistic: Statistic, *, draws: int = 10_000, level: float = 0.95, seed: int = 0
) -> Interval:
    """Interval of ``statistic(mean before, mean after)`` when seeds and problems are both drawn again.

    Every draw takes S seeds and P problems with replacement, independently of each other, and averages over the grid they span:
    all seeds answer the same problems, so a (seed, problem) pair is not a sample of its own, and drawing pairs would give
    intervals that are too narrow (Owen, "The pigeonhole bootstrap", Annals of Applied Statistics 2007, section 3). Before and
    after always come from the same draw. Inputs float (S, P), finite. Raises ValueError for shapes that differ, empty input,
    values that are not finite, or a level outside (0, 1).
    """
    before, after = np.asarray(before_SP, dtype=np.float64), np.asarray(after_SP, dtype=np.float64)
    if before.shape != after.shape or before.ndim != 2 or before.size == 0:
        raise ValueError(f"before {before.shape} and after {after.shape} must be the same non-empty (seeds, problems) grid")
    if not (np.isfinite(before).all() and np.isfinite(after).all()):
        raise ValueError("a value is not finite; leave out problems without a scored answer first")
    if not 0 < level < 1:
        raise ValueError(f"level={level} must lie between 0 and 1")
    if draws < 1:
        raise ValueError(f"draws={draws} must be at least 1")
    seeds, problems = before.shape
    generator = np.random.default_rng(seed)
    # How often each seed and each problem was drawn, as shares: a draw's mean is then share_S @ values_SP @ share_P.
    share_DS = generator.multinomial(seeds, np.full(seeds, 1 / seeds), size=draws) / seeds
    share_DP = generator.multinomial(problems, np.full(problems, 1 / problems), size=draws) / problems
    drawn_D = statistic(((share_DS @ before) * share_DP).sum(1), ((share_DS @ after) * share_DP).sum(1))
    tail = (1 - level) / 2
    low, high = np.quantile(drawn_D, [tail, 1 - tail])
    estimate = statistic(np.array([before.mean()]), np.array([after.mean()]))[0]
    return Interval(float(estimate), float(low), float(high))


def aligned(results: Sequence[Mapping[str, Mapping[str, float]]], name: str, problems: Sequence[str]) -> Array:
    """The figure ``name`` of each seed's results (problem -> figures) as a (seeds, problems) grid, problems as listed."""
    return np.array([[result[problem][name] for problem in problems] for result in results], dtype=np.float64)


def common_problems(results: Sequence[Mapping[str, object]]) -> list[str]:
    """Problems that every result has, sorted; ValueError when there is none."""
    if not results:
        raise ValueError("there are no results to compare")
    common = set(results[0]).intersection(*results[1:])
    if not common:
        raise ValueError("the results share no problem, so nothing can be paired; were they made with different data settings?")
    return sorted(common)
