"""Groups inside an engine, its reports added up, and the figures made of them."""

from __future__ import annotations

import pytest

from rl.types import Lease
from rollout.progress import EngineStats, OpenGroups, engine_metrics, total
from tests.builders import make_lease, make_rollout


def _groups(*members: int) -> tuple[OpenGroups, list[list[Lease]]]:
    """Open groups with that many members each."""
    groups = OpenGroups()
    leases = [[make_lease(group=g, member=m) for m in range(count)] for g, count in enumerate(members)]
    for group in leases:
        for lease in group:
            groups.add(lease)
    return groups, leases


def _taken(groups: OpenGroups) -> list[str]:
    return [rollout.lease.ticket for rollout in groups.take()]


def test_a_group_is_handed_out_when_its_last_member_is_done_and_only_once() -> None:
    groups, (first, second) = _groups(2, 2)
    groups.finish(make_rollout(first[1]))
    groups.finish(make_rollout(second[0]))
    assert not groups.has_whole and _taken(groups) == []
    groups.finish(make_rollout(first[0]))
    assert groups.has_whole and _taken(groups) == [first[1].ticket, first[0].ticket]
    assert not groups.has_whole and _taken(groups) == []
    assert len(groups) == 2


def test_a_finished_rollout_counts_as_open_until_it_is_handed_out() -> None:
    groups, ((one, other),) = _groups(2)
    groups.finish(make_rollout(one))
    assert len(groups) == 2
    assert groups.tickets() == (other.ticket, one.ticket)


def test_a_ticket_that_is_open_is_not_taken_twice_whether_under_way_or_kept() -> None:
    groups, ((one, other),) = _groups(2)
    groups.finish(make_rollout(one))
    for lease in (one, other):
        with pytest.raises(ValueError, match=f"{lease.ticket} is already open"):
            groups.add(lease)
    assert len(groups) == 2


def test_a_group_is_whole_without_the_members_that_were_dropped() -> None:
    groups, ((one, two, three),) = _groups(3)
    groups.finish(make_rollout(two))
    assert groups.drop([one.ticket, three.ticket]) == (one.ticket, three.ticket)
    assert _taken(groups) == [two.ticket]
    assert len(groups) == 0


def test_dropping_names_what_was_held_and_leaves_nothing_behind() -> None:
    groups, ((one, two), (other,)) = _groups(2, 1)
    groups.finish(make_rollout(two))
    assert groups.drop([two.ticket, "000000.0009.000", one.ticket]) == (two.ticket, one.ticket)
    assert groups.tickets() == (other.ticket,)
    assert not groups.has_whole
    groups.add(one)  # a ticket that was dropped may come back
    groups.finish(make_rollout(one))
    assert _taken(groups) == [one.ticket]


def test_a_group_may_grow_while_it_is_open() -> None:
    groups, ((one,),) = _groups(1)
    late = make_lease(member=1)
    groups.add(late)
    groups.finish(make_rollout(one))
    assert not groups.has_whole
    groups.finish(make_rollout(late))
    assert len(_taken(groups)) == 2


def test_reports_of_one_engine_add_up_and_running_is_a_mean_over_steps() -> None:
    reports = [
        EngineStats(seconds=1.0, steps=1, generated=10, prompt_tokens=5, cached_tokens=0, running=8.0, waiting=3, preemptions=1),
        EngineStats(seconds=2.0, steps=3, generated=20, prompt_tokens=5, cached_tokens=4, running=4.0, waiting=0, preemptions=0),
        EngineStats(aborted=2, waiting=0, preemptions=2, weight_version=7),
    ]
    assert total(reports) == EngineStats(
        seconds=3.0, steps=4, generated=30, prompt_tokens=10, cached_tokens=4, aborted=2, running=5.0, waiting=3,
        preemptions=3, weight_version=7,
    )  # fmt: skip
    assert total(reports).tokens_per_s == 10.0


def test_what_an_engine_does_not_tell_stays_unknown_in_the_sum() -> None:
    assert total([EngineStats(steps=2, seconds=1.0, generated=4)] * 2) == EngineStats(steps=4, seconds=2.0, generated=8)


def test_figures_of_a_step_add_the_speeds_of_engines_and_average_what_they_decode_at_once() -> None:
    stats = [
        EngineStats(seconds=2.0, steps=10, generated=100, prompt_tokens=30, cached_tokens=6, running=6, waiting=1, preemptions=2),
        EngineStats(seconds=4.0, steps=30, generated=100, prompt_tokens=10, cached_tokens=4, running=2, waiting=5, preemptions=0),
    ]
    assert engine_metrics(stats) == {
        "engine/tokens_per_s": 75.0,
        "engine/running_mean": 3.0,
        "engine/waiting_max": 5.0,
        "engine/cache_hit": 0.25,
        "engine/preemptions": 2.0,
        "engine/aborted": 0.0,
    }


def test_what_no_engine_tells_is_absent_rather_than_zero() -> None:
    spread = EngineStats(seconds=2.0, steps=4, generated=10, prompt_tokens=8, cached_tokens=2, aborted=1)
    assert engine_metrics([spread]) == {"engine/tokens_per_s": 5.0, "engine/cache_hit": 0.25, "engine/aborted": 1.0}
    assert engine_metrics([EngineStats(running=None), EngineStats()]) == {}
    assert engine_metrics([]) == {}
