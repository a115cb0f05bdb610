"""When a busy engine counts as silent; the clock is a number here."""

from __future__ import annotations

import math

from rl.heartbeat import Heartbeats


def test_a_busy_engine_is_silent_once_it_was_not_heard_for_the_limit() -> None:
    beats = Heartbeats(10.0)
    beats.expect({0, 1}, 100.0)
    beats.heard(1, 105.0)
    assert beats.silent(109.9) == []
    assert beats.silent(110.0) == [0]
    assert beats.silent(115.0) == [0, 1]


def test_an_idle_engine_may_be_silent_and_its_time_begins_when_it_gets_work() -> None:
    beats = Heartbeats(10.0)
    beats.expect({0}, 100.0)
    beats.expect(set(), 101.0)
    assert beats.silent(1000.0) == []
    beats.expect({0}, 1000.0)
    assert beats.silent(1009.0) == []
    assert beats.silent(1010.0) == [0]


def test_being_expected_again_is_no_sign_of_life() -> None:
    beats = Heartbeats(10.0)
    for now in (0.0, 5.0, 10.0):
        beats.expect({0}, now)
    assert beats.silent(10.0) == [0]


def test_the_answer_of_an_engine_that_owes_nothing_does_not_make_it_busy() -> None:
    beats = Heartbeats(10.0)
    beats.heard(0, 5.0)
    assert beats.silent(1000.0) == []


def test_patience_ends_with_the_engine_heard_longest_ago_and_never_below_zero() -> None:
    beats = Heartbeats(10.0)
    assert beats.patience_s(0.0) == math.inf
    beats.expect({0, 1}, 0.0)
    beats.heard(1, 4.0)
    assert beats.patience_s(4.0) == 6.0
    assert beats.patience_s(12.0) == 0.0
