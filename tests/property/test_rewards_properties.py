"""What holds for every length and budget: longer never pays beyond the budget, wrong never pays, limits are limits."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from reward.budget import budget_ceiling, hbpo, overlong

LIMIT = 4096
FORMS = ("piecewise", "min")
lengths = st.integers(1, 2 * LIMIT)
budgets = st.one_of(st.integers(1, LIMIT).map(float), st.just(math.inf))
slopes = st.one_of(st.none(), st.floats(0.0, 0.01))


def _reward(length: int, budget: float, *, correct: bool = True, form: str = "piecewise", alpha: float | None = None) -> float:
    out = hbpo(torch.tensor([correct]), torch.tensor([length]), torch.tensor([budget]), max_length=LIMIT, form=form, alpha=alpha)
    return out.item()


@pytest.mark.parametrize("form", FORMS)
@given(a=lengths, b=lengths, budget=budgets, alpha=slopes)
def test_beyond_the_budget_a_longer_correct_answer_never_earns_more(
    form: str, a: int, b: int, budget: float, alpha: float | None
) -> None:
    start = 1 if math.isinf(budget) else int(budget)
    short, long = sorted(min(LIMIT, max(start, n)) for n in (a, b))
    assert _reward(long, budget, form=form, alpha=alpha) <= _reward(short, budget, form=form, alpha=alpha) + 1e-6


@given(length=lengths, budget=st.integers(1, LIMIT))
def test_within_the_budget_every_correct_answer_earns_the_ceiling(length: int, budget: int) -> None:
    length = min(length, budget)
    ceiling = budget_ceiling(torch.tensor([budget]), max_length=LIMIT).item()
    assert _reward(length, float(budget)) == pytest.approx(ceiling, abs=1e-6)


@pytest.mark.parametrize("form", FORMS)
@given(length=st.integers(1, LIMIT), budget=st.integers(1, LIMIT), alpha=slopes)
def test_no_answer_earns_more_than_its_ceiling(form: str, length: int, budget: int, alpha: float | None) -> None:
    ceiling = budget_ceiling(torch.tensor([budget]), max_length=LIMIT).item()
    assert _reward(length, float(budget), form=form, alpha=alpha) <= ceiling + 1e-6


@given(length=lengths, budget=budgets, alpha=slopes)
def test_the_minimum_form_never_earns_more_than_the_piecewise_form(length: int, budget: float, alpha: float | None) -> None:
    assert _reward(length, budget, form="min", alpha=alpha) <= _reward(length, budget, alpha=alpha) + 1e-6


@pytest.mark.parametrize("form", FORMS)
@given(length=lengths, budget=budgets)
def test_wrong_and_over_long_answers_earn_exactly_nothing(form: str, length: int, budget: float) -> None:
    assert _reward(length, budget, correct=False, form=form) == 0.0
    assert _reward(length + LIMIT, budget, form=form) == 0.0


@given(low=st.integers(1, LIMIT - 1), gap=st.integers(1, LIMIT))
def test_a_smaller_budget_has_a_higher_ceiling(low: int, gap: int) -> None:
    ceiling = budget_ceiling(torch.tensor([low, min(LIMIT, low + gap)]), max_length=LIMIT)
    assert ceiling[0] > ceiling[1]
    assert abs(ceiling[1]) <= 4.0


@given(rows=st.lists(st.tuples(st.booleans(), lengths, budgets), min_size=1, max_size=20))
def test_each_member_is_rewarded_on_its_own(rows: list[tuple[bool, int, float]]) -> None:
    correct, length, budget = (torch.tensor(column) for column in zip(*rows, strict=True))
    together = hbpo(correct, length, budget, max_length=LIMIT)
    assert together.tolist() == [_reward(n, b, correct=c) for c, n, b in rows]


@given(a=lengths, b=lengths, buffer=st.integers(0, LIMIT), factor=st.floats(0, 2))
def test_the_overlong_penalty_never_shrinks_with_length_and_stays_within_its_factor(
    a: int, b: int, buffer: int, factor: float
) -> None:
    short, long = overlong(torch.tensor(sorted((a, b))), max_length=LIMIT, buffer=buffer, factor=factor).tolist()
    assert -factor - 1e-6 <= long <= short <= 0.0
    if max(a, b) <= LIMIT - buffer:
        assert long == 0.0
