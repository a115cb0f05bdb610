"""One reward function seen from the parent: the calls it has to make, the process that makes them, the blame when one fails.

A call that fails or overruns is made again one answer at a time, so that only the answer at fault is blamed. A process that died
or overran is killed with its process group and replaced. Nothing here waits: the pool does.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from reward.function_calls import FunctionRequest
from reward.functions import RewardFunctionError
from reward.process import GraderProcess, ProtocolError
from rl.types import FunctionScore

MAX_FAILED_STARTS = 3
GIVE_UP_AFTER = 5
"""Calls in a row that time out or kill the process, after which the rest of the answers are not tried."""
COMMAND = (sys.executable, "-P", "-m", "reward.function_child")


@dataclass(frozen=True)
class CallReport:
    """One call of a function, as measured in its process."""

    name: str
    rows: int
    """Answers it served."""
    seconds: float
    failed: str = ""
    """Why it gave no scores."""
    changed: tuple[str, ...] = ()
    """Arguments that it changed in place; looked at where the pool inspects."""
    printed: str = ""
    """Beginning of what it printed; kept where the pool inspects."""
    printed_chars: int = 0


class FunctionWorker:
    """A function in a process of its own.

    ``task``: the first line that reward/function_child.py reads. ``clean``: takes secrets out of what the function says.
    """

    def __init__(
        self,
        name: str,
        task: Mapping[str, Any],
        scratch: Path,
        *,
        deadline_s: float,
        start_deadline_s: float,
        clean: Callable[[str], str],
    ) -> None:
        self.name = name
        self.convention = ""
        """``trl``, ``verl`` or ``verl_batch`` once it is ready."""
        self.is_ready = False
        self.replaced = self.retried = 0
        self.scores: dict[int, FunctionScore] = {}
        """By index of the answer."""
        self.reports: list[CallReport] = []
        self._task, self._scratch, self._clean = task, scratch, clean
        self._deadline_s, self._start_deadline_s = deadline_s, start_deadline_s
        self._requests: Sequence[FunctionRequest] = ()
        self._step = self._call = self._failed_starts = self._lost_in_a_row = 0
        self._batches = self._wants_prompt_ids = False
        self._plan: deque[tuple[int, ...]] = deque()
        """Calls still to be made, as indices of answers."""
        self._current: tuple[int, ...] = ()
        self._tokens: list[float | None] = []
        """Per-token rewards, as far as they have come, of the answer whose score comes next."""
        self.process, self.deadline = self._start()

    @property
    def is_done(self) -> bool:
        return self.is_ready and not self._current and len(self.scores) == len(self._requests)

    def begin(self, requests: Sequence[FunctionRequest], step: int) -> None:
        """Take over these answers; the scores of earlier ones are forgotten."""
        self._requests, self._step, self._lost_in_a_row = requests, step, 0
        self.scores, self.reports = {}, []
        self._plan = deque([tuple(range(len(requests)))] if requests else [])

    def advance(self) -> None:
        """Make the next call if there is one and none is running."""
        if not self.is_ready or self._current or not self._plan:
            return
        if not self.process.is_alive():
            self._replace()  # it died while idle: no answer is to blame
            return
        if not self._batches and len(self._plan[0]) > 1:
            self._split(self._plan.popleft())
        self._current = self._plan.popleft()
        self._call += 1
        self.deadline = time.monotonic() + self._deadline_s
        rows = [self._row(self._requests[index]) for index in self._current]
        self.process.send([{"call": self._call, "step": self._step, "rows": rows}])

    def take_in(self) -> None:
        """Record what the process has said; blame the call for its end or for nonsense."""
        is_alive = self.process.is_alive()  # asked first: what a dead process had said is then all in the pipe
        try:
            for message in self.process.receive():
                self._record(message)
        except ProtocolError as error:
            self._lose("crashed", f"the function's process {error}")
            return
        if self.process.has_ended or not is_alive:
            self._lose("crashed", "the function's process ended")

    def enforce_deadline(self) -> None:
        """Kill a process that has overrun, unless its answer has come meanwhile."""
        if self.deadline is None or time.monotonic() < self.deadline:
            return
        self.take_in()
        if self.deadline is not None and time.monotonic() >= self.deadline:
            limit_s = self._deadline_s if self.is_ready else self._start_deadline_s
            self._lose("timed_out", f"no answer within {limit_s:g} s")

    def abandon(self) -> None:
        """Replace a process that is at work: what it still says must not be taken for the answer to a later call."""
        if self._current:
            self._replace()
        self._plan.clear()

    def _start(self) -> tuple[GraderProcess, float | None]:
        process = GraderProcess(COMMAND, self._scratch)
        process.send([self._task])
        return process, time.monotonic() + self._start_deadline_s

    def _replace(self) -> str:
        how = self.process.kill()
        self.process, self.deadline = self._start()
        self.is_ready, self._current, self._tokens = False, (), []
        self.replaced += 1
        return how

    def _row(self, request: FunctionRequest) -> dict[str, Any]:
        row = dict(vars(request))  # dataclasses.asdict would copy every token id by itself
        if self.convention != "trl":
            row["completion_ids"] = ()
        if not self._wants_prompt_ids:
            row["prompt_ids"] = ()
        return row

    def _split(self, rows: Sequence[int]) -> None:
        self._plan.extendleft((index,) for index in reversed(rows))

    def _record(self, message: Mapping[str, Any]) -> None:
        try:
            if not self.is_ready:
                self._record_start(message)
            elif message["call"] != self._call or not self._current:
                raise ProtocolError("answered a call that was not made")
            elif "tokens" in message:
                self._tokens.extend(message["tokens"])
            elif "outcome" in message:
                self._record_score(self._current[message["row"]], message["outcome"])
            else:
                self._record_end(message)
        except (IndexError, KeyError, TypeError) as error:
            raise ProtocolError(f"sent {str(message)[:80]}, which is no answer") from error

    def _record_start(self, message: Mapping[str, Any]) -> None:
        if "failed" in message:
            raise RewardFunctionError(self._clean(f"reward function {self.name}: {message['failed']}"), fix=message["fix"])
        self.convention, self._batches = message["convention"], message["batches"]
        self._wants_prompt_ids = message["prompt_ids"]
        self.is_ready, self.deadline, self._failed_starts = True, None, 0

    def _record_score(self, index: int, outcome: Mapping[str, Any]) -> None:
        per_token = None if outcome["per_token"] is None else tuple(self._tokens)
        said = {**outcome, "per_token": per_token, "evidence": self._clean(outcome["evidence"])}
        self.scores[index] = FunctionScore(self.name, **said)
        self._tokens = []

    def _record_end(self, message: Mapping[str, Any]) -> None:
        rows, self._current, self.deadline = self._current, (), None
        failed = self._clean(message["failed"] or "")
        changed, printed = tuple(message["changed"]), self._clean(message["printed"])
        self.reports.append(
            CallReport(self.name, len(rows), message["seconds"], failed, changed, printed, message["printed_chars"])
        )
        self._lost_in_a_row = 0
        self._settle(rows, "crashed", failed or "the function's process gave no score")

    def _lose(self, status: Literal["timed_out", "crashed"], why: str) -> None:
        """Replace the process and blame the call it was at, or count a failed start."""
        rows, was_ready = self._current, self.is_ready
        how = self._clean(self._replace())
        evidence = f"{why} ({how})" if status == "crashed" else why
        if not was_ready:
            self._failed_starts += 1
            if self._failed_starts >= MAX_FAILED_STARTS or status == "timed_out":
                raise RewardFunctionError(
                    f"reward function {self.name} could not be started: {why} ({how})",
                    fix="import its module by hand to see what it does; a slow import or one that ends the process is at fault",
                )
            return
        self._lost_in_a_row += 1
        self._settle(rows, status, evidence)
        if self._lost_in_a_row >= GIVE_UP_AFTER:
            self._give_up(status)

    def _settle(self, rows: Sequence[int], status: Literal["timed_out", "crashed"], evidence: str) -> None:
        """Of a call that is over: its only answer is blamed for a missing score, several are tried again one by one."""
        missing = [index for index in rows if index not in self.scores]
        if len(rows) == 1 and missing:
            self.scores[rows[0]] = FunctionScore(self.name, status, evidence=evidence)
        elif missing:
            self.retried += 1
            self._split(missing)

    def _give_up(self, status: Literal["timed_out", "crashed"]) -> None:
        what = "timed out" if status == "timed_out" else "ended its process"
        evidence = f"not tried: each of the {self._lost_in_a_row} calls before {what}"
        for index in (index for rows in self._plan for index in rows):
            self.scores[index] = FunctionScore(self.name, status, evidence=evidence)
        self._plan.clear()
