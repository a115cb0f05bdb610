"""Importance weights, rejected rollouts, and whether both treat long and short answers alike."""

from __future__ import annotations

import math

import pytest
import torch

from rl.correction import Correction, importance_weight
from rl.fairness import fairness_metrics, unfair_rejection

NAN = float("nan")
LN2 = math.log(2.0)
# Two rollouts: ratios 2, 2, (not sampled) and 4, 1/2.
OLD = torch.tensor([LN2, LN2, -7.0, math.log(4.0), 0.0])
MU = torch.tensor([0.0, 0.0, NAN, 0.0, LN2])
OWNER = torch.tensor([0, 0, 0, 1, 1])


def test_weights_are_ratios_cut_at_the_cap_and_one_where_nothing_was_sampled() -> None:
    found = importance_weight(OLD, MU, OWNER, 2, Correction("truncated", cap=3.0))
    assert found.weight_T.tolist() == pytest.approx([2.0, 2.0, 1.0, 3.0, 0.5])
    assert found.capped_T.tolist() == [False, False, False, True, False]
    assert found.rejected_B.tolist() == [False, False]


@pytest.mark.parametrize(
    ("mask", "bounds", "rejected"),
    [
        ("sequence", (0.5, 3.0), [True, False]),  # products 4 and 2
        ("sequence", (0.5, 5.0), [False, False]),
        ("geometric", (0.5, 1.9), [True, False]),  # means 2 and sqrt 2
        ("geometric", (0.5, 1.4), [True, True]),
    ],
)
def test_a_rollout_whose_ratio_is_out_of_bounds_is_left_out(mask: str, bounds: tuple[float, float], rejected: list[bool]) -> None:
    found = importance_weight(OLD, MU, OWNER, 2, Correction("truncated", 10.0, mask, bounds))  # pyright: ignore
    assert found.rejected_B.tolist() == rejected
    assert (found.weight_T == 0).tolist() == [rejected[i] for i in OWNER.tolist()]


def test_shares_are_told_by_decile_of_length_and_by_budget() -> None:
    """Twenty answers of lengths 1 to 20, half of each budget; the two longest are rejected, the longest clipped everywhere."""
    rows = torch.tensor([[float(i), 10.0, 10.0 * (i == 19), 5.0 * (i >= 18), float(i >= 18)] for i in range(20)])
    labels = ["32" if i % 2 else "free" for i in range(20)]
    found = fairness_metrics(rows, range(1, 21), labels, clip=True, correction=True)
    assert found["clip/decile/10"] == pytest.approx(0.5) and found["clip/decile/9"] == 0.0
    assert found["correction/capped/decile/10"] == pytest.approx(0.5)
    assert found["correction/rejected/decile/10"] == 1.0 and found["correction/rejected/decile/1"] == 0.0
    assert found["correction/rejected"] == pytest.approx(0.1)
    assert found["correction/rejected/budget/32"] == found["correction/rejected/budget/free"] == pytest.approx(0.1)
    assert "100%" in (unfair_rejection(found) or "")
    even = fairness_metrics(rows * torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0]), range(1, 21), labels, clip=False, correction=True)
    assert unfair_rejection(even) is None and not any(name.startswith("clip") for name in even)


def test_several_passes_over_a_rollout_are_averaged_and_few_rollouts_leave_deciles_out() -> None:
    rows = torch.tensor([[0.0, 4.0, 4.0, 0.0, 1.0], [0.0, 4.0, 0.0, 0.0, 0.0], [1.0, 8.0, 0.0, 0.0, 0.0]])
    found = fairness_metrics(rows, [4, 8], ["a", "b"], clip=True, correction=True)
    assert found["clip/budget/a"] == pytest.approx(0.5) and found["correction/rejected/budget/a"] == pytest.approx(0.5)
    assert len([name for name in found if name.startswith("clip/decile")]) == 2
    assert fairness_metrics(torch.zeros(0, 5), [], [], clip=True, correction=True) == {}
