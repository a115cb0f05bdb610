"""The coordinator under random schedules: losses, partial, late and doubled answers never lose or double a ticket."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TypeVar

from hypothesis import given, settings
from hypothesis import strategies as st

from rl.coordinator import (
    MAX_ATTEMPTS,
    CloseStep,
    Coordinator,
    EngineLost,
    Event,
    Generate,
    Instruction,
    RolloutsArrived,
    Score,
    ScorerLost,
    ScoresArrived,
    StepBegan,
    TicketState,
)
from rl.leases import make_leases
from rl.schedule import group_of
from rl.types import Lease, Shaping, VerdictStatus
from tests.builders import make_opening, make_rollout, make_scored

EDGES = {
    (TicketState.LEASED, TicketState.FINISHED),
    (TicketState.LEASED, TicketState.LOST),
    (TicketState.FINISHED, TicketState.SCORED),
    (TicketState.FINISHED, TicketState.LOST),
}
Work = TypeVar("Work", Generate, Score)
VERDICTS = [VerdictStatus.CORRECT, VerdictStatus.WRONG, VerdictStatus.TIMED_OUT, VerdictStatus.CRASHED]


@dataclass
class World:
    """Engines and scorers as a random schedule sees them: what was asked of them, what they sent, which are alive."""

    data: st.DataObject
    engines: set[int]
    scorers: int
    coordinator: Coordinator = field(default_factory=Coordinator)
    generating: list[Generate] = field(default_factory=list)
    scoring: list[Score] = field(default_factory=list)
    zombies: list[Lease] = field(default_factory=list)
    """Leases of engines believed lost, which may still answer."""
    sent: list[Event] = field(default_factory=list)
    """Answers delivered so far; any of them may be delivered again."""
    issued: Counter[str] = field(default_factory=Counter)
    closes: list[CloseStep] = field(default_factory=list)

    def send(self, event: Event) -> None:
        """One event in; its instructions become work under way, and no ticket takes an edge that does not exist."""
        beginning = isinstance(event, StepBegan)
        before = {} if beginning else {name: ticket.state for name, ticket in self.coordinator.tickets.items()}
        instructions = self.coordinator.step(event)
        for name, state in before.items():
            after = self.coordinator.tickets[name].state
            assert after is state or (state, after) in EDGES
        for instruction in instructions:
            self._take(instruction)
        assert self.coordinator.busy_engines() == {generate.engine for generate in self.generating}

    def _take(self, instruction: Instruction) -> None:
        match instruction:
            case Generate():
                assert instruction.engine in self.engines
                assert [lease.attempt for lease in instruction.leases] == [self.issued[x.ticket] for x in instruction.leases]
                self.issued.update(lease.ticket for lease in instruction.leases)
                self.generating.append(instruction)
            case Score():
                self.scoring.append(instruction)
            case CloseStep():
                self.closes.append(instruction)

    def turn(self) -> None:
        """Something happens, chosen at random among what can."""
        choices = [self.engine_answers, self.engine_hands_over_a_group] * 2 * bool(self.generating)
        choices += [self.scorer_answers] * 3 * bool(self.scoring)
        choices += [self.engine_dies] * bool(self.generating) + [self.scorer_dies] * bool(self.scoring and self.scorers)
        choices += [self.zombie_answers] * bool(self.zombies) + [self.answer_comes_again] * bool(self.sent)
        self.data.draw(st.sampled_from(choices))()

    def engine_answers(self) -> None:
        """An engine sends some of its rollouts, in any order."""
        generate = self._pop(self.generating)
        now, later = self._split(generate.leases)
        if later:
            self.generating.append(Generate(generate.engine, later))
        self._answer(RolloutsArrived(tuple(make_rollout(lease) for lease in now)))

    def engine_hands_over_a_group(self) -> None:
        """An engine sends all it still owes of one prompt, as a streaming engine does, and goes on with the rest."""
        generate = self._pop(self.generating)
        group = group_of(self.data.draw(st.sampled_from(generate.leases)).ticket)
        whole = [lease for lease in generate.leases if group_of(lease.ticket) == group]
        rest = tuple(lease for lease in generate.leases if lease not in whole)
        if rest:
            self.generating.append(Generate(generate.engine, rest))
        self._answer(RolloutsArrived(tuple(make_rollout(lease) for lease in whole)))

    def scorer_answers(self) -> None:
        score = self._pop(self.scoring)
        status = self.data.draw(st.sampled_from(VERDICTS))
        self._answer(ScoresArrived(tuple(make_scored(rollout, status=status) for rollout in score.rollouts)))

    def engine_dies(self) -> None:
        """Any living engine is lost, busy or not; what it was asked may still be answered later."""
        dead = self.data.draw(st.sampled_from(sorted(self.engines)))
        self.engines.discard(dead)
        for generate in [g for g in self.generating if g.engine == dead]:
            self.generating.remove(generate)
            self.zombies += generate.leases
        self.send(EngineLost(dead, "killed", tuple(sorted(self.engines))))

    def scorer_dies(self) -> None:
        score = self._pop(self.scoring)
        self.scorers -= 1
        self.send(ScorerLost(tuple(rollout.lease.ticket for rollout in score.rollouts), "killed", self.scorers))
        while self.scorers == 0 and self.scoring:  # what the dead ones were asked, and what would be asked now
            rest = self.scoring.pop()
            self.send(ScorerLost(tuple(rollout.lease.ticket for rollout in rest.rollouts), "killed", 0))

    def zombie_answers(self) -> None:
        now, later = self._split(tuple(self.zombies))
        self.zombies = list(later)
        self._answer(RolloutsArrived(tuple(make_rollout(lease) for lease in now)))

    def answer_comes_again(self) -> None:
        self.send(self.data.draw(st.sampled_from(self.sent)))

    def _answer(self, event: Event) -> None:
        self.sent.append(event)
        self.send(event)

    def _pop(self, work: list[Work]) -> Work:
        return work.pop(self.data.draw(st.integers(0, len(work) - 1)))

    def _split(self, leases: tuple[Lease, ...]) -> tuple[tuple[Lease, ...], tuple[Lease, ...]]:
        order = self.data.draw(st.permutations(leases))
        cut = self.data.draw(st.integers(1, len(order)))
        return tuple(order[:cut]), tuple(order[cut:])


def _leases(data: st.DataObject, step: int) -> tuple[Lease, ...]:
    prompts, members = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 3))
    groups = [[make_opening(p)] * members for p in range(prompts)]
    return make_leases(groups, step=step, run_seed=1, shaping=Shaping(), min_version=step)


def _play(world: World, leases: tuple[Lease, ...]) -> CloseStep:
    """Random turns until nothing is under way; the step must have closed by then, once."""
    world.sent, world.zombies, world.issued, world.closes = [], [], Counter(), []
    order = world.data.draw(st.permutations(leases))
    world.send(StepBegan(tuple(order), tuple(sorted(world.engines))))
    while world.generating or world.scoring:
        if world.scorers == 0 and world.scoring:
            score = world.scoring.pop()
            world.send(ScorerLost(tuple(rollout.lease.ticket for rollout in score.rollouts), "no scorer is left", 0))
        else:
            world.turn()
    assert world.coordinator.open_tickets() == []
    for _ in range(world.data.draw(st.integers(0, 3))):  # stragglers after the end change nothing
        if world.sent:
            world.answer_comes_again()
    (close,) = world.closes
    return close


def _check(close: CloseStep, leases: tuple[Lease, ...], world: World) -> None:
    scored = [member.rollout.lease.ticket for group in close.groups for member in group.members]
    lost = [entry.split(":")[0] for entry in close.lost]
    assert sorted(scored + lost) == [lease.ticket for lease in leases]
    assert scored == sorted(scored)
    assert [group.prompt.id for group in close.groups] == list(dict.fromkeys(lease.prompt.id for lease in leases))
    seeds = {lease.ticket: lease.seed for lease in leases}
    for group in close.groups:
        for member in group.members:
            assert member.rollout.lease.prompt == group.prompt
            assert member.rollout.lease.seed == seeds[member.rollout.lease.ticket]
    assert set(world.issued) == set(seeds)
    assert all(1 <= count <= MAX_ATTEMPTS for count in world.issued.values())


@settings(max_examples=300)
@given(data=st.data())
def test_under_any_schedule_every_ticket_ends_scored_or_lost_and_the_step_closes_once(data: st.DataObject) -> None:
    world = World(data, engines=set(range(data.draw(st.integers(1, 4)))), scorers=data.draw(st.integers(1, 3)))
    for step in range(2):
        if not world.engines:
            break
        leases = _leases(data, step)
        _check(_play(world, leases), leases, world)


@settings(max_examples=100)
@given(data=st.data(), engines=st.integers(1, 4))
def test_without_losses_nothing_is_lost_and_every_lease_is_issued_once(data: st.DataObject, engines: int) -> None:
    world = World(data, engines=set(range(engines)), scorers=1)
    leases = _leases(data, 0)
    world.send(StepBegan(leases, tuple(range(engines))))
    while world.generating or world.scoring:
        choices = [world.engine_answers, world.engine_hands_over_a_group] * bool(world.generating)
        choices += [world.scorer_answers] * bool(world.scoring)
        data.draw(st.sampled_from(choices))()
    (close,) = world.closes
    assert close.lost == ()
    assert set(world.issued.values()) == {1}
    assert [m.rollout.lease for group in close.groups for m in group.members] == list(leases)


@settings(max_examples=100)
@given(data=st.data(), engines=st.integers(2, 4))
def test_one_lost_engine_costs_no_rollout(data: st.DataObject, engines: int) -> None:
    world = World(data, engines=set(range(engines)), scorers=1)
    leases = _leases(data, 0)
    world.send(StepBegan(leases, tuple(range(engines))))
    world.engine_dies()
    while world.generating or world.scoring:
        choices = [world.engine_answers, world.engine_hands_over_a_group] * bool(world.generating)
        choices += [world.scorer_answers] * bool(world.scoring)
        choices += [world.zombie_answers] * bool(world.zombies)
        data.draw(st.sampled_from(choices))()
    (close,) = world.closes
    assert close.lost == ()
    assert [m.rollout.lease.ticket for group in close.groups for m in group.members] == [lease.ticket for lease in leases]
