"""What hostile answers can do to the grader pool: nothing but earn themselves a verdict."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from reward.pool import GraderPool, GraderStartError, GradeTask
from rl.types import Verdict, VerdictStatus

HOSTILE = ("reward.graders", "tests.chaos.hostile_graders")
# Short for a hang, ample for any honest task here even on a loaded machine.
DEADLINE_S = 3.0


@pytest.fixture(scope="module")
def pool() -> Iterator[GraderPool]:
    with GraderPool(2, DEADLINE_S, modules=HOSTILE, memory_bytes=2 * 2**30) as pool:
        pool.wait_ready()
        yield pool


def act(pool: GraderPool, *answers: str) -> list[Verdict]:
    return pool.grade([GradeTask("mischief", answer, "4") for answer in answers])


def statuses(verdicts: list[Verdict]) -> list[VerdictStatus]:
    return [verdict.status for verdict in verdicts]


def assert_pool_is_whole(pool: GraderPool) -> None:
    assert statuses(act(pool, "4", "5")) == [VerdictStatus.CORRECT, VerdictStatus.WRONG]
    assert len(pool.pids) == 2


def test_a_grader_hanging_in_c_times_out_and_its_neighbours_are_graded(pool: GraderPool) -> None:
    verdicts = act(pool, *["4"] * 10, "hang in C", *["5"] * 10)
    assert statuses(verdicts) == [VerdictStatus.CORRECT] * 10 + [VerdictStatus.TIMED_OUT] + [VerdictStatus.WRONG] * 10
    assert "within 3 s" in verdicts[10].evidence
    assert_pool_is_whole(pool)


@pytest.mark.parametrize(
    ("answer", "evidence"),
    [("exit", "exit code 7"), ("segfault", "SIGSEGV"), ("hog memory", "MemoryError"), ("forge answers", "no JSON")],
)
def test_a_dying_grader_is_crashed_with_evidence_and_its_neighbours_live(pool: GraderPool, answer: str, evidence: str) -> None:
    verdicts = act(pool, "4", answer, "4", answer, "5", "4")
    crashed, correct, wrong = VerdictStatus.CRASHED, VerdictStatus.CORRECT, VerdictStatus.WRONG
    assert statuses(verdicts) == [correct, crashed, correct, crashed, wrong, correct]
    assert evidence in verdicts[1].evidence
    assert_pool_is_whole(pool)


def test_a_raising_grader_is_crashed_without_losing_its_process(pool: GraderPool) -> None:
    before = pool.replaced
    verdicts = act(pool, "raise", "4")
    assert statuses(verdicts) == [VerdictStatus.CRASHED, VerdictStatus.CORRECT]
    assert verdicts[0].evidence == "ValueError: no such luck"
    assert pool.replaced == before


@pytest.mark.parametrize("answer", ["flood stdout", "flood stderr", "read stdin"])
def test_what_a_grader_reads_or_prints_does_not_disturb_the_protocol(pool: GraderPool, answer: str) -> None:
    before = pool.replaced
    assert statuses(act(pool, answer, "4", "5")) == [VerdictStatus.CORRECT, VerdictStatus.CORRECT, VerdictStatus.WRONG]
    assert pool.replaced == before


def test_an_unknown_grader_is_crashed_by_name(pool: GraderPool) -> None:
    (verdict,) = pool.grade([GradeTask("palmistry", "4", "4")])
    assert verdict.status is VerdictStatus.CRASHED and "palmistry" in verdict.evidence


def test_a_chunk_larger_than_a_pipe_is_graded_in_order(pool: GraderPool) -> None:
    tasks = [GradeTask("exact", f"{i} " + "x" * 15_000, f"{i if i % 3 else 'no'} " + "x" * 15_000) for i in range(100)]
    expected = [VerdictStatus.CORRECT if i % 3 else VerdictStatus.WRONG for i in range(100)]
    assert statuses(pool.grade(tasks)) == expected


def test_a_hang_in_front_of_a_chunk_larger_than_a_pipe_still_times_out(pool: GraderPool) -> None:
    large = GradeTask("exact", "x" * 15_000, "x" * 15_000)
    verdicts = pool.grade([GradeTask("mischief", "hang in C", "4"), *[large] * 40])
    assert statuses(verdicts) == [VerdictStatus.TIMED_OUT] + [VerdictStatus.CORRECT] * 40


def test_secrets_in_the_environment_do_not_reach_the_graders(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    with GraderPool(1, DEADLINE_S, modules=HOSTILE) as pool:
        (verdict,) = act(pool, "environment")
    assert "HF_TOKEN" not in verdict.evidence and "PATH" in verdict.evidence


def test_children_are_recycled_after_their_share_of_tasks() -> None:
    with GraderPool(1, DEADLINE_S, modules=HOSTILE, recycle_after=4) as pool:
        pool.wait_ready()
        first = pool.pids
        assert statuses(act(pool, *["4"] * 10)) == [VerdictStatus.CORRECT] * 10
        assert pool.replaced == 2
        assert pool.pids != first


def test_a_child_killed_while_idle_is_replaced_and_no_answer_is_blamed() -> None:
    with GraderPool(1, DEADLINE_S, modules=HOSTILE) as pool:
        pool.wait_ready()
        os.kill(pool.pids[0], 9)
        os.waitid(os.P_PID, pool._workers[0].process.pid, os.WEXITED | os.WNOWAIT)
        assert statuses(act(pool, "4", "5")) == [VerdictStatus.CORRECT, VerdictStatus.WRONG]
        assert pool.replaced == 1


def test_a_grader_module_that_cannot_be_imported_is_a_start_error_with_its_last_words() -> None:
    dying = ("tests.chaos.dying_at_import",)
    with GraderPool(1, DEADLINE_S, modules=dying) as pool, pytest.raises(GraderStartError, match="licence file"):
        act(pool, "4")


def test_closing_leaves_no_process_not_even_one_a_grader_started() -> None:
    pool = GraderPool(2, DEADLINE_S, modules=HOSTILE)
    (verdict,) = act(pool, "spawn")
    pids = [*pool.pids, int(verdict.evidence)]
    assert len(pids) == 3
    pool.close()
    pool.close()
    # The children are reaped by close; their own children get the same signal, but only init can wait for those to be gone.
    assert [pid for pid in pids[:2] if is_running(pid)] == []
    limit = time.monotonic() + 30
    while is_running(pids[2]) and time.monotonic() < limit:
        time.sleep(0.01)
    assert not is_running(pids[2])
    with pytest.raises(RuntimeError, match="closed"):
        act(pool, "4")


def is_running(pid: int) -> bool:
    """Whether the process exists and is no corpse (one whose own parent is gone may wait for init to reap it)."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return status.rpartition(")")[2].split()[0] != "Z"
