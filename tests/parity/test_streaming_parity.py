"""A real engine that streams: groups as they finish, requests that join, stop, or lose their cache; the tokens stay the same."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from rl.errors import BudgetRLError
from rl.schedule import group_of
from rl.settings import RolloutSettings
from rl.types import Lease, Rollout
from rl.waiting import wait_for
from rollout.progress import EngineStats, Progress
from rollout.weights import bundle_weights
from tests.builders import make_lease
from tests.parity.plain import load_plain, random_rollouts
from tests.parity.serving import DEADLINE_S, Served, start_engine

SETTINGS = RolloutSettings(max_length=48, max_concurrent=16, kv_cache_gb=0.1)
BLOCK_BYTES = 2 * 2 * 128 * 64 * 4
"""Cache of 128 tokens: keys and values, layers, tokens, hidden size, bytes."""
SCARCE = SETTINGS.model_copy(update={"kv_cache_gb": 6.5 * BLOCK_BYTES / 2**30})
ROUNDING = 1e-4
"""Nats: largest difference of a log-prob between two batches of the same tokens that float32 explains."""
PREFILL = 3
STEP_S = 0.0
"""As the time of an advance: one engine step."""


@pytest.fixture(scope="module")
def engine(ray_cluster: None, tiny_folder: Path) -> Iterator[Served]:
    import ray

    served = start_engine(tiny_folder, SETTINGS)
    yield served
    ray.kill(served.actor)


@pytest.fixture(scope="module")
def scarce(ray_cluster: None, tiny_folder: Path) -> Iterator[Served]:
    """A second engine, whose cache holds six blocks."""
    import ray

    served = start_engine(tiny_folder, SCARCE)
    yield served
    ray.kill(served.actor)


def _leases(groups: int, members: int = 2, *, prompt: int = 12, seed: int = 5) -> list[Lease]:
    """Leases of groups that share a prompt of random tokens, about ``prompt`` long; each has a seed of its own."""
    drawn = random_rollouts([(prompt + i % 5, PREFILL, 1) for i in range(groups)], seed=seed)
    return [
        replace(
            make_lease(prompt=r.lease.prompt, group=g, member=m, prefill_ids=r.lease.prefill_ids),
            seed=1000 + 10 * g + m,
            max_new_tokens=SETTINGS.max_length - PREFILL,
        )
        for g, r in enumerate(drawn)
        for m in range(members)
    ]


def _submit(served: Served, leases: Sequence[Lease]) -> None:
    wait_for([served.actor.submit.remote(list(leases))], seconds=DEADLINE_S, what="engine takes leases")


def _advance(served: Served, seconds: float = DEADLINE_S) -> Progress:
    return wait_for([served.actor.advance.remote(seconds)], seconds=DEADLINE_S, what="engine generates")[0]


def _abort(served: Served, tickets: Sequence[str] | None = None) -> tuple[str, ...]:
    chosen = None if tickets is None else list(tickets)
    return wait_for([served.actor.abort.remote(chosen)], seconds=DEADLINE_S, what="engine stops")[0]


def _stats(served: Served) -> EngineStats:
    return wait_for([served.actor.stats.remote()], seconds=DEADLINE_S, what="engine tells its figures")[0]


def _drain(served: Served) -> list[Progress]:
    """Answers until nothing is open."""
    answers = [_advance(served)]
    while answers[-1].open:
        answers.append(_advance(served))
    return answers


def _rollouts(answers: Sequence[Progress]) -> list[Rollout]:
    return [rollout for answer in answers for rollout in answer.rollouts]


def _same(found: Sequence[Rollout], expected: Sequence[Rollout]) -> None:
    """The same tokens for the same tickets, and log-probs that differ by rounding at most."""
    by_ticket = {rollout.lease.ticket: rollout for rollout in expected}
    assert len(found) == len({rollout.lease.ticket for rollout in found}) > 0
    for rollout in found:
        other = by_ticket[rollout.lease.ticket]
        assert rollout.response_ids == other.response_ids
        assert rollout.finish is other.finish
        assert rollout.logp_T == pytest.approx(other.logp_T, abs=ROUNDING)


def test_streamed_rollouts_are_those_of_one_batch_whatever_the_order_and_the_company(engine: Served) -> None:
    leases = _leases(8)
    expected = engine.generate(leases)
    for submitted in (leases, leases[::-1], leases[1::2], leases[:1]):
        _submit(engine, submitted)
        found = _rollouts(_drain(engine))
        assert {r.lease.ticket for r in found} == {lease.ticket for lease in submitted}
        _same(found, expected)


def test_another_engine_samples_the_same_tokens(engine: Served, scarce: Served) -> None:
    leases = _leases(3)
    _same(scarce.generate(leases), engine.generate(leases))


def test_every_answer_holds_whole_groups_and_counts_what_is_left(engine: Served) -> None:
    leases = _leases(8, 3)
    _submit(engine, leases)
    answers = _drain(engine)
    for answer in answers:
        groups = {group_of(rollout.lease.ticket) for rollout in answer.rollouts}
        assert len(answer.rollouts) == 3 * len(groups) > 0
    left = [len(leases)]
    for answer in answers:
        left.append(left[-1] - len(answer.rollouts))
    assert [answer.open for answer in answers] == left[1:] and left[-1] == 0
    assert len(answers) > 1  # groups end at different lengths, so the first did not wait for the last


def test_a_request_may_join_while_others_are_decoded(engine: Served) -> None:
    leases = _leases(6)
    expected = engine.generate(leases)
    _submit(engine, leases[:4])
    first = _advance(engine, STEP_S)
    _submit(engine, leases[4:])
    assert first.open + 8 == 12
    _same([*first.rollouts, *_rollouts(_drain(engine))], expected)


def test_stopping_some_requests_leaves_the_tokens_of_the_others_as_they_are(engine: Served) -> None:
    leases = _leases(6)
    expected = engine.generate(leases)
    stopped = [leases[0].ticket, *(lease.ticket for lease in leases[4:6])]
    _submit(engine, leases)
    first = _advance(engine, STEP_S)
    assert first.rollouts == ()
    assert sorted(_abort(engine, [*stopped, "000000.0099.000"])) == sorted(stopped)
    assert _stats(engine).aborted == 3
    found = _rollouts(_drain(engine))
    assert {r.lease.ticket for r in found} == {lease.ticket for lease in leases} - set(stopped)
    _same(found, expected)
    _same(engine.generate(leases), expected)  # a stopped ticket may be asked for again


def test_new_weights_are_refused_while_leases_are_open_and_taken_once_they_are_stopped(engine: Served, tiny_folder: Path) -> None:
    weights = {name: p.detach() for name, p in load_plain(tiny_folder).named_parameters(remove_duplicate=False)}
    leases = _leases(2)
    before, version = engine.generate(leases), engine.version()
    _submit(engine, leases)
    _advance(engine, STEP_S)
    with pytest.raises(BudgetRLError, match=r"4 leases are open .* first 000000\.0000\.000.* mix weight versions"):
        engine.push(bundle_weights(weights.items(), version + 1))
    with pytest.raises(BudgetRLError, match="4 leases are open"):
        wait_for([engine.actor.call.remote("start_weight_update")], seconds=DEADLINE_S, what="engine opens an NCCL push")
    assert engine.version() == version
    assert len(_abort(engine)) == 4
    assert engine.push(bundle_weights(weights.items(), version + 1)).number == version + 1
    _same(engine.generate(leases), before)


def test_two_calls_in_flight_are_answered_in_turn_and_one_of_an_idle_engine_at_once(engine: Served) -> None:
    leases = _leases(4)
    refs = [engine.actor.submit.remote(leases), *(engine.actor.advance.remote(DEADLINE_S) for _ in range(6))]
    answers = wait_for(refs, seconds=DEADLINE_S, what="engine generates")[1:]
    assert [answer.open for answer in answers] == sorted((answer.open for answer in answers), reverse=True)
    assert len(_rollouts(answers)) == 8
    assert answers[-1] == Progress((), replace(EngineStats(waiting=0, preemptions=0), weight_version=engine.version()), 0)


def test_the_figures_tell_what_was_generated_and_what_the_prefix_cache_saved(engine: Served) -> None:
    _abort(engine)
    _advance(engine, STEP_S)  # reports what tests before left
    leases = _leases(2, 10, prompt=200, seed=6)
    _submit(engine, leases)
    answers = _drain(engine)
    rollouts = _rollouts(answers)
    assert sum(a.stats.generated for a in answers) == sum(len(r.logp_T) for r in rollouts)
    assert sum(a.stats.prompt_tokens for a in answers) == sum(len(x.prompt.token_ids) + PREFILL for x in leases)
    # One block of 128 tokens of each prompt is shared: computed for one sibling, found by the nine others.
    assert sum(a.stats.cached_tokens for a in answers) == 2 * 9 * 128
    assert max(a.stats.waiting or 0 for a in answers) == 4  # 20 requests, 16 places
    assert 1.0 <= max(a.stats.running or 0.0 for a in answers) <= 16.0
    assert all(a.stats.preemptions == 0 and a.stats.aborted == 0 for a in answers)
    assert {a.stats.weight_version for a in answers} == {engine.version()}


def test_preempted_requests_sample_the_tokens_they_would_have_sampled_undisturbed(engine: Served, scarce: Served) -> None:
    """Eight prompts just below a block of the cache, which holds six: all grow beyond it, so some have to go and come back."""
    leases = _leases(8, 1, prompt=110, seed=7)
    expected = engine.generate(leases)
    assert sum(len(r.logp_T) for r in expected) > 200
    _advance(scarce, STEP_S)  # reports what tests before left
    _submit(scarce, leases)
    answers = _drain(scarce)
    assert sum(a.stats.preemptions or 0 for a in answers) > 0
    _same(_rollouts(answers), expected)


def test_prompts_that_do_not_fit_into_one_engine_step_are_not_cut(engine: Served) -> None:
    """16 prompts of 300 tokens are more than the 2048 of a step, and vLLM on a CPU cannot cut a prompt sampled by seed."""
    leases = _leases(16, 1, prompt=300, seed=8)
    _same(engine.generate(leases), [r for lease in leases for r in engine.generate([lease])])


def test_leases_are_taken_all_or_none(engine: Served) -> None:
    leases = _leases(2)
    too_long = random_rollouts([(400, 0, 1)])[0].lease.prompt
    with pytest.raises(BudgetRLError, match="400|longer|length"):
        _submit(engine, [*leases, replace(leases[0], ticket="000000.0007.000", prompt=too_long)])
    with pytest.raises(BudgetRLError, match="000000.0000.000 is already open"):
        _submit(engine, [*leases, leases[0]])
    assert _advance(engine).open == 0
    assert len(engine.generate(leases)) == 4


def test_generating_at_once_is_refused_while_other_leases_are_open(engine: Served) -> None:
    leases = _leases(2)
    _submit(engine, leases[:2])
    with pytest.raises(BudgetRLError, match="2 leases are open"):
        engine.generate(leases[2:])
    assert len(_abort(engine)) == 2
