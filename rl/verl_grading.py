"""Grading for callers that come one answer at a time: a queue in front of the pool of killable grader processes."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor

from reward.grading import GradeTask
from reward.pool import GraderPool
from rl.types import Verdict


class GradingQueue:
    """Answers that arrive while others are graded go to the pool together: a canary closes every portion, not every answer.

    The pool starts with the first answer. To be used from one event loop at a time. Close it.
    """

    def __init__(self, grader: str, processes: int, deadline_s: float) -> None:
        self._make = lambda: GraderPool(processes, deadline_s, preload=[grader])
        self._pool: GraderPool | None = None
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="grading")
        self._waiting: list[tuple[GradeTask, asyncio.Future[Verdict]]] = []
        self._work: asyncio.Task[None] | None = None

    async def grade(self, task: GradeTask) -> Verdict:
        """The verdict on an answer, TIMED_OUT and CRASHED included. Raises GraderStartError where graders cannot be started."""
        loop = asyncio.get_running_loop()
        verdict: asyncio.Future[Verdict] = loop.create_future()
        self._waiting.append((task, verdict))
        if self._work is None or self._work.done():
            self._work = loop.create_task(self._drain())
        return await verdict

    def close(self) -> None:
        """End the grader processes."""
        self._thread.shutdown(wait=True)
        if self._pool is not None:
            self._pool.close()
            self._pool = None

    async def _drain(self) -> None:
        loop = asyncio.get_running_loop()
        while self._waiting:
            portion, self._waiting = self._waiting, []
            try:
                found = await loop.run_in_executor(self._thread, self._grade, [task for task, _ in portion])
            except Exception as error:  # whoever waits for a verdict is told, whatever it was
                for _, verdict in portion:
                    if not verdict.done():
                        verdict.set_exception(error)
                continue
            for (_, verdict), said in zip(portion, found, strict=True):
                if not verdict.done():
                    verdict.set_result(said)

    def _grade(self, tasks: list[GradeTask]) -> list[Verdict]:
        if self._pool is None:
            self._pool = self._make()
        return self._pool.grade(tasks)
