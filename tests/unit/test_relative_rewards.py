"""Rewards relative to a group, a history or the start policy: hand-worked values, ties, and why guards are needed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from reward.budget import lcpo_max
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
from rl.advantage import group_normalised

LENGTH = torch.tensor([400, 600, 800, 1000, 1200, 1400, 1600, 2000])
CORRECT = torch.tensor([True, False, True, True, False, True, True, True])
FIRST = torch.tensor([True] + [False] * 7)
NONE = torch.zeros(8, dtype=torch.bool)
GROUP = torch.zeros(8, dtype=torch.int64)


def _full(value: float) -> torch.Tensor:
    return torch.full((8,), value)


WORKED: list[tuple[str, Callable[[], torch.Tensor], Sequence[float]]] = [
    ("alp", lambda: alp(CORRECT, LENGTH, GROUP, max_length=2000), [0.97, -0.045, 0.94, 0.925, -0.09, 0.895, 0.88, 0.85]),
    (
        "alp, one right",
        lambda: alp(FIRST, LENGTH, GROUP, max_length=2000),
        [0.995, -0.0075, -0.01, -0.0125, -0.015, -0.0175, -0.02, -0.025],
    ),
    (
        "alp, none right",
        lambda: alp(NONE, LENGTH, GROUP, max_length=2000),
        [-0.005, -0.0075, -0.01, -0.0125, -0.015, -0.0175, -0.02, -0.025],
    ),
    (
        "efficient",
        lambda: efficient(CORRECT, LENGTH, GROUP),
        [0.981934, 0, 0.968047, 0.959338, 0, 0.940662, 0.931953, 0.918066],
    ),
    ("efficient, one right", lambda: efficient(FIRST, LENGTH, GROUP, alpha=0.4), [0.8, 0, 0, 0, 0, 0, 0, 0]),
    ("efficient, none right", lambda: efficient(NONE, LENGTH, GROUP), [0] * 8),
    ("kimi", lambda: kimi(CORRECT, LENGTH, GROUP), [1.5, 0, 1.25, 1.125, 0, 0.875, 0.75, 0.5]),
    ("kimi, half", lambda: kimi(~CORRECT, LENGTH, GROUP, weight=0.5), [0, 1.1875, 0, 0, 1, -0.0625, -0.125, -0.25]),
    ("kimi, equal lengths", lambda: kimi(CORRECT, _full(7), GROUP), [1, 0, 1, 1, 0, 1, 1, 1]),
    (
        "history_min",
        lambda: history_min(CORRECT, LENGTH, _full(1000)),
        [1.809017, 0, 1.309017, 1, -0.309017, 0.412215, 0.3, 0.3],
    ),
    ("history_min, far over", lambda: history_min(CORRECT, LENGTH, _full(200)), [0.3, -1, 0.3, 0.3, -1, 0.3, 0.3, 0.3]),
    ("history_min, none yet", lambda: history_min(CORRECT, LENGTH, _full(math.inf)), [1, 0, 1, 1, 0, 1, 1, 1]),
    ("history_min, unknown", lambda: history_min(CORRECT, LENGTH, _full(math.nan)), [1, 0, 1, 1, 0, 1, 1, 1]),
    ("shorterbetter", lambda: shorterbetter(CORRECT, LENGTH, GROUP), [2, -0.2, 1.6, 1.4, -0.8, 1, 0.8, 0.4]),
    (
        "shorterbetter, none right",
        lambda: shorterbetter(NONE, LENGTH, GROUP),
        [-0.725, -0.525, -0.325, -0.125, -0.075, -0.275, -0.475, -0.875],
    ),
    ("dast_budget", lambda: dast_budget(CORRECT, LENGTH, GROUP, max_length=2000), [1400] * 8),
    ("dast_budget, none right", lambda: dast_budget(NONE, LENGTH, GROUP, max_length=2000), [2000] * 8),
    (
        "dast",
        lambda: dast(CORRECT, LENGTH, _full(1400)),
        [0.857143, -0.614286, 0.714286, 0.642857, -0.228571, 0.5, 0.428571, 0.285714],
    ),
    ("dast, far over", lambda: dast(CORRECT, LENGTH, _full(400)), [0.5, -0.1, 0.1, 0.1, -0.1, 0.1, 0.1, 0.1]),
    (
        "grpo_lead",
        lambda: grpo_lead(CORRECT, LENGTH, GROUP),
        [1.071443, -1, 1.035105, 1.017401, -1, 0.982896, 0.966085, 0.933321],
    ),
    ("grpo_lead, one right", lambda: grpo_lead(FIRST, LENGTH, GROUP), [1] + [-1] * 7),
    ("lead_weight", lambda: lead_weight(torch.tensor([0.25, 0.5, 0.75, 1])), [1.492638, 1.416556, 0.95, 0.483444]),
    (
        "o1_pruner",
        lambda: o1_pruner(CORRECT, LENGTH, _full(1100), _full(0.7)),
        [2.35, -0.566667, 0.975, 0.7, -1.483333, 0.385714, 0.2875, 0.15],
    ),
    (
        "o1_pruner, clamped",
        lambda: o1_pruner(CORRECT, LENGTH, _full(4000), _full(0), low=-1, high=3),
        [3, 3, 3, 3, 2.333333, 3, 3, 3],
    ),
    ("o1_pruner, from below", lambda: o1_pruner(NONE, LENGTH, _full(1), _full(1)), [-2] * 8),
    ("adaptthink", lambda: adaptthink(CORRECT, FIRST, _full(0.6)), [0.45, -0.6, 0.4, 0.4, -0.6, 0.4, 0.4, 0.4]),
    ("adlp", lambda: adlp(CORRECT, LENGTH, weight=1e-3), [0.6, -0.6, 0.2, 0, -1.2, -0.4, -0.6, -1]),
]


@pytest.mark.parametrize(("reward", "worked"), [row[1:] for row in WORKED], ids=[row[0] for row in WORKED])
def test_a_rule_has_its_worked_values(reward: Callable[[], torch.Tensor], worked: Sequence[float]) -> None:
    result = reward()
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, torch.tensor(worked, dtype=torch.float32), atol=1e-6, rtol=0)


RIGHT, OTHER = (
    {0.5: 2.474867, 0.75: 1.620182, 1: 1.207612, 1.5: 0.724567, 2: 0.540061},
    {
        0.5: -0.353552,
        0.75: -0.540061,
        1: -0.724567,
        1.5: -1.207612,
        2: -1.620182,
    },
)
REWARDED = {
    0.5: [1, 0, 0, 0, 0, 0, 0, 0],
    0.75: [1, 0, 1, 0, 0, 0, 0, 0],
    1: [1, 0, 1, 1, 0, 0, 0, 0],
    1.5: [1, 0, 1, 1, 0, 1, 1, 0],
    2: [1, 0, 1, 1, 0, 1, 1, 1],
}


@pytest.mark.parametrize("effort", REWARDED)
def test_an_effort_has_its_worked_rewards_and_advantages(effort: float) -> None:
    average = group_mean_length(LENGTH, GROUP)
    assert average.tolist() == [1125.0] * 8
    reward = aec(CORRECT, LENGTH, _full(effort), average)
    assert reward.tolist() == REWARDED[effort]
    worked = torch.where(reward == 1, RIGHT[effort], OTHER[effort])
    torch.testing.assert_close(group_normalised(reward, GROUP), worked, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("effort", "worked"),
    [
        (0.5, [1, 0, 0.155556, 0, 0, 0, 0, 0]),
        (0.75, [1, 0, 1, 0.444444, 0, 0, 0, 0]),
        (1, [1, 0, 1, 1, 0, 0.022222, 0, 0]),
    ],
)
def test_a_soft_edge_has_its_worked_values(effort: float, worked: list[float]) -> None:
    reward = aec(CORRECT, LENGTH, _full(effort), _full(1125), soft_delta=0.25)
    torch.testing.assert_close(reward, torch.tensor(worked, dtype=torch.float32), atol=1e-6, rtol=0)


@pytest.mark.parametrize("soft_delta", [0.0, 0.25])
def test_without_an_effort_only_correctness_counts(soft_delta: float) -> None:
    reward = aec(CORRECT, LENGTH, _full(math.inf), _full(10), soft_delta=soft_delta)
    assert reward.tolist() == CORRECT.float().tolist()


def test_an_answer_exactly_at_its_limit_is_within_it() -> None:
    effort = torch.tensor([0.29, 0.57, 1.15], dtype=torch.float64)
    length, average = torch.tensor([29, 57, 115]), torch.full((3,), 100)
    assert (effort * average < length).all()  # in floating point: the limit must not be worked out this way
    assert aec(torch.ones(3, dtype=torch.bool), length, effort, average).tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("effort", "share", "mean"),
    [(0.5, 0.128, 0.398), (0.75, 0.372, 0.549), (1, 0.599, 0.670), (1.5, 0.856, 0.833), (2, 0.949, 0.919), (3, 0.993, 0.981)],
)
def test_with_the_groups_own_average_every_effort_rewards_answers_shorter_than_average(
    effort: float, share: float, mean: float
) -> None:
    count = 200_000
    quantile = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    length = 1000 * torch.exp(0.5 * torch.special.ndtri(quantile))
    average = group_mean_length(length, torch.zeros(count, dtype=torch.int64))
    rewarded = aec(torch.ones(count, dtype=torch.bool), length, torch.full((count,), effort), average) == 1
    assert rewarded.double().mean().item() == pytest.approx(share, abs=1e-3)
    assert (length[rewarded].mean() / average[0]).item() == pytest.approx(mean, abs=1e-3)


def test_groups_are_kept_apart_whatever_their_ids_and_order() -> None:
    group = torch.tensor([7, -1, 7, -1, 2**40])
    length = torch.tensor([10, 400, 30, 200, 5])
    assert group_mean_length(length, group).tolist() == [20, 300, 20, 300, 5]
    assert kimi(torch.ones(5, dtype=torch.bool), length, group).tolist() == [1.5, 0.5, 0.5, 1.5, 1]


@pytest.mark.parametrize(
    ("right", "of", "band"), [(0, 3, 0), (1, 3, 1), (2, 3, 2), (3, 9, 1), (6, 9, 2), (2, 8, 0), (3, 8, 1), (6, 8, 2)]
)
def test_a_band_begins_exactly_at_its_third(right: int, of: int, band: int) -> None:
    bands = difficulty_bands(torch.arange(of) < right, torch.full((of,), 5))
    assert bands.dtype == torch.int64
    assert bands.tolist() == [band] * of


def test_each_later_correct_exit_earns_half_of_the_one_before() -> None:
    correct = torch.tensor([False, True, True, False, True])
    assert s_grpo(correct, torch.arange(5), torch.zeros(5, dtype=torch.int64)).tolist() == [0, 1, 0.5, 0, 0.25]


def test_exits_count_in_the_order_of_the_path_and_in_their_own_path_only() -> None:
    exits = torch.tensor([math.inf, 20.0, 5.0, 10.0, 5.0, math.inf])
    path = torch.tensor([3, 3, 3, 3, 9, 9])
    correct = torch.tensor([True, True, True, False, False, True])
    assert s_grpo(correct, exits, path).tolist() == [0.25, 0.5, 1, 0, 0, 1]


def test_equal_exits_share_their_place() -> None:
    correct = torch.tensor([True, True, True, True])
    assert s_grpo(correct, torch.tensor([8, 3, 3, 9]), torch.zeros(4, dtype=torch.int64)).tolist() == [0.25, 1, 1, 0.125]


def test_no_answers_give_no_rewards() -> None:
    flags, values, ids = torch.zeros(0, dtype=torch.bool), torch.zeros(0), torch.zeros(0, dtype=torch.int64)
    results = [
        aec(flags, values, values, values),
        alp(flags, values, ids, max_length=8),
        efficient(flags, values, ids),
        kimi(flags, values, ids),
        history_min(flags, values, values),
        shorterbetter(flags, values, ids),
        dast_budget(flags, values, ids, max_length=8),
        dast(flags, values, values),
        grpo_lead(flags, values, ids),
        o1_pruner(flags, values, values, values),
        s_grpo(flags, values, ids),
        adaptthink(flags, flags, values),
        adlp(flags, values, weight=0.1),
        difficulty_bands(flags, ids),
        group_mean_length(values, ids),
    ]
    assert all(result.shape == (0,) for result in results)


@pytest.mark.parametrize(("right", "first", "last"), [(0, 1.045, -1.261), (8, 1.309, -1.580)])
def test_a_tiny_length_term_becomes_full_size_where_all_answers_are_wrong_or_all_right(
    right: int, first: float, last: float
) -> None:
    """Why advantage.length_guard exists: division by the group's std makes "wrong but shorter" count as much as "right"."""
    reward = alp(torch.arange(8) < right, LENGTH, GROUP, max_length=2000, beta=1e-4)
    assert (reward.max() - reward.min()) < 1e-4
    advantage = group_normalised(reward, GROUP)
    # float32 rewards near 1 are 6e-8 apart, a few thousandths of their spread here
    assert advantage[0].item() == pytest.approx(first, abs=5e-3)
    assert advantage[-1].item() == pytest.approx(last, abs=5e-3)


def test_a_linear_length_penalty_gives_a_long_correct_answer_a_negative_advantage() -> None:
    """Why the decoupled advantage exists: the answer is right, and is trained against."""
    correct = torch.tensor([True, True, True, False, False, False])
    length = torch.tensor([500, 1000, 6000, 700, 900, 3000])
    reward = lcpo_max(correct, length, torch.full((6,), 8192), alpha=1 / 8192, delta=0.0)
    torch.testing.assert_close(reward, torch.where(correct, 1 - length / 8192, 0.0))
    advantage = group_normalised(reward, torch.zeros(6, dtype=torch.int64))
    assert advantage[2].item() == pytest.approx(-0.1785, abs=1e-4)


ONE, YES, TWO = torch.tensor([1.0]), torch.tensor([True]), torch.tensor([1.0, 1.0])
NAN, INF, ZERO, ID = torch.tensor([math.nan]), torch.tensor([math.inf]), torch.tensor([0.0]), torch.tensor([3])
BAD: list[tuple[type[Exception], str, Callable[..., Any], tuple[torch.Tensor, ...], dict[str, Any]]] = [
    (ValueError, "soft_delta must be at least 0", aec, (YES, ONE, ONE, ONE), {"soft_delta": -0.1}),
    (ValueError, "effort_N must be above 0 everywhere; write inf", aec, (YES, ONE, NAN, ONE), {}),
    (ValueError, "average_N must be above 0", aec, (YES, ONE, ONE, ZERO), {}),
    (ValueError, "average_N must be finite", aec, (YES, ONE, ONE, INF), {}),
    (ValueError, "average_N has shape", aec, (YES, ONE, ONE, TWO), {}),
    (ValueError, "effort_N has shape", aec, (YES, ONE, TWO, ONE), {}),
    (ValueError, "length_N must be finite", aec, (YES, NAN, ONE, ONE), {}),
    (TypeError, "correct_N must be bool", alp, (ONE, ONE, ID), {"max_length": 8}),
    (ValueError, "max_length must be above 0", alp, (YES, ONE, ID), {"max_length": 0}),
    (TypeError, "group_N must hold integer ids", alp, (YES, ONE, ONE), {"max_length": 8}),
    (ValueError, "group_N has shape", efficient, (YES, ONE, torch.tensor([3, 3])), {}),
    (ValueError, "group_N must have one dimension", kimi, (YES[None], ONE[None], ID[None]), {}),
    (TypeError, "group_N must hold integer ids", kimi, (YES, ONE, YES), {}),
    (ValueError, "length_N must be finite and at least 0", kimi, (YES, INF, ID), {}),
    (TypeError, "correct_N must be bool", difficulty_bands, (ONE, ID), {}),
    (ValueError, "group_N has shape .*, correct_N has shape", difficulty_bands, (YES, torch.tensor([1, 2])), {}),
    (ValueError, "shortest_N must be above 0 everywhere; write inf", history_min, (YES, ONE, ZERO), {}),
    (ValueError, "shortest_N has shape", history_min, (YES, ONE, TWO), {}),
    (ValueError, "length_N has shape", shorterbetter, (YES, TWO, ID), {}),
    (ValueError, "max_length must be above 0", dast_budget, (YES, ONE, ID), {"max_length": 0}),
    (ValueError, "budget_N must be finite", dast, (YES, ONE, INF), {}),
    (TypeError, "correct_N must be bool", grpo_lead, (ID, ONE, ID), {}),
    (ValueError, r"pass_rate_N must be in \[0, 1\]", lead_weight, (TWO + 1,), {}),
    (ValueError, "length_N must be above 0", o1_pruner, (YES, ZERO, ONE, ONE), {}),
    (ValueError, "reference_length_N must be above 0", o1_pruner, (YES, ONE, ZERO, ONE), {}),
    (ValueError, r"reference_accuracy_N must be in \[0, 1\]", o1_pruner, (YES, ONE, ONE, NAN), {}),
    (ValueError, "reference_accuracy_N has shape", o1_pruner, (YES, ONE, ONE, TWO), {}),
    (ValueError, "low must not be above high", o1_pruner, (YES, ONE, ONE, ONE), {"low": 5.0}),
    (ValueError, "exit_N must be at least 0", s_grpo, (YES, NAN, ID), {}),
    (ValueError, "exit_N has shape", s_grpo, (YES, TWO, ID), {}),
    (TypeError, "no_think_N must be bool", adaptthink, (YES, ONE, ONE), {}),
    (ValueError, "no_think_N has shape", adaptthink, (YES, torch.tensor([True, True]), ONE), {}),
    (ValueError, r"reference_accuracy_N must be in \[0, 1\]", adaptthink, (YES, YES, ONE + 1), {}),
    (ValueError, "weight must be at least 0", adlp, (YES, ONE), {"weight": math.nan}),
]


@pytest.mark.parametrize(("kind", "words", "rule", "arguments", "options"), BAD)
def test_bad_arguments_are_named(
    kind: type[Exception], words: str, rule: Callable[..., Any], arguments: tuple[torch.Tensor, ...], options: dict[str, Any]
) -> None:
    with pytest.raises(kind, match=words):
        rule(*arguments, **options)
