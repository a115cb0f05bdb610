"""The policy loss, KL forms and truncated weight: worked values, gradients, masks and extreme ratios."""

from __future__ import annotations

import math

import pytest
import torch

from rl.losses import kl_penalty, policy_loss, truncated_weight

RATIO = torch.tensor([1.0, 1.5, 0.7, 0.6, 3.5], dtype=torch.float64)
ADVANTAGE = torch.tensor([0.952658] * 3 + [-3.299311] * 2, dtype=torch.float64)
ALL = torch.ones(5, dtype=torch.bool)
OLD = torch.full((5,), -1.0, dtype=torch.float64)


def _logp() -> torch.Tensor:
    return (OLD + RATIO.log()).requires_grad_()


def test_the_worked_loss_has_its_value_with_and_without_the_dual_clip() -> None:
    dual = policy_loss(_logp(), OLD, ADVANTAGE, ALL)
    assert (dual.loss / dual.tokens).item() == pytest.approx(1.939692, abs=1e-6)
    plain = policy_loss(_logp(), OLD, ADVANTAGE, ALL, dual_clip=None)
    assert (plain.loss / plain.tokens).item() == pytest.approx(2.269623, abs=1e-6)
    assert (int(dual.tokens), int(dual.clipped_T.sum()), int(dual.dual_clipped), int(plain.dual_clipped)) == (5, 2, 1, 0)


def test_each_token_of_the_worked_loss_has_its_value() -> None:
    expected = [-0.952658, -1.219402, -0.666861, 2.639449, 9.897933]
    for token, value in enumerate(expected):
        mask = torch.arange(5) == token
        assert policy_loss(_logp(), OLD, ADVANTAGE, mask).loss.item() == pytest.approx(value, abs=1e-6)


def test_the_gradient_is_minus_ratio_times_advantage_and_zero_where_clipped() -> None:
    logp = _logp()
    policy_loss(logp, OLD, ADVANTAGE, ALL).loss.backward()
    free = torch.tensor([True, False, True, False, False])
    assert logp.grad is not None
    torch.testing.assert_close(logp.grad, torch.where(free, -RATIO * ADVANTAGE, 0.0))


def test_sums_of_kl_and_ratio_cover_masked_tokens_only() -> None:
    mask = torch.tensor([True, True, False, False, True])
    result = policy_loss(_logp(), OLD, ADVANTAGE, mask)
    assert float(result.ratio) == pytest.approx(6.0)
    assert float(result.kl) == pytest.approx(-math.log(1.5 * 3.5))
    assert not result.kl.requires_grad and not result.ratio.requires_grad


def test_parts_of_a_batch_add_up_to_the_whole() -> None:
    whole = policy_loss(_logp(), OLD, ADVANTAGE, ALL)
    parts = [
        policy_loss(_logp()[part], OLD[part], ADVANTAGE[part], ALL[part]) for part in (slice(0, 2), slice(2, 5), slice(5, 5))
    ]
    for name in ("loss", "tokens", "dual_clipped", "kl", "ratio"):
        torch.testing.assert_close(sum(getattr(part, name) for part in parts), getattr(whole, name))


def test_garbage_outside_the_mask_reaches_neither_value_nor_gradient() -> None:
    logp = torch.tensor([-1.0, math.nan, -math.inf, 5000.0], requires_grad=True)
    advantage = torch.tensor([1.0, math.nan, 1.0, 1.0])
    mask = torch.tensor([True, False, False, False])
    result = policy_loss(logp, torch.full((4,), -1.0), advantage, mask, weight_T=torch.tensor([0.5, math.nan, 1.0, 1.0]))
    result.loss.backward()
    assert result.loss.item() == -0.5
    assert logp.grad is not None and logp.grad.tolist() == [-0.5, 0.0, 0.0, 0.0]


@pytest.mark.parametrize("advantage", [1.0, -1.0])
@pytest.mark.parametrize("difference", [500.0, -500.0])
def test_extreme_ratios_stay_finite(advantage: float, difference: float) -> None:
    logp = torch.tensor([difference], requires_grad=True)
    result = policy_loss(logp, torch.zeros(1), torch.tensor([advantage]), torch.ones(1, dtype=torch.bool), dual_clip=None)
    result.loss.backward()
    assert logp.grad is not None
    assert torch.isfinite(result.loss) and torch.isfinite(logp.grad).all()


def test_a_nan_log_prob_inside_the_mask_is_not_hidden() -> None:
    result = policy_loss(torch.tensor([math.nan]), torch.zeros(1), torch.ones(1), torch.ones(1, dtype=torch.bool))
    assert torch.isnan(result.loss)


def test_the_weight_scales_the_loss_and_receives_no_gradient() -> None:
    weight = torch.tensor([2.0, 0.0, 1.0, 0.5, 1.0], dtype=torch.float64, requires_grad=True)
    result = policy_loss(_logp(), OLD, ADVANTAGE, ALL, weight_T=weight)
    assert result.loss.item() == pytest.approx(2 * -0.952658 - 0.666861 + 0.5 * 2.639449 + 9.897933, abs=1e-5)
    result.loss.backward()
    assert weight.grad is None


def test_the_kl_forms_have_their_values() -> None:
    logp, ref = torch.tensor([-1.0, -2.0]), torch.tensor([-1.5, -1.0])
    torch.testing.assert_close(kl_penalty(logp, ref, "k1"), torch.tensor([0.5, -1.0]))
    torch.testing.assert_close(kl_penalty(logp, ref, "k2"), torch.tensor([0.125, 0.5]))
    torch.testing.assert_close(kl_penalty(logp, ref, "k3"), torch.tensor([0.106531, 0.718282]), atol=1e-6, rtol=0)


def _expected_gradient(form: str, logits: torch.Tensor, ref_logp: torch.Tensor) -> torch.Tensor:
    """Exact mean over the policy's own samples of the gradient of the per-token penalty."""
    logits = logits.clone().requires_grad_()
    logp = torch.log_softmax(logits, dim=-1)
    (logp.detach().exp() * kl_penalty(logp, ref_logp, form)).sum().backward()
    assert logits.grad is not None
    return logits.grad


def test_in_expectation_k1_has_no_gradient_k2_the_reverse_kls_and_k3_the_forward_kls() -> None:
    torch.manual_seed(0)
    logits = torch.randn(6, dtype=torch.float64)
    ref_logp = torch.log_softmax(torch.randn(6, dtype=torch.float64), dim=-1)
    free = logits.clone().requires_grad_()
    logp = torch.log_softmax(free, dim=-1)
    reverse = torch.autograd.grad((logp.exp() * (logp - ref_logp)).sum(), free, retain_graph=True)[0]
    forward = torch.autograd.grad((ref_logp.exp() * (ref_logp - logp)).sum(), free)[0]
    torch.testing.assert_close(_expected_gradient("k1", logits, ref_logp), torch.zeros(6, dtype=torch.float64))
    torch.testing.assert_close(_expected_gradient("k2", logits, ref_logp), reverse)
    torch.testing.assert_close(_expected_gradient("k3", logits, ref_logp), forward)


def test_k3_of_a_token_the_policy_has_lost_stays_finite() -> None:
    logp = torch.tensor([-500.0], requires_grad=True)
    penalty = kl_penalty(logp, torch.zeros(1), "k3")
    penalty.sum().backward()
    assert logp.grad is not None
    assert torch.isfinite(penalty).all() and torch.isfinite(logp.grad).all()


def test_the_truncated_weight_is_the_ratio_up_to_its_cap_and_one_where_nothing_was_sampled() -> None:
    old = torch.tensor([-1.0, -1.0, -1.0, -1.0], requires_grad=True)
    sampled = torch.tensor([-1.0 + math.log(2), -1.0 - math.log(8), math.nan, -900.0])
    weight = truncated_weight(old, sampled, cap=2.0)
    torch.testing.assert_close(weight, torch.tensor([0.5, 2.0, 1.0, 2.0]))
    assert not weight.requires_grad
    assert truncated_weight(old, sampled, cap=0.25).tolist() == [0.25, 0.25, 1.0, 0.25]


def test_bad_arguments_are_named() -> None:
    one, mask = torch.zeros(1), torch.ones(1, dtype=torch.bool)
    with pytest.raises(ValueError, match="advantage_T has shape"):
        policy_loss(one, one, torch.zeros(2), mask)
    with pytest.raises(TypeError, match="mask_T must be bool"):
        policy_loss(one, one, one, one)
    with pytest.raises(ValueError, match="dual_clip must be above 1"):
        policy_loss(one, one, one, mask, dual_clip=1.0)
    with pytest.raises(ValueError, match="form must be"):
        kl_penalty(one, one, "k4")
    with pytest.raises(ValueError, match="cap must be above 0"):
        truncated_weight(one, one, cap=0.0)
