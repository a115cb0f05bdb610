"""The grader child process: ``python -m reward.child``; one JSON object per line in, one per line out.

In:  ``{"id", "grader", "answer", "golds", "entry", "options"}``, the last two JSON texts.
Out: first ``{"ready": true, "refused": [...]}``, the second being what the kernel refused of its confinement, then per task
     ``{"id", "status": "correct" | "wrong" | "malformed" | "crashed", "evidence"}``.
It may hang, die or be killed at any time; reward/pool.py copes. It imports neither torch nor rl.types, to start fast.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
from collections.abc import Mapping
from typing import Any, TextIO

from reward.confinement import allow_processor_time, confine, end_with_parent, limit_resources
from reward.graders import preload
from reward.grading import Grader, MalformedAnswer

CPU_GRACE_S = 2
"""Processor time beyond the deadline after which the kernel ends a child whose parent has not."""
MAX_EVIDENCE_CHARS = 300


def private_channel() -> tuple[TextIO, TextIO]:
    """Move the protocol off descriptors 0 and 1, so that whatever a grader reads or prints cannot disturb it."""
    source = os.fdopen(os.dup(0), "r", encoding="utf-8")
    sink = os.fdopen(os.dup(1), "w", encoding="utf-8")
    nowhere = os.open(os.devnull, os.O_RDWR)
    os.dup2(nowhere, 0)
    os.dup2(nowhere, 1)
    os.close(nowhere)
    return source, sink


def load_graders(modules: list[str]) -> dict[str, Grader]:
    """The allow-list: the union of the ``GRADERS`` tables of the given modules."""
    graders: dict[str, Grader] = {}
    for name in modules:
        graders.update(importlib.import_module(name).GRADERS)
    return graders


def judge(task: Mapping[str, Any], graders: Mapping[str, Grader]) -> dict[str, Any]:
    """Grade one task; an exception of the grader becomes status ``crashed``. MemoryError passes: the process is spoilt."""
    try:
        grader = graders[task["grader"]]
        right, evidence = grader(task["answer"], task["golds"], json.loads(task["entry"]), json.loads(task["options"]))
    except MemoryError:
        raise
    except MalformedAnswer as error:
        return _reply(task, "malformed", str(error))
    except Exception as error:  # the boundary: any failure of a grader is reported, never scored
        return _reply(task, "crashed", f"{type(error).__name__}: {error}")
    return _reply(task, "correct" if right else "wrong", evidence)


def _reply(task: Mapping[str, Any], status: str, evidence: str) -> dict[str, Any]:
    return {"id": task["id"], "status": status, "evidence": evidence[:MAX_EVIDENCE_CHARS]}


def serve(source: TextIO, sink: TextIO, graders: Mapping[str, Grader], *, deadline_s: float) -> None:
    """Answer tasks until the parent closes the pipe."""
    for line in source:
        allow_processor_time(deadline_s + CPU_GRACE_S)
        _send(sink, judge(json.loads(line), graders))


def _send(sink: TextIO, message: Mapping[str, Any]) -> None:
    sink.write(json.dumps(message) + "\n")
    sink.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description="grader child process; started by reward/pool.py")
    parser.add_argument("--modules", nargs="+", required=True, help="modules whose GRADERS table may be called")
    parser.add_argument("--preload", nargs="*", default=[], help="graders whose libraries are imported before the first task")
    parser.add_argument("--memory-bytes", type=int, required=True)
    parser.add_argument("--deadline-s", type=float, required=True)
    parser.add_argument("--unconfined", action="store_true", help="keep the network and the right to start processes")
    arguments = parser.parse_args()
    source, sink = private_channel()
    limit_resources(arguments.memory_bytes)
    graders = load_graders(arguments.modules)
    for grader in arguments.preload:
        preload(grader)
    if arguments.unconfined:
        end_with_parent(source.fileno())
        refused = []
    else:
        refused = confine(source.fileno())
    _send(sink, {"ready": True, "refused": refused})
    serve(source, sink, graders, deadline_s=arguments.deadline_s)


if __name__ == "__main__":
    main()
