"""What the kernel knows of the processes that a grader pool has started."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

from reward.pool import GraderPool

ENDS_WITHIN_S = 60


def family(pool: GraderPool) -> set[int]:
    """Every living process with the pool's scratch folder in its environment, children of children and daemons too."""
    scratch = pool._scratch.name.encode()
    return {pid for pid in _processes() if scratch in _read(pid, "environ")}


def zombies() -> list[int]:
    """Dead children of this process that nobody has reaped."""
    return [pid for pid in _processes() if _state(pid) == ("Z", os.getpid())]


def is_running(pid: int) -> bool:
    """Whether the process exists and is no corpse (one whose own parent is gone may wait for init to reap it)."""
    return _state(pid)[0] not in ("", "Z")


def ends(condition: Callable[[], object]) -> bool:
    """Wait until the condition is false; whether it came to that in time."""
    limit = time.monotonic() + ENDS_WITHIN_S
    while condition() and time.monotonic() < limit:
        time.sleep(0.01)
    return not condition()


def _processes() -> list[int]:
    return [int(folder.name) for folder in Path("/proc").iterdir() if folder.name.isdigit()]


def _read(pid: int, name: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes()
    except OSError:
        return b""


def _state(pid: int) -> tuple[str, int]:
    words = _read(pid, "stat").decode(errors="replace").rpartition(")")[2].split()
    return (words[0], int(words[1])) if words else ("", 0)
