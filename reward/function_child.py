"""The child process of one reward function: ``python -m reward.function_child``; JSON lines in and out.

In:  first ``{"path", "convention", "arguments", "context", "environment", "import_path", "inspect"}``, then per call
     ``{"call", "step", "rows"}``, the rows as in FunctionRequest.
Out: first ``{"ready": true, "convention", "batches", "prompt_ids"}`` or ``{"failed", "fix"}``. Per call, for each row any number
     of ``{"call", "row", "tokens"}``, the next part of its per-token rewards, then ``{"call", "row", "outcome"}``; last
     ``{"call", "seconds", "failed", "changed", "printed", "printed_chars"}``.
It may hang, die or be killed at any time; reward/function_pool.py copes. Lines stay short whatever a function returns.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import ctypes
import io
import json
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any, TextIO

from reward.function_calls import (
    Context,
    FunctionRequest,
    Log,
    Outcome,
    arguments_of,
    evidence_of,
    invoke,
    outcomes_of,
)
from reward.functions import RewardFunction, RewardFunctionError, fit_function, load_function

TOKENS_PER_LINE = 1000
PRINTED_KEPT_CHARS = 2000
_OWN_PACKAGES = ("reward", "rl")
_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


class Printed(io.TextIOBase):
    """Takes in what is printed: the beginning is kept, the rest only counted."""

    def __init__(self) -> None:
        self.kept = ""
        self.chars = 0

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        self.kept += text[: PRINTED_KEPT_CHARS - len(self.kept)]
        self.chars += len(text)
        return len(text)


def private_channel() -> tuple[TextIO, TextIO]:
    """Move the protocol off descriptors 0 and 1: the function reads nothing, and what it prints goes where errors go."""
    source = os.fdopen(os.dup(0), "r", encoding="utf-8")
    sink = os.fdopen(os.dup(1), "w", encoding="utf-8")
    nowhere = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nowhere, 0)
    os.dup2(2, 1)
    os.close(nowhere)
    return source, sink


def die_with_parent() -> None:
    """Have the kernel end this process when its parent ends without having done so; a function may hang and never look."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def make_room(import_path: Sequence[str]) -> None:
    """Import as the parent would, but with names such as ``reward`` free for packages of the function's author."""
    sys.path.extend(place for place in import_path if place not in sys.path)
    for name in [n for n in sys.modules if n.partition(".")[0] in _OWN_PACKAGES]:
        del sys.modules[name]


class FunctionServer:
    """Answers calls of one function."""

    def __init__(self, function: RewardFunction, context: Context, sink: TextIO, *, inspect: bool) -> None:
        self._function = function
        self._context = context
        self._sink = sink
        self._inspect = inspect

    def serve(self, source: TextIO) -> None:
        """Answer until the parent closes the pipe."""
        with asyncio.Runner() as runner:
            for line in source:
                message = json.loads(line)
                rows = [_request(row) for row in message["rows"]]
                self._answer(message["call"], rows, message["step"], runner)

    def _answer(self, call: int, rows: Sequence[FunctionRequest], step: int, runner: asyncio.Runner) -> None:
        end: dict[str, Any] = {"call": call, "failed": None, "changed": [], "printed": "", "printed_chars": 0}
        outcomes: list[Outcome] = []
        log, printed, started = Log(), Printed(), time.monotonic()
        with _captured(printed) if self._inspect else contextlib.nullcontext():
            try:
                calls = arguments_of(self._function, rows, self._context, step=step, log=log)
                before = [copy.deepcopy(_data(kwargs)) for kwargs in calls] if self._inspect else []
                started = time.monotonic()
                results = invoke(self._function, calls, runner)
                end["seconds"] = time.monotonic() - started
                outcomes = outcomes_of(self._function, results, rows, log=log)
                end["changed"] = _changed(before, [_data(kwargs) for kwargs in calls]) if self._inspect else []
            except (Exception, SystemExit, asyncio.CancelledError) as error:  # the boundary: reported, never scored
                end["failed"] = evidence_of(error)
        end.setdefault("seconds", time.monotonic() - started)
        end.update(printed=printed.kept, printed_chars=printed.chars)
        for row, outcome in enumerate(outcomes):
            self._send_outcome(call, row, outcome)
        send(self._sink, end)

    def _send_outcome(self, call: int, row: int, outcome: Outcome) -> None:
        tokens = outcome.per_token or ()
        for first in range(0, len(tokens), TOKENS_PER_LINE):
            send(self._sink, {"call": call, "row": row, "tokens": tokens[first : first + TOKENS_PER_LINE]})
        # An answer of no tokens keeps its empty tuple; else the values have been sent.
        short = replace(outcome, per_token=None if outcome.per_token is None else ())
        send(self._sink, {"call": call, "row": row, "outcome": asdict(short)})


def _request(row: dict[str, Any]) -> FunctionRequest:
    lists = {name: tuple(row[name]) for name in ("golds", "prompt_ids", "completion_ids")}
    return FunctionRequest(**{**row, **lists})


def _data(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in kwargs.items() if not callable(value)}


def _changed(before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]]) -> list[str]:
    return sorted({name for was, now in zip(before, after, strict=True) for name in was if was[name] != now[name]})


@contextlib.contextmanager
def _captured(printed: Printed) -> Any:
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        yield


def described(function: RewardFunction) -> dict[str, Any]:
    """What the parent needs to know to call it."""
    wants = function.convention == "trl" and "prompt_ids" in function.names
    return {"convention": function.convention, "batches": function.takes_batches, "prompt_ids": wants}


def send(sink: TextIO, message: Mapping[str, Any]) -> None:
    """Write one line."""
    sink.write(json.dumps(message) + "\n")
    sink.flush()


def main() -> None:
    die_with_parent()
    source, sink = private_channel()
    task = json.loads(source.readline())
    os.environ.update(task["environment"])
    make_room(task["import_path"])
    try:
        function = fit_function(load_function(task["path"]), convention=task["convention"], arguments=task["arguments"])
    except RewardFunctionError as error:
        send(sink, {"failed": error.cause, "fix": error.fix})
        return
    send(sink, {"ready": True, **described(function)})
    FunctionServer(function, Context(**task["context"]), sink, inspect=task["inspect"]).serve(source)


if __name__ == "__main__":
    main()
