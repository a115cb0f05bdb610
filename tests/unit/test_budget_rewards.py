"""Rewards under a budget against hand-worked values: HBPO (beta 4, L 4096, alpha 1/4096) and every other budget rule."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

import reward.budget
from reward.budget import (
    budget_ceiling,
    budgetthinker,
    classic,
    cosine,
    hbpo,
    laser,
    laser_de,
    lcpo_exact,
    lcpo_max,
    overlong,
    triangle,
    triangle_mix,
)
from rl.advantage import group_normalised

LENGTH = torch.tensor([400, 600, 800, 1000, 1200, 1400, 1600, 2000])
CORRECT = torch.tensor([True, False, True, True, False, True, True, True])

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


def _full(value: float) -> torch.Tensor:
    return torch.full((8,), value)


def _assert_worked(found: torch.Tensor, worked: list[float]) -> None:
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, torch.tensor(worked, dtype=torch.float32), atol=1e-6, rtol=0)


WORKED: list[tuple[str, Callable[[], torch.Tensor], list[float]]] = [
    ("classic", lambda: classic(CORRECT, LENGTH, max_length=1400), [1, 0, 1, 1, 0, 1, 0, 0]),
    (
        "cosine",
        lambda: cosine(CORRECT, LENGTH, max_length=1600),
        [3.695518, 0, 2.828427, 2.222281, 0, 0.780361, 0, 0],
    ),
    ("lcpo_exact", lambda: lcpo_exact(CORRECT, LENGTH, _full(1000)), [0.82, -0.12, 0.94, 1, -0.06, 0.88, 0.82, 0.7]),
    ("lcpo_max", lambda: lcpo_max(CORRECT, LENGTH, _full(1000)), [0.68, 0, 0.56, 0.5, 0, 0.38, 0.32, 0.2]),
    ("lcpo_max, far below", lambda: lcpo_max(CORRECT, LENGTH, _full(4000)), [1, 0, 1, 1, 0, 1, 1, 1]),
    ("lcpo_max, steep", lambda: lcpo_max(CORRECT, LENGTH, _full(1000), alpha=1e-3, delta=0.2), [0.8, 0, 0.4, 0.2, 0, 0, 0, 0]),
    ("laser", lambda: laser(CORRECT, LENGTH, _full(1024)), [1.5, -0.5, 1.5, 1.5, -0.5, 1, 1, 1]),
    ("laser, no target", lambda: laser(CORRECT, LENGTH, _full(math.inf)), [1.5, -0.5, 1.5, 1.5, -0.5, 1.5, 1.5, 1.5]),
    ("laser, own values", lambda: laser(CORRECT, LENGTH, _full(800), bonus=2, wrong=-1), [3, -1, 3, 1, -1, 1, 1, 1]),
    (
        "overlong",
        lambda: overlong(LENGTH, max_length=2048, buffer=1024),
        [0, 0, 0, 0, -0.171875, -0.367188, -0.5625, -0.953125],
    ),
    ("triangle", lambda: triangle(LENGTH, _full(800)), [0.5, 0.75, 1, 0.75, 0.5, 0.25, 0, 0]),
    ("triangle, higher", lambda: triangle(LENGTH, _full(800), r_max=2), [1, 1.5, 2, 1.5, 1, 0.5, 0, 0]),
    ("budgetthinker", lambda: budgetthinker(CORRECT, LENGTH, _full(1000)), [1, 0.15, 1, 1, 0.204, 0.85, 0.85, 0.85]),
    (
        "budgetthinker, a wrong answer below a loose budget",
        lambda: budgetthinker(CORRECT, LENGTH, _full(2000)),
        [1, 0.2265, 1, 1, 0.276, 1, 1, 1],
    ),
    (
        "budgetthinker, the loose budget begins at 1500",
        lambda: budgetthinker(~CORRECT, LENGTH, torch.tensor([1499.0, 1500, 1500, 1250, 1300, 1499, 1500, 2000])),
        [
            0.15,
            1,
            0.15 + 0.15 * (1 - (7 / 15) ** 2),
            0.15 + 0.15 * 0.36,
            1,
            0.15 + 0.15 * (1 - 16 * (99 / 1499) ** 2),
            0.15 + 0.15 * (1 - 16 / 225),
            0.3,
        ],
    ),
    (
        "budgetthinker, malformed",
        lambda: budgetthinker(CORRECT, LENGTH, _full(1000), ~CORRECT),
        [0.85, 0.15, 0.85, 0.85, 0.204, 0.7, 0.7, 0.7],
    ),
]


@pytest.mark.parametrize(("rule", "worked"), [row[1:] for row in WORKED], ids=[row[0] for row in WORKED])
def test_a_rule_has_its_worked_values(rule: Callable[[], torch.Tensor], worked: list[float]) -> None:
    _assert_worked(rule(), worked)


def test_a_group_under_four_budgets_has_its_worked_hbpo_rewards() -> None:
    b = torch.tensor([512, 512, 1024, 1024, 2048, 2048, 2560, 2560])
    n = torch.tensor([300, 700, 900, 1500, 1800, 2600, 4096, 2400])
    ok = torch.tensor([True, True, True, False, True, True, False, True])
    paper = [3.923141, 3.810838, 3.695518, 0, 2.828427, 2.036238, 0, 2.222281]
    _assert_worked(hbpo(ok, n, b, max_length=4096), paper)
    _assert_worked(hbpo(ok, n, b, max_length=4096, form="min"), [3.921799, *paper[1:]])


def test_lcpo_exact_blames_wrong_answers_for_their_length_and_lcpo_max_does_not() -> None:
    wrong, target = torch.zeros(8, dtype=torch.bool), _full(1000)
    assert lcpo_exact(wrong, LENGTH, target).unique().numel() > 1
    assert lcpo_max(wrong, LENGTH, target).tolist() == [0.0] * 8


def test_the_triangle_has_its_worked_values() -> None:
    n = torch.tensor([0, 50, 100, 200, 250, 300, 399, 400, 4000])
    _assert_worked(triangle(n, torch.full((9,), 200)), [0, 0.25, 0.5, 1, 0.75, 0.5, 0.005, 0, 0])


def test_the_mix_of_hit_and_triangle_has_its_worked_rewards_and_advantages() -> None:
    hit = torch.tensor([True, False, True, False, False, True, False, False])
    n = torch.tensor([357, 100, 178, 400, 715, 500, 800, 30])
    reward = triangle_mix(hit, n, torch.full((8,), 357))
    _assert_worked(reward, [1, 0.056022, 0.89972, 0.17591, 0, 0.919888, 0, 0.016807])
    worked = [1.32587, -0.70443, 1.110188, -0.446575, -0.824922, 1.153565, -0.824922, -0.788774]
    advantage = group_normalised(reward, torch.zeros(8, dtype=torch.int64))
    torch.testing.assert_close(advantage, torch.tensor(worked), atol=1e-5, rtol=0)


def test_laser_de_pays_only_wrong_answers_that_are_long_and_not_repetitive() -> None:
    repetitive = torch.tensor([False, False, False, False, True, False, False, False])
    wrong = ~CORRECT | (LENGTH == 1400)
    reward = laser_de(~wrong, LENGTH, _full(1024), repetitive)
    # 600: wrong and short; 1200: wrong, long, in circles; 1400: wrong, long, exploring
    _assert_worked(reward, [1.5, -0.5, 1.5, 1.5, -0.5, 0.0, 1, 1])
    at_target = laser_de(wrong, LENGTH, LENGTH, torch.zeros(8, dtype=torch.bool))
    assert (at_target[~wrong] == -0.5).all()


def test_the_names_that_others_rely_on_can_be_imported_from_the_budget_module() -> None:
    shared = {
        "hbpo",
        "budget_ceiling",
        "aec",
        "lcpo_exact",
        "lcpo_max",
        "laser",
        "alp",
        "efficient",
        "kimi",
        "overlong",
        "triangle",
    }
    assert shared <= set(reward.budget.__all__)
    assert all(callable(getattr(reward.budget, name)) for name in reward.budget.__all__)


ONE, YES, TWO = torch.tensor([1.0]), torch.tensor([True]), torch.tensor([1.0, 1.0])
NAN, INF, ZERO = torch.tensor([math.nan]), torch.tensor([math.inf]), torch.tensor([0.0])
CAP = {"max_length": 8}
BAD: list[tuple[type[Exception], str, Callable[..., Any], tuple[torch.Tensor, ...], dict[str, Any]]] = [
    (ValueError, "budget_N must be above 0 everywhere; write inf", hbpo, (YES, ONE, ZERO), CAP),
    (ValueError, "budget_N must be above 0 everywhere; write inf", budget_ceiling, (NAN,), CAP),
    (ValueError, "length_N must be finite", hbpo, (YES, NAN, ONE), CAP),
    (TypeError, "correct_N must be bool", hbpo, (ONE, ONE, ONE), CAP),
    (ValueError, "correct_N has shape", hbpo, (torch.tensor([True, False]), ONE, ONE), CAP),
    (ValueError, "length_N has shape", hbpo, (YES, TWO, ONE), CAP),
    (ValueError, "budget_N has shape", hbpo, (YES, ONE, TWO), CAP),
    (ValueError, "form must be", hbpo, (YES, ONE, ONE), {"max_length": 8, "form": "maximum"}),
    (ValueError, "max_length must be above 0", hbpo, (YES, ONE, ONE), {"max_length": 0}),
    (ValueError, "max_length must be above 0", budget_ceiling, (ONE,), {"max_length": -1}),
    (ValueError, "max_length must be above 0", classic, (YES, ONE), {"max_length": 0}),
    (TypeError, "correct_N must be bool", classic, (ONE, ONE), CAP),
    (ValueError, "max_length must be above 0", cosine, (YES, ONE), {"max_length": 0}),
    (ValueError, "length_N must be finite and at least 0", cosine, (YES, -ONE), CAP),
    (ValueError, "target_N has shape", lcpo_exact, (YES, ONE, TWO), {}),
    (ValueError, "target_N must be finite", lcpo_exact, (YES, ONE, INF), {}),
    (ValueError, "target_N must be above 0", lcpo_max, (YES, ONE, ZERO), {}),
    (TypeError, "target_N must hold real numbers", lcpo_max, (YES, ONE, YES), {}),
    (ValueError, "target_N must be above 0 everywhere; write inf", laser, (YES, ONE, NAN), {}),
    (TypeError, "repetitive_N must be bool", laser_de, (YES, ONE, ONE, ONE), {}),
    (ValueError, "repetitive_N has shape", laser_de, (YES, ONE, ONE, torch.tensor([True, True])), {}),
    (ValueError, "buffer must be in", overlong, (ONE,), {"max_length": 8, "buffer": 9}),
    (ValueError, "length_N must be finite", overlong, (INF,), {"max_length": 8, "buffer": 4}),
    (ValueError, "max_length must be above 0", overlong, (ONE,), {"max_length": 0, "buffer": 0}),
    (ValueError, "budget_N must be finite", triangle, (ONE, INF), {}),
    (ValueError, "budget_N has shape", triangle, (ONE, TWO), {}),
    (TypeError, "length_N must hold real numbers", triangle, (YES, ONE), {}),
    (ValueError, "weight must be in", triangle_mix, (YES, ONE, ONE), {"weight": 1.5}),
    (ValueError, "length_N has shape", triangle_mix, (YES, TWO, TWO), {}),
    (TypeError, "well_formed_N must be bool", budgetthinker, (YES, ONE, ONE, ONE), {}),
    (ValueError, "budget_N must be finite", budgetthinker, (YES, ONE, INF), {}),
]


@pytest.mark.parametrize(("kind", "words", "rule", "arguments", "options"), BAD)
def test_bad_arguments_are_named(
    kind: type[Exception], words: str, rule: Callable[..., Any], arguments: tuple[torch.Tensor, ...], options: dict[str, Any]
) -> None:
    with pytest.raises(kind, match=words):
        rule(*arguments, **options)
