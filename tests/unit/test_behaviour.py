"""The shaped distribution: bias first, temperature second, over the whole vocabulary."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from rl.batch import pack_rollouts
from rl.behaviour import Vocabulary, behaviour_logp, behaviour_of, replayed_bias
from rl.types import AdaptiveTemperature, EntropyStatistics, Reflex, Rollout, Shaping
from rollout.temperature import rule_of
from tests.builders import make_lease, make_rollout

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


VOCABULARY = Vocabulary(words=(11, 12), end=13)


def _biased(generated: list[int], reflex: Reflex | None, *, prefill: tuple[int, ...] = (13, 5)) -> Rollout:
    lease = make_lease(prefill_ids=prefill)
    return make_rollout(replace(lease, shaping=Shaping(1.0, None, reflex)), generated=generated)


def test_the_replayed_bias_counts_generated_tokens_and_ends_after_the_thinking() -> None:
    """The prefill, which even holds an end mark, does not count; the mark itself is still drawn under the bias."""
    wave = Reflex(amplitude=4.0, period=8.0)
    assert replayed_bias(_biased([7, 11, 13, 8], wave), VOCABULARY).tolist() == [0.0, 2.0, 4.0, 0.0]
    assert replayed_bias(_biased([7, 11], None), None).tolist() == [0.0, 0.0]
    with pytest.raises(ValueError, match="which token ends it"):
        replayed_bias(_biased([7], wave), None)


def test_a_batch_has_one_temperature_rule_and_the_ids_of_its_bias() -> None:
    statistics = EntropyStatistics(0.0, 1.0, 1.0, -1.0, 1.0, 9)
    heated = Shaping(1.0, AdaptiveTemperature(statistics))
    assert behaviour_of([Shaping(0.7)], None).is_plain
    assert behaviour_of([heated, heated], None).rule == rule_of(heated.adaptive)
    assert behaviour_of([Shaping(1.0, None, Reflex())], VOCABULARY).bias_ids == (11, 12)
    with pytest.raises(ValueError, match="different entropy statistics"):
        behaviour_of([heated, Shaping()], None)
    with pytest.raises(ValueError, match="which words"):
        behaviour_of([Shaping(1.0, None, Reflex())], None)


def test_the_closed_form_of_a_tilted_distribution_holds() -> None:
    """Logits 2, 1, 0.5, -0.5, -1, bias 2.5 on ids 1 and 3 at temperature 0.6."""
    logits = torch.tensor([[2.0, 1.0, 0.5, -0.5, -1.0]]).expand(5, -1)
    options = {"temperature_T": torch.full((5,), 0.6), "bias_ids": [1, 3]}
    found = behaviour_logp(logits, torch.arange(5), bias_T=torch.full((5,), 2.5), **options).exp()
    assert found.tolist() == pytest.approx([0.070071, 0.853635, 0.005752, 0.070071, 0.000472], abs=1e-6)
    plain = behaviour_logp(logits, torch.arange(5), bias_T=torch.zeros(5), **options).exp()
    assert plain.tolist() == pytest.approx([0.773274, 0.146053, 0.063474, 0.011989, 0.005210], abs=1e-6)
    assert (plain / found).tolist() == pytest.approx([11.035641, 0.171095, 11.035641, 0.171095, 11.035641], rel=1e-4)


def test_a_forced_token_carries_neither_loss_nor_log_prob() -> None:
    rollout = replace(make_rollout(make_lease(prefill_ids=(5,)), generated=[7, 13, 8], logp_T=[-1.0, 0.0, -2.0]), forced=(2,))
    batch = pack_rollouts([rollout], torch.tensor([1.5]), torch.zeros(1, dtype=torch.int64), train_prefix=False)
    assert batch.loss_mask_T.tolist() == [False] * 4 + [True, False, True]
    assert batch.sampled_logp_T.isnan().tolist() == [True] * 4 + [False, True, False]
    assert batch.advantage_T.tolist() == [0.0] * 4 + [1.5, 0.0, 1.5]
