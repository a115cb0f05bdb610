"""The only way to wait for Ray: with a deadline, a name, and an ear for Ctrl-C."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Sequence
from itertools import dropwhile
from types import FrameType
from typing import Any

from rl.errors import BudgetRLError

SLICE_S = 0.5
"""Longest time between two looks at the stop flag."""
LATE = "raise the deadline in the configuration, or look in the log for what the worker was doing"
"""What to do about most waits that ran out."""


class DeadlineExceeded(BudgetRLError):
    """A wait ran out; says who was waited for and how long."""


class WorkerLost(BudgetRLError):
    """A Ray actor or task died; carries the first cause rather than Ray's wrapper."""


class WorkerFailed(BudgetRLError):
    """A worker is alive but its task raised something that is no BudgetRLError; carries that first cause, not Ray's wrapper."""


class StopRequested(BudgetRLError):
    """Ctrl-C or SIGTERM arrived while waiting."""


class StopFlag:
    """Set by SIGINT and SIGTERM; the loop looks at it between waits, so the learner is never cut in the middle of an update."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self._previous: dict[int, Any] = {}
        self.reason = ""

    def __enter__(self) -> StopFlag:
        self.arm()
        return self

    def arm(self) -> None:
        """Take both signals; again after ``ray.init``, which puts handlers of its own in their place."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                previous = signal.signal(number, self._on_signal)
                self._previous.setdefault(number, previous)

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        if self._event.is_set():
            raise KeyboardInterrupt  # the second Ctrl-C means now
        self.reason = signal.Signals(number).name
        self._event.set()

    @property
    def is_set(self) -> bool:
        return self._event.is_set()


def wait_for(refs: Sequence[Any], *, seconds: float, what: str, stop: StopFlag | None = None, fix: str = LATE) -> list[Any]:
    """Results of all ``refs`` in order; ``fix`` is the advice when they do not come in time.

    Raises DeadlineExceeded after ``seconds``, WorkerLost when a worker died, WorkerFailed when its task raised, StopRequested
    when ``stop`` was set meanwhile; a BudgetRLError that a worker raised arrives as it was raised there.
    """
    import ray

    end = time.monotonic() + seconds
    waiting = list(refs)
    while waiting:
        if stop is not None and stop.is_set:
            raise StopRequested(f"{stop.reason} while waiting for {what}")
        left = end - time.monotonic()
        if left <= 0:
            raise DeadlineExceeded(
                f"{what}: {len(waiting)} of {len(refs)} answers missing after {seconds:.0f} s",
                fix=fix,
            )
        done, waiting = ray.wait(waiting, num_returns=len(waiting), timeout=min(SLICE_S, left))
        for ref in done:
            _raise_first_cause(ref, what)
    return [ray.get(ref) for ref in refs]


def first_ready(refs: Sequence[Any], *, seconds: float, what: str, stop: StopFlag | None = None) -> Any | None:
    """The first of ``refs`` that is done (its value is not looked at); None when none is within ``seconds``.

    Looks at least once. Raises StopRequested when ``stop`` was set meanwhile.
    """
    import ray

    end = time.monotonic() + seconds
    while True:
        if stop is not None and stop.is_set:
            raise StopRequested(f"{stop.reason} while waiting for {what}")
        left = max(0.0, end - time.monotonic())
        done, _ = ray.wait(list(refs), num_returns=1, timeout=min(SLICE_S, left))
        if done:
            return done[0]
        if not left:
            return None


def _raise_first_cause(ref: Any, what: str) -> None:
    import ray.exceptions

    try:
        ray.get(ref)
    except ray.exceptions.RayTaskError as error:
        # What ray raises looks like the cause but prints the remote traceback; `cause` is the exception as it was raised.
        if isinstance(error.cause, BudgetRLError):
            raise error.cause from error
        raise WorkerFailed(f"{what}: {_last_message(error)}") from error
    except ray.exceptions.RayError as error:  # a dead actor, a dead task process, an object lost with its node
        raise WorkerLost(f"{what}: the worker process died: {_last_message(error)}") from error


def _last_message(error: Exception) -> str:
    """The message that ends a traceback, on one line; without a traceback the last line of all."""
    lines = [line for line in str(error).strip().splitlines() if line.strip()] or [type(error).__name__]
    frames = [number for number, line in enumerate(lines) if line.lstrip().startswith('File "')]
    after = lines[frames[-1] + 1 :] if frames else lines[-1:]
    message = list(dropwhile(lambda line: line[0].isspace(), after)) or lines[-1:]
    return " ".join(line.strip() for line in message)
