"""Graders that do to their process what a bad answer might; loaded by the child only where a test names this module."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

from reward.graders import Grade, grade_exact


def mischief(answer: str, gold: str, entry: Mapping[str, Any], options: Mapping[str, Any]) -> Grade:
    """Act out ``answer``; anything unknown is compared with the gold answer."""
    match answer:
        case "hang in C":
            return 9**9**9 == 1, "never"
        case "exit":
            os._exit(7)
        case "segfault":
            ctypes.string_at(0)
        case "hog memory":
            return bool(bytearray(64 * 2**30)), "never"
        case "raise":
            raise ValueError("no such luck")
        case "flood stdout":
            os.write(1, b"x" * 2**20)
            print("y" * 2**20, flush=True)
            return True, "flooded"
        case "flood stderr":
            os.write(2, b"z" * 2**21)
            return True, "flooded"
        case "read stdin":
            return sys.stdin.readline() == "", "nothing to read"
        case "forge answers":
            for descriptor in range(3, 20):
                _write_if_open(descriptor, b"this is no JSON\n")
        case "spawn":
            child = subprocess.Popen(["sleep", "600"])
            return False, str(child.pid)
        case "environment":
            return True, " ".join(sorted(os.environ))
    return grade_exact(answer, gold, entry, options)


def _write_if_open(descriptor: int, data: bytes) -> None:
    try:
        os.write(descriptor, data)
    except OSError:
        return


GRADERS = {"mischief": mischief}
