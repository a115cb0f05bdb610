"""What a grader child cannot do: reach the network, start processes, outlive its parent."""

from __future__ import annotations

import platform
import socket
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from reward.pool import GraderPool, GradeTask
from rl.types import VerdictStatus
from tests.chaos.watching import ends, family, is_running

HOSTILE = ("reward.graders", "tests.chaos.hostile_graders")
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module", params=[True, False], ids=["confined", "unconfined"])
def pool(request: pytest.FixtureRequest) -> Iterator[GraderPool]:
    with GraderPool(1, 10, modules=HOSTILE, confined=request.param) as pool:
        yield pool


def act(pool: GraderPool, answer: str) -> tuple[VerdictStatus, str]:
    (verdict,) = pool.grade([GradeTask("mischief", answer, ("4",))])
    return verdict.status, verdict.evidence


def is_confined(pool: GraderPool) -> bool:
    return "--unconfined" not in pool._command


def test_only_an_unconfined_grader_reaches_a_server_on_this_machine(pool: GraderPool) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        status, evidence = act(pool, f"connect at {server.getsockname()[1]}")
    assert status is (VerdictStatus.CRASHED if is_confined(pool) else VerdictStatus.CORRECT), evidence
    assert not is_confined(pool) or "PermissionError" in evidence


def test_only_an_unconfined_grader_reaches_a_unix_socket(pool: GraderPool, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "s"))
        server.listen()
        status, evidence = act(pool, f"connect to a path at {tmp_path / 's'}")
    assert status is (VerdictStatus.CRASHED if is_confined(pool) else VerdictStatus.CORRECT), evidence


def test_a_confined_grader_has_a_network_of_its_own_unless_the_kernel_says_why_not(pool: GraderPool) -> None:
    pool.wait_ready()
    is_apart = Path(f"/proc/{pool.pids[0]}/ns/net").readlink() != Path("/proc/self/ns/net").readlink()
    was_refused = any("network namespace" in reason for reason in pool.refused)
    assert is_apart is (is_confined(pool) and not was_refused)


@pytest.mark.parametrize("answer", ["spawn", "leave daemons", "fork bomb"])
def test_a_confined_grader_starts_no_process_and_goes_on_working(answer: str) -> None:
    with GraderPool(1, 10, modules=HOSTILE) as pool:
        status, evidence = act(pool, answer)
        assert status is VerdictStatus.CRASHED and "PermissionError" in evidence
        assert family(pool) == set(pool.pids) and pool.replaced == 0
        assert act(pool, "4")[0] is VerdictStatus.CORRECT


def run_python(code: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    return done.stdout.splitlines()


def test_where_the_kernel_refuses_confinement_the_audit_hook_refuses_and_says_why() -> None:
    unshare, prctl = {"x86_64": (272, 157), "aarch64": (97, 167)}[platform.machine()]
    refused, *errors = run_python(
        f"""
        import os, socket, subprocess
        from reward import confinement
        confinement.refuse_system_calls(more=[{unshare}, {prctl}])  # a kernel that grants nothing further
        pipe, _ = os.pipe()
        print("; ".join(confinement.confine(pipe)))
        for attempt in (socket.socket, lambda: socket.getaddrinfo("localhost", 1), os.fork, lambda: subprocess.run(["true"])):
            try:
                attempt()
            except PermissionError as error:
                print(error)
        """
    )
    assert refused.count("Operation not permitted") == 2
    assert "network namespace" in refused and "system-call filter" in refused
    assert len(errors) == 4
    for error, event in zip(errors, ("socket.__new__", "socket.getaddrinfo", "os.fork", "subprocess.Popen"), strict=True):
        assert event in error and refused in error


@pytest.mark.parametrize("answer", ["sleep", "hang in C"])
def test_a_child_whose_parent_was_killed_in_the_middle_of_a_task_ends_by_itself(answer: str) -> None:
    code = f"""
    import time
    from reward.pool import GraderPool, GradeTask
    pool = GraderPool(1, 1.0, modules={HOSTILE})
    pool.wait_ready()
    pool._workers[0].process.send([{{"id": 0, **vars(GradeTask("mischief", {answer!r}, ("4",)))}}])
    print(pool.pids[0], pool._scratch.name, flush=True)
    time.sleep(600)
    """
    with subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid, scratch = parent.stdout.readline().split()
        assert ends(lambda: not (Path(scratch) / "busy").exists())
        parent.kill()
        parent.wait()
        assert ends(lambda: is_running(int(pid)))
