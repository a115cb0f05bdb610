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
    Instruction,
    RolloutsArrived,
    Score,
    ScoresArrived,
    StepBegan,
)
from rl.errors import BudgetRLError
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
    """Runs leases to scored groups on the given actors."""

    engines: list[Any]
    scorers: list[Any]
    settings: Settings
    coordinator: Coordinator = field(default_factory=Coordinator)

    def collect(self, leases: tuple[Lease, ...], *, top_p: float = 1.0, stop: StopFlag | None = None) -> Collected:
        """Generate and score all leases. Raises BudgetRLError when no engine is left or the deadline passes."""
        started = generated = time.monotonic()
        running: dict[Any, Generate | Score] = {}
        alive = set(range(len(self.engines)))
        scorers = list(self.scorers)
        queue: list[Instruction] = self.coordinator.step(StepBegan(leases, tuple(sorted(alive))))
        turn = 0
        while True:
            for instruction in queue:
                match instruction:
                    case Generate():
                        running[self.engines[instruction.engine].generate.remote(list(instruction.leases), top_p)] = instruction
                    case Score():
                        scorer = scorers[turn % len(scorers)]
                        turn += 1
                        running[scorer.score.remote(list(instruction.rollouts))] = instruction
                    case CloseStep():
                        return Collected(instruction.groups, instruction.lost, generated - started, time.monotonic() - generated)
            if not running:
                raise BudgetRLError(f"nothing is running but {len(self.coordinator.open_tickets())} rollouts are open")
            deadline = self.settings.rollout.deadline_s
            what = f"{len(self.coordinator.open_tickets())} rollouts, first {self.coordinator.open_tickets()[0]}"
            ref = first_ready(list(running), seconds=deadline, what=what, stop=stop)
            instruction = running.pop(ref)
            event = self._answer(ref, instruction, alive, scorers)
            if isinstance(event, RolloutsArrived):
                generated = time.monotonic()
            queue = self.coordinator.step(event)

    def _answer(self, ref: Any, instruction: Generate | Score, alive: set[int], scorers: list[Any]) -> Event:
        try:
            (value,) = wait_for([ref], seconds=self.settings.rollout.deadline_s, what=_name(instruction))
        except WorkerLost as error:
            log.warning("%s", error)
            if isinstance(instruction, Generate):
                alive.discard(instruction.engine)
                if not alive:
                    raise
                return EngineLost(instruction.engine, str(error), tuple(sorted(alive)))
            raise
        return RolloutsArrived(tuple(value)) if isinstance(instruction, Generate) else ScoresArrived(tuple(value))


def _name(instruction: Generate | Score) -> str:
    if isinstance(instruction, Generate):
        return f"engine {instruction.engine} generates {len(instruction.leases)} rollouts"
    return f"a reward worker scores {len(instruction.rollouts)} rollouts"
