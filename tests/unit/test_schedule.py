"""Which lease starts first, and which engine gets which group."""

from __future__ import annotations

from dataclasses import replace

import pytest

from rl.schedule import deal, expected_length, group_of, submission_order
from rl.types import Lease
from tests.builders import make_lease


def _lease(group: int, member: int, budget: int | None, *, cap: int = 100) -> Lease:
    return replace(make_lease(group=group, member=member, budget=budget), max_new_tokens=cap)


def _places(leases: list[Lease]) -> list[tuple[int, int]]:
    return [(int(lease.ticket.split(".")[1]), lease.member) for lease in leases]


@pytest.mark.parametrize(("budget", "cap", "expected"), [(32, 100, 32), (128, 100, 100), (None, 100, 50), (None, 7, 3)])
def test_a_response_is_expected_to_keep_its_budget_within_its_cap_and_half_the_cap_without_one(
    budget: int | None, cap: int, expected: int
) -> None:
    assert expected_length(_lease(0, 0, budget, cap=cap)) == expected


def test_the_longest_expected_start_first_across_groups() -> None:
    leases = [_lease(group, member, budget) for group in range(2) for member, budget in enumerate((20, 80, None))]
    assert _places(submission_order(leases, "longest_first")) == [(0, 1), (1, 1), (0, 2), (1, 2), (0, 0), (1, 0)]


def test_siblings_of_equal_length_stay_adjacent_and_in_member_order() -> None:
    leases = [_lease(group, member, None) for group in range(3) for member in range(3)]
    assert submission_order(leases, "longest_first") == leases


def test_in_the_order_of_arrival_nothing_moves() -> None:
    leases = [_lease(0, 0, 20), _lease(1, 0, 80), _lease(0, 1, 50)]
    assert submission_order(leases, "arrival") == leases


def test_the_order_does_not_change_what_is_generated() -> None:
    leases = [_lease(group, member, 10 * (group + member)) for group in range(3) for member in range(3)]
    assert sorted(submission_order(leases, "longest_first"), key=lambda lease: lease.ticket) == leases


def test_a_group_goes_whole_to_the_engine_with_the_least_to_do() -> None:
    leases = [_lease(group, member, budget) for group, budget in enumerate((20, 15, 10, 1)) for member in range(2)]
    shares = deal(leases, {0: 0, 1: 0})
    assert {engine: [lease.budget.tokens for lease in share] for engine, share in shares.items()} == {
        0: [20, 20, 1, 1],  # 40 tokens are on engine 0 when the last group is dealt, 50 on engine 1
        1: [15, 15, 10, 10],
    }


def test_what_an_engine_owes_already_counts_and_one_that_gets_nothing_is_not_named() -> None:
    assert deal([_lease(0, 0, 10)], {3: 500, 7: 499}) == {7: [_lease(0, 0, 10)]}


def test_a_group_is_the_ticket_without_its_member() -> None:
    assert group_of("000012.0003.001") == "000012.0003"
    assert group_of("alone") == "alone"
