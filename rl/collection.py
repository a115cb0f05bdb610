"""The shell around the coordinator: carries its instructions to Ray actors and their answers back as events."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field
from typing import Any

from rl.coordinator import (
    CloseStep,
    Coordinator,
    EngineLost,
    Event,
    Generate,
    RolloutsArrived,
    Score,
    ScorerLost,
    ScoresArrived,
    StepBegan,
)
from rl.errors import BudgetRLError
from rl.heartbeat import Heartbeats
from rl.schedule import submission_order
from rl.settings import Settings
from rl.types import Group, Lease, Rollout
from rl.waiting import LATE, DeadlineExceeded, StopFlag, WorkerLost, first_ready, wait_for
from rollout.progress import EngineStats, Progress, total

log = logging.getLogger("budget_rl")

ADVANCE_S = 1.0
"""Longest time an engine works before it answers; also about how long it takes to hear that it should stop."""
IN_FLIGHT = 2
"""Advance calls of a busy engine: while one answer travels, the engine works on the next."""
ABORT_S = 10.0
"""How long engines get to stop what is open when a step ends early."""
LEAST_WAIT_S = 0.05


@dataclass(frozen=True)
class Collected:
    """One step's closed groups and what it cost."""

    groups: tuple[Group, ...]
    lost: tuple[str, ...]
    generate_s: float
    """From the first lease to the last rollout."""
    score_s: float
    """From the last rollout to the last verdict: what scoring added, the rest ran beside generation."""
    stats: tuple[EngineStats, ...] = ()
    """One per engine that worked; `rollout.progress.engine_metrics` makes figures of them."""


@dataclass(frozen=True)
class _Submit:
    engine: int
    leases: int


@dataclass(frozen=True)
class _Advance:
    engine: int


@dataclass(frozen=True)
class _Grade:
    scorer: Any
    rollouts: tuple[Rollout, ...]


_Call = _Submit | _Advance | _Grade


@dataclass
class Collector:
    """Runs leases to scored groups on the given actors; one that dies or falls silent is left out from then on."""

    engines: list[Any]
    scorers: list[Any]
    settings: Settings
    dead_engines: set[int] = field(default_factory=set)
    turn: int = 0

    @property
    def live_engines(self) -> list[Any]:
        """The engines that have not died; all of them must serve the newest weights."""
        return [self.engines[i] for i in self.alive()]

    def alive(self) -> tuple[int, ...]:
        """The indices of the engines that have not died."""
        return tuple(i for i in range(len(self.engines)) if i not in self.dead_engines)

    def collect(self, leases: tuple[Lease, ...], *, top_p: float = 1.0, stop: StopFlag | None = None) -> Collected:
        """Generate and score all leases, each group scored when it is whole, while others still generate.

        Raises WorkerLost when no engine or no reward worker is left, DeadlineExceeded after `rollout.deadline_s`, StopRequested
        on Ctrl-C. When it raises, the engines were told to stop what is open.
        """
        try:
            return _Step(self, top_p, stop).run(leases)
        except Exception:
            self._abort_open()
            raise

    def next_scorer(self) -> Any:
        """The reward workers in turn."""
        self.turn += 1
        return self.scorers[(self.turn - 1) % len(self.scorers)]

    def _abort_open(self) -> None:
        """Best effort to wait for it: what is asked of an engine later comes after the abort in any case."""
        refs = [engine.abort.remote() for engine in self.live_engines]
        try:
            wait_for(refs, seconds=ABORT_S, what="engines stop what is open")
        except BudgetRLError as error:
            log.warning("%s", error.cause)


class _Step:
    """One collection under way: which calls are out, and what came back."""

    def __init__(self, collector: Collector, top_p: float, stop: StopFlag | None) -> None:
        self.collector, self.top_p, self.stop = collector, top_p, stop
        self.settings = collector.settings.rollout
        self.coordinator = Coordinator()
        self.calls: dict[Any, _Call] = {}
        self.heartbeats = Heartbeats(self.settings.heartbeat_s)
        self.reports: dict[int, list[EngineStats]] = {}
        self.started = self.generated = time.monotonic()

    def run(self, leases: tuple[Lease, ...]) -> Collected:
        end = self.started + self.settings.deadline_s
        queue = self.coordinator.step(StepBegan(leases, self.collector.alive()))
        while True:
            for instruction in queue:
                if isinstance(instruction, CloseStep):
                    return self._closed(instruction)
                self._send(instruction)
            self._keep_busy()
            event = self._lose_silent() or self._next_event(end)
            queue = self.coordinator.step(event) if event is not None else []

    def _closed(self, close: CloseStep) -> Collected:
        stats = tuple(total(self.reports[engine]) for engine in sorted(self.reports))
        seconds = self.generated - self.started, time.monotonic() - self.generated
        return Collected(close.groups, close.lost, *seconds, stats)

    def _send(self, instruction: Generate | Score) -> None:
        if isinstance(instruction, Generate):
            actor = self.collector.engines[instruction.engine]
            ordered = submission_order(instruction.leases, self.settings.order)
            self.calls[actor.submit.remote(ordered, self.top_p)] = _Submit(instruction.engine, len(ordered))
            return
        for rollouts in shared_out(instruction.rollouts, len(self.collector.scorers)):
            scorer = self.collector.next_scorer()
            self.calls[scorer.score.remote(list(rollouts))] = _Grade(scorer, rollouts)

    def _keep_busy(self) -> None:
        """Every engine that owes rollouts has calls in flight, and its heartbeat is watched."""
        busy = self.coordinator.busy_engines()
        self.heartbeats.expect(busy, time.monotonic())
        in_flight = [call.engine for call in self.calls.values() if isinstance(call, _Advance)]
        for engine in sorted(busy):
            for _ in range(IN_FLIGHT - in_flight.count(engine)):
                self.calls[self.collector.engines[engine].advance.remote(ADVANCE_S)] = _Advance(engine)

    def _lose_silent(self) -> EngineLost | None:
        """An engine that owes rollouts and answers nothing: its process may live, but nothing more is expected of it."""
        import ray

        for engine in self.heartbeats.silent(time.monotonic()):
            refs = self._refs_of(engine)
            if ray.wait(refs, num_returns=1, timeout=0)[0]:
                continue  # it did answer, and this process was slow to look
            cause = f"engine {engine} answered nothing for {self.settings.heartbeat_s:g} s"
            return self._lose(engine, WorkerLost(cause, fix="raise rollout.heartbeat_s if one engine step may take that long"))
        return None

    def _next_event(self, end: float) -> Event | None:
        """What the next answer says; None when it says nothing new or none came yet."""
        now = time.monotonic()
        tickets = self.coordinator.open_tickets()
        what = f"{len(tickets)} open rollouts, first {tickets[0]}"
        if now >= end:
            raise DeadlineExceeded(f"{what}: not done within {self.settings.deadline_s:.0f} s", fix=LATE)
        seconds = max(LEAST_WAIT_S, min(end - now, self.heartbeats.patience_s(now)))
        ref = first_ready(list(self.calls), seconds=seconds, what=what, stop=self.stop)
        return None if ref is None else self._answer(ref, self.calls.pop(ref))

    def _answer(self, ref: Any, call: _Call) -> Event | None:
        try:
            (value,) = wait_for([ref], seconds=self.settings.deadline_s, what=_name(call))
        except WorkerLost as error:
            if isinstance(call, _Grade):
                return self._lose_scorer(call, error)
            return self._lose(call.engine, error)
        if isinstance(call, _Grade):
            return ScoresArrived(tuple(value))
        self.heartbeats.heard(call.engine, time.monotonic())
        return self._advanced(call.engine, value) if isinstance(call, _Advance) else None

    def _advanced(self, engine: int, progress: Progress) -> Event | None:
        self.reports.setdefault(engine, []).append(progress.stats)
        if not progress.rollouts:
            return None
        self.generated = time.monotonic()
        return RolloutsArrived(progress.rollouts)

    def _lose(self, engine: int, error: WorkerLost) -> EngineLost:
        """Leave an engine out for good, killed so that it neither answers nor holds memory; raises ``error`` for the last one."""
        import ray

        log.warning("%s; its work goes to another worker", error.cause)
        for ref in self._refs_of(engine):
            del self.calls[ref]
        self.collector.dead_engines.add(engine)
        ray.kill(self.collector.engines[engine])
        if not self.collector.alive():
            raise error
        return EngineLost(engine, error.cause, self.collector.alive())

    def _lose_scorer(self, call: _Grade, error: WorkerLost) -> ScorerLost:
        log.warning("%s; its work goes to another worker", error.cause)
        self.collector.scorers = [scorer for scorer in self.collector.scorers if scorer is not call.scorer]
        if not self.collector.scorers:
            raise error
        tickets = tuple(rollout.lease.ticket for rollout in call.rollouts)
        return ScorerLost(tickets, error.cause, len(self.collector.scorers))

    def _refs_of(self, engine: int) -> list[Any]:
        return [ref for ref, call in self.calls.items() if not isinstance(call, _Grade) and call.engine == engine]


def shared_out(rollouts: tuple[Rollout, ...], scorers: int) -> list[tuple[Rollout, ...]]:
    """One part per reward worker, none of them empty: else those beyond the number of engines had nothing to do.

    An answer's verdict and reward depend on no other answer, and the coordinator settles each ticket by itself. Dealt in turn:
    the members of a group are often cut, slow to grade or short together.
    """
    return [part for i in range(scorers) if (part := rollouts[i::scorers])]


def _name(call: _Call) -> str:
    match call:
        case _Submit():
            return f"engine {call.engine} takes {call.leases} leases"
        case _Advance():
            return f"engine {call.engine} generates"
        case _Grade():
            return f"a reward worker scores {len(call.rollouts)} rollouts"
