"""Pairs of answers: from scored rollouts, as a stream, on disk, and packed for the learner."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rl.data import DataError
from rl.guidance import Pair
from rl.pairs import (
    PairStream,
    is_pairs_file,
    load_pairs,
    make_pair,
    pairs_digest,
    pairs_of,
    split_pairs,
    to_batch,
    turned_round,
    write_pairs,
)
from rl.types import Budget, BudgetKind, Group, Scored, VerdictStatus
from tests.builders import NO_THINK, make_budget, make_lease, make_prompt, make_rollout, make_scored

RIGHT, WRONG = VerdictStatus.CORRECT, VerdictStatus.WRONG
Member = tuple[VerdictStatus, int] | tuple[VerdictStatus, int, Budget]


def at_most(tokens: int, *, hard: bool = False) -> Budget:
    return Budget(tokens, BudgetKind.AT_MOST, "<think> {budget}", hard=hard)


def answer(member: int, status: VerdictStatus, length: int, budget: Budget | None = None) -> Scored:
    """An answer of so many tokens, each of them 100 + its member, by which it is told apart."""
    lease = make_lease(member=member, budget=make_budget() if budget is None else budget)
    return make_scored(make_rollout(lease, generated=[100 + member] * length), status=status)


def group(*members: Member) -> Group:
    return Group(make_prompt(), tuple(answer(i, *member) for i, member in enumerate(members)))


def made(*members: Member, per_prompt: int = 1, prefer_short: bool = True) -> list[tuple[int, int]]:
    """The pairs of one prompt's answers, as (chosen member, rejected member)."""
    found = pairs_of([group(*members)], per_prompt=per_prompt, prefer_short=prefer_short, max_length=1000)
    return [(pair.chosen_ids[0] - 100, pair.rejected_ids[0] - 100) for pair in found.pairs]


def some_pairs(count: int, *, per_prompt: int = 1) -> list[Pair]:
    return [make_pair([1, i // per_prompt], [2, i], [3, i, 4], f"question {i // per_prompt}") for i in range(count)]


# ---- from scored rollouts --------------------------------------------------------------------------------------------


def test_short_and_right_beats_long_and_right_beats_wrong() -> None:
    short, long, wrong = (RIGHT, 10), (RIGHT, 40), (WRONG, 5)
    assert made(long, wrong, short) == [(2, 1)]
    assert made(long, wrong) == [(0, 1)]
    assert made(long, short) == [(1, 0)]


def test_a_right_answer_over_its_budget_loses_to_one_within_and_beats_a_wrong_one_within() -> None:
    over, within = (RIGHT, 30, at_most(20)), (RIGHT, 29, at_most(40))
    assert made(over, within) == [(1, 0)]
    assert made(over, within, prefer_short=False) == made(over, within, per_prompt=9) == [(1, 0)]
    assert made(over, (WRONG, 5, at_most(20))) == [(0, 1)]


def test_of_wrong_answers_the_longest_over_its_budget_is_rejected() -> None:
    assert made((WRONG, 50, at_most(60)), (WRONG, 30, at_most(20)), (WRONG, 25, at_most(20)), (RIGHT, 15)) == [(3, 1)]


@pytest.mark.parametrize("prefer_short", [True, False])
def test_equal_answers_make_no_pair(prefer_short: bool) -> None:
    assert made((WRONG, 5), (WRONG, 60), (VerdictStatus.TRUNCATED, 64), prefer_short=prefer_short) == []
    assert made((RIGHT, 20), (RIGHT, 20), prefer_short=prefer_short) == []
    assert made((RIGHT, 20), prefer_short=prefer_short) == [] and made(prefer_short=prefer_short) == []


def test_lengths_of_right_answers_count_from_a_fifth_on_and_only_where_short_is_preferred() -> None:
    assert made((RIGHT, 20), (RIGHT, 16)) == [(1, 0)]
    assert made((RIGHT, 20), (RIGHT, 17)) == []
    assert made((RIGHT, 20), (RIGHT, 5), prefer_short=False) == []
    assert made((RIGHT, 9, NO_THINK), (RIGHT, 20)) == [(0, 1)]


def test_an_exact_budget_is_kept_within_a_tenth_of_it_and_its_length_is_not_compared() -> None:
    exact = make_budget(20)
    assert made((RIGHT, 10, exact), (RIGHT, 22, exact)) == [(1, 0)]
    assert made((RIGHT, 18, exact), (RIGHT, 22, exact)) == []
    assert made((RIGHT, 5, exact), (RIGHT, 17, exact)) == []
    assert made((RIGHT, 18, exact), (RIGHT, 60)) == []


def test_a_budget_that_the_engine_enforces_is_kept_always() -> None:
    assert made((RIGHT, 30, at_most(20, hard=True)), (RIGHT, 28, at_most(40, hard=True))) == []


def test_more_pairs_go_from_both_ends_inwards_and_use_no_answer_twice() -> None:
    members: list[Member] = [(WRONG, 50), (RIGHT, 10), (RIGHT, 39), (WRONG, 60), (RIGHT, 40)]
    assert made(*members, per_prompt=1) == [(1, 3)]
    assert made(*members, per_prompt=9) == [(1, 3), (2, 0)]
    assert made((RIGHT, 10), (RIGHT, 11), (RIGHT, 12), (RIGHT, 40), per_prompt=9) == [(0, 3)]


def test_what_no_grader_could_judge_takes_no_part_and_is_counted() -> None:
    members = ((VerdictStatus.TIMED_OUT, 5), (RIGHT, 10), (VerdictStatus.CRASHED, 70), (WRONG, 20))
    assert made(*members) == [(1, 3)]
    found = pairs_of([group(*members), group((RIGHT, 9), (RIGHT, 9))], max_length=1000)
    assert found.counts == {"prompts": 2, "unscored": 2, "flat": 1, "too_long": 0}


def test_answers_are_compared_only_behind_the_same_prompt() -> None:
    first, second = make_prompt(token_ids=(1, 2)), make_prompt(token_ids=(1, 2, 7))

    def member(index: int, prompt: object, status: VerdictStatus) -> Scored:
        scored = answer(index, status, 10)
        return replace(scored, rollout=replace(scored.rollout, lease=replace(scored.rollout.lease, prompt=prompt)))

    apart = Group(first, (member(0, first, RIGHT), member(1, second, WRONG)))
    assert pairs_of([apart], max_length=1000).counts == {"prompts": 2, "unscored": 0, "flat": 2, "too_long": 0}
    together = Group(first, (*apart.members, member(2, second, RIGHT)))
    (pair,) = pairs_of([together], max_length=1000).pairs
    assert (pair.prompt_ids, pair.chosen_ids[0], pair.rejected_ids[0]) == ((1, 2, 7), 102, 101)


def test_a_pair_holds_the_whole_responses_and_the_question() -> None:
    prefilled = make_rollout(make_lease(prefill_ids=[50, 51]), generated=[8, 9])
    other = make_rollout(make_lease(member=1, prefill_ids=[50]), generated=[7])
    both = Group(make_prompt(), (make_scored(prefilled), make_scored(other, status=WRONG, reward=0.0)))
    (pair,) = pairs_of([both], max_length=7).pairs
    assert (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids) == ((1, 2, 3), (50, 51, 8, 9), (50, 7))
    assert pair.question == "question 0" and pair.tokens == 6
    assert pairs_of([both], max_length=6).counts["too_long"] == 1
    assert not pairs_of([both], max_length=6).pairs


# ---- as a stream, and on disk ----------------------------------------------------------------------------------------


def test_the_id_of_a_pair_is_that_of_its_tokens() -> None:
    pair = make_pair([1], [2], [3], "asked")
    assert pair.id == make_pair((1,), (2,), (3,)).id and len(pair.id) == 16
    assert pair.id not in {make_pair([1], [3], [2]).id, make_pair([1, 2], [], [3]).id}
    turned = turned_round(pair)
    assert (turned.chosen_ids, turned.rejected_ids, turned.question) == ((3,), (2,), "asked")
    assert turned_round(turned) == pair


def test_held_out_pairs_share_no_prompt_with_the_others() -> None:
    pairs = some_pairs(30, per_prompt=3)
    train, held_out = split_pairs(pairs, 7, seed=0)
    assert (len(train), len(held_out)) == (21, 7)  # three prompts of three pairs were drawn, and two pairs are in neither part
    assert not {p.prompt_ids for p in train} & {p.prompt_ids for p in held_out}
    assert (train, held_out) == split_pairs(pairs, 7, seed=0) != split_pairs(pairs, 7, seed=1)
    assert split_pairs(pairs, 0, seed=0) == (pairs, [])


def test_held_out_pairs_that_leave_none_to_train_on_are_refused() -> None:
    with pytest.raises(DataError, match="10 pairs of 10 prompts leave none to train on beside 10 held out"):
        split_pairs(some_pairs(10), 10, seed=0)


def test_an_epoch_of_pairs_holds_each_once_and_a_resumed_stream_goes_on_where_it_stopped() -> None:
    pairs = some_pairs(10)
    stream = PairStream(pairs, seed=1)
    whole, cursor = stream.take(0, 20)
    assert cursor == 20 and len(stream) == 10
    assert set(whole[:10]) == set(whole[10:]) == set(pairs) and whole[:10] != whole[10:]
    assert PairStream(pairs, seed=1).take(7, 9) == (whole[7:16], 16)
    assert PairStream(pairs, seed=2).take(0, 10)[0] != whole[:10]
    with pytest.raises(ValueError, match="must not be negative"):
        stream.take(-1, 1)


def test_a_stream_of_no_pairs_is_refused() -> None:
    with pytest.raises(DataError, match="no pairs to stream"):
        PairStream([], seed=0)


def test_pairs_on_disk_are_the_very_same_pairs(tmp_path: Path) -> None:
    pairs = [*some_pairs(3), make_pair([1], [2], [3], "7 · 5 =\u2028 \ud800 ?")]
    digest = write_pairs(tmp_path / "pairs.jsonl", pairs)
    assert digest == pairs_digest(pairs)
    assert load_pairs(tmp_path / "pairs.jsonl", digest=digest) == pairs
    write_pairs(tmp_path / "pairs.jsonl", [])
    assert load_pairs(tmp_path / "pairs.jsonl") == []


def test_the_digest_tells_order_answers_and_questions_apart() -> None:
    pairs = some_pairs(3)
    others: list[Sequence[Pair]] = [pairs[::-1], pairs[:2], [turned_round(pairs[0]), *pairs[1:]]]
    others.append([replace(pairs[0], question="another"), *pairs[1:]])
    assert len({pairs_digest(p) for p in [pairs, *others]}) == 5


def test_damaged_and_other_pairs_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    with pytest.raises(DataError, match="no file .* with pairs"):
        load_pairs(path)
    digest = write_pairs(path, some_pairs(3))
    text = path.read_text()
    for damaged in (text[:-1], text.replace("[3, 2, 4]", "[3, 2, 5]"), "".join(text.splitlines(keepends=True)[:-1])):
        path.write_text(damaged)
        with pytest.raises(DataError, match="is damaged"):
            load_pairs(path)
    for foreign in ("", "[1]\n", '{"prompt": [1]}\n', text.replace('"chosen"', '"better"')):
        path.write_text(foreign)
        with pytest.raises(DataError, match="holds no pairs"):
            load_pairs(path)
    write_pairs(path, some_pairs(2))
    with pytest.raises(DataError, match="other pairs than the checkpoint"):
        load_pairs(path, digest=digest)


# ---- for the learner -------------------------------------------------------------------------------------------------


def test_a_batch_holds_both_answers_of_each_pair_side_by_side() -> None:
    pairs = [make_pair([1, 2], [10, 11], [12]), make_pair([3], [13], [14, 15, 16])]
    batch = to_batch(pairs, [0, 1])
    assert batch.token_T.tolist() == [1, 2, 10, 11, 1, 2, 12, 3, 13, 3, 14, 15, 16]
    assert batch.start_N.tolist() == [0, 4, 7, 9, 13]
    assert batch.prompt_length_N.tolist() == [2, 2, 1, 1]
    assert batch.advantage_T.tolist() == [0, 0, 1, 1, 0, 0, -1, 0, 1, 0, -1, -1, -1]
    assert torch.equal(batch.loss_mask_T, batch.advantage_T != 0)
    assert batch.pair_N is not None and batch.pair_N.tolist() == [0, 0, 1, 1]
    assert batch.minibatch_N.tolist() == [0, 0, 1, 1]
    assert batch.guidance.columns() == {}
    assert to_batch(pairs).minibatch_N.tolist() == [0, 0, 0, 0]


def test_values_of_response_tokens_stand_beside_their_tokens() -> None:
    pairs = [make_pair([1, 2], [10, 11], [12]), make_pair([3], [13], [14, 15])]
    credit = [(torch.tensor([0.1, 0.2]), torch.tensor([0.3])), (None, torch.tensor([0.4, 0.5], dtype=torch.float64))]
    reference = [(torch.tensor([-1.0, -2.0]), torch.tensor([-3.0])), (torch.tensor([-4.0]), torch.tensor([-5.0, -6.0]))]
    guidance = to_batch(pairs, credit=credit, reference=reference).guidance
    assert guidance.credit_T is not None and guidance.reference_T is not None
    torch.testing.assert_close(guidance.credit_T, torch.tensor([0, 0, 0.1, 0.2, 0, 0, 0.3, 0, 0, 0, 0.4, 0.5]))
    assert guidance.reference_T.tolist() == [0, 0, -1, -2, 0, 0, -3, 0, -4, 0, -5, -6]


def test_values_that_do_not_fit_are_refused() -> None:
    pairs = [make_pair([1, 2], [10, 11], [12])]
    full = (torch.zeros(2), torch.zeros(1))
    with pytest.raises(ValueError, match="lacks the reference log-probs"):
        to_batch(pairs, reference=[(None, torch.zeros(1))])
    with pytest.raises(ValueError, match="an answer of 1 tokens and values of shape"):
        to_batch(pairs, credit=[(torch.zeros(2), torch.zeros(2))])
    with pytest.raises(ValueError, match="values for 2"):
        to_batch(pairs, credit=[full, full])
    with pytest.raises(ValueError, match="1 pairs and 2 mini-batch ids"):
        to_batch(pairs, [0, 0])


def test_a_runs_own_pairs_are_told_from_a_data_set(tmp_path: Path) -> None:
    own, texts, broken = tmp_path / "pairs.jsonl", tmp_path / "texts.jsonl", tmp_path / "broken.jsonl"
    write_pairs(own, [make_pair((1,), (2,), (3,))])
    texts.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    broken.write_text("{")
    assert [is_pairs_file(path) for path in (own, texts, broken, tmp_path / "none.jsonl")] == [True, False, False, False]
