"""A pool of grader processes: every task gets a verdict, whatever its grader does to the process it runs in.

Tasks go to a child in small chunks and come back one by one; the deadline restarts with each answer. When a child dies or
overruns, only the task it was working on is blamed, the rest of its chunk is sent again, and the child is replaced.
"""

from __future__ import annotations

import selectors
import tempfile
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from reward.process import GraderProcess, ProtocolError, child_command
from rl.types import Verdict, VerdictStatus

START_DEADLINE_S = 60.0
MAX_FAILED_STARTS = 3
CHUNK = 32
MEMORY_BYTES = 4 * 2**30
_ANSWERED = {"correct": VerdictStatus.CORRECT, "wrong": VerdictStatus.WRONG, "crashed": VerdictStatus.CRASHED}


class GraderStartError(RuntimeError):
    """Grader children die or hang before they can take a task: the installation is at fault, not an answer."""


@dataclass(frozen=True)
class GradeTask:
    """One extracted answer to judge."""

    grader: str
    """Name in a ``GRADERS`` table."""
    answer: str
    gold: str
    entry: str = "{}"
    """JSON object: the data row or reasoning-gym entry."""
    options: str = "{}"
    """JSON object of what the grader needs beside it."""


@dataclass
class _Worker:
    """One place in the pool and the process that fills it now."""

    process: GraderProcess
    deadline: float | None
    """Monotonic time by which it must say something; None while idle."""
    is_ready: bool = False
    outstanding: deque[int] = field(default_factory=deque)
    """Indices sent and not answered, the one in progress first."""
    served: int = 0


@dataclass
class _Job:
    tasks: Sequence[GradeTask]
    waiting: deque[int]
    verdicts: dict[int, Verdict]


class GraderPool:
    """``processes`` grader children; ``grade`` returns verdicts in the order of its tasks. Close it or use it in ``with``.

    ``deadline_s``: longest time for one answer. ``modules``: whose ``GRADERS`` tables may be called. ``preload``: graders whose
    libraries are imported at the start. ``recycle_after``: tasks after which a child is replaced. Not thread-safe.
    """

    def __init__(
        self,
        processes: int,
        deadline_s: float,
        *,
        modules: Sequence[str] = ("reward.graders",),
        preload: Sequence[str] = (),
        recycle_after: int = 20_000,
        memory_bytes: int = MEMORY_BYTES,
        start_deadline_s: float = START_DEADLINE_S,
    ) -> None:
        if processes < 1 or deadline_s <= 0 or recycle_after < 1:
            raise ValueError(f"processes={processes}, deadline_s={deadline_s}, recycle_after={recycle_after} must be positive")
        self.deadline_s = deadline_s
        self.replaced = 0
        """Children replaced so far, for whatever reason."""
        self._start_deadline_s = start_deadline_s
        self._recycle_after = recycle_after
        self._failed_starts = 0
        self._command = child_command(modules, preload=preload, memory_bytes=memory_bytes, deadline_s=deadline_s)
        self._scratch = tempfile.TemporaryDirectory(prefix="budget-rl-graders-")
        self._workers: list[_Worker] = []
        try:
            for _ in range(processes):
                self._workers.append(self._start())
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> GraderPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def pids(self) -> list[int]:
        """Process ids of the children that are alive."""
        return [worker.process.pid for worker in self._workers if worker.process.is_alive()]

    def wait_ready(self) -> None:
        """Return when every child can take tasks; raises GraderStartError when they cannot be started."""
        self._run(_Job((), deque(), {}))

    def grade(self, tasks: Sequence[GradeTask]) -> list[Verdict]:
        """One verdict per task, in order; TIMED_OUT and CRASHED where a grader failed. Raises GraderStartError."""
        if not self._workers:
            raise RuntimeError("the grader pool is closed; make a new one")
        job = _Job(tasks, deque(range(len(tasks))), {})
        if tasks:
            self._run(job)
        return [job.verdicts[index] for index in range(len(tasks))]

    def close(self) -> None:
        """Kill and reap every child and remove the scratch folder; may be called twice."""
        while self._workers:
            self._workers.pop().process.kill()
        self._scratch.cleanup()

    def _run(self, job: _Job) -> None:
        try:
            self._assign(job)
            while len(job.verdicts) < len(job.tasks) or (not job.tasks and not all(w.is_ready for w in self._workers)):
                self._await_events(job)
                self._enforce_deadlines(job)
                self._assign(job)
        finally:
            # After an error or Ctrl-C answers may still be on their way; the next call must not take them for its own.
            for worker in self._workers:
                if worker.outstanding:
                    self._replace(worker)

    def _start(self) -> _Worker:
        process = GraderProcess(self._command, Path(self._scratch.name))
        return _Worker(process, deadline=time.monotonic() + self._start_deadline_s)

    def _replace(self, worker: _Worker) -> str:
        """Kill the worker's process and start another in its place; returns how the old one ended."""
        how = worker.process.kill()
        fresh = self._start()
        worker.process, worker.deadline = fresh.process, fresh.deadline
        worker.is_ready, worker.served = False, 0
        worker.outstanding.clear()
        self.replaced += 1
        return how

    def _assign(self, job: _Job) -> None:
        for worker in self._workers:
            if not job.waiting:
                return
            if not worker.is_ready or worker.outstanding:
                continue
            if not worker.process.is_alive():
                self._replace(worker)  # it died while idle: no task is to blame
                continue
            share = len(job.waiting) // len(self._workers) + 1
            count = min(CHUNK, share, len(job.waiting), self._recycle_after - worker.served)
            chunk = [job.waiting.popleft() for _ in range(count)]
            worker.outstanding.extend(chunk)
            worker.deadline = time.monotonic() + self.deadline_s
            worker.process.send([{"id": index, **asdict(job.tasks[index])} for index in chunk])

    def _await_events(self, job: _Job) -> None:
        """Wait until a child says something or the first deadline passes, then take in all there is."""
        deadlines = [worker.deadline for worker in self._workers if worker.deadline is not None]
        timeout_s = max(0.0, min(deadlines) - time.monotonic())
        with selectors.PollSelector() as selector:
            for worker in self._workers:
                process = worker.process
                selector.register(process.stdout, selectors.EVENT_READ, worker)
                if process.listen():
                    selector.register(process.stderr, selectors.EVENT_READ, worker)
                if process.wants_write:
                    selector.register(process.stdin, selectors.EVENT_WRITE, worker)
            ready = {id(key.data): key.data for key, _ in selector.select(timeout_s)}
        for worker in ready.values():
            worker.process.flush()
            self._take_in(worker, job)

    def _take_in(self, worker: _Worker, job: _Job) -> None:
        try:
            for message in worker.process.receive():
                self._record(worker, message, job)
        except ProtocolError as error:
            self._blame(worker, job, VerdictStatus.CRASHED, f"grader {error}")
            return
        if worker.process.has_ended:
            self._blame(worker, job, VerdictStatus.CRASHED, "grader process ended")
        elif worker.served >= self._recycle_after and not worker.outstanding:
            self._replace(worker)

    def _record(self, worker: _Worker, message: dict[str, Any], job: _Job) -> None:
        if not worker.is_ready:
            if message != {"ready": True}:
                raise ProtocolError(f"sent {message} before it was ready")
            worker.is_ready, worker.deadline, self._failed_starts = True, None, 0
            return
        status = _ANSWERED.get(message.get("status", ""))
        if status is None or not worker.outstanding or message.get("id") != worker.outstanding[0]:
            raise ProtocolError(f"sent {message}, which answers nothing it was asked")
        index = worker.outstanding.popleft()
        job.verdicts[index] = Verdict(status, job.tasks[index].answer, str(message.get("evidence")))
        worker.served += 1
        worker.deadline = time.monotonic() + self.deadline_s if worker.outstanding else None

    def _enforce_deadlines(self, job: _Job) -> None:
        for worker in self._workers:
            if worker.deadline is None or time.monotonic() < worker.deadline:
                continue
            self._take_in(worker, job)  # an answer may have come while another child was being served
            if worker.deadline is not None and time.monotonic() >= worker.deadline:
                limit_s = self.deadline_s if worker.is_ready else self._start_deadline_s
                self._blame(worker, job, VerdictStatus.TIMED_OUT, f"grader gave no answer within {limit_s:g} s")

    def _blame(self, worker: _Worker, job: _Job, status: VerdictStatus, why: str) -> None:
        """Give the task in progress its verdict, put the rest of the chunk back in front, replace the child."""
        outstanding, was_ready = list(worker.outstanding), worker.is_ready
        how = self._replace(worker)
        evidence = f"{why} ({how})" if status is VerdictStatus.CRASHED else why
        if outstanding:
            job.verdicts[outstanding[0]] = Verdict(status, job.tasks[outstanding[0]].answer, evidence)
            job.waiting.extendleft(reversed(outstanding[1:]))
        elif not was_ready:
            self._failed_starts += 1
            if self._failed_starts >= MAX_FAILED_STARTS:
                raise GraderStartError(
                    f"{self._failed_starts} grader processes in a row could not start; the last: {why} ({how})"
                )
