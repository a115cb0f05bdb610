"""What anyone's reward function can do to its process: nothing but leave the answer at fault without a score."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from reward.function_calls import FunctionRequest
from reward.function_pool import FunctionPool
from reward.functions import RewardFunctionError
from rl.reward_settings import FunctionSettings
from rl.types import FunctionScore

HOSTILE = Path(__file__).with_name("hostile_functions.py")
ROOT = HOSTILE.parent.parent.parent
# Short for a hang, ample for any honest call here even on a loaded machine.
DEADLINE_S = 4.0
FAR_S = 120.0


def function(called: str, **settings: Any) -> FunctionSettings:
    return FunctionSettings.model_validate({"path": f"{HOSTILE}:{called}", **settings})


@pytest.fixture(scope="module")
def pool() -> Iterator[FunctionPool]:
    """One function of each convention that acts out what it is asked to judge."""
    with FunctionPool([function("batch"), function("single")], DEADLINE_S) as pool:
        yield pool


def requests(*texts: str, tokens: int = 2) -> list[FunctionRequest]:
    return [FunctionRequest("q", text, ("4",), completion_ids=tuple(range(tokens))) for text in texts]


def by_function(pool: FunctionPool, *texts: str) -> list[list[FunctionScore]]:
    return [list(scores) for scores in zip(*pool.score(requests(*texts)), strict=True)]


def statuses(scores: list[FunctionScore]) -> list[str]:
    return [score.status for score in scores]


def values(scores: list[FunctionScore]) -> list[float | None]:
    return [score.value for score in scores]


def test_a_hang_in_c_times_out_alone_under_both_conventions(pool: FunctionPool) -> None:
    for scores in by_function(pool, "a", "bb", "hang in C", "ccc"):
        assert statuses(scores) == ["ok", "ok", "timed_out", "ok"]
        assert values(scores) == [1.0, 2.0, None, 3.0]
        assert scores[2].evidence == "no answer within 4 s"


@pytest.mark.parametrize(
    ("text", "evidence"),
    [
        ("exit", "exit code 7"),
        ("segfault", "SIGSEGV"),
        ("exit, leaving a child with the pipes", "exit code 7"),
        ("close descriptors", "ended"),
    ],
)
def test_a_call_that_ends_its_process_is_crashed_with_evidence_and_its_neighbours_are_scored(
    pool: FunctionPool, text: str, evidence: str
) -> None:
    for scores in by_function(pool, "a", text, "bb"):
        assert statuses(scores) == ["ok", "crashed", "ok"]
        assert values(scores) == [1.0, None, 2.0]
        assert evidence in scores[1].evidence
    assert len(pool.pids) == 2


@pytest.mark.parametrize(
    ("text", "evidence"),
    [
        ("raise", "ValueError: no such luck (hostile_functions.py, line "),
        ("sys.exit", "SystemExit: enough"),
        ("cancel", "CancelledError"),
        ("return a long text", "returned a text of 50000000 characters where a number is due"),
    ],
)
def test_a_call_that_raises_or_returns_nonsense_is_crashed_without_losing_the_process(
    pool: FunctionPool, text: str, evidence: str
) -> None:
    before = pool.replaced
    for scores in by_function(pool, "a", text, "bb"):
        assert statuses(scores) == ["ok", "crashed", "ok"]
        assert scores[1].evidence.startswith(evidence)
    assert pool.replaced == before


def test_a_failed_batch_is_made_again_once_for_each_answer_and_counted(pool: FunctionPool) -> None:
    before = pool.retried
    by_function(pool, "a", "raise", "bb")
    assert pool.retried == before + 1, "only the batch; verl's convention calls for one answer at a time anyway"
    assert [(r.rows, r.failed.partition(":")[0]) for r in pool.reports if r.name == "batch"] == [
        (3, "ValueError"),
        (1, ""),
        (1, "ValueError"),
        (1, ""),
    ]


@pytest.mark.parametrize("text", ["flood", "read stdin"])
def test_what_a_function_reads_or_prints_does_not_disturb_the_protocol(pool: FunctionPool, text: str) -> None:
    before = pool.replaced
    expected = 5.0 if text == "flood" else 1.0
    for scores in by_function(pool, "a", text):
        assert values(scores) == [1.0, expected]
    assert pool.replaced == before


def test_a_function_that_changes_its_inputs_changes_them_for_no_other_and_for_no_later_call() -> None:
    settings = [function("mutate", name="first"), function("mutate", name="second")]
    with FunctionPool(settings, DEADLINE_S) as pool:
        asked = requests("a", "bb")
        for _ in range(2):
            assert [[s.value for s in scores] for scores in pool.score(asked)] == [[3.0, 3.0], [4.0, 4.0]]


@pytest.mark.parametrize("name", ["long_list", "endless"])
def test_a_result_that_is_far_too_long_is_crashed_and_named(name: str) -> None:
    with FunctionPool([function(name)], FAR_S) as pool:
        ((score,),) = pool.score(requests("a"))
    assert (score.status, score.evidence.partition(";")[0]) == ("crashed", "returned more items for 1 completions")


def test_rewards_of_many_tokens_arrive_exactly() -> None:
    asked = requests("a", "b", tokens=30_000)
    with FunctionPool([function("per_token")], FAR_S) as pool:
        for (score,) in pool.score(asked):
            assert score.per_token == tuple(i / 3 for i in range(30_000))


def test_an_answer_larger_than_a_pipe_reaches_the_function_whole(pool: FunctionPool) -> None:
    for scores in by_function(pool, "x" * 3_000_000, "\0" * 7, "\ud800", "\u2028\n\r"):
        assert values(scores) == [3_000_000.0, 7.0, 1.0, 3.0]


def test_after_five_hangs_in_a_row_the_rest_is_not_tried() -> None:
    with FunctionPool([function("single")], 1.0) as pool:
        scores = [scores[0] for scores in pool.score(requests("a", *["hang in C"] * 7, "b"))]
        assert statuses(scores) == ["ok", *["timed_out"] * 8]
        assert [score.evidence for score in scores[1:6]] == ["no answer within 1 s"] * 5
        assert [score.evidence for score in scores[6:]] == ["not tried: each of the 5 calls before timed out"] * 3
        assert [scores[0].value for scores in pool.score(requests("bb"))] == [2.0], "the next batch is tried afresh"


def test_functions_run_side_by_side(tmp_path: Path) -> None:
    one, other = str(tmp_path / "one"), str(tmp_path / "other")
    settings = [
        function("meet", name="first", arguments={"mine": one, "theirs": other}),
        function("meet", name="second", arguments={"mine": other, "theirs": one}),
    ]
    with FunctionPool(settings, FAR_S) as pool:
        assert statuses(list(pool.score(requests("a"))[0])) == ["ok", "ok"]


def test_async_calls_share_one_event_loop_over_the_whole_run() -> None:
    with FunctionPool([function("same_loop")], DEADLINE_S) as pool:
        assert [pool.score(requests("a"))[0][0].value for _ in range(3)] == [1.0, 1.0, 1.0]


def test_calls_that_end_well_replace_no_process() -> None:
    with FunctionPool([function("batch"), function("per_token")], FAR_S) as pool:
        for _ in range(50):
            pool.score(requests(*"abc", tokens=2000))
        assert (pool.replaced, pool.retried) == (0, 0)


def test_a_process_killed_while_idle_is_replaced_and_no_answer_is_blamed() -> None:
    with FunctionPool([function("batch")], DEADLINE_S) as pool:
        pool.wait_ready()
        (pid,) = pool.pids
        os.kill(pid, signal.SIGKILL)
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        assert [scores[0].value for scores in pool.score(requests("bb"))] == [2.0]
        assert pool.replaced == 1


# ---- what a function may see ------------------------------------------------------------------------------------------


@pytest.fixture
def _judge_login(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_LOGIN", "opensesame")
    monkeypatch.setenv("OTHER_LOGIN", "hidden")


@pytest.mark.usefixtures("_judge_login")
def test_a_function_sees_the_variables_it_names_and_no_others() -> None:
    settings = [function("seen"), function("seen", name="named", environment=["JUDGE_LOGIN"])]
    with FunctionPool(settings, DEADLINE_S) as pool:
        found = pool.score(requests("JUDGE_LOGIN", "OTHER_LOGIN", "PATH"))
    assert [[score.value for score in scores] for scores in found] == [[0.0, 1.0], [0.0, 0.0], [1.0, 1.0]]


@pytest.mark.usefixtures("_judge_login")
@pytest.mark.parametrize(
    ("text", "evidence"),
    [
        ("raise the login", "ValueError: the login [redacted] is not valid"),
        ("die of the login", "fatal: login [redacted] refused"),
    ],
)
def test_the_value_of_a_variable_is_in_no_evidence(text: str, evidence: str) -> None:
    with FunctionPool([function("batch", environment=["JUDGE_LOGIN"])], DEADLINE_S) as pool:
        ((score,),) = pool.score(requests(text))
    assert evidence in score.evidence and "opensesame" not in score.evidence


def test_a_variable_that_is_not_set_is_an_error_that_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JUDGE_LOGIN", raising=False)
    with pytest.raises(RewardFunctionError, match="JUDGE_LOGIN, which is not set"):
        FunctionPool([function("seen", environment=["JUDGE_LOGIN"])], DEADLINE_S)


# ---- starting and ending -----------------------------------------------------------------------------------------------


def test_a_function_that_cannot_be_loaded_is_an_error_with_its_last_lines(tmp_path: Path) -> None:
    file = tmp_path / "broken.py"
    file.write_text("import no_such_library\n", encoding="utf-8")
    with (
        FunctionPool([FunctionSettings(path=f"{file}:judge")], DEADLINE_S) as pool,
        pytest.raises(RewardFunctionError, match=r"(?s)reward function judge: .*No module named 'no_such_library'"),
    ):
        pool.wait_ready()


@pytest.mark.parametrize(("text", "why"), [("import os; os._exit(3)", "exit code 3"), ("while True: pass", "within 1 s")])
def test_an_import_that_ends_or_never_ends_is_an_error(tmp_path: Path, text: str, why: str) -> None:
    file = tmp_path / "dying.py"
    file.write_text(text, encoding="utf-8")
    settings = FunctionSettings(path=f"{file}:judge")
    # Where it ends by itself the short deadline would only be in the way.
    start_s = 1.0 if "within" in why else FAR_S
    with (
        FunctionPool([settings], DEADLINE_S, start_deadline_s=start_s) as pool,
        pytest.raises(RewardFunctionError, match=f"judge could not be started.*{why}"),
    ):
        pool.wait_ready()


def test_a_package_of_the_author_may_be_called_like_one_of_ours(tmp_path: Path) -> None:
    (tmp_path / "reward.py").write_text("BONUS = 7.0\n", encoding="utf-8")
    file = tmp_path / "judge.py"
    file.write_text("from reward import BONUS\ndef f(completions): return [BONUS for _ in completions]\n", encoding="utf-8")
    with FunctionPool([FunctionSettings(path=f"{file}:f")], DEADLINE_S) as pool:
        assert pool.score(requests("a"))[0][0].value == 7.0


def test_the_deadline_ends_what_the_function_has_started_too(tmp_path: Path) -> None:
    file = tmp_path / "pid"
    with FunctionPool([function("spawn", arguments={"file": str(file)})], 2.0) as pool:
        ((score,),) = pool.score(requests("a"))
    assert score.status == "timed_out"
    assert_ends(int(file.read_text()))


def test_closing_leaves_no_process_and_a_closed_pool_says_so() -> None:
    pool = FunctionPool([function("batch"), function("single")], DEADLINE_S)
    pool.wait_ready()
    pids = pool.pids
    pool.close()
    pool.close()
    assert len(pids) == 2 and not any(is_running(pid) for pid in pids)
    with pytest.raises(RuntimeError, match="closed"):
        pool.score(requests("a"))


PARENT = """
import sys
from reward.function_calls import FunctionRequest
from reward.function_pool import FunctionPool
from rl.reward_settings import FunctionSettings
pool = FunctionPool([FunctionSettings(path=sys.argv[1])], 600.0)
pool.wait_ready()
print(*pool.pids, flush=True)
pool.score([FunctionRequest("q", "hang in C", ("4",))])
"""


def test_a_hung_function_ends_with_a_parent_that_was_killed(tmp_path: Path) -> None:
    command = [sys.executable, "-c", PARENT, f"{HOSTILE}:single"]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}  # a killed parent cannot remove its scratch folder
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        parent.kill()
    assert_ends(pid)


def assert_ends(pid: int) -> None:
    """The signal has been sent; only init can wait for a process whose parent is gone."""
    limit = time.monotonic() + 30
    while is_running(pid) and time.monotonic() < limit:
        time.sleep(0.01)
    assert not is_running(pid)


def is_running(pid: int) -> bool:
    """Whether the process exists and is no corpse."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return status.rpartition(")")[2].split()[0] != "Z"
