"""Packing, selecting and padding against values worked by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from rl.batch import pack_rollouts, pad_rows, plan_microbatches, select_rollouts, unpack_tokens
from rl.types import Rollout, TrainBatch
from tests.builders import make_lease, make_prompt, make_rollout


def _rollouts() -> list[Rollout]:
    """A budgeted rollout (2 prompt, 1 prefill, 2 generated) and a free one (1 prompt, 3 generated) at temperature 0.5."""
    budgeted = make_lease(prompt=make_prompt(0, token_ids=(11, 12)), prefill_ids=(13,), budget=4)
    free = make_lease(prompt=make_prompt(1, token_ids=(21,)), group=1, temperature=0.5)
    return [
        make_rollout(budgeted, generated=(14, 15), logp_T=(-0.5, -0.25)),
        make_rollout(free, generated=(22, 23, 24), logp_T=(-1.0, -2.0, -3.0)),
    ]


def _batch(*, train_prefix: bool = True) -> TrainBatch:
    return pack_rollouts(_rollouts(), torch.tensor([2.0, -1.0]), torch.tensor([0, 1]), train_prefix=train_prefix)


def test_a_packed_batch_holds_prompts_and_responses_one_after_the_other() -> None:
    batch = _batch()
    assert batch.token_T.tolist() == [11, 12, 13, 14, 15, 21, 22, 23, 24]
    assert batch.start_N.tolist() == [0, 5, 9]
    assert (batch.rollouts, batch.tokens) == (2, 9)
    assert batch.prompt_length_N.tolist() == [2, 1]
    assert batch.prefill_length_N.tolist() == [1, 0]
    assert batch.temperature_N.tolist() == [1.0, 0.5]
    assert batch.minibatch_N.tolist() == [0, 1]


def test_loss_and_advantage_stand_on_the_response_only() -> None:
    batch = _batch()
    assert batch.loss_mask_T.tolist() == [False, False, True, True, True, False, True, True, True]
    assert batch.advantage_T.tolist() == [0, 0, 2, 2, 2, 0, -1, -1, -1]


def test_without_train_prefix_the_budget_sentence_carries_neither_loss_nor_advantage() -> None:
    batch = _batch(train_prefix=False)
    assert batch.loss_mask_T.tolist() == [False, False, False, True, True, False, True, True, True]
    assert batch.advantage_T.tolist() == [0, 0, 0, 2, 2, 0, -1, -1, -1]


def test_sampled_log_probs_are_nan_where_the_engine_did_not_sample() -> None:
    values = _batch().sampled_logp_T.tolist()
    assert [math.isnan(v) for v in values] == [True, True, True, False, False, True, False, False, False]
    assert [v for v in values if not math.isnan(v)] == [-0.5, -0.25, -1.0, -2.0, -3.0]


def test_unpacking_gives_back_the_tokens() -> None:
    assert unpack_tokens(_batch()) == [[11, 12, 13, 14, 15], [21, 22, 23, 24]]


def test_packing_refuses_lengths_that_disagree() -> None:
    with pytest.raises(ValueError, match="2 rollouts, 3 advantages, 2 mini-batch ids"):
        pack_rollouts(_rollouts(), torch.zeros(3), torch.zeros(2))
    short = replace(_rollouts()[0], logp_T=(-0.5,))
    with pytest.raises(ValueError, match=r"000000.0000.000: 2 generated tokens but 1 log-probs"):
        pack_rollouts([short], torch.zeros(1), torch.zeros(1))


def test_packing_refuses_an_empty_prompt_because_nothing_predicts_its_first_token() -> None:
    orphan = make_rollout(make_lease(prompt=make_prompt(token_ids=())))
    with pytest.raises(ValueError, match="no prompt token"):
        pack_rollouts([orphan], torch.zeros(1), torch.zeros(1))


def test_selected_rollouts_come_in_the_order_asked_for() -> None:
    part = select_rollouts(_batch(), [1, 0])
    assert part.token_T.tolist() == [21, 22, 23, 24, 11, 12, 13, 14, 15]
    assert part.start_N.tolist() == [0, 4, 9]
    assert part.advantage_T.tolist() == [0, -1, -1, -1, 0, 0, 2, 2, 2]
    assert part.temperature_N.tolist() == [0.5, 1.0]
    assert part.minibatch_N.tolist() == [1, 0]


def test_selecting_nothing_gives_an_empty_batch_of_the_same_types() -> None:
    whole, part = _batch(), select_rollouts(_batch(), [])
    assert (part.rollouts, part.tokens) == (0, 0)
    assert part.start_N.tolist() == [0]
    for name, value in part.columns().items():
        assert value.dtype == getattr(whole, name).dtype


def test_a_plan_sorts_by_length_and_counts_padded_tokens() -> None:
    # 2 x 5 = 10 fits in 10, a third row of width 5 does not; 3 x 2 = 6 fits
    assert plan_microbatches([2, 5, 2, 4, 2], 10) == [[1, 3], [0, 2, 4]]


def test_a_rollout_longer_than_the_token_budget_gets_a_micro_batch_of_its_own() -> None:
    assert plan_microbatches([12, 3, 3], 6) == [[0], [1, 2]]
    assert plan_microbatches([], 6) == []


def test_padded_rows_point_from_each_predicting_position_to_its_response_token() -> None:
    micro = pad_rows(_batch(), [1, 0])
    assert micro.token_BS.tolist() == [[21, 22, 23, 24, 0], [11, 12, 13, 14, 15]]
    assert micro.position_T.tolist() == [0, 1, 2, 6, 7, 8]  # the position before each response token
    assert micro.target_T.tolist() == [22, 23, 24, 13, 14, 15]
    assert micro.source_T.tolist() == [6, 7, 8, 2, 3, 4]
    assert micro.mask_T.tolist() == [True] * 6
    assert micro.advantage_T.tolist() == [-1, -1, -1, 2, 2, 2]
    assert micro.temperature_T.tolist() == [0.5, 0.5, 0.5, 1, 1, 1]
    assert micro.padding == 1


def test_an_empty_micro_batch_has_a_row_but_no_loss() -> None:
    micro = pad_rows(_batch(), [])
    assert micro.token_BS.shape == (1, 2) and micro.padding == 2
    assert not micro.mask_T.any() and not micro.advantage_T.any()
    assert torch.isnan(micro.sampled_logp_T).all()
