"""The shell between coordinator and actors, on engines and reward workers that only play their parts: who gets what, when which
answer counts, and what becomes of one that dies, falls silent or fails."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import ray
import ray.exceptions

from rl.collection import Collector, shared_out
from rl.settings import Settings
from rl.types import Lease, Rollout, Scored
from rl.waiting import DeadlineExceeded, StopFlag, StopRequested, WorkerFailed, WorkerLost, wait_for
from rollout.progress import EngineStats, OpenGroups, Progress
from tests.builders import make_lease, make_rollout, make_scored

LONG_S = 120.0
HEARTBEAT_S = 4.0


@ray.remote(num_cpus=0)
class Engine:
    """One group per answer. ``part`` names what it does at the second answer: `hang`, `die`, `fail`, `wait` (for the gate); or at
    every answer: `idle`, `slow`."""

    def become(self, part: str, gate: Any) -> None:
        self.part, self.gate = part, gate
        self.groups = OpenGroups()
        self.log: list[Any] = []
        self.answers = 0

    def submit(self, leases: list[Lease], top_p: float) -> None:
        self.log.append(("submit", [lease.ticket for lease in leases], top_p))
        for lease in leases:
            self.groups.add(lease)

    def advance(self, seconds: float) -> Progress:
        self.answers += 1
        if self.answers > 1:
            self._play()
        rollouts = () if self.part == "idle" or self.answers < 12 and self.part == "slow" else self._next_group()
        if self.part in ("idle", "slow"):
            time.sleep(HEARTBEAT_S / 8)
        stats = EngineStats(seconds=1.0, steps=1, generated=len(rollouts), running=1.0, waiting=0, preemptions=0)
        return Progress(rollouts, stats, len(self.groups))

    def _play(self) -> None:
        match self.part:
            case "hang":
                threading.Event().wait()
            case "die":
                ray.get(self.gate.wait.remote(), timeout=LONG_S)
                os._exit(1)
            case "fail":
                raise ValueError("no more blocks")
            case "wait":
                ray.get(self.gate.wait.remote(), timeout=LONG_S)

    def _next_group(self) -> tuple[Rollout, ...]:
        leases = list(self.groups.leases.values())
        for lease in leases:
            if lease.ticket.startswith(leases[0].ticket[:-3]):
                self.groups.finish(make_rollout(lease))
        return self.groups.take()

    def abort(self, tickets: list[str] | None = None) -> tuple[str, ...]:
        dropped = self.groups.drop(self.groups.tickets())
        self.log.append(("abort", sorted(dropped)))
        return dropped

    def read(self) -> list[Any]:
        return self.log


@ray.remote(num_cpus=0)
class Scorer:
    """Every answer is correct; opens the gate, if it has one, at those of group 0. ``part``: `die`."""

    def become(self, part: str, gate: Any) -> None:
        self.part, self.gate = part, gate

    def score(self, rollouts: list[Rollout]) -> list[Scored]:
        if self.part == "die":
            os._exit(1)
        if self.gate is not None and any(rollout.lease.ticket.startswith("000000.0000.") for rollout in rollouts):
            ray.get(self.gate.open.remote())
        return [make_scored(rollout) for rollout in rollouts]


@ray.remote(num_cpus=0)
class Gate:
    def __init__(self) -> None:
        self.event = asyncio.Event()

    async def open(self) -> None:
        self.event.set()

    async def wait(self) -> None:
        await self.event.wait()


Make = Callable[..., Collector]


@pytest.fixture(scope="module")
def players(ray_cluster: None) -> Iterator[dict[Any, list[Any]]]:
    """Actors by class; each takes seconds to start, so a test gives those it did not kill to the next one."""
    actors: dict[Any, list[Any]] = {Engine: [], Scorer: []}
    yield actors
    for actor in [*actors[Engine], *actors[Scorer]]:
        ray.kill(actor)


def _cast(actors: list[Any], kind: Any, parts: tuple[str, ...], gate: Any) -> list[Any]:
    """One actor of the kind per part, all up and in their parts."""
    actors += [kind.remote() for _ in range(len(parts) - len(actors))]
    for i, part in enumerate(parts):
        try:
            wait_for([actors[i].become.remote(part, gate)], seconds=LONG_S, what="a player takes its part")
        except WorkerLost:
            actors[i] = kind.remote()
            wait_for([actors[i].become.remote(part, gate)], seconds=LONG_S, what="a new player takes the part")
    return actors[: len(parts)]


@pytest.fixture
def make(players: dict[Any, list[Any]]) -> Make:
    """``make("", "hang", scorers=("",), deadline_s=...)``: a collector on engines and reward workers with these parts."""

    def made(*engines: str, scorers: tuple[str, ...] = ("",), gate: Any = None, **rollout: Any) -> Collector:
        settings = Settings.model_validate(
            {
                "model": {"path": "model"},
                "data": {"source": "problems.jsonl"},
                "max_steps": 1,
                "rollout": {"deadline_s": LONG_S, "heartbeat_s": LONG_S, **rollout},
            }
        )
        return Collector(_cast(players[Engine], Engine, engines, gate), _cast(players[Scorer], Scorer, scorers, gate), settings)

    return made


def _leases(groups: int = 4, members: int = 2) -> tuple[Lease, ...]:
    return tuple(make_lease(group=g, member=m) for g in range(groups) for m in range(members))


def _log(engine: Any) -> list[Any]:
    return ray.get(engine.read.remote(), timeout=LONG_S)


def _attempts(collected: Any) -> dict[str, int]:
    return {m.rollout.lease.ticket: m.rollout.lease.attempt for group in collected.groups for m in group.members}


def _raise_signal_soon(stop: StopFlag) -> None:
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
    assert not stop.is_set


def test_every_lease_comes_back_scored_in_order_with_figures_of_each_engine(make: Make) -> None:
    collector = make("", "", scorers=("", ""))
    collected = collector.collect(_leases(4), top_p=0.9)
    assert _attempts(collected) == {lease.ticket: 0 for lease in _leases(4)}
    assert [group.prompt.id for group in collected.groups] == ["q0", "q1", "q2", "q3"]
    assert collected.lost == () and collected.generate_s > 0 and collected.score_s >= 0
    assert [one.generated for one in collected.stats] == [4, 4]
    assert [entry[2] for engine in collector.engines for entry in _log(engine)] == [0.9, 0.9]
    assert collector.collect(_leases(1)).groups[0] == collected.groups[0]  # and nothing of the first step is left over


def test_a_group_is_scored_while_the_engine_still_works_on_the_next(make: Make) -> None:
    gate = Gate.remote()
    collected = make("wait", gate=gate).collect(_leases(3))  # the second group waits until the first one is scored
    assert len(_attempts(collected)) == 6


@pytest.mark.parametrize(("order", "first"), [("longest_first", [60, 40, 20]), ("arrival", [20, 60, 40])])
def test_an_engine_gets_its_leases_in_the_order_that_is_set(make: Make, order: str, first: list[int]) -> None:
    leases = tuple(make_lease(member=m, budget=tokens) for m, tokens in enumerate((20, 60, 40)))
    collector = make("", order=order)
    collector.collect(leases)
    budgets = {lease.ticket: lease.budget.tokens for lease in leases}
    assert [budgets[ticket] for ticket in _log(collector.engines[0])[0][1]] == first


def test_what_a_silent_engine_owes_goes_to_another_and_it_is_killed(make: Make) -> None:
    collector = make("hang", "", heartbeat_s=HEARTBEAT_S)
    collected = collector.collect(_leases(4))
    # The first group of the silent engine came back before it fell silent; what it owed is a second attempt.
    assert sorted(_attempts(collected).values()) == [0, 0, 0, 0, 0, 0, 1, 1]
    assert collected.lost == ()
    assert collector.alive() == (1,) and len(collector.live_engines) == 1
    with pytest.raises(ray.exceptions.RayActorError):
        _log(collector.engines[0])


def test_the_last_engine_that_falls_silent_ends_the_step_and_the_error_names_the_setting(make: Make) -> None:
    collector = make("hang", heartbeat_s=HEARTBEAT_S)
    with pytest.raises(WorkerLost, match="engine 0 answered nothing for 4 s") as caught:
        collector.collect(_leases())
    assert "rollout.heartbeat_s" in caught.value.fix


def test_an_engine_that_answers_is_not_silent_however_long_its_first_group_takes(make: Make) -> None:
    collected = make("slow", heartbeat_s=HEARTBEAT_S).collect(_leases(1))  # a group after 1.5 limits, an answer every eighth
    assert set(_attempts(collected).values()) == {0}


def test_what_a_dying_engine_owes_goes_to_another(make: Make) -> None:
    collector = make("die", "", gate=Gate.remote())  # it dies when its first group is scored
    collected = collector.collect(_leases(4))
    assert sorted(_attempts(collected).values()) == [0, 0, 0, 0, 0, 0, 1, 1]
    assert collector.alive() == (1,)


def test_what_a_dying_reward_worker_held_is_scored_by_another(make: Make) -> None:
    collector = make("", scorers=("die", ""))
    assert _attempts(collector.collect(_leases(2))) == {lease.ticket: 0 for lease in _leases(2)}
    assert len(collector.scorers) == 1


def test_the_deadline_bounds_the_whole_step_although_the_engine_answers(make: Make) -> None:
    collector = make("idle", deadline_s=1.0)
    with pytest.raises(DeadlineExceeded, match="8 open rollouts, first 000000.0000.000: not done within 1 s"):
        collector.collect(_leases())
    assert _log(collector.engines[0])[-1] == ("abort", [lease.ticket for lease in _leases()])


def test_an_engine_that_fails_ends_the_step_and_the_others_stop_what_is_open(make: Make) -> None:
    collector = make("fail", "idle")
    with pytest.raises(WorkerFailed, match="engine 0 generates: ValueError: no more blocks"):
        collector.collect(_leases(4))
    kind, tickets = _log(collector.engines[1])[-1]
    assert kind == "abort" and len(tickets) == 4


def test_a_stop_leaves_idle_engines_behind_and_the_next_step_starts_clean(make: Make) -> None:
    collector = make("idle", "idle")
    with StopFlag() as stop:
        _raise_signal_soon(stop)
        with pytest.raises(StopRequested, match="SIGINT while waiting for 8 open rollouts"):
            collector.collect(_leases(), stop=stop)
    aborted = [_log(engine)[-1] for engine in collector.engines]
    assert sorted(ticket for _, tickets in aborted for ticket in tickets) == [lease.ticket for lease in _leases()]


def test_leases_that_an_engine_refuses_end_the_step_with_its_words(make: Make) -> None:
    collector = make("idle")
    with pytest.raises(WorkerFailed, match="engine 0 takes 2 leases: ValueError: ticket 000000.0000.000 is already open"):
        collector.collect((make_lease(), make_lease()))
    assert _log(collector.engines[0])[-1] == ("abort", ["000000.0000.000"])


class _Recorded:
    """Stands for an actor handle: notes each call and answers never."""

    def __init__(self, gate: Any) -> None:
        self.calls: list[str] = []
        self.gate = gate

    def __getattr__(self, name: str) -> Any:
        def remote(*_: Any) -> Any:
            self.calls.append(name)
            return self.gate.wait.remote()

        return type("Method", (), {"remote": staticmethod(remote)})


def test_a_busy_engine_always_has_two_calls_in_flight_so_it_does_not_wait_for_us(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rl.collection.ABORT_S", 0.2)
    engine = _Recorded(Gate.remote())
    collector = make(deadline_s=0.5)
    collector.engines = [engine]
    with pytest.raises(DeadlineExceeded):
        collector.collect(_leases(2))
    assert engine.calls == ["submit", "advance", "advance", "abort"]


def _rollouts(answers: int) -> tuple[Rollout, ...]:
    return tuple(make_rollout(make_lease(member=m)) for m in range(answers))


def _members(parts: list[tuple[Rollout, ...]]) -> list[list[int]]:
    return [[rollout.lease.member for rollout in part] for part in parts]


def test_answers_are_dealt_in_turn_to_all_reward_workers() -> None:
    assert _members(shared_out(_rollouts(7), 3)) == [[0, 3, 6], [1, 4], [2, 5]]
    assert _members(shared_out(_rollouts(3), 1)) == [[0, 1, 2]]


def test_no_reward_worker_gets_an_empty_part() -> None:
    assert _members(shared_out(_rollouts(2), 4)) == [[0], [1]]
