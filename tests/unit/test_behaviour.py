"""The shaped distribution: bias first, temperature second, over the whole vocabulary."""

from __future__ import annotations

import torch

from rl.behaviour import behaviour_logp

LOGITS = torch.tensor([[2.0, 1.0, 0.0, -1.0]])


def test_the_log_prob_under_an_adapted_temperature_has_its_worked_values() -> None:
    rows, target = LOGITS.expand(4, -1), torch.arange(4)
    plain = behaviour_logp(rows, target)
    torch.testing.assert_close(plain.exp(), torch.tensor([0.643914, 0.236883, 0.087144, 0.032059]), atol=1e-6, rtol=0)
    shaped = behaviour_logp(rows, target, temperature_T=torch.full((4,), 1.002743))
    torch.testing.assert_close(plain - shaped, torch.tensor([0.001390, -0.001345, -0.004081, -0.006816]), atol=1e-6, rtol=0)


def test_the_bias_is_added_before_the_temperature_divides() -> None:
    logp = behaviour_logp(
        LOGITS, torch.tensor([3]), temperature_T=torch.tensor([0.5]), bias_ids=torch.tensor([3, 1]), bias_T=torch.tensor([1.5])
    )
    expected = torch.log_softmax(torch.tensor([4.0, 5.0, 0.0, 1.0]), dim=-1)[3]
    torch.testing.assert_close(logp, expected[None])


def test_each_token_has_its_own_temperature_and_bias() -> None:
    rows, target = LOGITS.expand(3, -1), torch.tensor([0, 0, 0])
    temperature, bias = torch.tensor([1.0, 2.0, 1.0]), torch.tensor([0.0, 0.0, -3.0])
    together = behaviour_logp(rows, target, temperature_T=temperature, bias_ids=[0], bias_T=bias)
    alone = [
        behaviour_logp(LOGITS, target[:1], temperature_T=temperature[t : t + 1], bias_ids=[0], bias_T=bias[t : t + 1])
        for t in range(3)
    ]
    torch.testing.assert_close(together, torch.cat(alone))
    assert len(set(together.tolist())) == 3


def test_it_is_differentiable_in_the_logits() -> None:
    logits = LOGITS.clone().requires_grad_()
    behaviour_logp(logits, torch.tensor([0]), temperature_T=torch.tensor([2.0])).sum().backward()
    p = torch.softmax(LOGITS / 2.0, dim=-1)
    expected = (torch.tensor([[1.0, 0.0, 0.0, 0.0]]) - p) / 2.0
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad, expected)
