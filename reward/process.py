"""One grader child process seen from the parent: start, send, receive, kill. Nothing here blocks without a bound."""

from __future__ import annotations

import collections
import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import reward

MAX_LINE_BYTES = 64 * 1024
STDERR_KEPT_BYTES = 4096
NATURAL_END_S = 0.2
"""How long a child whose output has ended may take to finish dying before it is killed."""
REAP_DEADLINE_S = 10.0
STRAYS_DEADLINE_S = 1.0
"""How long processes that left the child's group are hunted; none can arise where the child is confined."""
MARK = "BUDGET_RL_GRADER"
"""Environment variable with a value of its own for every child, by which its descendants are known."""


class ProtocolError(RuntimeError):
    """The child sent something that is no answer."""


def child_command(
    modules: Sequence[str], *, preload: Sequence[str], memory_bytes: int, deadline_s: float, confined: bool = True
) -> list[str]:
    """The command line of ``reward.child``; ``-P`` keeps its scratch folder off the import path."""
    command = [sys.executable, "-P", "-m", "reward.child", "--memory-bytes", str(memory_bytes), "--deadline-s", str(deadline_s)]
    freedom = [] if confined else ["--unconfined"]
    return [*command, *freedom, "--modules", *modules, "--preload", *preload]


def clean_environment(scratch: Path) -> dict[str, str]:
    """The few variables a grader needs; tokens, proxies and cluster addresses of the parent stay behind."""
    return {
        "PATH": os.environ.get("PATH", os.defpath),
        "PYTHONPATH": str(Path(reward.__path__[0]).resolve().parent),
        "LANG": "C.UTF-8",
        "HOME": str(scratch),
        "TMPDIR": str(scratch),
        # One thread: the address-space limit would otherwise go to thread stacks, and there is one child per core anyway.
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore",
    }


class GraderProcess:
    """A child in its own session and with a mark in its environment, by which ``kill`` also ends whatever it started."""

    def __init__(self, command: Sequence[str], scratch: Path) -> None:
        self._mark = f"{MARK}={secrets.token_hex(16)}"
        name, _, value = self._mark.partition("=")
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=scratch,
            env=clean_environment(scratch) | {name: value},
            start_new_session=True,
            bufsize=0,
        )
        assert self._process.stdin and self._process.stdout and self._process.stderr
        self.stdin: IO[bytes] = self._process.stdin
        self.stdout: IO[bytes] = self._process.stdout
        self.stderr: IO[bytes] = self._process.stderr
        for stream in (self.stdin, self.stdout, self.stderr):
            os.set_blocking(stream.fileno(), False)
        self._outgoing = bytearray()
        self._incoming = bytearray()
        self._last_words: collections.deque[int] = collections.deque(maxlen=STDERR_KEPT_BYTES)
        self.has_ended = False
        """Its output is closed: it is dead or as good as."""

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def wants_write(self) -> bool:
        return bool(self._outgoing) and not self.has_ended

    def is_alive(self) -> bool:
        """Whether the process runs; one that has exited is left unreaped until ``kill``."""
        if self._process.returncode is not None:
            return False
        # WNOWAIT leaves the corpse in place: the group id cannot be reused before killpg has used it.
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is None

    def send(self, messages: Sequence[Mapping[str, Any]]) -> None:
        """Queue JSON lines and write what fits into the pipe."""
        for message in messages:
            self._outgoing += json.dumps(message).encode() + b"\n"
        self.flush()

    def flush(self) -> None:
        """Write as much of the queue as the pipe takes."""
        try:
            while self._outgoing:
                written = os.write(self.stdin.fileno(), self._outgoing[:65536])
                del self._outgoing[:written]
        except BlockingIOError:
            return
        except BrokenPipeError:
            self._outgoing.clear()  # it is dying; the end of its output says so in a moment

    def receive(self) -> Iterator[dict[str, Any]]:
        """Yield the complete messages that have arrived; raises ProtocolError at the first thing that is none."""
        data, ended = _drain(self.stdout)
        self.has_ended = self.has_ended or ended
        self._incoming += data
        *lines, rest = self._incoming.split(b"\n")
        self._incoming = rest
        for line in lines:
            yield _parsed(line)
        if len(rest) > MAX_LINE_BYTES:
            raise ProtocolError(f"sent more than {MAX_LINE_BYTES} bytes without an end of line")

    def listen(self) -> bool:
        """Read standard error, keeping its end; False once it is closed."""
        data, ended = _drain(self.stderr)
        self._last_words.extend(data[-STDERR_KEPT_BYTES:])
        return not ended

    def kill(self) -> str:
        """End the child and all it started, reap it, close the pipes, and say in a few words how the child had ended."""
        if self._process.returncode is not None:
            return f"exit code {self._process.returncode}"
        if self.has_ended:
            self._await_natural_end()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        code = self._process.wait(timeout=REAP_DEADLINE_S)
        end_marked_processes(self._mark)
        self.listen()
        for stream in (self.stdin, self.stdout, self.stderr):
            stream.close()
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        words = bytes(self._last_words).decode("utf-8", "replace").strip().rsplit("\n", 1)[-1][-200:]
        return f"{how}; last words: {words}" if words else how

    def _await_natural_end(self) -> None:
        limit = time.monotonic() + NATURAL_END_S
        while self.is_alive() and time.monotonic() < limit:
            time.sleep(0.001)


def end_marked_processes(mark: str) -> None:
    """Kill every process that was started with ``mark`` (``NAME=value``) in its environment; by whom and when does not matter.

    A process that clears its environment before it starts another program is not found; in a confined child none can start.
    """
    limit = time.monotonic() + STRAYS_DEADLINE_S
    while strays := _marked_processes(mark.encode()):  # again, for those that were started meanwhile
        for pid in strays:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        if time.monotonic() > limit:
            return


def _marked_processes(mark: bytes) -> list[int]:
    found = []
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        # A process may end while it is looked at, and those of other users are none of ours.
        with contextlib.suppress(OSError):
            if mark in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
    return found


def _drain(stream: IO[bytes]) -> tuple[bytes, bool]:
    """What can be read now, at most 1 MiB, and whether the stream has ended."""
    data = bytearray()
    while len(data) < 2**20:
        try:
            piece = os.read(stream.fileno(), 65536)
        except BlockingIOError:
            return bytes(data), False
        if not piece:
            return bytes(data), True
        data += piece
    return bytes(data), False


def _parsed(line: bytes | bytearray) -> dict[str, Any]:
    try:
        message = json.loads(line)
    except ValueError as error:
        raise ProtocolError(f"sent {bytes(line[:80])!r}, which is no JSON") from error
    if not isinstance(message, dict):
        raise ProtocolError(f"sent {bytes(line[:80])!r}, which is no object")
    return message
