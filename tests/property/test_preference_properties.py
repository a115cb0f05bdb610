"""What holds for every set of pairs: losses do not care for order, T-REG only reweighs, streams and files lose nothing."""

from __future__ import annotations

import tempfile
from pathlib import Path
from random import Random

import torch
from hypothesis import given
from hypothesis import strategies as st

from reward.treg import reshape_advantage, token_reward
from rl.contrast import corrupt
from rl.guidance import Pair
from rl.pairs import SHORTER, PairStream, load_pairs, make_pair, pairs_of, split_pairs, to_batch, write_pairs
from rl.preference import preference_loss
from rl.types import Budget, BudgetKind, Group, VerdictStatus
from tests.builders import make_lease, make_prompt, make_rollout, make_scored

F64 = torch.float64
ids = st.integers(0, 30)
logps = st.floats(-20, 0, width=32)
alphas = st.floats(0.01, 1.99)
Columns = dict[str, torch.Tensor]


@st.composite
def pair_lists(draw: st.DrawFn, *, least: int = 1) -> list[Pair]:
    sides = st.lists(ids, min_size=1, max_size=5)
    drawn = draw(st.lists(st.tuples(st.lists(ids, min_size=1, max_size=2), sides, sides), min_size=least, max_size=12))
    return [make_pair(*three, question=f"question {i}") for i, three in enumerate(drawn)]


@st.composite
def columns(draw: st.DrawFn) -> Columns:
    """Tokens of 1 to 4 pairs, each answer with at least one token in the mask, rows in any order."""
    pairs = draw(st.integers(1, 4))
    order = draw(st.permutations(range(2 * pairs)))
    row_T = [row for row in range(2 * pairs) for _ in range(draw(st.integers(1, 4)))]
    size = len(row_T)
    kept = draw(st.lists(st.booleans(), min_size=size, max_size=size))
    mask = [keep or row_T.index(row) == place for place, (row, keep) in enumerate(zip(row_T, kept, strict=True))]

    def values(strategy: st.SearchStrategy[float]) -> torch.Tensor:
        return torch.tensor(draw(st.lists(strategy, min_size=size, max_size=size)), dtype=F64)

    return {
        "logp_T": values(logps),
        "mask_T": torch.tensor(mask),
        "row_T": torch.tensor(row_T),
        "pair_B": torch.tensor(order) // 2,
        "side_B": 1 - 2 * (torch.tensor(order) % 2),
        "reference_T": values(logps),
        "credit_T": values(st.floats(-0.5, 0.5)),
    }


@given(columns(), alphas, st.floats(0.01, 2))
def test_a_token_weighs_one_plus_or_minus_alpha_times_its_credit(found: Columns, alpha: float, beta: float) -> None:
    """dL/dlogp = -side beta w (1 + side alpha credit) with w of the whole pair: never of the other sign, 0 outside the mask."""
    free_T = found["logp_T"].clone().requires_grad_()
    preference_loss(**(found | {"logp_T": free_T}), beta=beta, treg_alpha=alpha).loss.backward()
    plain_T = found["logp_T"].clone().requires_grad_()
    preference_loss(**(found | {"logp_T": plain_T}), beta=beta).loss.backward()
    assert free_T.grad is not None and plain_T.grad is not None
    side_T = found["side_B"].to(F64)[found["row_T"]]
    torch.testing.assert_close(free_T.grad, plain_T.grad * (1 + alpha * side_T * found["credit_T"]), atol=1e-12, rtol=1e-9)
    assert bool((free_T.grad * side_T <= 0).all()) and not bool(free_T.grad[~found["mask_T"]].any())


@given(columns(), st.randoms(use_true_random=False), st.sampled_from(["dpo", "simpo"]))
def test_the_loss_does_not_depend_on_the_order_of_tokens_rows_and_pairs(found: Columns, rng: Random, form: str) -> None:
    token = list(range(found["row_T"].numel()))
    row = list(range(found["pair_B"].numel()))
    rng.shuffle(token)
    rng.shuffle(row)
    shuffled = {name: value[torch.tensor(token if name.endswith("_T") else row)] for name, value in found.items()}
    shuffled["row_T"] = torch.tensor(row).argsort()[shuffled["row_T"]]
    shuffled["pair_B"] = 1000 - 3 * shuffled["pair_B"]
    one, other = (preference_loss(**case, form=form, beta=0.5, treg_alpha=0.5) for case in (found, shuffled))
    for name in ("loss", "pairs", "accuracy", "margin", "chosen_reward", "rejected_reward", "regulariser"):
        torch.testing.assert_close(getattr(one, name), getattr(other, name), atol=1e-9, rtol=1e-9)


@given(columns(), st.sampled_from(["dpo", "simpo"]))
def test_the_loss_and_its_reverse_differ_by_the_margin(found: Columns, form: str) -> None:
    """log sigmoid(z) - log sigmoid(-z) = z."""
    one = preference_loss(**found, form=form, beta=0.5)
    other = preference_loss(**(found | {"side_B": -found["side_B"]}), form=form, beta=0.5)
    torch.testing.assert_close(one.loss - other.loss, -one.margin, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(one.margin, -other.margin)


@given(st.lists(st.tuples(logps, logps), min_size=1, max_size=20))
def test_token_rewards_are_bounded_and_odd(pairs: list[tuple[float, float]]) -> None:
    better_T, worse_T = torch.tensor(pairs, dtype=F64).unbind(1)
    credit_T = token_reward(better_T, worse_T)
    assert bool((credit_T.abs() <= 0.5).all())
    assert torch.equal(credit_T, -token_reward(worse_T, better_T))
    assert torch.equal(credit_T.sign(), (better_T - worse_T).sign())
    torch.testing.assert_close(credit_T, torch.sigmoid(better_T - worse_T) - 0.5)


@given(st.lists(st.tuples(st.floats(-5, 5), st.floats(-0.5, 0.5)), min_size=1, max_size=20), alphas)
def test_reshaping_keeps_every_sign_and_bounds_every_change(drawn: list[tuple[float, float]], weight: float) -> None:
    advantage_T, credit_T = torch.tensor(drawn, dtype=F64).unbind(1)
    reshaped_T = reshape_advantage(advantage_T, credit_T, weight=weight)
    assert torch.equal(reshaped_T.sign(), advantage_T.sign())
    assert bool(((reshaped_T - advantage_T).abs() <= weight / 2 * advantage_T.abs() + 1e-12).all())
    torch.testing.assert_close(reshaped_T, advantage_T + weight * advantage_T.abs() * credit_T)


@given(pair_lists(least=2), st.integers(0, 3), st.integers(0, 12))
def test_held_out_pairs_share_no_prompt_with_those_to_train_on(pairs: list[Pair], seed: int, held_out: int) -> None:
    held_out = min(held_out, len({pair.prompt_ids for pair in pairs}) - 1)
    train, kept_apart = split_pairs(pairs, held_out, seed=seed)
    assert len(kept_apart) == held_out and set(train) | set(kept_apart) <= set(pairs)
    assert not {pair.prompt_ids for pair in train} & {pair.prompt_ids for pair in kept_apart}


@given(pair_lists(), st.integers(0, 5), st.integers(1, 30), st.integers(1, 7))
def test_a_stream_of_pairs_does_not_depend_on_how_it_is_cut(pairs: list[Pair], seed: int, total: int, step: int) -> None:
    whole, _ = PairStream(pairs, seed).take(0, total)
    cursor, pieces = 0, []
    while cursor < total:
        taken, cursor = PairStream(pairs, seed).take(cursor, min(step, total - cursor))
        pieces += taken
    assert pieces == whole
    epoch, _ = PairStream(pairs, seed).take(len(pairs), len(pairs))
    assert sorted(p.question for p in epoch) == sorted(p.question for p in pairs)


@given(pair_lists())
def test_pairs_come_back_from_disk_and_from_a_batch_as_they_were(pairs: list[Pair]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        digest = write_pairs(Path(folder) / "pairs.jsonl", pairs)
        assert load_pairs(Path(folder) / "pairs.jsonl", digest=digest) == pairs
    batch = to_batch(pairs, credit=[(torch.full((len(p.chosen_ids),), 0.5), None) for p in pairs])
    expected = [[*p.prompt_ids, *answer] for p in pairs for answer in (p.chosen_ids, p.rejected_ids)]
    starts = batch.start_N.tolist()
    assert [batch.token_T[a:b].tolist() for a, b in zip(starts, starts[1:], strict=False)] == expected
    assert batch.guidance.credit_T is not None
    assert torch.equal(batch.guidance.credit_T != 0, batch.advantage_T > 0)
    assert int(batch.loss_mask_T.sum()) == sum(p.tokens for p in pairs)


members = st.tuples(
    st.sampled_from([VerdictStatus.CORRECT, VerdictStatus.WRONG, VerdictStatus.TRUNCATED, VerdictStatus.TIMED_OUT]),
    st.integers(1, 40),
    st.sampled_from([None, 10, 20]),
)


@given(st.lists(members, max_size=8), st.booleans(), st.integers(1, 4))
def test_a_chosen_answer_is_right_and_better_than_the_rejected_one(
    drawn: list[tuple[VerdictStatus, int, int | None]], prefer_short: bool, per_prompt: int
) -> None:
    scored = []
    for i, (status, length, budget) in enumerate(drawn):
        kind = BudgetKind.FREE if budget is None else BudgetKind.AT_MOST
        lease = make_lease(member=i, budget=Budget(budget or 0, kind, "<think>"))
        scored.append(make_scored(make_rollout(lease, generated=[i] * length), status=status))
    found = pairs_of([Group(make_prompt(), tuple(scored))], per_prompt=per_prompt, prefer_short=prefer_short, max_length=100)
    used: list[int] = []
    for pair in found.pairs:
        chosen, rejected = (drawn[ids[0]] for ids in (pair.chosen_ids, pair.rejected_ids))
        used += [pair.chosen_ids[0], pair.rejected_ids[0]]
        assert chosen[0] is VerdictStatus.CORRECT and rejected[0] is not VerdictStatus.TIMED_OUT
        if rejected[0] is VerdictStatus.CORRECT:
            kept, kept_too = (budget is None or length <= budget for _, length, budget in (chosen, rejected))
            assert kept >= kept_too
            assert kept > kept_too or (prefer_short and chosen[1] <= SHORTER * rejected[1])
    assert len(used) == len(set(used)) and len(found.pairs) <= per_prompt
    statuses = {status for status, *_ in drawn} - {VerdictStatus.TIMED_OUT}
    mixed = VerdictStatus.CORRECT in statuses and len(statuses) > 1
    assert not mixed or found.pairs


@given(st.lists(st.lists(ids, max_size=12), max_size=6), st.sets(ids), st.sets(ids), st.floats(0.01, 1), st.integers(0, 99))
def test_a_corruption_changes_exactly_its_places_and_nothing_fixed(
    answers: list[list[int]], numbers: set[int], fixed: set[int], share: float, seed: int
) -> None:
    for answer, corruption in zip(
        answers, corrupt(answers, number_ids=numbers, fixed_ids=fixed, share=share, seed=seed), strict=True
    ):
        changed = [place for place, (a, b) in enumerate(zip(answer, corruption.ids, strict=True)) if a != b]
        assert tuple(changed) == corruption.places
        assert not fixed & {answer[place] for place in changed} and not fixed & {corruption.ids[place] for place in changed}
