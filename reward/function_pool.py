"""Reward functions in processes of their own: every answer gets a score of each, whatever a function does to its process."""

from __future__ import annotations

import os
import selectors
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from reward.function_calls import Context, FunctionRequest, without_special_tokens
from reward.function_worker import CallReport, FunctionWorker
from reward.functions import RewardFunctionError, absolute_path
from rl.redaction import MASK, redact
from rl.reward_settings import FunctionSettings
from rl.types import FunctionScore, Rollout

START_DEADLINE_S = 180.0
"""A function's module may import torch and more."""
SHORTEST_SECRET = 4
"""Shorter values of named variables, such as 1, stand in innocent text, too."""
LOOK_AGAIN_S = 1.0
"""A dead process whose own children hold its pipes open says nothing; it is found out by looking."""


class FunctionPool:
    """Runs reward functions side by side, one process each. Close it or use it in ``with``.

    ``deadline_s``: longest time for one call. ``data_source``: verl's, where a row names none. ``chat``, ``system_prompt``:
    whether prompts were made by a chat template, and its system message. ``inspect``: report prints and changed arguments. Not
    thread-safe; the thread that makes it must outlive it. Raises RewardFunctionError: two functions of one name, a variable of
    ``environment`` that is not set.
    """

    def __init__(
        self,
        functions: Sequence[FunctionSettings],
        deadline_s: float,
        *,
        data_source: str = "",
        chat: bool = False,
        system_prompt: str | None = None,
        inspect: bool = False,
        start_deadline_s: float = START_DEADLINE_S,
    ) -> None:
        if deadline_s <= 0:
            raise ValueError(f"deadline_s={deadline_s} must be positive")
        self.deadline_s = deadline_s
        names = function_names(functions)
        tasks = [
            _first_line(f, Context(data_source, chat if f.messages is None else f.messages, system_prompt), inspect=inspect)
            for f in functions
        ]
        values = {value for task in tasks for value in task["environment"].values() if len(value) >= SHORTEST_SECRET}
        self._secrets = sorted(values, key=len, reverse=True)
        self._is_closed = False
        self._scratch = tempfile.TemporaryDirectory(prefix="budget-rl-functions-", ignore_cleanup_errors=True)
        self._workers: list[FunctionWorker] = []
        try:
            for name, task in zip(names, tasks, strict=True):
                scratch = Path(tempfile.mkdtemp(dir=self._scratch.name))
                self._workers.append(
                    FunctionWorker(
                        name, task, scratch, deadline_s=deadline_s, start_deadline_s=start_deadline_s, clean=self._without_secrets
                    )
                )
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> FunctionPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def pids(self) -> list[int]:
        """Process ids of the children that are alive."""
        return [worker.process.pid for worker in self._workers if worker.process.is_alive()]

    @property
    def conventions(self) -> list[str]:
        """``trl``, ``verl`` or ``verl_batch`` for each function; known once they are ready."""
        return [worker.convention for worker in self._workers]

    @property
    def replaced(self) -> int:
        """Processes replaced so far."""
        return sum(worker.replaced for worker in self._workers)

    @property
    def retried(self) -> int:
        """Calls so far that gave no scores and were made again, one answer at a time."""
        return sum(worker.retried for worker in self._workers)

    @property
    def reports(self) -> list[CallReport]:
        """The finished calls of the latest ``score``."""
        return [report for worker in self._workers for report in worker.reports]

    def wait_ready(self) -> None:
        """Return when every function is loaded; raises RewardFunctionError where one cannot be."""
        self.score(())

    def score(self, requests: Sequence[FunctionRequest], *, step: int = 0) -> list[tuple[FunctionScore, ...]]:
        """For each answer the score of every function, in order; ``step`` is what TRL's functions see as ``global_step``.

        A score is ``crashed`` or ``timed_out``, without a number, where the function failed on that answer. Raises
        RewardFunctionError where a function cannot be loaded.
        """
        if self._is_closed:
            raise RuntimeError("the function pool is closed; make a new one")
        for worker in self._workers:
            worker.begin(requests, step)
        try:
            while not all(worker.is_done for worker in self._workers):
                for worker in self._workers:
                    worker.advance()
                self._await_events()
        finally:
            for worker in self._workers:
                worker.abandon()
        return [tuple(worker.scores[index] for worker in self._workers) for index in range(len(requests))]

    def close(self) -> None:
        """Kill and reap every process with what it started, and remove the scratch folders; may be called twice."""
        self._is_closed = True
        while self._workers:
            self._workers.pop().process.kill()
        self._scratch.cleanup()

    def _await_events(self) -> None:
        """Wait until a process says something or the first deadline passes, then take in all there is."""
        deadlines = [worker.deadline for worker in self._workers if worker.deadline is not None]
        timeout_s = min(LOOK_AGAIN_S, max(0.0, min(deadlines, default=0.0) - time.monotonic()))
        busy = [worker for worker in self._workers if worker.deadline is not None]
        with selectors.PollSelector() as selector:
            for worker in busy:
                process = worker.process
                selector.register(process.stdout, selectors.EVENT_READ)
                if process.listen():
                    selector.register(process.stderr, selectors.EVENT_READ)
                if process.wants_write:
                    selector.register(process.stdin, selectors.EVENT_WRITE)
            selector.select(timeout_s)
        for worker in busy:
            worker.process.flush()
            worker.take_in()
            worker.enforce_deadline()

    def _without_secrets(self, text: str) -> str:
        for secret in self._secrets:
            text = text.replace(secret, MASK)
        return redact(text) if text else text  # most evidence is empty, and looking for secrets takes its time


def function_names(functions: Sequence[FunctionSettings]) -> list[str]:
    """The name of each function: as set, else the last part of its path. Raises RewardFunctionError for two of one name."""
    names = [f.called for f in functions]
    for name, count in Counter(names).items():
        if count > 1:
            raise RewardFunctionError(f"{count} of reward.functions are called {name!r}", fix="give each a `name` of its own")
    return names


def function_request(rollout: Rollout, *, special_tokens: Sequence[str] = (), template: str = "{question}") -> FunctionRequest:
    """What reward functions see of a rollout. ``template``: of a plain prompt, with ``{question}``."""
    lease = rollout.lease
    words = lease.budget.sentence if lease.budget.place == "suffix" else ""
    return FunctionRequest(
        prompt=template.replace("{question}", lease.prompt.question + words),
        completion=without_special_tokens(rollout.text, special_tokens),
        golds=(lease.prompt.answer, *lease.prompt.other_answers),
        entry=lease.prompt.entry,
        prompt_ids=lease.prompt.token_ids,
        completion_ids=rollout.response_ids,
    )


def _first_line(settings: FunctionSettings, context: Context, *, inspect: bool) -> dict[str, Any]:
    return {
        "path": absolute_path(settings.path),
        "convention": settings.convention,
        "arguments": settings.arguments,
        "context": asdict(context),
        "environment": _environment(settings),
        "import_path": [place for place in sys.path if Path(place).is_absolute()],
        "inspect": inspect,
    }


def _environment(settings: FunctionSettings) -> dict[str, str]:
    for name in settings.environment:
        if name not in os.environ:
            raise RewardFunctionError(
                f"reward function {settings.path} wants the environment variable {name}, which is not set",
                fix="export it before the run (on a cluster: before `ray start`), or take it out of `environment`",
            )
    return {name: os.environ[name] for name in settings.environment}
