"""How a batch of answers is shared out over reward workers; losses on the way are the coordinator's, in test_coordinator.py."""

from __future__ import annotations

from rl.collection import shared_out
from rl.coordinator import Generate, Score
from tests.builders import make_lease, make_rollout


def _score(answers: int) -> Score:
    return Score(tuple(make_rollout(make_lease(member=m)) for m in range(answers)))


def _members(parts: list[Generate | Score]) -> list[list[int]]:
    return [[rollout.lease.member for rollout in part.rollouts] for part in parts if isinstance(part, Score)]


def test_answers_are_dealt_in_turn_to_all_reward_workers() -> None:
    assert _members(shared_out(_score(7), 3)) == [[0, 3, 6], [1, 4], [2, 5]]
    assert _members(shared_out(_score(3), 1)) == [[0, 1, 2]]


def test_no_reward_worker_gets_an_empty_part() -> None:
    assert _members(shared_out(_score(2), 4)) == [[0], [1]]


def test_the_leases_of_an_engine_stay_together() -> None:
    generate = Generate(0, (make_lease(), make_lease(member=1)))
    assert shared_out(generate, 3) == [generate]
