"""The figures of a step against numbers worked by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from rl.batch import pack_rollouts
from rl.step_metrics import (
    accuracy_and_tokens,
    advantage_metrics,
    budget_labels,
    exit_metrics,
    half_octave,
    kept,
    learner_metrics,
    octave,
    rollout_metrics,
)
from rl.types import Budget, BudgetKind, Group, Scored, VerdictStatus
from tests.builders import NO_THINK, make_budget, make_effort, make_group, make_lease, make_prompt, make_rollout, make_scored


def _groups() -> list[Group]:
    """Four answers of two groups: right in 2 tokens under budget 8, wrong in 4 free, one unscored, one right in 3 free."""
    short = make_scored(make_rollout(make_lease(budget=8)), reward=3.0, parts={"budget": 2.0, "correct": 1.0})
    wrong = make_scored(
        make_rollout(make_lease(member=1), generated=(5, 6, 7, 8)), status=VerdictStatus.WRONG, reward=0.0, parts={"correct": 0.0}
    )
    hung = make_scored(make_rollout(make_lease(group=1), generated=(5,) * 50), status=VerdictStatus.TIMED_OUT)
    right = make_scored(make_rollout(make_lease(group=1, member=1), generated=(5, 6, 7)), reward=1.0)
    return [Group(make_prompt(0), (short, wrong)), Group(make_prompt(1), (hung, right))]


def test_rollout_metrics_of_a_small_step() -> None:
    metrics = rollout_metrics(_groups())
    assert metrics == pytest.approx(
        {
            "train/accuracy": 2 / 3,
            "train/tokens": 3.0,  # (2 + 4 + 3) / 3: the unscored answer is in no mean
            "train/reward": 4 / 3,
            "reward/budget": 2.0,
            "reward/correct": 2 / 3,
            "budget/8/accuracy": 1.0,
            "budget/8/tokens": 2.0,
            "budget/8/distance": 6.0,
            "budget/free/accuracy": 0.5,
            "budget/free/tokens": 3.5,
            "verdict/correct": 0.5,
            "verdict/wrong": 0.25,
            "verdict/malformed": 0.0,
            "verdict/truncated": 0.0,
            "verdict/timed_out": 0.25,
            "verdict/crashed": 0.0,
            "group/flat": 0.5,  # the second group has one scored member, which cannot differ from anything
        }
    )


@pytest.mark.parametrize(
    ("tokens", "label"), [(1, "1"), (2, "2-3"), (3, "2-3"), (4, "4-7"), (64, "64-127"), (127, "64-127"), (4000, "2048-4095")]
)
def test_a_bin_of_budgets_reaches_from_a_power_of_two_to_the_next(tokens: int, label: str) -> None:
    assert octave(tokens) == label


def test_there_is_no_bin_below_one() -> None:
    with pytest.raises(ValueError, match="above 0, got 0"):
        octave(0)


def test_up_to_eight_budgets_are_shown_one_by_one_and_more_by_powers_of_two() -> None:
    free, eight = make_budget(), [make_budget(n) for n in range(60, 68)]
    labels = budget_labels([free, *eight, *eight])
    assert [labels[b] for b in (free, eight[0], eight[7])] == ["free", "60", "67"]
    labels = budget_labels([free, *eight, make_budget(130)])
    assert [labels[b] for b in (free, eight[0], eight[7])] == ["free", "32-63", "64-127"]
    assert set(labels.values()) == {"free", "32-63", "64-127", "128-255"}


@pytest.mark.parametrize(
    ("effort", "label"),
    [
        (0.5, "x0.50-0.70"),
        (0.7, "x0.50-0.70"),
        (0.71, "x0.71-0.99"),  # sqrt(1/2) = 0.7071
        (0.99, "x0.71-0.99"),
        (1.0, "x1.00-1.41"),
        (1.42, "x1.42-1.99"),  # sqrt(2) = 1.4142
        (2.83, "x2.83-3.99"),
        (3.0, "x2.83-3.99"),
    ],
)
def test_a_bin_of_efforts_reaches_from_a_power_of_the_root_of_two_to_the_next(effort: float, label: str) -> None:
    assert half_octave(effort) == label


def test_there_is_no_bin_below_the_smallest_effort() -> None:
    with pytest.raises(ValueError, match="0.01 or more, got 0.0"):
        half_octave(0.0)


def test_up_to_eight_efforts_are_shown_one_by_one_and_drawn_ones_by_bins() -> None:
    listed, free = [make_effort(n / 10) for n in range(5, 13)], make_budget()
    assert set(budget_labels([free, NO_THINK, *listed]).values()) >= {"free", "no_think", "x0.50", "x1.20"}
    drawn = budget_labels([free, NO_THINK, *listed], binned=True)
    assert set(drawn.values()) == {"free", "no_think", "x0.50-0.70", "x0.71-0.99", "x1.00-1.41"}
    assert set(budget_labels([*listed, make_effort(1.3)]).values()) == {"x0.50-0.70", "x0.71-0.99", "x1.00-1.41"}


def test_members_that_do_not_think_and_efforts_have_their_own_accuracy_and_tokens_and_keep_nothing() -> None:
    metrics = rollout_metrics([make_group(0, [1.0, 0.0, 1.0, 0.0], budgets=[None, NO_THINK, NO_THINK, make_effort(0.5)])])
    assert {name: value for name, value in metrics.items() if name.startswith("budget/")} == {
        "budget/free/accuracy": 1.0,
        "budget/free/tokens": 2.0,
        "budget/no_think/accuracy": 0.5,
        "budget/no_think/tokens": 2.0,
        "budget/x0.50/accuracy": 0.0,
        "budget/x0.50/tokens": 2.0,
    }
    assert "train/budget" not in rollout_metrics([make_group(0, [1.0], budgets=[make_effort(0.5)])], drawn=True)


def test_drawn_budgets_have_names_that_stay_and_a_mean_that_moves() -> None:
    metrics = rollout_metrics(
        [make_group(0, [1.0, 0.0], budgets=[40, 40]), make_group(1, [1.0, 1.0], budgets=[50, None])], drawn=True
    )
    assert metrics["budget/32-63/accuracy"] == pytest.approx(2 / 3)
    assert metrics["budget/free/accuracy"] == 1.0
    assert metrics["train/budget"] == pytest.approx(130 / 3)
    assert not any(name.startswith(("budget/40", "budget/50")) for name in metrics)
    assert "train/budget" not in rollout_metrics([make_group(0, [1.0], budgets=[40])])


def test_the_verdict_shares_add_up_to_one() -> None:
    metrics = rollout_metrics(_groups())
    assert sum(value for name, value in metrics.items() if name.startswith("verdict/")) == 1.0


def test_a_group_whose_members_got_the_same_reward_is_flat() -> None:
    groups = [make_group(0, [1.0, 1.0]), make_group(1, [0.0, 0.0]), make_group(2, [1.0, 0.0]), make_group(3, [None, None])]
    assert rollout_metrics(groups)["group/flat"] == 0.75


def test_a_group_of_several_efforts_is_flat_where_one_effort_is() -> None:
    efforts = [make_effort(0.5), make_effort(0.5), make_effort(2), make_effort(2)]
    assert rollout_metrics([make_group(0, [0.0, 0.0, 1.0, 1.0], budgets=efforts)])["group/flat"] == 1.0
    assert rollout_metrics([make_group(0, [0.0, 1.0, 1.0, 1.0], budgets=efforts)])["group/flat"] == 0.5
    assert rollout_metrics([make_group(0, [None] * 4, budgets=efforts), make_group(1, [0.0, 1.0])])["group/flat"] == 0.5
    assert rollout_metrics([make_group(0, [0.0, 1.0], budgets=[32, 64])])["group/flat"] == 0.0


def test_exits_and_the_paths_they_leave_are_shown_apart_and_missing_ones_are_counted() -> None:
    """Two exits each: the first prompt has both (one right), the second one that nobody could judge, the third lost all."""

    def answer(group: int, member: int, tokens: int, status: VerdictStatus) -> Scored:
        return make_scored(make_rollout(make_lease(group=group, member=member), generated=(5,) * tokens), status=status)

    right, wrong, hung = VerdictStatus.CORRECT, VerdictStatus.WRONG, VerdictStatus.TIMED_OUT
    groups = [
        Group(make_prompt(0), (answer(0, 0, 3, wrong), answer(0, 1, 5, right), answer(0, 2, 9, right))),
        Group(make_prompt(1), (answer(1, 0, 3, hung), answer(1, 2, 7, wrong))),
        Group(make_prompt(2), ()),
    ]
    assert exit_metrics(groups, exits=2) == {
        "exits/missing": 0.5,
        "exits/accuracy": 0.5,
        "exits/tokens": 4.0,
        "path/accuracy": 0.5,
        "path/tokens": 8.0,
    }
    assert exit_metrics(groups, exits=0) == {}


def test_a_mean_over_nothing_is_not_a_number_rather_than_zero() -> None:
    metrics = rollout_metrics([make_group(0, [None])])
    assert math.isnan(metrics["train/accuracy"]) and math.isnan(metrics["train/reward"])
    assert all(math.isnan(value) for value in accuracy_and_tokens([]).values())


def test_advantage_metrics_count_loss_tokens_with_signal() -> None:
    rollouts = [make_rollout(generated=(1,)), make_rollout(generated=(1, 2, 3))]
    advantage_N = torch.tensor([1.0, 0.0])
    batch = pack_rollouts(rollouts, advantage_N, torch.zeros(2))
    metrics = advantage_metrics(advantage_N, batch)
    assert metrics == pytest.approx({"adv/mean": 0.5, "adv/std": math.sqrt(0.5), "adv/nonzero_tokens": 0.25})


def test_the_spread_of_a_single_advantage_is_zero() -> None:
    batch = pack_rollouts([make_rollout()], torch.tensor([2.0]), torch.zeros(1))
    assert advantage_metrics(torch.tensor([2.0]), batch) == {"adv/mean": 2.0, "adv/std": 0.0, "adv/nonzero_tokens": 1.0}


RANK_0 = {
    "sum/tokens": 30.0, "sum/loss": 3.0, "sum/entropy": 60.0, "sum/clipped": 2.0, "sum/dual_clipped": 1.0, "sum/approx_kl": 0.4,
    "sum/padding": 4.0, "sum/grid": 50.0, "sum/mismatch": 0.3, "sum/mismatch_tokens": 20.0, "max/mismatch": 0.1,
    "same/lr": 1e-6, "same/skipped": 0.0, "same/grad_norm": 2.5,
}  # fmt: skip
RANK_1 = RANK_0 | {"sum/tokens": 10.0, "sum/loss": 1.0, "sum/entropy": 20.0, "sum/padding": 6.0, "max/mismatch": 0.4}


def test_learner_metrics_weigh_the_ranks_by_their_tokens() -> None:
    assert learner_metrics([RANK_0, RANK_1]) == pytest.approx(
        {
            "policy/loss": 4 / 40,
            "policy/entropy": 80 / 40,
            "policy/clip_fraction": 4 / 40,
            "policy/dual_clip_fraction": 2 / 40,
            "policy/approx_kl": 0.8 / 40,
            "learn/lr": 1e-6,
            "learn/skipped": 0.0,
            "learn/padding": 10 / 100,
            "learn/grad_norm": 2.5,
            "mismatch/mean": 0.6 / 40,
            "mismatch/max": 0.4,
        }
    )


def test_a_rank_without_rollouts_changes_no_mean() -> None:
    idle = {name: value if name.startswith("same/") else 0.0 for name, value in RANK_0.items()}
    assert learner_metrics([RANK_0, idle]) == pytest.approx(learner_metrics([RANK_0]))


def test_figures_that_were_not_computed_are_left_out_rather_than_zero() -> None:
    skipped = {name: value for name, value in RANK_0.items() if name != "same/grad_norm"} | {"same/skipped": 1.0}
    metrics = learner_metrics([skipped])
    assert metrics["learn/skipped"] == 1.0
    assert not {"learn/grad_norm", "policy/kl", "policy/correction_weight"} & metrics.keys()
    full = learner_metrics([RANK_0 | {"sum/kl": 6.0, "sum/correction_weight": 33.0}])
    assert full["policy/kl"] == pytest.approx(0.2) and full["policy/correction_weight"] == pytest.approx(1.1)


def test_soft_budgets_say_how_they_were_kept_and_hard_ones_do_not() -> None:
    """Two answers of 2 tokens each: within 2, over 1, and 30 away from 32."""

    def answer(tokens: int, kind: BudgetKind, *, hard: bool = False) -> Scored:
        lease = replace(make_lease(), budget=Budget(tokens, kind, "", hard=hard))
        return make_scored(make_rollout(lease))

    at_most = [answer(2, BudgetKind.AT_MOST), answer(1, BudgetKind.AT_MOST), answer(1, BudgetKind.AT_MOST, hard=True)]
    assert kept(at_most) == {"kept": 0.5}
    assert kept([answer(32, BudgetKind.EXACT)]) == {"distance": 30.0}
    assert kept([answer(0, BudgetKind.FREE)]) == {}
