"""The coordinator: a pure state machine (events in, instructions out, no I/O) that owns every ticket of a step.

A ticket is leased to one engine, comes back as a rollout, goes to a reward worker and comes back scored. A ticket whose worker is
lost is leased once more; after a second loss it is recorded as lost. The step closes when no ticket is open.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import Enum

from rl.schedule import deal, expected_length, group_of
from rl.types import Group, Lease, Prompt, Rollout, Scored

MAX_ATTEMPTS = 2
"""A ticket is leased again once; a second loss is more likely the prompt's fault than the worker's."""


class TicketState(Enum):
    """Life of a ticket; the only edges are down this list, and back from LEASED to LEASED on a lost worker."""

    LEASED = "leased"
    FINISHED = "finished"
    SCORED = "scored"
    LOST = "lost"


# -- events ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StepBegan:
    """A step starts with these leases, dealt to the engines in ``engines``."""

    leases: tuple[Lease, ...]
    engines: tuple[int, ...]


@dataclass(frozen=True)
class RolloutsArrived:
    rollouts: tuple[Rollout, ...]


@dataclass(frozen=True)
class ScoresArrived:
    scored: tuple[Scored, ...]


@dataclass(frozen=True)
class EngineLost:
    """An engine died or did not answer in time; ``engines`` are those still alive."""

    engine: int
    cause: str
    engines: tuple[int, ...]


@dataclass(frozen=True)
class ScorerLost:
    """A reward worker died with these rollouts unscored; they are scored again by another, or lost when none is left."""

    tickets: tuple[str, ...]
    cause: str
    scorers_left: int


Event = StepBegan | RolloutsArrived | ScoresArrived | EngineLost | ScorerLost


# -- instructions ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Generate:
    engine: int
    leases: tuple[Lease, ...]


@dataclass(frozen=True)
class Score:
    rollouts: tuple[Rollout, ...]


@dataclass(frozen=True)
class CloseStep:
    """All tickets are settled: groups in prompt order, and the causes of what was lost."""

    groups: tuple[Group, ...]
    lost: tuple[str, ...]


Instruction = Generate | Score | CloseStep


@dataclass
class _Ticket:
    lease: Lease
    engine: int
    state: TicketState = TicketState.LEASED
    rollout: Rollout | None = None
    scored: Scored | None = None


@dataclass
class Coordinator:
    """Owns the tickets of the current step. ``step(event)`` is the only way in."""

    tickets: dict[str, _Ticket] = field(default_factory=dict)
    lost: list[str] = field(default_factory=list)
    closed: bool = True
    """Whether CloseStep was already given for the current step: it is given exactly once, whatever arrives late."""

    def step(self, event: Event) -> list[Instruction]:
        """Apply one event; returns what to do next. Raises ValueError on an event that fits no open ticket."""
        match event:
            case StepBegan():
                return self._begin(event)
            case RolloutsArrived():
                return self._finish(event)
            case ScoresArrived():
                return self._score(event)
            case EngineLost():
                return self._lose_engine(event)
            case ScorerLost():
                return self._lose_scorer(event)

    def open_tickets(self) -> list[str]:
        """Tickets that are neither scored nor lost; what a wait that expires should name."""
        settled = (TicketState.SCORED, TicketState.LOST)
        return [name for name, ticket in self.tickets.items() if ticket.state not in settled]

    def busy_engines(self) -> set[int]:
        """The engines that owe rollouts."""
        return {ticket.engine for ticket in self.tickets.values() if ticket.state is TicketState.LEASED}

    def _begin(self, event: StepBegan) -> list[Instruction]:
        if self.open_tickets():
            raise ValueError(f"a step began with {len(self.open_tickets())} tickets of the last one open")
        if not event.engines:
            raise ValueError("no engine is alive")
        self.tickets, self.lost, self.closed = {}, [], False
        return self._deal(event.leases, event.engines) or self._close()

    def _deal(self, leases: Sequence[Lease], engines: Sequence[int]) -> list[Instruction]:
        """Whole groups, the next one to the engine with the fewest tokens to come; what it still owes counts."""
        load = dict.fromkeys(engines, 0)
        for ticket in self.tickets.values():
            if ticket.state is TicketState.LEASED and ticket.engine in load:
                load[ticket.engine] += expected_length(ticket.lease)
        shares = deal(leases, load)
        engine_of = {lease.ticket: engine for engine, share in shares.items() for lease in share}
        self.tickets |= {lease.ticket: _Ticket(lease, engine_of[lease.ticket]) for lease in leases}
        return [Generate(engine, tuple(share)) for engine, share in shares.items()]

    def _finish(self, event: RolloutsArrived) -> list[Instruction]:
        fresh = []
        for rollout in event.rollouts:
            ticket = self._known(rollout.lease.ticket)
            if ticket.state is not TicketState.LEASED or rollout.lease.attempt != ticket.lease.attempt:
                continue  # a worker believed lost answered after all; its replacement already owns the ticket
            ticket.state, ticket.rollout = TicketState.FINISHED, rollout
            fresh.append(rollout)
        return [Score(tuple(fresh))] if fresh else []

    def _score(self, event: ScoresArrived) -> list[Instruction]:
        for scored in event.scored:
            ticket = self._known(scored.rollout.lease.ticket)
            if ticket.state is TicketState.FINISHED:
                ticket.state, ticket.scored = TicketState.SCORED, scored
        return self._close()

    def _lose_engine(self, event: EngineLost) -> list[Instruction]:
        again = []
        for ticket in self.tickets.values():
            if ticket.engine != event.engine or ticket.state is not TicketState.LEASED:
                continue
            if ticket.lease.attempt + 1 < MAX_ATTEMPTS and event.engines:
                again.append(replace(ticket.lease, attempt=ticket.lease.attempt + 1))
            else:
                ticket.state = TicketState.LOST
                self.lost.append(f"{ticket.lease.ticket}: {event.cause}")
        return (self._deal(again, event.engines) if again else []) + self._close()

    def _lose_scorer(self, event: ScorerLost) -> list[Instruction]:
        again: list[Rollout] = []
        for name in event.tickets:
            ticket = self._known(name)
            if ticket.state is not TicketState.FINISHED or ticket.rollout is None:
                continue
            if event.scorers_left:
                again.append(ticket.rollout)
            else:
                ticket.state = TicketState.LOST
                self.lost.append(f"{name}: {event.cause}")
        return ([Score(tuple(again))] if again else []) + self._close()

    def _close(self) -> list[Instruction]:
        if self.closed or self.open_tickets():
            return []
        self.closed = True
        groups: dict[str, list[Scored]] = {}
        prompts: dict[str, Prompt] = {}
        for name in sorted(self.tickets, key=_ticket_order):
            ticket = self.tickets[name]
            key = group_of(name)
            prompts.setdefault(key, ticket.lease.prompt)
            groups.setdefault(key, [])
            if ticket.scored is not None:
                groups[key].append(ticket.scored)
        closed = tuple(Group(prompts[key], tuple(members)) for key, members in groups.items())
        return [CloseStep(closed, tuple(self.lost))]

    def _known(self, name: str) -> _Ticket:
        if name not in self.tickets:
            raise ValueError(f"ticket {name} is not of this step")
        return self.tickets[name]


def _ticket_order(name: str) -> list[int]:
    """By number, not by letter: an evaluation may hold more prompts than a ticket has digits for."""
    return [int(part) for part in name.split(".")]
