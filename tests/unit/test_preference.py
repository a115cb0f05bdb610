"""Preference losses: worked values, gradients against autograd and by hand, masks, pairs in any order, extremes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from reward.treg import token_reward
from rl.preference import PreferenceLoss, preference_loss

F64 = torch.float64
# The worked pair: chosen of 4 tokens, rejected of 3.
POLICY = torch.tensor([-0.9, -0.4, -1.2, -0.2, -1.1, -0.6, -2.0], dtype=F64)
REFERENCE = torch.tensor([-1.0, -0.5, -1.1, -0.3, -1.0, -0.6, -1.6], dtype=F64)
BETTER = torch.tensor([-0.7, -0.3, -2.0, -0.1, -1.3, -0.5, -3.0], dtype=F64)
WORSE = torch.tensor([-1.5, -0.9, -0.8, -0.1, -0.9, -0.7, -0.5], dtype=F64)
CREDIT = token_reward(BETTER, WORSE)
ROW = torch.tensor([0, 0, 0, 0, 1, 1, 1])
PAIR, SIDE = torch.tensor([0, 0]), torch.tensor([1, -1])
ALL = torch.ones(7, dtype=torch.bool)


def loss(logp: torch.Tensor = POLICY, **changes: Any) -> PreferenceLoss:
    """Of the worked pair; DPO with its reference unless told otherwise."""
    columns: dict[str, Any] = {"mask_T": ALL, "row_T": ROW, "pair_B": PAIR, "side_B": SIDE}
    columns |= {name: changes.pop(name) for name in tuple(columns) if name in changes}
    return preference_loss(logp, *columns.values(), **{"reference_T": REFERENCE, **changes})


def gradient(logp: torch.Tensor = POLICY, **changes: Any) -> torch.Tensor:
    free = logp.clone().requires_grad_()
    loss(free, **changes).loss.backward()
    assert free.grad is not None
    return free.grad


@pytest.mark.parametrize(("alpha", "value"), [(0.0, 0.658760), (0.1, 0.653838), (0.25, 0.646456), (0.5, 0.634153)])
def test_the_worked_pair_has_its_loss(alpha: float, value: float) -> None:
    result = loss(credit_T=CREDIT, treg_alpha=alpha)
    assert result.loss.item() == pytest.approx(value, abs=1e-6)
    assert result.regulariser.item() == pytest.approx(value - 0.658760, abs=2e-6)


def test_the_worked_pair_has_its_rewards() -> None:
    result = loss()
    assert result.chosen_reward.item() == pytest.approx(0.02) and result.rejected_reward.item() == pytest.approx(-0.05)
    assert result.margin.item() == pytest.approx(0.07)
    assert (int(result.pairs), int(result.accuracy)) == (1, 1)
    sums = (result.pairs, result.accuracy, result.margin, result.chosen_reward, result.rejected_reward, result.regulariser)
    assert not any(value.requires_grad for value in sums)


def test_the_worked_gradient_has_its_values() -> None:
    expected = torch.tensor([-0.050542, -0.050008, -0.045012, -0.048251, 0.049441, 0.047650, 0.053367], dtype=F64)
    torch.testing.assert_close(gradient(credit_T=CREDIT, treg_alpha=0.25), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("alpha", [0.0, 0.25, 1.5])
def test_each_token_weighs_one_plus_or_minus_its_credit(alpha: float) -> None:
    beta = 0.3
    weight = torch.sigmoid(-loss(beta=beta).margin)
    side = torch.tensor([1.0, -1.0], dtype=F64)[ROW]
    by_hand = -side * beta * weight * (1 + alpha * side * CREDIT)
    torch.testing.assert_close(gradient(beta=beta, credit_T=CREDIT, treg_alpha=alpha), by_hand, atol=1e-12, rtol=0)


def test_the_worked_simpo_pair_has_its_loss() -> None:
    simpo = {"form": "simpo", "beta": 10.0, "margin": 3.0, "reference_T": None}
    assert loss(**simpo).loss.item() == pytest.approx(0.072806, abs=1e-6)
    assert loss(**simpo, credit_T=CREDIT, treg_alpha=0.25).loss.item() == pytest.approx(0.014484, abs=1e-6)


def test_a_token_of_simpo_weighs_its_share_of_the_answer() -> None:
    simpo = {"form": "simpo", "beta": 10.0, "margin": 3.0, "reference_T": None}
    side, length = torch.tensor([1.0, -1.0], dtype=F64)[ROW], torch.tensor([4.0, 3.0], dtype=F64)[ROW]
    by_hand = -side * 10 / length * 0.070219 * (1 + 0.25 * side * CREDIT)
    torch.testing.assert_close(gradient(**simpo, credit_T=CREDIT, treg_alpha=0.25), by_hand, atol=1e-5, rtol=0)


@pytest.mark.parametrize("form", ["dpo", "simpo"])
def test_the_gradient_agrees_with_finite_differences(form: str) -> None:
    row, pair, side = torch.tensor([0, 2, 1, 2, 3, 0, 1]), torch.tensor([5, 2, 5, 2]), torch.tensor([-1, -1, 1, 1])

    def total(logp: torch.Tensor) -> torch.Tensor:
        return loss(logp, row_T=row, pair_B=pair, side_B=side, form=form, beta=0.7).loss

    assert torch.autograd.gradcheck(total, (POLICY.clone().requires_grad_(),))


@pytest.mark.parametrize("form", ["dpo", "simpo"])
def test_the_regularised_gradient_agrees_with_finite_differences_at_a_fixed_weight(form: str) -> None:
    """The weight w is a constant of the loss, so the function that is differentiated numerically holds it fixed."""
    weight = torch.sigmoid(-loss(form=form, beta=0.7).margin)

    def total(logp: torch.Tensor) -> torch.Tensor:
        scale = 0.7 if form == "dpo" else 0.7 / torch.tensor([4.0, 3.0], dtype=F64)[ROW]
        return loss(logp, form=form, beta=0.7).loss - 0.4 * weight * (scale * CREDIT * logp).sum()

    (numeric,) = torch.autograd.functional.jacobian(total, (POLICY,))
    torch.testing.assert_close(gradient(form=form, beta=0.7, credit_T=CREDIT, treg_alpha=0.4), numeric, atol=1e-10, rtol=0)
    assert torch.autograd.gradcheck(total, (POLICY.clone().requires_grad_(),))


def test_the_gradient_reaches_the_policy_alone() -> None:
    reference, credit = REFERENCE.clone().requires_grad_(), CREDIT.clone().requires_grad_()
    loss(POLICY.clone().requires_grad_(), reference_T=reference, credit_T=credit, treg_alpha=0.25).loss.backward()
    assert reference.grad is None and credit.grad is None


def test_turning_the_sides_round_is_reverse_dpo() -> None:
    result = loss(side_B=-SIDE)
    assert result.loss.item() == pytest.approx(math.log1p(math.exp(0.07)))
    assert result.margin.item() == pytest.approx(-0.07) and int(result.accuracy) == 0


def test_rows_and_tokens_may_come_in_any_order() -> None:
    order = torch.tensor([6, 0, 4, 1, 5, 3, 2])
    shuffled = loss(
        POLICY[order],
        reference_T=REFERENCE[order],
        credit_T=CREDIT[order],
        treg_alpha=0.25,
        row_T=1 - ROW[order],
        side_B=torch.tensor([-1, 1]),
    )
    assert shuffled.loss.item() == pytest.approx(0.646456, abs=1e-6)


def test_what_is_outside_the_mask_does_not_count_even_if_it_is_nan() -> None:
    broken = torch.tensor([math.nan, math.inf], dtype=F64)
    mask = torch.cat([ALL, torch.zeros(2, dtype=torch.bool)])
    longer = {"row_T": torch.cat([ROW, torch.tensor([0, 1])]), "mask_T": mask, "reference_T": torch.cat([REFERENCE, broken])}
    longer |= {"credit_T": torch.cat([CREDIT, broken]), "treg_alpha": 0.25}
    padded = torch.cat([POLICY, broken])
    assert loss(padded, **longer).loss.item() == pytest.approx(0.646456, abs=1e-6)
    torch.testing.assert_close(gradient(padded, **longer)[7:], torch.zeros(2, dtype=F64))
    simpo = longer | {"form": "simpo", "beta": 10.0, "margin": 3.0}
    assert loss(padded, **simpo).loss.item() == pytest.approx(0.014484, abs=1e-6)


def test_a_row_of_no_pair_gives_a_loss_of_zero_that_can_go_backward() -> None:
    """What keeps a rank in step that ran out of pairs."""
    columns = {"row_T": torch.zeros(7, dtype=torch.int64), "pair_B": torch.tensor([-1]), "side_B": torch.tensor([0])}
    for form in ("dpo", "simpo"):
        result = loss(form=form, credit_T=CREDIT, treg_alpha=0.25, **columns)
        assert (result.loss.item(), int(result.pairs)) == (0.0, 0)
        assert not gradient(form=form, **columns).any()


def test_parts_of_a_batch_add_up_to_the_whole() -> None:
    twice = {"row_T": torch.cat([ROW, ROW + 2]), "pair_B": torch.tensor([0, 0, 1, 1]), "side_B": torch.cat([SIDE, -SIDE])}
    both = torch.cat([POLICY, POLICY - 0.5])
    extra = {"reference_T": torch.cat([REFERENCE, REFERENCE]), "credit_T": torch.cat([CREDIT, CREDIT]), "treg_alpha": 0.25}
    whole = loss(both, mask_T=torch.cat([ALL, ALL]), **twice, **extra)
    parts = [loss(credit_T=CREDIT, treg_alpha=0.25), loss(POLICY - 0.5, side_B=-SIDE, credit_T=CREDIT, treg_alpha=0.25)]
    for name in ("loss", "pairs", "accuracy", "margin", "chosen_reward", "rejected_reward", "regulariser"):
        torch.testing.assert_close(sum(getattr(part, name) for part in parts), getattr(whole, name))


@pytest.mark.parametrize("sign", [1, -1])
def test_a_pair_that_is_decided_overflows_nothing(sign: int) -> None:
    far = torch.tensor([1e4] * 4 + [-1e4] * 3) * sign
    result = loss(far, reference_T=REFERENCE.float(), beta=1.0)
    assert result.loss.item() == pytest.approx(0.0 if sign > 0 else 7e4, rel=1e-3)
    steep = gradient(far, reference_T=REFERENCE.float(), beta=1.0)
    assert bool(steep.isfinite().all()) and steep[0].item() == pytest.approx(0.0 if sign > 0 else -1.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reference_T": None}, "dpo compares with a reference"),
        ({"margin": 1.0}, "has no margin"),
        ({"form": "ipo"}, "must be dpo or simpo"),
        ({"treg_alpha": 0.25}, "there is none"),
        ({"side_B": torch.tensor([1, 1])}, "each pair needs a row of side 1 and one of side -1"),
        ({"side_B": torch.tensor([1, 0])}, "each pair needs"),
        ({"pair_B": torch.tensor([0, 1])}, "each pair needs"),
        ({"pair_B": torch.tensor([0, -1])}, "each pair needs"),
        ({"pair_B": torch.tensor([0, 0, 0, 0]), "side_B": torch.tensor([1, -1, 1, -1])}, "each pair needs"),
        ({"pair_B": torch.tensor([0])}, "over the same rows"),
        ({"reference_T": REFERENCE[:3]}, "reference_T has shape"),
        ({"form": "simpo", "mask_T": ROW == 0}, "no token that carries loss"),
    ],
)
def test_what_is_no_pair_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        loss(**changes)


def test_a_mask_of_numbers_is_refused() -> None:
    with pytest.raises(TypeError, match="must be bool"):
        loss(mask_T=ALL.float())
