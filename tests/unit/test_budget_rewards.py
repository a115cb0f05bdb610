"""HBPO's reward against hand-worked values (beta 4, L 4096, alpha 1/4096) and the other budget rewards."""

from __future__ import annotations

import math

import pytest
import torch

from reward.budget import budget_ceiling, hbpo, overlong

BUDGETS = (512.0, 1024.0, 2048.0, 2560.0)
CEILINGS = (3.923141, 3.695518, 2.828427, 2.222281)
PIECEWISE = {
    1: CEILINGS,
    100: CEILINGS,
    300: CEILINGS,
    512: CEILINGS,
    600: (3.873093, 3.695518, 2.828427, 2.222281),
    1024: (3.570518, 3.695518, 2.828427, 2.222281),
    1500: (3.115030, 3.240030, 2.828427, 2.222281),
    2048: (2.453427, 2.578427, 2.828427, 2.222281),
    2560: (1.722281, 1.847281, 2.097281, 2.222281),
    3000: (1.024755, 1.149755, 1.399755, 1.524755),
    3500: (0.176821, 0.301821, 0.551821, 0.676821),
    4096: (-0.875, -0.75, -0.5, -0.375),
    4097: (0.0, 0.0, 0.0, 0.0),
}
MINIMUM_AT_512 = {1: 3.875244, 100: 3.896473, 300: 3.921799}


def _row(length: int, form: str) -> torch.Tensor:
    correct = torch.ones(4, dtype=torch.bool)
    return hbpo(correct, torch.full((4,), float(length)), torch.tensor(BUDGETS), max_length=4096, form=form)


@pytest.mark.parametrize("length", PIECEWISE)
def test_the_piecewise_reward_has_its_worked_values(length: int) -> None:
    torch.testing.assert_close(_row(length, "piecewise"), torch.tensor(PIECEWISE[length]), atol=1e-6, rtol=0)


@pytest.mark.parametrize("length", PIECEWISE)
def test_the_minimum_reward_differs_only_for_short_answers_under_the_smallest_budget(length: int) -> None:
    expected = (MINIMUM_AT_512.get(length, PIECEWISE[length][0]), *PIECEWISE[length][1:])
    torch.testing.assert_close(_row(length, "min"), torch.tensor(expected), atol=1e-6, rtol=0)


def test_the_ceiling_is_the_reward_at_the_budget_and_missing_without_one() -> None:
    ceiling = budget_ceiling(torch.tensor([*BUDGETS, math.inf]), max_length=4096)
    torch.testing.assert_close(ceiling, torch.tensor([*CEILINGS, math.nan]), atol=1e-6, rtol=0, equal_nan=True)
    assert ceiling.dtype == torch.float32


@pytest.mark.parametrize("form", ["piecewise", "min"])
def test_a_wrong_answer_earns_nothing(form: str) -> None:
    wrong = torch.zeros(3, dtype=torch.bool)
    reward = hbpo(wrong, torch.tensor([1, 600, 9000]), torch.tensor([512.0, 512.0, math.inf]), max_length=4096, form=form)
    assert reward.tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("form", ["piecewise", "min"])
def test_without_a_budget_only_the_cosine_counts(form: str) -> None:
    correct = torch.ones(4, dtype=torch.bool)
    reward = hbpo(correct, torch.tensor([0, 2048, 4096, 4097]), torch.full((4,), math.inf), max_length=4096, form=form)
    torch.testing.assert_close(reward, torch.tensor([4.0, 2.828427, 0.0, 0.0]), atol=1e-6, rtol=0)


def test_alpha_is_the_slope_away_from_the_budget() -> None:
    correct, length, budget = torch.tensor([True]), torch.tensor([600]), torch.tensor([512])
    flat = hbpo(correct, length, budget, max_length=4096, alpha=0.0)
    steep = hbpo(correct, length, budget, max_length=4096, alpha=0.01)
    assert float(flat - steep) == pytest.approx(0.88, abs=1e-6)


def test_a_correct_answer_that_overruns_by_far_is_worth_less_than_a_wrong_one() -> None:
    first_negative = {512: 3602, 1024: 3673, 2048: 3815, 2560: 3885}
    for budget, length in first_negative.items():
        reward = hbpo(torch.tensor([True] * 2), torch.tensor([length - 1, length]), torch.tensor([budget] * 2), max_length=4096)
        assert reward[0] >= 0 > reward[1]


def test_overlong_grows_linearly_over_the_buffer_and_stops_at_the_factor() -> None:
    length = torch.tensor([1, 6144, 7168, 8192, 10240, 20000])
    penalty = overlong(length, max_length=10240, buffer=4096)
    assert penalty.tolist() == [0.0, 0.0, -0.25, -0.5, -1.0, -1.0]
    assert overlong(length, max_length=10240, buffer=4096, factor=0.5)[4] == -0.5


def test_overlong_without_a_buffer_is_switched_off() -> None:
    assert overlong(torch.tensor([1, 10240, 20000]), max_length=10240, buffer=0).tolist() == [0.0, 0.0, 0.0]


def test_bad_arguments_are_named() -> None:
    one, yes = torch.tensor([1.0]), torch.tensor([True])
    with pytest.raises(ValueError, match="budget_N must be above 0"):
        hbpo(yes, one, torch.tensor([0.0]), max_length=8)
    with pytest.raises(ValueError, match="budget_N must be above 0"):
        budget_ceiling(torch.tensor([math.nan]), max_length=8)
    with pytest.raises(TypeError, match="correct_N must be bool"):
        hbpo(one, one, one, max_length=8)
    with pytest.raises(ValueError, match="correct_N has shape"):
        hbpo(torch.tensor([True, False]), one, one, max_length=8)
    with pytest.raises(ValueError, match="length_N has shape"):
        hbpo(yes, torch.ones(2), one, max_length=8)
    with pytest.raises(ValueError, match="form must be"):
        hbpo(yes, one, one, max_length=8, form="maximum")
    with pytest.raises(ValueError, match="buffer must be in"):
        overlong(one, max_length=8, buffer=9)
