"""A sample that changes how later ones are judged costs its own verdict and nobody else's."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from reward.canaries import CANARIES, Canaries, canaries_of
from reward.graders import GRADERS
from reward.pool import GraderPool, GraderStartError, GradeTask
from rl.types import Verdict, VerdictStatus

HOSTILE = ("reward.graders", "tests.chaos.hostile_graders")
CORRECT, WRONG, CRASHED = VerdictStatus.CORRECT, VerdictStatus.WRONG, VerdictStatus.CRASHED
HONEST = ["4", "5", "44", "4"]
EXPECTED = [CORRECT, WRONG, WRONG, CORRECT]


@pytest.fixture(scope="module")
def pool() -> Iterator[GraderPool]:
    with GraderPool(2, 10, modules=HOSTILE) as pool:
        pool.wait_ready()
        yield pool


def act(pool: GraderPool, *answers: str) -> list[Verdict]:
    return pool.grade([GradeTask("mischief", answer, ("4",)) for answer in answers])


def statuses(verdicts: list[Verdict]) -> list[VerdictStatus]:
    return [verdict.status for verdict in verdicts]


def test_the_poison_forges_later_verdicts_where_canaries_do_not_see_it() -> None:
    """What the canaries are there for: with such that the poison leaves alone, wrong answers pass."""
    with GraderPool(1, 10, modules=HOSTILE, canaries={"mischief": CANARIES["numeric"]}) as pool:
        assert statuses(act(pool, "5", "poison", "5")) == [WRONG, CORRECT, CORRECT]


@pytest.mark.parametrize("place", [0, 17, 39])
def test_only_the_poisoner_is_crashed_wherever_it_stands(pool: GraderPool, place: int) -> None:
    answers, expected = HONEST * 10, EXPECTED * 10
    verdicts = act(pool, *answers[:place], "poison", *answers[place:])
    assert statuses(verdicts) == [*expected[:place], CRASHED, *expected[place:]]
    assert "spoilt its grader process, twice" in verdicts[place].evidence
    assert "exact canary correct" in verdicts[place].evidence


def test_several_poisoners_are_each_found(pool: GraderPool) -> None:
    verdicts = act(pool, "poison", *HONEST, "poison", "poison", *HONEST)
    assert statuses(verdicts) == [CRASHED, *EXPECTED, CRASHED, CRASHED, *EXPECTED]


def test_a_poisoner_alone_is_crashed_and_the_next_call_is_judged_as_ever(pool: GraderPool) -> None:
    assert statuses(act(pool, "poison")) == [CRASHED]
    assert statuses(act(pool, *HONEST)) == EXPECTED


def test_verdicts_forged_before_a_crash_do_not_count(pool: GraderPool) -> None:
    verdicts = act(pool, "poison", "5", "exit", "5", "4")
    assert statuses(verdicts) == [CRASHED, WRONG, CRASHED, WRONG, CORRECT]


def test_answers_forged_on_the_pipe_are_narrowed_down_like_poison(pool: GraderPool) -> None:
    verdicts = act(pool, *HONEST, "forge answers", *HONEST)
    assert statuses(verdicts) == [*EXPECTED, CRASHED, *EXPECTED]


def test_an_honest_batch_replaces_no_process(pool: GraderPool) -> None:
    pool.wait_ready()
    before = pool.replaced, pool.pids
    assert statuses(act(pool, *HONEST * 50)) == EXPECTED * 50
    assert (pool.replaced, pool.pids) == before


@pytest.mark.parametrize("preload", [("exact",), ()])
def test_a_grader_that_fails_its_canary_from_the_start_is_a_start_error_and_no_verdict(preload: tuple[str, ...]) -> None:
    def hopeless(turn: int) -> tuple[GradeTask, GradeTask]:
        return GradeTask("exact", "right", ("wrong",)), GradeTask("exact", "right", ("wrong",))

    table: dict[str, Canaries] = {"exact": hopeless}
    with GraderPool(1, 10, preload=preload, canaries=table) as pool, pytest.raises(GraderStartError, match="canary wrong"):
        pool.grade([GradeTask("exact", "4", ("4",))])


def test_every_grader_has_canaries_that_change_with_the_turn() -> None:
    assert CANARIES.keys() == GRADERS.keys()
    for grader in CANARIES:
        assert len({canaries_of([grader], turn, CANARIES)[0][0] for turn in range(4)}) == 4
