from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from rl.bootstrap import aligned, common_problems, difference, paired_bootstrap, ratio
from tests.benchmarks.learning import worst_window

GRIDS = hnp.arrays(np.float64, st.tuples(st.integers(1, 4), st.integers(1, 12)), elements=st.floats(0.125, 1.0))


def test_a_change_that_is_the_same_everywhere_has_an_interval_of_no_width() -> None:
    before = np.array([[0.25, 0.5, 0.75], [0.0, 0.5, 1.0]])
    gained = paired_bootstrap(before, before + 0.125, difference, draws=200)
    assert (gained.estimate, gained.low, gained.high) == pytest.approx((0.125, 0.125, 0.125))
    halved = paired_bootstrap(before + 1, (before + 1) / 2, ratio, draws=200)
    assert (halved.estimate, halved.low, halved.high) == pytest.approx((0.5, 0.5, 0.5))


def test_the_ratio_is_of_means_and_not_a_mean_of_ratios() -> None:
    found = paired_bootstrap(np.array([[10.0, 90.0]]), np.array([[10.0, 40.0]]), ratio, draws=10)
    assert found.estimate == pytest.approx(0.5)


def test_the_interval_of_one_seed_matches_the_normal_one() -> None:
    generator = np.random.default_rng(1)
    before = np.zeros((1, 400))
    after = generator.normal(1.0, 2.0, size=(1, 400))
    found = paired_bootstrap(before, after, difference, draws=20_000)
    half_width = 1.96 * after.std() / 20
    assert found.high - found.estimate == pytest.approx(half_width, rel=0.06)
    assert found.estimate - found.low == pytest.approx(half_width, rel=0.06)


def test_seeds_that_differ_widen_the_interval_however_many_problems_there_are() -> None:
    before = np.zeros((3, 5000))
    after = np.repeat([[0.0], [0.3], [0.6]], 5000, axis=1)
    found = paired_bootstrap(before, after, difference)
    # 1 of 27 draws takes the worst seed three times: 3.7 % on each side, so the 95 % interval is the whole range.
    assert (found.low, found.high) == pytest.approx((0.0, 0.6))


def test_the_same_seed_gives_the_same_interval() -> None:
    generator = np.random.default_rng(2)
    before, after = generator.random((2, 3, 40))
    assert paired_bootstrap(before, after, difference, seed=5) == paired_bootstrap(before, after, difference, seed=5)
    assert paired_bootstrap(before, after, difference, seed=5) != paired_bootstrap(before, after, difference, seed=6)


@given(GRIDS, st.floats(0.5, 0.99))
def test_the_interval_lies_within_what_single_cells_allow(before: np.ndarray, level: float) -> None:
    after = before[::-1, ::-1]
    found = paired_bootstrap(before, after, difference, draws=100, level=level)
    spread = before.max() - before.min() + 1e-12
    assert -spread <= found.low <= found.high <= spread
    assert found.estimate == pytest.approx(0.0, abs=1e-12)


def test_grids_that_cannot_be_paired_are_refused() -> None:
    grid = np.zeros((2, 3))
    with pytest.raises(ValueError, match="same non-empty"):
        paired_bootstrap(grid, np.zeros((3, 2)), difference)
    with pytest.raises(ValueError, match="same non-empty"):
        paired_bootstrap(np.zeros((0, 3)), np.zeros((0, 3)), difference)
    with pytest.raises(ValueError, match="not finite"):
        paired_bootstrap(grid, np.full((2, 3), np.nan), difference)
    with pytest.raises(ValueError, match="level=95"):
        paired_bootstrap(grid, grid, difference, level=95)


def test_only_problems_that_every_result_has_are_compared() -> None:
    one = {"b": {"accuracy": 0.5}, "a": {"accuracy": 1.0}, "c": {"accuracy": 0.0}}
    two = {"a": {"accuracy": 0.25}, "b": {"accuracy": 0.75}}
    problems = common_problems([one, two])
    assert problems == ["a", "b"]
    assert aligned([one, two], "accuracy", problems).tolist() == [[1.0, 0.5], [0.25, 0.75]]
    with pytest.raises(ValueError, match="share no problem"):
        common_problems([one, {"d": {"accuracy": 1.0}}])


def test_the_worst_window_is_found_wherever_it_is() -> None:
    assert worst_window([1.0, 1.0, 0.0, 0.5, 1.0], 2) == (0.25, 2)
    assert worst_window([0.0, 0.5, 1.0], 2) == (0.25, 0)
    assert worst_window([1.0, 0.5, 0.0], 2) == (0.25, 1)
    assert worst_window([0.2, 0.4], 30) == (pytest.approx(0.3), 0)
    with pytest.raises(ValueError, match="no window"):
        worst_window([], 30)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=60), st.integers(1, 30))
def test_no_window_is_below_the_worst_one(values: list[float], width: int) -> None:
    worst, start = worst_window(values, width)
    width = min(width, len(values))
    means = [sum(values[i : i + width]) / width for i in range(len(values) - width + 1)]
    assert worst == pytest.approx(min(means), abs=1e-12)
    assert means[start] == pytest.approx(worst, abs=1e-12)
