"""Which tokens a distillation looks at and how much each counts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from rl.batch import pack_rollouts
from rl.guidance import Guidance
from rl.replay import Distillation, OldScores
from rl.selection import distillation_weights, weighted
from rl.types import TrainBatch
from tests.builders import make_lease, make_prompt, make_rollout


def _batch(weights: list[float]) -> TrainBatch:
    """Two rollouts of one prompt token, with 3 and 2 response tokens, in two mini-batches; weights of the response tokens."""
    rollouts = [
        make_rollout(make_lease(prompt=make_prompt(i, token_ids=(1,)), group=i), generated=[5] * n, logp_T=[-1.0] * n)
        for i, n in enumerate((3, 2))
    ]
    batch = pack_rollouts(rollouts, torch.ones(2), torch.tensor([0, 1]))
    weight_T = torch.tensor([0.0, *weights[:3], 0.0, *weights[3:]])
    return replace(batch, guidance=Guidance(weight_T=weight_T))


def _old(entropy: list[float], raw: list[float] | None = None) -> OldScores:
    values = torch.tensor(raw or [0.0] * len(entropy))
    return OldScores(values, values, None, torch.tensor(entropy))


def _weights(batch: TrainBatch, old: OldScores | None, divisors: list[int], **task: Any) -> list[float]:
    terms = Distillation(mode="hidden", rollouts=(1, 1), **task)
    found = weighted(batch, old, divisors, terms, gather=lambda value_T: value_T).guidance.weight_T
    assert found is not None
    return found.tolist()


def test_weights_make_a_sum_over_tokens_the_mean_over_rollouts_of_token_means() -> None:
    selected_T, owner_T = torch.tensor([True, True, False, True]), torch.tensor([0, 0, 0, 1])
    weight_T = distillation_weights(selected_T, owner_T, torch.tensor([5.0, 5.0]))
    assert weight_T.tolist() == [2.5, 2.5, 0.0, 5.0]
    # losses 1 and 3 in the first rollout, 7 in the second: mean over rollouts of (2, 7) = 4.5, times the divisor 10 / 2 rollouts
    assert float((weight_T * torch.tensor([1.0, 3.0, 100.0, 7.0])).sum()) / 10 == pytest.approx(4.5)


def test_without_length_norm_every_selected_token_counts_alike() -> None:
    weight_T = distillation_weights(torch.tensor([True, True, True]), torch.tensor([0, 0, 1]), torch.ones(2), length_norm=False)
    assert weight_T.tolist() == [1.0, 1.0, 1.0]


def test_each_mini_batch_has_its_own_divisor_and_candidates_without_a_weight_stay_out() -> None:
    assert _weights(_batch([1, 0, 1, 1, 1]), None, [6, 8]) == [0, 3.0, 0, 3.0, 0, 4.0, 4.0]


def test_an_entropy_share_keeps_the_least_sure_candidates_of_all_rollouts_together() -> None:
    # candidates' entropies 0.1 0.9 0.3 | 0.8 0.2, and 5 at a token that is no candidate
    batch = _batch([1, 1, 1, 1, 1])
    old = _old([5.0, 0.1, 0.9, 0.3, 5.0, 0.8, 0.2])
    kept = [weight > 0 for weight in _weights(batch, old, [4, 4], entropy_share=0.4)]
    assert kept == [False, False, True, True, False, True, False]
    kept = [weight > 0 for weight in _weights(batch, old, [4, 4], entropy_share=0.2)]
    assert kept == [False, False, True, False, False, True, False]  # the quantile itself is in


def test_sstoken_keeps_what_the_policy_gained_most_on_the_start_policy() -> None:
    batch = _batch([1, 1, 1, 1, 1])
    reference_T = torch.tensor([0.0, -2.0, -0.5, -3.0, 0.0, -0.1, -2.5])
    batch = replace(batch, guidance=replace(batch.guidance, reference_T=reference_T))
    old = _old([1.0] * 7, [0.0, -1.0, -0.5, -3.2, 0.0, -0.1, -1.0])  # gains 1, 0, -0.2 | 0, 1.5
    kept = [weight > 0 for weight in _weights(batch, old, [4, 4], sstoken=(1.0, 0.5))]
    assert kept == [False, True, True, False, False, False, True]


def test_sstoken_has_nothing_to_choose_from_where_no_token_is_a_candidate() -> None:
    assert _weights(_batch([0, 0, 0, 0, 0]), _old([1.0] * 7), [4, 4], sstoken=(0.5, 0.5)) == [0.0] * 7
