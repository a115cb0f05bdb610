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
from rl.settings import Settings
from rl.types import Group, Lease
from rl.waiting import StopFlag, WorkerLost, first_ready, wait_for

log = logging.getLogger("budget_rl")


@dataclass(frozen=True)
class Collected:
    """One step's closed groups and what it cost."""

    groups: tuple[Group, ...]
    lost: tuple[str, ...]
    generate_s: float
    """From the first lease to the last rollout."""
    score_s: float
    """From the last rollout to the last verdict: what scoring added, the rest ran beside generation."""


@dataclass
class Collector:
    """Runs leases to scored groups on the given actors; one that dies is left out from then on."""

    engines: list[Any]
    scorers: list[Any]
    settings: Settings
    coordinator: Coordinator = field(default_factory=Coordinator)
    dead_engines: set[int] = field(default_factory=set)
    turn: int = 0

    @property
    def live_engines(self) -> list[Any]:
        """The engines that have not died; all of them must serve the newest weights."""
        return [self.engines[i] for i in self._alive()]

    def collect(self, leases: tuple[Lease, ...], *, top_p: float = 1.0, stop: StopFlag | None = None) -> Collected:
        """Generate and score all leases. Raises WorkerLost when no engine or no reward worker is left, DeadlineExceeded when
        nothing arrives in time, StopRequested on Ctrl-C."""
        self.coordinator = Coordinator()
        started = generated = time.monotonic()
        running: dict[Any, tuple[Generate | Score, Any]] = {}
        queue = self.coordinator.step(StepBegan(leases, self._alive()))
        while True:
            for instruction in queue:
                if isinstance(instruction, CloseStep):
                    return Collected(instruction.groups, instruction.lost, generated - started, time.monotonic() - generated)
                for part in shared_out(instruction, len(self.scorers)):
                    actor, ref = self._send(part, top_p)
                    running[ref] = (part, actor)
            open_tickets = self.coordinator.open_tickets()
            what = f"{len(open_tickets)} open rollouts, first {open_tickets[0]}"
            ref = first_ready(list(running), seconds=self.settings.rollout.deadline_s, what=what, stop=stop)
            event = self._answer(ref, *running.pop(ref))
            if isinstance(event, RolloutsArrived):
                generated = time.monotonic()
            queue = self.coordinator.step(event)

    def _alive(self) -> tuple[int, ...]:
        return tuple(i for i in range(len(self.engines)) if i not in self.dead_engines)

    def _send(self, instruction: Generate | Score, top_p: float) -> tuple[Any, Any]:
        if isinstance(instruction, Generate):
            actor = self.engines[instruction.engine]
            return actor, actor.generate.remote(list(instruction.leases), top_p)
        actor = self.scorers[self.turn % len(self.scorers)]
        self.turn += 1
        return actor, actor.score.remote(list(instruction.rollouts))

    def _answer(self, ref: Any, instruction: Generate | Score, actor: Any) -> Event:
        try:
            (value,) = wait_for([ref], seconds=self.settings.rollout.deadline_s, what=_name(instruction))
        except WorkerLost as error:
            log.warning("%s; its work goes to another worker", error)
            if isinstance(instruction, Generate):
                self.dead_engines.add(instruction.engine)
                if not self._alive():
                    raise
                return EngineLost(instruction.engine, str(error), self._alive())
            self.scorers = [scorer for scorer in self.scorers if scorer is not actor]
            if not self.scorers:
                raise
            tickets = tuple(rollout.lease.ticket for rollout in instruction.rollouts)
            return ScorerLost(tickets, str(error), len(self.scorers))
        return RolloutsArrived(tuple(value)) if isinstance(instruction, Generate) else ScoresArrived(tuple(value))


def shared_out(instruction: Generate | Score, scorers: int) -> list[Generate | Score]:
    """The instruction, or for a Score one part per reward worker: else those beyond the number of engines had nothing to do.

    An answer's verdict and reward depend on no other answer, and the coordinator settles each ticket by itself.
    """
    if isinstance(instruction, Generate):
        return [instruction]
    # Dealt in turn: the members of a group are often cut, slow to grade or short together.
    parts = [instruction.rollouts[i::scorers] for i in range(scorers)]
    return [Score(part) for part in parts if part]


def _name(instruction: Generate | Score) -> str:
    if isinstance(instruction, Generate):
        return f"engine {instruction.engine} generates {len(instruction.leases)} rollouts"
    return f"a reward worker scores {len(instruction.rollouts)} rollouts"
