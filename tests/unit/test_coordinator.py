"""The coordinator, event by event: deals, re-issues, late answers, and what a closed step holds."""

from __future__ import annotations

from dataclasses import replace

import pytest

from rl.coordinator import (
    CloseStep,
    Coordinator,
    EngineLost,
    Generate,
    RolloutsArrived,
    Score,
    ScorerLost,
    ScoresArrived,
    StepBegan,
)
from rl.leases import make_leases
from rl.types import Lease, Shaping, VerdictStatus
from tests.builders import make_lease, make_opening, make_rollout, make_scored


def _leases(prompts: int = 2, members: int = 2, *, step: int = 0) -> tuple[Lease, ...]:
    groups = [[make_opening(p)] * members for p in range(prompts)]
    return make_leases(groups, step=step, run_seed=3, shaping=Shaping(), min_version=step)


def _begun(*, engines: tuple[int, ...] = (0, 1)) -> tuple[Coordinator, list[Generate]]:
    """A coordinator with two groups of two members under way, and what it asked of the engines."""
    coordinator = Coordinator()
    instructions = coordinator.step(StepBegan(_leases(), engines))
    generates = [i for i in instructions if isinstance(i, Generate)]
    assert len(generates) == len(instructions)
    return coordinator, generates


def _arrived(generate: Generate) -> RolloutsArrived:
    return RolloutsArrived(tuple(make_rollout(lease) for lease in generate.leases))


def _scored(score: Score) -> ScoresArrived:
    return ScoresArrived(tuple(make_scored(rollout) for rollout in score.rollouts))


def test_the_seeds_do_not_depend_on_the_engines() -> None:
    dealt = []
    for engines in ((0,), (0, 1), (5, 2, 9)):
        _, generates = _begun(engines=engines)
        dealt.append({lease.ticket: lease.seed for generate in generates for lease in generate.leases})
    assert dealt[0] == dealt[1] == dealt[2] == {lease.ticket: lease.seed for lease in _leases()}


def test_a_group_stays_together_and_the_groups_are_spread() -> None:
    _, generates = _begun()
    assert [(g.engine, [lease.ticket for lease in g.leases]) for g in generates] == [
        (0, ["000000.0000.000", "000000.0000.001"]),
        (1, ["000000.0001.000", "000000.0001.001"]),
    ]


def test_the_next_group_goes_to_the_engine_with_the_fewest_expected_tokens() -> None:
    leases = tuple(make_lease(group=g, budget=tokens) for g, tokens in enumerate((60, 10, 20, 40)))
    instructions = Coordinator().step(StepBegan(leases, (0, 1)))
    shares = {i.engine: [lease.budget.tokens for lease in i.leases] for i in instructions if isinstance(i, Generate)}
    assert shares == {0: [60], 1: [10, 20, 40]}  # engine 1 has 30 tokens when the last group is dealt, engine 0 has 60


def test_a_step_closes_with_its_groups_and_members_in_order_whatever_the_order_of_arrival() -> None:
    coordinator, (first, second) = _begun()
    (score,) = coordinator.step(RolloutsArrived(tuple(reversed(_arrived(second).rollouts))))
    assert isinstance(score, Score)
    assert coordinator.step(_scored(score)) == []
    (score,) = coordinator.step(RolloutsArrived(tuple(reversed(_arrived(first).rollouts))))
    assert isinstance(score, Score)
    (close,) = coordinator.step(_scored(score))
    assert isinstance(close, CloseStep)
    assert [group.prompt.id for group in close.groups] == ["q0", "q1"]
    assert [[m.rollout.lease.member for m in group.members] for group in close.groups] == [[0, 1], [0, 1]]
    assert close.lost == ()


def test_groups_are_ordered_by_number_also_beyond_the_digits_of_a_ticket() -> None:
    coordinator = Coordinator()
    leases = tuple(make_lease(group=g) for g in (9999, 10000, 10001))
    (generate,) = coordinator.step(StepBegan(leases, (0,)))
    assert isinstance(generate, Generate)
    (score,) = coordinator.step(_arrived(generate))
    assert isinstance(score, Score)
    (close,) = coordinator.step(_scored(score))
    assert isinstance(close, CloseStep)
    assert [group.prompt.id for group in close.groups] == ["q9999", "q10000", "q10001"]


def test_the_leases_of_a_lost_engine_are_issued_once_more_with_the_same_seed() -> None:
    coordinator, (first, second) = _begun()
    (again,) = coordinator.step(EngineLost(0, "out of memory", (1,)))
    assert isinstance(again, Generate) and again.engine == 1
    assert again.leases == tuple(replace(lease, attempt=1) for lease in first.leases)
    instructions = coordinator.step(EngineLost(1, "out of memory again", ()))
    (close,) = instructions
    assert isinstance(close, CloseStep)
    assert [group.members for group in close.groups] == [(), ()]
    assert sorted(close.lost) == [f"{lease.ticket}: out of memory again" for lease in (*first.leases, *second.leases)]


def test_a_second_loss_of_the_same_lease_is_final_although_engines_are_left() -> None:
    coordinator, (first, second) = _begun()
    coordinator.step(_arrived(second))
    coordinator.step(EngineLost(0, "killed", (1, 2)))
    lost_on = coordinator.tickets[first.leases[0].ticket].engine
    coordinator.step(EngineLost(lost_on, "killed again", (2,)))
    assert coordinator.lost == [f"{lease.ticket}: killed again" for lease in first.leases]


def test_what_a_lost_engine_owed_goes_to_the_engine_that_owes_least() -> None:
    coordinator = Coordinator()
    leases = tuple(make_lease(group=g, budget=tokens) for g, tokens in enumerate((60, 50, 10)))
    generates = [i for i in coordinator.step(StepBegan(leases, (0, 1, 2))) if isinstance(i, Generate)]
    assert [[lease.budget.tokens for lease in generate.leases] for generate in generates] == [[60], [50], [10]]
    (again,) = coordinator.step(EngineLost(1, "killed", (0, 2)))
    assert isinstance(again, Generate) and again.engine == 2


def test_an_engine_is_busy_until_its_last_rollout_arrived_or_it_is_lost() -> None:
    coordinator, (first, second) = _begun()
    assert coordinator.busy_engines() == {0, 1}
    one, other = _arrived(first).rollouts
    coordinator.step(RolloutsArrived((one,)))
    assert coordinator.busy_engines() == {0, 1}
    coordinator.step(RolloutsArrived((other,)))
    assert coordinator.busy_engines() == {1}
    coordinator.step(EngineLost(1, "killed", (0,)))
    assert coordinator.busy_engines() == {0}


def test_each_group_is_scored_as_it_arrives_while_others_are_open() -> None:
    coordinator, (generate,) = _begun(engines=(0,))
    one, other = _arrived(generate).rollouts[:2], _arrived(generate).rollouts[2:]
    assert coordinator.step(RolloutsArrived(one)) == [Score(one)]
    assert coordinator.step(_scored(Score(one))) == []
    assert coordinator.open_tickets() == [rollout.lease.ticket for rollout in other]
    assert coordinator.step(RolloutsArrived(other)) == [Score(other)]


def test_what_an_engine_finished_before_its_loss_is_kept() -> None:
    coordinator, (first, second) = _begun()
    coordinator.step(_arrived(first))
    assert coordinator.step(EngineLost(0, "killed", (1,))) == []
    assert coordinator.open_tickets() == [lease.ticket for lease in (*first.leases, *second.leases)]


def test_an_engine_reported_lost_twice_is_lost_once() -> None:
    coordinator, _ = _begun()
    assert len(coordinator.step(EngineLost(0, "killed", (1,)))) == 1
    assert coordinator.step(EngineLost(0, "killed", (1,))) == []
    assert coordinator.lost == []


def test_the_late_answer_of_an_engine_believed_lost_is_ignored_and_its_replacements_counts() -> None:
    coordinator, (first, _) = _begun()
    (again,) = coordinator.step(EngineLost(0, "no answer in time", (1,)))
    assert isinstance(again, Generate)
    assert coordinator.step(_arrived(first)) == []
    (score,) = coordinator.step(_arrived(again))
    assert isinstance(score, Score)
    assert [rollout.lease.attempt for rollout in score.rollouts] == [1, 1]
    assert coordinator.step(_arrived(first)) == []


def test_a_duplicate_answer_is_neither_scored_nor_counted_again() -> None:
    coordinator, (first, second) = _begun()
    doubled = _arrived(first).rollouts * 2
    (score,) = coordinator.step(RolloutsArrived(doubled))
    assert isinstance(score, Score)
    assert len(score.rollouts) == 2
    wrong = tuple(make_scored(rollout, status=VerdictStatus.WRONG, reward=0.0) for rollout in score.rollouts)
    coordinator.step(_scored(score))
    coordinator.step(ScoresArrived(wrong))
    (score,) = coordinator.step(_arrived(second))
    assert isinstance(score, Score)
    (close,) = coordinator.step(_scored(score))
    assert isinstance(close, CloseStep)
    assert [m.verdict.status for group in close.groups for m in group.members] == [VerdictStatus.CORRECT] * 4


def test_a_step_is_closed_once_whatever_arrives_afterwards() -> None:
    coordinator, (generate,) = _begun(engines=(0,))
    (score,) = coordinator.step(_arrived(generate))
    assert isinstance(score, Score)
    assert len(coordinator.step(_scored(score))) == 1
    assert coordinator.step(_scored(score)) == []
    assert coordinator.step(_arrived(generate)) == []
    assert coordinator.step(EngineLost(0, "killed", ())) == []
    assert coordinator.step(ScorerLost((generate.leases[0].ticket,), "killed", 0)) == []


def test_what_a_lost_scorer_held_is_scored_by_another() -> None:
    coordinator, (generate,) = _begun(engines=(0,))
    (score,) = coordinator.step(_arrived(generate))
    assert isinstance(score, Score)
    tickets = tuple(rollout.lease.ticket for rollout in score.rollouts)
    assert coordinator.step(ScorerLost(tickets, "killed", 1)) == [score]


def test_without_a_scorer_left_the_answers_are_lost_with_their_cause() -> None:
    coordinator, (generate,) = _begun(engines=(0,))
    (score,) = coordinator.step(_arrived(generate))
    assert isinstance(score, Score)
    tickets = tuple(rollout.lease.ticket for rollout in score.rollouts)
    (close,) = coordinator.step(ScorerLost(tickets, "killed", 0))
    assert isinstance(close, CloseStep)
    assert close.lost == tuple(f"{ticket}: killed" for ticket in tickets)
    assert [len(group.members) for group in close.groups] == [0, 0]


def test_a_step_without_leases_closes_at_once() -> None:
    assert Coordinator().step(StepBegan((), (0,))) == [CloseStep((), ())]


def test_a_step_cannot_begin_while_the_last_one_is_open_or_without_engines() -> None:
    coordinator, _ = _begun()
    with pytest.raises(ValueError, match="4 tickets of the last one open"):
        coordinator.step(StepBegan(_leases(step=1), (0,)))
    with pytest.raises(ValueError, match="no engine is alive"):
        Coordinator().step(StepBegan(_leases(), ()))


def test_an_answer_to_a_ticket_of_another_step_is_refused() -> None:
    coordinator, _ = _begun()
    with pytest.raises(ValueError, match="ticket 000009.0000.000 is not of this step"):
        coordinator.step(RolloutsArrived((make_rollout(make_lease(step=9)),)))
