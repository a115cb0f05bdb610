"""A pool of grader processes: every task gets a verdict, whatever its grader does to the process it runs in.

Tasks go to a child in chunks and come back one by one; the deadline restarts with each answer. When a child dies or overruns,
only the task it was working on is blamed and the child is replaced. Before a grader's first task in a child and after at
most ``UNCONFIRMED`` tasks come canaries, whose verdicts are known: verdicts count once the canaries behind them were judged as
they must be. When one is not, some task has spoilt the child; those since its last good canary are graded again apart, then half
by half, until the spoiler is alone.
"""

from __future__ import annotations

import itertools
import selectors
import tempfile
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from reward.canaries import CANARIES, Canaries, canaries_of
from reward.grading import GradeTask
from reward.process import GraderProcess, ProtocolError, child_command
from rl.types import Verdict, VerdictStatus

START_DEADLINE_S = 60.0
MAX_FAILED_STARTS = 3
SMALLEST_CHUNK = 4
UNCONFIRMED = 64
"""Most verdicts of a child without canaries behind them."""
LOOK_AGAIN_S = 0.25
"""How often children are looked at that say nothing: the end of one does not close its pipe if another process holds it."""
MEMORY_BYTES = 4 * 2**30
_ANSWERED = {
    status.value: status
    for status in (VerdictStatus.CORRECT, VerdictStatus.WRONG, VerdictStatus.MALFORMED, VerdictStatus.CRASHED)
}


class GraderStartError(RuntimeError):
    """Grader children die, hang or fail their canaries before they can take a task: the installation is at fault, no answer."""


@dataclass(frozen=True)
class _Line:
    """One task or canary sent to a child."""

    id: int
    task: GradeTask
    index: int | None = None
    """Of the task in its job; None for a canary."""
    expected: VerdictStatus | None = None
    """What the canary must be found to be."""
    opens: bool = False
    """A canary in front of the tasks: when it fails, no task is to blame."""


@dataclass
class _Worker:
    """One place in the pool and the process that fills it now."""

    process: GraderProcess
    deadline: float | None
    """Monotonic time by which it must say something; None while idle."""
    has_started: bool = False
    is_ready: bool = False
    """It has started and passed its first canaries."""
    outstanding: deque[_Line] = field(default_factory=deque)
    """Sent and not answered, the one in progress first."""
    unconfirmed: dict[int, Verdict] = field(default_factory=dict)
    """Verdicts since its last good canary, by index."""
    touched: set[str] = field(default_factory=set)
    """Graders it has used since then."""
    are_suspects: bool = False
    """One of these tasks is thought to have spoilt another child."""
    proven: set[str] = field(default_factory=set)
    """Graders whose canaries this process has passed."""
    served: int = 0


@dataclass
class _Job:
    tasks: Sequence[GradeTask]
    waiting: deque[int]
    suspects: deque[Sequence[int]] = field(default_factory=deque)
    """Tasks that are graded apart from all others, because one of them has spoilt a child."""
    verdicts: dict[int, Verdict] = field(default_factory=dict)


class GraderPool:
    """``processes`` grader children; ``grade`` returns verdicts in the order of its tasks. Close it or use it in ``with``.

    ``deadline_s``: longest time for one answer. ``modules``: whose ``GRADERS`` tables may be called. ``preload``: graders whose
    libraries are imported, and whose canaries are graded, at the start. ``recycle_after``: tasks after which a child is replaced.
    ``canaries``: as ``reward.canaries.CANARIES``. ``confined``: whether children lose the network and the right to start
    processes. Not thread-safe.
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
        canaries: Mapping[str, Canaries] = CANARIES,
        confined: bool = True,
    ) -> None:
        if processes < 1 or deadline_s <= 0 or recycle_after < 1:
            raise ValueError(f"processes={processes}, deadline_s={deadline_s}, recycle_after={recycle_after} must be positive")
        self.deadline_s = deadline_s
        self.replaced = 0
        """Children replaced so far, for whatever reason."""
        self.refused: tuple[str, ...] = ()
        """What the kernel refused of the children's confinement, and why; empty where it is complete."""
        self._start_deadline_s = start_deadline_s
        self._recycle_after = recycle_after
        self._preload = tuple(preload)
        self._canaries = canaries
        self._turns = itertools.count(1)
        self._ids = itertools.count()
        self._failed_starts = 0
        self._command = child_command(
            modules, preload=preload, memory_bytes=memory_bytes, deadline_s=deadline_s, confined=confined
        )
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
        self._run(_Job((), deque()))

    def grade(self, tasks: Sequence[GradeTask]) -> list[Verdict]:
        """One verdict per task, in order; TIMED_OUT and CRASHED where a grader failed. Raises GraderStartError."""
        if not self._workers:
            raise RuntimeError("the grader pool is closed; make a new one")
        job = _Job(tasks, deque(range(len(tasks))))
        if tasks:
            self._run(job)
        return [job.verdicts[index] for index in range(len(tasks))]

    def close(self) -> None:
        """Kill and reap every child with all it started and remove the scratch folder; may be called twice."""
        while self._workers:
            self._workers.pop().process.kill()
        self._scratch.cleanup()

    # ---- children ----------------------------------------------------------------------------------------------------

    def _start(self) -> _Worker:
        process = GraderProcess(self._command, Path(self._scratch.name))
        return _Worker(process, deadline=time.monotonic() + self._start_deadline_s)

    def _replace(self, worker: _Worker) -> str:
        """Kill the worker's process and start another in its place; returns how the old one ended."""
        how = worker.process.kill()
        vars(worker).update(vars(self._start()))
        self.replaced += 1
        return how

    # ---- the loop ----------------------------------------------------------------------------------------------------

    def _run(self, job: _Job) -> None:
        try:
            self._assign(job)
            while len(job.verdicts) < len(job.tasks) or (not job.tasks and not all(w.is_ready for w in self._workers)):
                self._await_events()
                for worker in self._workers:
                    self._take_in(worker, job)
                    self._enforce_deadline(worker, job)
                self._assign(job)
        finally:
            # After an error or Ctrl-C answers may still be on their way; the next call must not take them for its own.
            for worker in self._workers:
                if worker.is_ready and (worker.outstanding or worker.unconfirmed):
                    self._replace(worker)

    def _assign(self, job: _Job) -> None:
        for worker in self._workers:
            if not worker.is_ready or worker.outstanding:
                continue
            room = self._recycle_after - worker.served
            is_done = not job.waiting or job.suspects or worker.are_suspects or room < 1
            if not worker.process.is_alive():
                self._blame(worker, job, VerdictStatus.CRASHED, "grader process ended")
            elif worker.unconfirmed and (is_done or len(worker.unconfirmed) >= UNCONFIRMED):
                self._send(worker, self._canary_lines(sorted(worker.touched), opens=False))
            elif job.suspects:
                worker.are_suspects = True
                self._ask(worker, job, job.suspects.popleft())
            elif job.waiting:
                # Smaller towards the end, so that the children finish together.
                share = max(SMALLEST_CHUNK, len(job.waiting) // (2 * len(self._workers)))
                count = min(share, UNCONFIRMED - len(worker.unconfirmed), len(job.waiting), room)
                self._ask(worker, job, [job.waiting.popleft() for _ in range(count)])

    def _ask(self, worker: _Worker, job: _Job, indices: Sequence[int]) -> None:
        """Send tasks, and in front of them the canaries of graders that this process has not proven yet."""
        graders = {job.tasks[index].grader for index in indices}
        worker.touched |= graders
        opening = self._canary_lines(sorted(graders - worker.proven), opens=True)
        self._send(worker, [*opening, *(_Line(next(self._ids), job.tasks[index], index) for index in indices)])

    def _canary_lines(self, graders: Sequence[str], *, opens: bool) -> list[_Line]:
        chosen = canaries_of(graders, next(self._turns), self._canaries)
        return [_Line(next(self._ids), task, expected=expected, opens=opens) for task, expected in chosen]

    def _send(self, worker: _Worker, lines: Sequence[_Line]) -> None:
        worker.outstanding.extend(lines)
        worker.deadline = self._next_deadline(worker)
        worker.process.send([{"id": line.id, **vars(line.task)} for line in lines])

    def _next_deadline(self, worker: _Worker) -> float | None:
        if not worker.outstanding:
            return None
        # The first task of a grader that was not preloaded waits for its library.
        return time.monotonic() + (self._start_deadline_s if worker.outstanding[0].opens else self.deadline_s)

    def _await_events(self) -> None:
        """Wait until a child says something, the first deadline passes or it is time to look again."""
        deadlines = [worker.deadline for worker in self._workers if worker.deadline is not None]
        timeout_s = min(LOOK_AGAIN_S, max(0.0, min(deadlines, default=0.0) - time.monotonic()))
        with selectors.PollSelector() as selector:
            for worker in self._workers:
                process = worker.process
                selector.register(process.stdout, selectors.EVENT_READ)
                if process.listen():
                    selector.register(process.stderr, selectors.EVENT_READ)
                if process.wants_write:
                    selector.register(process.stdin, selectors.EVENT_WRITE)
            selector.select(timeout_s)

    def _take_in(self, worker: _Worker, job: _Job) -> None:
        is_alive = worker.process.is_alive()  # asked first: what a dead process had said is then all in the pipe
        worker.process.flush()
        try:
            for message in worker.process.receive():
                self._record(worker, message, job)
        except ProtocolError as error:
            self._suspect(worker, job, f"it {error}")
            return
        if worker.process.has_ended or not is_alive:
            self._blame(worker, job, VerdictStatus.CRASHED, "grader process ended")
        elif worker.served >= self._recycle_after and not worker.outstanding and not worker.unconfirmed:
            self._replace(worker)

    def _record(self, worker: _Worker, message: dict[str, Any], job: _Job) -> None:
        line = worker.outstanding[0] if worker.outstanding else None
        if not worker.has_started:
            if message.get("ready") is not True:
                raise ProtocolError(f"sent {message} before it was ready")
            worker.has_started = True
            self.refused = tuple(message.get("refused", ()))
            self._send(worker, self._canary_lines(self._preload, opens=True))
        else:
            status = _ANSWERED.get(message.get("status", ""))
            if line is None or status is None or message.get("id") != line.id:
                raise ProtocolError(f"sent {message}, which answers nothing it was asked")
            verdict = Verdict(status, line.task.answer, str(message.get("evidence")))
            if line.index is not None:
                worker.unconfirmed[line.index] = verdict
                worker.served += 1
            elif status is not line.expected:
                raise ProtocolError(f"found the {line.task.grader} canary {status.value}: {verdict.evidence}")
            else:
                worker.proven.add(line.task.grader)
            worker.outstanding.popleft()
            worker.deadline = self._next_deadline(worker)
        if worker.outstanding:
            return
        worker.is_ready = True
        if line is not None and line.index is None:
            self._failed_starts = 0
            job.verdicts.update(worker.unconfirmed)
            worker.unconfirmed.clear()
            worker.touched.clear()
            worker.are_suspects = False

    def _enforce_deadline(self, worker: _Worker, job: _Job) -> None:
        if worker.deadline is not None and time.monotonic() >= worker.deadline:
            limit_s = self.deadline_s if worker.has_started and not worker.outstanding[0].opens else self._start_deadline_s
            self._blame(worker, job, VerdictStatus.TIMED_OUT, f"grader gave no answer within {limit_s:g} s")

    # ---- failures ----------------------------------------------------------------------------------------------------

    def _blame(self, worker: _Worker, job: _Job, status: VerdictStatus, why: str) -> None:
        """Give the task in progress its verdict, have the rest of the chunk graded again, and replace the child."""
        line = worker.outstanding[0] if worker.outstanding else None
        if line is None or line.index is None:
            self._suspect(worker, job, why)
            return
        behind = [other.index for other in worker.outstanding if other.index is not None][1:]
        again = [*worker.unconfirmed, *behind]
        are_suspects = worker.are_suspects
        how = self._replace(worker)
        evidence = f"{why} ({how})" if status is VerdictStatus.CRASHED else why
        job.verdicts[line.index] = Verdict(status, line.task.answer, evidence)
        if not are_suspects:
            job.waiting.extendleft(reversed(again))
        elif again:
            job.suspects.appendleft(again)

    def _suspect(self, worker: _Worker, job: _Job, why: str) -> None:
        """Something in the chunk has spoilt the child: narrow it down, unless the child never worked or had nothing to do."""
        line = worker.outstanding[0] if worker.outstanding else None
        never_worked = not worker.has_started or (line is not None and line.opens and not worker.unconfirmed)
        tasks = [*worker.unconfirmed, *(asked.index for asked in worker.outstanding if asked.index is not None)]
        begun = len(worker.unconfirmed) + (line is not None and line.index is not None)
        are_suspects = worker.are_suspects
        how = self._replace(worker)
        if never_worked:
            job.waiting.extendleft(reversed(tasks))
            self._count_failed_start(f"{why} ({how})")
            return
        suspects, untouched = tasks[:begun], tasks[begun:]
        job.waiting.extendleft(reversed(untouched))
        if not are_suspects:
            halves = [suspects]  # once more as they are: it may have been the child
        elif len(suspects) == 1:
            (index,) = suspects
            evidence = f"spoilt its grader process, twice: {why}"
            job.verdicts[index] = Verdict(VerdictStatus.CRASHED, job.tasks[index].answer, evidence)
            return
        else:
            middle = len(suspects) // 2
            halves = [suspects[:middle], suspects[middle:]]
        job.suspects.extend(half for half in halves if half)

    def _count_failed_start(self, why: str) -> None:
        self._failed_starts += 1
        if self._failed_starts >= MAX_FAILED_STARTS:
            raise GraderStartError(f"{self._failed_starts} grader processes in a row could not start; the last: {why}")
