"""Graders that do to their process what a bad answer might; loaded by the child only where a test names this module."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from reward import text_graders
from reward.grading import Grade


def mischief(answer: str, golds: Sequence[str], entry: Mapping[str, Any], options: Mapping[str, Any]) -> Grade:
    """Act out ``answer``; anything unknown is compared with the gold answers."""
    match answer.split(" at ")[0]:
        case "hang in C":
            Path("busy").touch()
            return 9**9**9 == 1, "never"
        case "sleep":
            Path("busy").touch()
            signal.pause()
        case "exit":
            os._exit(7)
        case "segfault":
            ctypes.string_at(0)
        case "hog memory":
            return bool(bytearray(64 * 2**30)), "never"
        case "hog memory bit by bit":
            hoard = []
            while True:
                hoard.append(bytes(2**24 + len(hoard)))  # blank pages: the limit is on addresses, and filling them takes time
        case "raise":
            raise ValueError("no such luck")
        case "flood stdout":
            os.write(1, b"x" * 2**20)
            print("y" * 2**20, flush=True)
            return True, "flooded"
        case "flood stderr":
            os.write(2, b"z" * 2**21)
            return True, "flooded"
        case "flood both for ever":
            while True:
                os.write(1, b"x" * 2**16)
                os.write(2, b"z" * 2**16)
        case "read stdin":
            return sys.stdin.readline() == "", "nothing to read"
        case "forge answers":
            for descriptor in range(3, 20):
                _write_if_open(descriptor, b"this is no JSON\n")
        case "poison":
            text_graders.normalise = lambda text: ""  # from now on any text is the same as any other
            return True, "poisoned"
        case "spawn":
            child = subprocess.Popen(["sleep", "600"])
            return False, str(child.pid)
        case "fork bomb":
            _bomb(daemons=False)
        case "fork bomb of daemons":
            _bomb(daemons=True)
        case "leave daemons":
            _bomb(daemons=True, waits=False)
            return True, "left"
        case "connect":
            socket.create_connection(("127.0.0.1", int(answer.split(" at ")[1])), timeout=1)
            return True, "connected"
        case "connect to a path":
            socket.socket(socket.AF_UNIX).connect(answer.split(" at ")[1])
            return True, "connected"
        case "environment":
            return True, " ".join(sorted(os.environ))
    return text_graders.grade_exact(answer, golds, entry, options)


def _bomb(*, daemons: bool, waits: bool = True) -> None:
    """Start three processes that never end; daemons leave the session and have no parent."""
    for _ in range(3):
        if os.fork():
            continue
        if daemons:
            os.setsid()
            if os.fork():
                os._exit(0)
        while True:
            signal.pause()
    while waits:
        signal.pause()


def _write_if_open(descriptor: int, data: bytes) -> None:
    try:
        os.write(descriptor, data)
    except OSError:
        return


GRADERS = {"mischief": mischief}
