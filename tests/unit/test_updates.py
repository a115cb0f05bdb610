"""What an update's losses are divided by."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from rl.batch import pack_rollouts
from rl.guidance import Guidance
from rl.pairs import make_pair, to_batch
from rl.settings import Settings
from rl.updates import distillation_of, distilled_rollouts, loss_tokens, pair_counts, planned_updates
from tests.builders import make_lease, make_prompt, make_rollout


def _batch(minibatches: list[int]) -> Any:
    rollouts = [
        make_rollout(
            make_lease(prompt=make_prompt(i, token_ids=(1, 2)), group=i), generated=[5] * (i + 1), logp_T=[-1.0] * (i + 1)
        )
        for i in range(len(minibatches))
    ]
    return pack_rollouts(rollouts, torch.ones(len(minibatches)), torch.tensor(minibatches))


def test_loss_tokens_are_counted_by_mini_batch_and_an_empty_one_has_none() -> None:
    assert loss_tokens(_batch([0, 0, 2]), 3) == [3, 0, 3]


def test_pairs_are_counted_not_their_answers() -> None:
    pairs = [make_pair((1,), (2,), (3,)), make_pair((1,), (4,), (5,)), make_pair((1,), (6,), (7,))]
    assert pair_counts(to_batch(pairs, [0, 0, 1]), 2) == [2, 1]


def test_only_rollouts_with_a_token_to_distil_are_counted() -> None:
    batch = _batch([0, 0, 1])
    weight_T = torch.zeros(batch.tokens)
    weight_T[2] = 1.0  # the response token of rollout 0
    weight_T[0] = 1.0  # a prompt token counts for nothing
    assert distilled_rollouts(replace(batch, guidance=Guidance(weight_T=weight_T)), 2) == (1, 0)


def test_the_weight_of_a_distillation_counts_beside_a_reward_only() -> None:
    tree = {
        "model": {"path": "m"}, "data": {"source": "p.jsonl"}, "max_steps": 3, "learner": {"minibatches": 2, "epochs": 2},
        "distil": {"weight": 0.3, "teacher": {"dpo": "a", "reverse": "b", "r": 20}},
    }
    batch = replace(_batch([0]), guidance=Guidance(weight_T=torch.ones(3)))
    beside = distillation_of(Settings.model_validate(tree), batch, 11)
    alone = distillation_of(Settings.model_validate(tree | {"stage": "distil"}), batch, 11)
    assert beside is not None and alone is not None
    assert (beside.weight, alone.weight) == (0.3, 1.0) and beside.r == 20 and beside.vocabulary == 11
    assert planned_updates(Settings.model_validate(tree)) == 12
