"""What hostile answers can do to the grader pool: nothing but earn themselves a verdict."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

import pytest

from reward.pool import GraderPool, GraderStartError, GradeTask
from rl.types import Verdict, VerdictStatus
from tests.chaos.watching import ends, family, is_running, zombies

HOSTILE = ("reward.graders", "tests.chaos.hostile_graders")
# Short for a hang, ample for any honest task here even on a loaded machine.
DEADLINE_S = 3.0
MEMORY_BYTES = 2**30
CORRECT, WRONG, CRASHED, TIMED_OUT = (
    VerdictStatus.CORRECT,
    VerdictStatus.WRONG,
    VerdictStatus.CRASHED,
    VerdictStatus.TIMED_OUT,
)


@pytest.fixture(scope="module")
def pool() -> Iterator[GraderPool]:
    with GraderPool(2, DEADLINE_S, modules=HOSTILE, memory_bytes=MEMORY_BYTES) as pool:
        pool.wait_ready()
        yield pool


@pytest.fixture(scope="module")
def unconfined() -> Iterator[GraderPool]:
    """Where the kernel grants no confinement, processes that graders start must still be found."""
    with GraderPool(2, DEADLINE_S, modules=HOSTILE, memory_bytes=MEMORY_BYTES, confined=False) as pool:
        pool.wait_ready()
        yield pool


def act(pool: GraderPool, *answers: str) -> list[Verdict]:
    return pool.grade([GradeTask("mischief", answer, ("4",)) for answer in answers])


def statuses(verdicts: list[Verdict]) -> list[VerdictStatus]:
    return [verdict.status for verdict in verdicts]


def assert_pool_is_whole(pool: GraderPool) -> None:
    assert statuses(act(pool, "4", "5")) == [CORRECT, WRONG]
    assert len(pool.pids) == 2
    assert ends(lambda: family(pool) != set(pool.pids))
    assert zombies() == []


def test_a_grader_hanging_in_c_times_out_and_its_neighbours_are_graded(pool: GraderPool) -> None:
    verdicts = act(pool, *["4"] * 10, "hang in C", *["5"] * 10)
    assert statuses(verdicts) == [CORRECT] * 10 + [TIMED_OUT] + [WRONG] * 10
    assert "within 3 s" in verdicts[10].evidence
    assert_pool_is_whole(pool)


@pytest.mark.parametrize(
    ("answer", "evidence"),
    [
        ("exit", "exit code 7"),
        ("segfault", "SIGSEGV"),
        ("hog memory", "MemoryError"),
        ("hog memory bit by bit", "MemoryError"),
        ("forge answers", "no JSON"),
    ],
)
def test_a_dying_grader_is_crashed_with_evidence_and_its_neighbours_live(pool: GraderPool, answer: str, evidence: str) -> None:
    verdicts = act(pool, "4", answer, "4", answer, "5", "4")
    assert statuses(verdicts) == [CORRECT, CRASHED, CORRECT, CRASHED, WRONG, CORRECT]
    assert evidence in verdicts[1].evidence
    assert_pool_is_whole(pool)


@pytest.mark.parametrize(
    ("answer", "status"),
    [
        ("hang in C", TIMED_OUT),
        ("sleep", TIMED_OUT),
        ("flood both for ever", TIMED_OUT),
        ("hog memory", CRASHED),
        ("hog memory bit by bit", CRASHED),
        ("segfault", CRASHED),
        ("exit", CRASHED),
        ("fork bomb", CRASHED),
        ("fork bomb of daemons", CRASHED),
    ],
)
def test_a_verdict_comes_within_a_second_of_the_deadline(pool: GraderPool, answer: str, status: VerdictStatus) -> None:
    pool.wait_ready()
    began = time.monotonic()
    (verdict,) = act(pool, answer)
    assert time.monotonic() - began < DEADLINE_S + 1
    assert verdict.status is status
    assert_pool_is_whole(pool)


@pytest.mark.parametrize("answer", ["fork bomb", "fork bomb of daemons"])
def test_a_fork_bomb_without_confinement_times_out_and_leaves_no_process(unconfined: GraderPool, answer: str) -> None:
    unconfined.wait_ready()
    began = time.monotonic()
    (verdict,) = act(unconfined, answer)
    assert time.monotonic() - began < DEADLINE_S + 1
    assert verdict.status is TIMED_OUT
    assert_pool_is_whole(unconfined)


def test_daemons_that_outlive_their_task_end_with_the_child() -> None:
    with GraderPool(1, DEADLINE_S, modules=HOSTILE, confined=False) as pool:
        assert statuses(act(pool, "leave daemons")) == [CORRECT]
        assert ends(lambda: len(family(pool)) != 1 + 3)
        # They hold the pipe of the child as well, so its end does not show as the end of its output.
        began = time.monotonic()
        assert statuses(act(pool, "exit")) == [CRASHED]
        assert time.monotonic() - began < DEADLINE_S
        assert ends(lambda: family(pool) != set(pool.pids))


def test_a_computer_algebra_hang_times_out() -> None:
    with GraderPool(1, DEADLINE_S, preload=("math",)) as pool:
        tasks = [GradeTask("math", answer, ("x + 1",)) for answer in ("1 + x", "(x+y+z+w)^{60}", "x")]
        assert statuses(pool.grade(tasks)) == [CORRECT, TIMED_OUT, WRONG]


def test_a_regular_expression_that_backtracks_for_ever_times_out(pool: GraderPool) -> None:
    hopeless = GradeTask("format", "a" * 60, (), options='{"pattern": "(a+)+b"}')
    assert statuses(pool.grade([hopeless, GradeTask("exact", "4", ("4",))])) == [TIMED_OUT, CORRECT]


def test_a_raising_grader_is_crashed_without_losing_its_process(pool: GraderPool) -> None:
    pool.wait_ready()
    before = pool.replaced
    verdicts = act(pool, "raise", "4")
    assert statuses(verdicts) == [CRASHED, CORRECT]
    assert verdicts[0].evidence == "ValueError: no such luck"
    assert pool.replaced == before


@pytest.mark.parametrize("answer", ["flood stdout", "flood stderr", "read stdin"])
def test_what_a_grader_reads_or_prints_does_not_disturb_the_protocol(pool: GraderPool, answer: str) -> None:
    before = pool.replaced
    assert statuses(act(pool, answer, "4", "5")) == [CORRECT, CORRECT, WRONG]
    assert pool.replaced == before


def test_an_unknown_grader_is_crashed_by_name(pool: GraderPool) -> None:
    (verdict,) = pool.grade([GradeTask("palmistry", "4", ("4",))])
    assert verdict.status is CRASHED and "palmistry" in verdict.evidence


def test_a_chunk_larger_than_a_pipe_is_graded_in_order(pool: GraderPool) -> None:
    tasks = [GradeTask("exact", f"{i} " + "x" * 15_000, (f"{i if i % 3 else 'no'} " + "x" * 15_000,)) for i in range(100)]
    assert statuses(pool.grade(tasks)) == [CORRECT if i % 3 else WRONG for i in range(100)]


def test_a_hang_in_front_of_a_chunk_larger_than_a_pipe_still_times_out(pool: GraderPool) -> None:
    large = GradeTask("exact", "x" * 15_000, ("x" * 15_000,))
    verdicts = pool.grade([GradeTask("mischief", "hang in C", ("4",)), *[large] * 40])
    assert statuses(verdicts) == [TIMED_OUT] + [CORRECT] * 40


def test_secrets_in_the_environment_do_not_reach_the_graders(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    with GraderPool(1, DEADLINE_S, modules=HOSTILE) as pool:
        (verdict,) = act(pool, "environment")
    assert "HF_TOKEN" not in verdict.evidence and "PATH" in verdict.evidence


def test_children_are_recycled_after_their_share_of_tasks() -> None:
    with GraderPool(1, DEADLINE_S, modules=HOSTILE, recycle_after=4) as pool:
        pool.wait_ready()
        first = pool.pids
        assert statuses(act(pool, *["4"] * 10)) == [CORRECT] * 10
        assert pool.replaced == 2
        assert pool.pids != first


def test_a_child_killed_while_idle_is_replaced_and_no_answer_is_blamed() -> None:
    with GraderPool(1, DEADLINE_S, modules=HOSTILE) as pool:
        pool.wait_ready()
        os.kill(pool.pids[0], 9)
        os.waitid(os.P_PID, pool._workers[0].process.pid, os.WEXITED | os.WNOWAIT)
        assert statuses(act(pool, "4", "5")) == [CORRECT, WRONG]
        assert pool.replaced == 1


def test_a_grader_module_that_cannot_be_imported_is_a_start_error_with_its_last_words() -> None:
    dying = ("tests.chaos.dying_at_import",)
    with GraderPool(1, DEADLINE_S, modules=dying) as pool, pytest.raises(GraderStartError, match="licence file"):
        act(pool, "4")


def test_closing_leaves_no_process_not_even_one_a_grader_started() -> None:
    pool = GraderPool(2, DEADLINE_S, modules=HOSTILE, confined=False)
    (verdict,) = act(pool, "spawn")
    pids = [*pool.pids, int(verdict.evidence)]
    assert len(pids) == 3
    pool.close()
    pool.close()
    # The children are reaped by close; their own children get the same signal, but only init can wait for those to be gone.
    assert [pid for pid in pids[:2] if is_running(pid)] == []
    assert ends(lambda: is_running(pids[2]))
    with pytest.raises(RuntimeError, match="closed"):
        act(pool, "4")
