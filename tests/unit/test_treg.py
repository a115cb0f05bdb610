"""T-REG's token rewards and the advantages they reshape: worked values, infinities, signs."""

from __future__ import annotations

import math

import pytest
import torch

from reward.treg import reshape_advantage, token_reward

F64 = torch.float64


def test_the_worked_answers_have_their_token_rewards() -> None:
    better = torch.tensor([-0.7, -0.3, -2.0, -0.1, -1.3, -0.5, -3.0])
    worse = torch.tensor([-1.5, -0.9, -0.8, -0.1, -0.9, -0.7, -0.5])
    expected = torch.tensor([0.189974, 0.145656, -0.268525, 0.0, -0.098688, 0.049834, -0.424142])
    torch.testing.assert_close(token_reward(better, worse), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("gap", "value"), [(0.1, 0.024979), (0.5, 0.122459), (1.0, 0.231059), (2.0, 0.380797), (5.0, 0.493307)])
def test_the_token_reward_of_a_gap_has_its_value(gap: float, value: float) -> None:
    worse = torch.tensor([-7.0], dtype=F64)
    assert token_reward(worse + gap, worse).item() == pytest.approx(value, abs=1e-6)
    assert token_reward(worse, worse + gap).item() == pytest.approx(-value, abs=1e-6)


def test_a_tiny_gap_keeps_its_digits_in_float32() -> None:
    # sigmoid(x) - 1/2 would give 0 here
    assert token_reward(torch.tensor([1e-8]), torch.tensor([0.0])).item() == pytest.approx(2.5e-9)


def test_a_token_that_a_prompt_rules_out_gets_the_bound_and_one_that_both_rule_out_nothing() -> None:
    better = torch.tensor([-math.inf, -math.inf, -1.0])
    worse = torch.tensor([-math.inf, -1.0, -math.inf])
    assert token_reward(better, worse).tolist() == [0.0, -0.5, 0.5]


def test_the_token_reward_has_no_gradient_and_the_precision_of_its_inputs() -> None:
    free = torch.tensor([-1.0], dtype=F64, requires_grad=True)
    assert token_reward(free, free - 1).dtype == F64 and not token_reward(free, free - 1).requires_grad
    assert token_reward(free.bfloat16(), free.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_what_is_no_log_prob_is_refused(broken: float) -> None:
    for pair in ((broken, -1.0), (-1.0, broken), (broken, broken), (broken, -math.inf)):
        with pytest.raises(ValueError, match="NaN or"):
            token_reward(torch.tensor([pair[0]]), torch.tensor([pair[1]]))


def test_answers_of_different_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="has shape"):
        token_reward(torch.zeros(2), torch.zeros(1))


def test_a_unit_advantage_becomes_the_worked_token_weights() -> None:
    credit = torch.tensor([0.189974, 0.145656, -0.268525, 0.0, -0.098688, 0.049834, -0.424142], dtype=F64)
    advantage = torch.tensor([1.0] * 4 + [-1.0] * 3, dtype=F64)
    expected = torch.tensor([1.047494, 1.036414, 0.932869, 1.0, -1.024672, -0.987542, -1.106035], dtype=F64)
    torch.testing.assert_close(reshape_advantage(advantage, credit, weight=0.25), expected, atol=1e-6, rtol=0)


def test_a_flat_group_is_not_reshaped() -> None:
    credit = torch.linspace(-0.5, 0.5, 5)
    assert not reshape_advantage(torch.zeros(5), credit, weight=1.9).any()


@pytest.mark.parametrize("weight", [0.0, 2.0, -0.25, math.nan])
def test_a_weight_that_could_turn_an_advantage_round_is_refused(weight: float) -> None:
    with pytest.raises(ValueError, match="between 0 and 2"):
        reshape_advantage(torch.ones(1), torch.zeros(1), weight=weight)


@pytest.mark.parametrize("credit", [0.51, -0.51, math.nan])
def test_a_credit_outside_its_bounds_is_refused(credit: float) -> None:
    with pytest.raises(ValueError, match="must lie in"):
        reshape_advantage(torch.ones(1), torch.tensor([credit]), weight=0.25)
    with pytest.raises(ValueError, match="has shape"):
        reshape_advantage(torch.ones(2), torch.zeros(1), weight=0.25)
