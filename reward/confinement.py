"""What a grader child gives up before its first task: memory, processor time, the network, and starting other processes.

Linux only. Two layers of the kernel's, each tried on its own: an empty network namespace, and a system-call filter (seccomp) that
refuses new processes and sockets of any kind, also the Unix sockets by which Ray and others could be reached. Where the filter is
refused, Python's audit hook stands in for it.
"""

from __future__ import annotations

import ctypes
import errno
import math
import os
import platform
import resource
import select
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

FILE_BYTES = 16 * 2**20
START_CPU_S = 120
"""Processor time for imports; afterwards it is allowed task by task."""

# <linux/sched.h>, <linux/prctl.h>, <linux/seccomp.h>, <linux/bpf_common.h>
_CLONE_THREAD, _CLONE_NEWUSER, _CLONE_NEWNET = 0x00010000, 0x10000000, 0x40000000
_PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS, _SECCOMP_MODE_FILTER = 22, 38, 2
_ALLOW, _REFUSE = 0x7FFF0000, 0x00050000
_LOAD, _EQUAL, _ANY_BIT, _RETURN = 0x20, 0x15, 0x45, 0x06
_NUMBER_AT, _MACHINE_AT, _FIRST_ARGUMENT_AT = 0, 4, 16  # of struct seccomp_data


@dataclass(frozen=True)
class _SystemCalls:
    """Numbers of one machine's system calls."""

    machine: int
    """AUDIT_ARCH_*."""
    clone: int
    clone3: int
    refused: tuple[int, ...]
    """fork, vfork, execve, execveat, socket, io_uring_setup (which could do the work of the others)."""


_SYSTEM_CALLS = {
    "x86_64": _SystemCalls(0xC000003E, clone=56, clone3=435, refused=(57, 58, 59, 322, 41, 425)),
    "aarch64": _SystemCalls(0xC00000B7, clone=220, clone3=435, refused=(221, 281, 198, 425)),
}


def limit_resources(memory_bytes: int) -> None:
    """Bound address space, file size and the processor time of the start; no core files."""
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_BYTES, FILE_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    allow_processor_time(START_CPU_S)


def allow_processor_time(seconds: float) -> None:
    """Have the kernel end this process (SIGXCPU) once it has used so many seconds more of processor time, parent or no parent."""
    limit = math.ceil(time.process_time() + seconds) + 1
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))


def end_with_parent(pipe: int) -> None:
    """End this process when nobody holds the other end of a pipe any more. One that spins in C is left to its processor time."""

    def watch() -> None:
        poller = select.poll()
        poller.register(pipe, 0)  # a hang-up is reported whether asked for or not
        poller.poll()
        os._exit(0)

    threading.Thread(target=watch, name="end with parent", daemon=True).start()


def confine(pipe: int) -> list[str]:
    """Leave the network, give up starting processes for good, and end with the parent behind a pipe.

    Returns what the kernel refused of it and why, in words; the audit hook and a limit on processes then make up for it.
    """
    refused = []
    try:
        leave_network()  # first: a process with threads cannot enter a user namespace
    except OSError as error:
        refused.append(f"network namespace: {error}")
    try:
        refuse_system_calls()
    except OSError as error:
        refused.append(f"system-call filter: {error}")
        end_with_parent(pipe)
        _refuse_without_kernel("; ".join(refused))
    else:
        end_with_parent(pipe)
    return refused


def leave_network() -> None:
    """Move into an empty network namespace, within a new user namespace where that takes one. Raises OSError when refused."""
    if _libc().unshare(_CLONE_NEWNET) == 0 or ctypes.get_errno() != errno.EPERM:
        _check_errno()
        return
    ctypes.set_errno(0)
    _libc().unshare(_CLONE_NEWUSER | _CLONE_NEWNET)
    _check_errno()


def refuse_system_calls(more: Sequence[int] = ()) -> None:
    """Have fork, exec and socket fail with EPERM in this process from now on; threads can still be made.

    ``more``: further numbers of system calls to refuse. Raises OSError when the kernel takes no filter or the machine is unknown.
    """
    calls = _SYSTEM_CALLS.get(platform.machine())
    if calls is None or sys.byteorder != "little":
        raise OSError(errno.ENOSYS, f"none is known for {platform.machine()}")
    refuse = (_RETURN, 0, 0, _REFUSE | errno.EPERM)
    program = [(_LOAD, 0, 0, _MACHINE_AT), (_EQUAL, 1, 0, calls.machine), refuse, (_LOAD, 0, 0, _NUMBER_AT)]
    for number in (*calls.refused, *more):
        program += [(_EQUAL, 0, 1, number), refuse]
    # Its flags are behind a pointer, which a filter cannot follow; libraries fall back to clone when it does not exist.
    program += [(_EQUAL, 0, 1, calls.clone3), (_RETURN, 0, 0, _REFUSE | errno.ENOSYS)]
    program += [(_EQUAL, 0, 3, calls.clone), (_LOAD, 0, 0, _FIRST_ARGUMENT_AT), (_ANY_BIT, 1, 0, _CLONE_THREAD), refuse]
    program += [(_RETURN, 0, 0, _ALLOW)]
    instructions = (_Instruction * len(program))(*(_Instruction(*step) for step in program))
    for option, argument, pointer in (
        (_PR_SET_NO_NEW_PRIVS, 1, None),
        (_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.byref(_Program(len(program), instructions))),
    ):
        ctypes.set_errno(0)
        _libc().prctl(option, argument, pointer, None, None)
        _check_errno()


class _Instruction(ctypes.Structure):
    _fields_ = (("code", ctypes.c_uint16), ("if_true", ctypes.c_uint8), ("if_false", ctypes.c_uint8), ("k", ctypes.c_uint32))


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_uint16), ("instructions", ctypes.POINTER(_Instruction)))


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _check_errno() -> None:
    number = ctypes.get_errno()
    if number:
        raise OSError(number, os.strerror(number))


_PROCESS_EVENTS = ("os.fork", "os.forkpty", "os.exec", "os.posix_spawn", "os.system", "subprocess.Popen", "pty.spawn")


def _refuse_without_kernel(why: str) -> None:
    def refuse(event: str, _: object) -> None:
        if event in _PROCESS_EVENTS or event.startswith("socket."):
            raise PermissionError(errno.EPERM, f"{event} is refused to graders, by the audit hook alone ({why})")

    sys.addaudithook(refuse)
    # It counts all processes and threads of the user, so 0 refuses every further one; the kernel exempts root.
    resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
