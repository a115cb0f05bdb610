"""What holds for every batch: packing, padding and dealing to ranks lose nothing, double nothing and can be undone."""

from __future__ import annotations

from dataclasses import replace

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rl.batch import pack_rollouts, pad_rows, plan_microbatches, select_rollouts, units_of, unpack_tokens
from rl.guidance import Guidance
from rl.learner_worker import ROLLOUT_COLUMNS, TOKEN_COLUMNS, from_data_proto, to_data_proto
from rl.types import Rollout, TrainBatch
from tests.builders import make_lease, make_prompt, make_rollout

ids = st.integers(0, 99)


@st.composite
def rollout_lists(draw: st.DrawFn, *, most: int = 12) -> list[Rollout]:
    """1 to ``most`` rollouts of all lengths, with and without a prefill."""
    rollouts = []
    for i in range(draw(st.integers(1, most))):
        lease = make_lease(
            prompt=make_prompt(i, token_ids=draw(st.lists(ids, min_size=1, max_size=6))),
            group=i,
            prefill_ids=draw(st.lists(ids, max_size=3)),
            temperature=draw(st.sampled_from([0.5, 1.0, 2.0])),
        )
        generated = draw(st.lists(ids, min_size=1, max_size=8))
        rollouts.append(make_rollout(lease, generated=generated, logp_T=[-0.5 * (t + 1) for t in range(len(generated))]))
    return rollouts


@st.composite
def batches(draw: st.DrawFn, *, most: int = 12, minibatches: int = 3) -> TrainBatch:
    """A packed batch; rollout i has advantage i + 1, so that rows can be told apart. Some mini-batches may be empty."""
    rollouts = draw(rollout_lists(most=most))
    owner = draw(st.lists(st.integers(0, minibatches - 1), min_size=len(rollouts), max_size=len(rollouts)))
    packed = pack_rollouts(
        rollouts, torch.arange(len(rollouts)) + 1.0, torch.tensor(owner), train_prefix=draw(st.booleans())
    )
    return replace(packed, guidance=guidance_of(packed.tokens)) if draw(st.booleans()) else packed


def guidance_of(tokens: int) -> Guidance:
    """Columns of one and of two dimensions that name their token."""
    place_T = torch.arange(tokens)
    return Guidance(weight_T=place_T.float(), id_TK=torch.stack([place_T, place_T + tokens], dim=1))


@st.composite
def paired(draw: st.DrawFn) -> TrainBatch:
    """Pairs of rollouts, shuffled: pair k has advantage 1 and -1, and lies in one mini-batch."""
    rollouts = draw(rollout_lists(most=10))
    rollouts = rollouts[: len(rollouts) // 2 * 2] or [rollouts[0], rollouts[0]]
    pair_N = torch.tensor(draw(st.permutations([i // 2 for i in range(len(rollouts))])))
    seen: set[int] = set()
    side = [-1.0 if pair in seen else (seen.add(pair) or 1.0) for pair in pair_N.tolist()]
    packed = pack_rollouts(rollouts, torch.tensor(side), pair_N % 2)
    return replace(packed, pair_N=pair_N, guidance=guidance_of(packed.tokens))


def _assert_same(left: TrainBatch, right: TrainBatch) -> None:
    assert left.columns().keys() == right.columns().keys()
    for name, value in left.columns().items():
        torch.testing.assert_close(right.columns()[name], value, rtol=0, atol=0, equal_nan=True)


@given(rollouts=rollout_lists(), train_prefix=st.booleans())
def test_a_packed_batch_gives_back_every_rollout_exactly(rollouts: list[Rollout], train_prefix: bool) -> None:
    batch = pack_rollouts(rollouts, torch.ones(len(rollouts)), torch.zeros(len(rollouts)), train_prefix=train_prefix)
    for i, (rollout, tokens) in enumerate(zip(rollouts, unpack_tokens(batch), strict=True)):
        prompt, prefill = int(batch.prompt_length_N[i]), int(batch.prefill_length_N[i])
        sampled_T = batch.sampled_logp_T[int(batch.start_N[i]) : int(batch.start_N[i + 1])]
        assert tuple(tokens[:prompt]) == rollout.lease.prompt.token_ids
        assert tuple(tokens[prompt : prompt + prefill]) == rollout.lease.prefill_ids
        assert tuple(tokens[prompt:]) == rollout.response_ids
        assert tuple(sampled_T[prompt + prefill :].tolist()) == rollout.logp_T
        assert torch.isnan(sampled_T[: prompt + prefill]).all()


@given(batch=batches())
def test_advantages_stand_on_loss_tokens_only_and_on_all_of_them(batch: TrainBatch) -> None:
    assert torch.equal(batch.advantage_T != 0, batch.loss_mask_T)


@given(rollouts=rollout_lists())
def test_train_prefix_changes_the_prefill_tokens_and_nothing_else(rollouts: list[Rollout]) -> None:
    advantage_N, minibatch_N = torch.ones(len(rollouts)), torch.zeros(len(rollouts))
    whole = pack_rollouts(rollouts, advantage_N, minibatch_N)
    without = pack_rollouts(rollouts, advantage_N, minibatch_N, train_prefix=False)
    changed = whole.loss_mask_T & ~without.loss_mask_T
    assert not (without.loss_mask_T & ~whole.loss_mask_T).any()
    assert int(changed.sum()) == int(whole.prefill_length_N.sum())
    assert torch.equal(without.loss_mask_T, ~torch.isnan(without.sampled_logp_T))
    assert torch.equal(whole.token_T, without.token_T) and torch.equal(whole.start_N, without.start_N)


@given(lengths=st.lists(st.integers(1, 60), max_size=40), budget=st.integers(1, 200))
def test_a_plan_covers_every_rollout_once_and_stays_within_the_token_budget(lengths: list[int], budget: int) -> None:
    plan = plan_microbatches(lengths, budget)
    assert sorted(i for index in plan for i in index) == list(range(len(lengths)))
    widths = [max(lengths[i] for i in index) for index in plan]
    assert widths == sorted(widths, reverse=True)
    assert all(len(index) == 1 or len(index) * width <= budget for index, width in zip(plan, widths, strict=True))


@given(batch=batches(), budget=st.integers(1, 64))
def test_the_micro_batches_of_a_plan_hold_every_response_token_once(batch: TrainBatch, budget: int) -> None:
    micros = [pad_rows(batch, index) for index in plan_microbatches(batch.start_N.diff().tolist(), budget)]
    source_T = torch.cat([micro.source_T for micro in micros]).sort().values
    response = [
        torch.arange(int(batch.start_N[i] + batch.prompt_length_N[i]), int(batch.start_N[i + 1])) for i in range(batch.rollouts)
    ]
    assert torch.equal(source_T, torch.cat(response))
    assert sum(micro.token_BS.numel() - micro.padding for micro in micros) == batch.tokens
    for micro in micros:
        flat = micro.token_BS.flatten()
        assert torch.equal(flat[micro.position_T + 1], micro.target_T)
        assert torch.equal(flat[micro.position_T], batch.token_T[micro.source_T - 1])
        torch.testing.assert_close(micro.sampled_logp_T, batch.sampled_logp_T[micro.source_T], equal_nan=True)


@given(batch=batches(), data=st.data())
def test_selecting_twice_equals_selecting_once_and_a_permutation_can_be_undone(batch: TrainBatch, data: st.DataObject) -> None:
    order = data.draw(st.permutations(range(batch.rollouts)))
    kept = data.draw(st.lists(st.integers(0, batch.rollouts - 1), max_size=batch.rollouts))
    shuffled = select_rollouts(batch, order)
    _assert_same(batch, select_rollouts(shuffled, [order.index(i) for i in range(batch.rollouts)]))
    _assert_same(select_rollouts(batch, [order[i] for i in kept]), select_rollouts(shuffled, kept))
    assert unpack_tokens(select_rollouts(batch, kept)) == [unpack_tokens(batch)[i] for i in kept]


def _shares(batch: TrainBatch, ranks: int) -> list[TrainBatch]:
    """What each rank receives: verl cuts a DataProto into equal consecutive chunks of rows."""
    return [from_data_proto(chunk) for chunk in to_data_proto(batch, ranks).chunk(ranks)]


def _whose(share: TrainBatch) -> list[int]:
    """Which rollouts of the batch a share holds; rollout i has advantage i + 1 on its last token."""
    return [int(share.advantage_T[end - 1]) - 1 for end in share.start_N[1:].tolist()]


@settings(max_examples=60)
@given(batch=batches(), ranks=st.integers(1, 4))
def test_dealing_to_ranks_loses_and_doubles_nothing(batch: TrainBatch, ranks: int) -> None:
    shares = _shares(batch, ranks)
    assert sorted(i for share in shares for i in _whose(share)) == list(range(batch.rollouts))
    for share in shares:
        _assert_same(select_rollouts(batch, _whose(share)), share)


@settings(max_examples=60)
@given(batch=batches(), ranks=st.integers(1, 4))
def test_every_mini_batch_is_dealt_to_as_many_ranks_as_it_has_rollouts_for(batch: TrainBatch, ranks: int) -> None:
    shares = _shares(batch, ranks)
    for m in set(batch.minibatch_N.tolist()):
        members = int((batch.minibatch_N == m).sum())
        served = sum(bool((share.minibatch_N == m).any()) for share in shares)
        assert served == min(ranks, members)


@settings(max_examples=60)
@given(batch=batches(most=4, minibatches=1))
def test_a_mini_batch_smaller_than_the_ranks_leaves_the_rest_of_them_empty_but_sound(batch: TrainBatch) -> None:
    shares = _shares(batch, 4)
    assert sorted(share.rollouts for share in shares) == [0] * (4 - batch.rollouts) + [1] * batch.rollouts
    for share in shares:
        if share.rollouts == 0:
            assert share.start_N.tolist() == [0] and share.tokens == 0
            assert pad_rows(share, []).token_BS.shape == (1, 2)


@settings(max_examples=60)
@given(batch=batches(), ranks=st.integers(1, 4))
def test_the_columns_of_a_dealt_batch_keep_their_types(batch: TrainBatch, ranks: int) -> None:
    columns = to_data_proto(batch, ranks).batch
    for name in (*TOKEN_COLUMNS, *ROLLOUT_COLUMNS):
        assert columns[name].dtype == getattr(batch, name).dtype
    assert int(columns["length_N"].sum()) == batch.tokens


@settings(max_examples=60)
@given(batch=paired(), ranks=st.integers(1, 3), budget=st.integers(1, 40))
def test_a_pair_meets_in_one_rank_and_one_micro_batch_with_its_sides_told_apart(
    batch: TrainBatch, ranks: int, budget: int
) -> None:
    found: list[tuple[int, int]] = []
    for share in _shares(batch, ranks):
        units = units_of(share, range(share.rollouts))
        for index in plan_microbatches(share.start_N.diff().tolist(), budget, units):
            micro = pad_rows(share, index)
            counts = torch.bincount(micro.pair_B)
            assert set(counts[counts > 0].tolist()) == {2}
            found += zip(micro.pair_B.tolist(), micro.side_B.tolist(), strict=True)
            assert torch.equal(micro.guidance.columns()["weight_T"], share.guidance.columns()["weight_T"][micro.source_T])
    assert sorted(found) == sorted((pair, side) for pair in set(batch.pair_N.tolist()) for side in (-1, 1))
