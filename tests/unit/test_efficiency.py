"""Hand-worked values of the figures that compare a trained model with its start."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rl.efficiency import (
    accuracy_efficiency,
    accuracy_within,
    adherence,
    efficiency_frontier,
    efficiency_gap,
    tokens_per_correct,
)
from rl.types import BudgetKind

ANSWERS = st.lists(st.tuples(st.booleans(), st.integers(0, 12)), min_size=1, max_size=30)


@pytest.mark.parametrize(
    ("accuracy", "tokens", "expected"),
    [
        (0.5, 100.0, 0.0),  # the start itself
        (0.5, 60.0, 0.4),  # shorter by two fifths: 1 * 0.4
        (0.6, 100.0, 0.6),  # a fifth more accurate: 3 * 0.2
        (0.4, 100.0, -1.0),  # a fifth less accurate: -5 * 0.2
        (0.6, 60.0, 1.0),  # 0.4 + 0.6
        (0.45, 20.0, 0.3),  # 0.8 - 5 * 0.1
        (0.55, 150.0, -0.2),  # -0.5 + 3 * 0.1
    ],
)
def test_aes_weighs_a_loss_of_accuracy_more_than_a_gain_and_a_gain_more_than_tokens(
    accuracy: float, tokens: float, expected: float
) -> None:
    assert accuracy_efficiency(accuracy, tokens, start_accuracy=0.5, start_tokens=100.0) == pytest.approx(expected)


def test_aes_takes_other_weights() -> None:
    found = accuracy_efficiency(0.4, 60.0, start_accuracy=0.5, start_tokens=100.0, alpha=2.0, beta=7.0, gamma=10.0)
    assert found == pytest.approx(2 * 0.4 - 10 * 0.2)


@pytest.mark.parametrize("start", [(0.0, 100.0), (0.5, 0.0)])
def test_aes_of_a_start_without_right_answers_or_tokens_is_refused(start: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="above 0"):
        accuracy_efficiency(0.5, 50.0, start_accuracy=start[0], start_tokens=start[1])


def test_a_correct_answer_costs_the_tokens_of_the_wrong_ones_too() -> None:
    assert tokens_per_correct(0.25, 40.0) == 160.0
    assert tokens_per_correct(0.0, 40.0) == float("inf")


def test_accuracy_within_a_cap_counts_right_answers_that_are_short_enough() -> None:
    # Right at 2, 4 and 4 tokens, wrong at 1: of four answers a quarter is right within 2 and 3, three quarters from 4 on.
    found = accuracy_within([1, 0, 1, 1], [2, 1, 4, 4], max_length=6)
    assert found.tolist() == [0.0, 0.25, 0.25, 0.75, 0.75, 0.75]


@pytest.mark.parametrize(
    ("correct", "lengths", "message"),
    [([1], [1, 2], "same non-empty"), ([], [], "same non-empty"), ([1], [7], "between 0 and"), ([1], [-1], "between 0 and")],
)
def test_answers_that_do_not_fit_are_refused(correct: list[int], lengths: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        accuracy_within(correct, lengths, max_length=6)


@given(ANSWERS)
def test_a_larger_cap_never_loses_accuracy_and_the_largest_loses_none(answers: list[tuple[bool, int]]) -> None:
    correct, lengths = [c for c, _ in answers], [max(1, n) for _, n in answers]
    found = accuracy_within(correct, lengths, max_length=12)
    assert (np.diff(found) >= 0).all()
    assert found[-1] == pytest.approx(sum(correct) / len(correct))


def test_the_gap_is_the_mean_shortfall_from_the_best_at_each_cap() -> None:
    early, late = np.array([0.5, 0.5, 0.5, 0.5]), np.array([0.0, 0.0, 0.75, 1.0])
    frontier = efficiency_frontier([early, late])
    assert frontier.tolist() == [0.5, 0.5, 0.75, 1.0]
    assert efficiency_gap(early, frontier) == pytest.approx((0 + 0 + 0.25 + 0.5) / 4)
    assert efficiency_gap(late, frontier) == pytest.approx((0.5 + 0.5 + 0 + 0) / 4)
    assert efficiency_gap(frontier, frontier) == 0.0


def test_a_frontier_of_nothing_and_caps_that_differ_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        efficiency_frontier([])
    with pytest.raises(ValueError, match="not the same caps"):
        efficiency_gap(np.zeros(3), np.zeros(4))


def test_adherence_is_a_share_for_caps_and_a_distance_for_targets() -> None:
    lengths = {32: [30, 32, 40], 64: [10]}
    assert adherence(lengths, BudgetKind.AT_MOST) == 0.75
    assert adherence(lengths, BudgetKind.EXACT) == pytest.approx((2 + 0 + 8 + 54) / 4)


@pytest.mark.parametrize(
    ("lengths", "kind"), [({}, BudgetKind.AT_MOST), ({32: []}, BudgetKind.EXACT), ({32: [1]}, BudgetKind.FREE)]
)
def test_a_budget_that_nobody_was_asked_to_keep_has_no_adherence(lengths: dict[int, list[int]], kind: BudgetKind) -> None:
    with pytest.raises(ValueError, match="cannot have kept it"):
        adherence(lengths, kind)
