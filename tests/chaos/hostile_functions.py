"""Reward functions that do to their process what a careless author might; loaded only where a test names this file."""

from __future__ import annotations

import asyncio
import ctypes
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

loop_of_first_call: list[asyncio.AbstractEventLoop] = []


def batch(completions: list[str], **kwargs: Any) -> list[Any]:
    """TRL's convention: act out each completion; what is no act is rewarded with its length."""
    return [act(text) for text in completions]


def single(solution_str: str, **kwargs: Any) -> Any:
    """verl's convention, the same."""
    return act(solution_str)


def act(text: str) -> Any:
    match text:
        case "hang in C":
            return 9**9**9
        case "exit":
            os._exit(7)
        case "sys.exit":
            sys.exit("enough")
        case "segfault":
            ctypes.string_at(0)
        case "raise":
            raise ValueError("no such luck")
        case "raise the login":
            raise ValueError(f"the login {os.environ['JUDGE_LOGIN']} is not valid")
        case "die of the login":
            sys.stderr.write(f"fatal: login {os.environ['JUDGE_LOGIN']} refused\n")
            os._exit(3)
        case "cancel":
            raise asyncio.CancelledError
        case "close descriptors":
            os.closerange(3, 50)
        case "exit, leaving a child with the pipes":
            if os.fork() == 0:
                time.sleep(600)
            os._exit(7)
        case "flood":
            os.write(1, b"x" * 2**20)
            os.write(2, b"y" * 2**20)
            print("z" * 2**20, flush=True)
            print("z" * 2**20, file=sys.stderr, flush=True)
        case "read stdin":
            return 1.0 if sys.stdin.readline() == "" else 0.0
        case "return a long text":
            return "x" * 50_000_000
    return float(len(text))


def mutate(completions: list[str], completion_ids: list[list[int]], answer: list[str], **kwargs: Any) -> list[float]:
    """Empty every list it was given."""
    values = [float(len(text) + len(ids)) for text, ids in zip(completions, completion_ids, strict=True)]
    for ids in completion_ids:
        ids.clear()
    completions.clear()
    answer.clear()
    return values


def long_list(completions: list[str], **kwargs: Any) -> list[float]:
    return [1.0] * 10_000_000


def endless(completions: list[str], **kwargs: Any) -> Any:
    while True:
        yield 1.0


def per_token(completion_ids: list[list[int]], **kwargs: Any) -> list[list[float]]:
    return [[id_ / 3 for id_ in ids] for ids in completion_ids]


async def same_loop(completions: list[str], **kwargs: Any) -> list[float]:
    """1 where a client kept from the first call could still be used, that is, on the same event loop."""
    loop_of_first_call.append(asyncio.get_running_loop())
    return [float(loop_of_first_call[0] is asyncio.get_running_loop())] * len(completions)


def meet(completions: list[str], mine: str, theirs: str, **kwargs: Any) -> list[float]:
    """Wait for another function to be called at the same time."""
    Path(mine).touch()
    while not Path(theirs).exists():
        time.sleep(0.01)
    return [1.0] * len(completions)


def seen(completions: list[str], **kwargs: Any) -> list[float]:
    """1 for each completion that names a variable of the environment."""
    return [float(text in os.environ) for text in completions]


def spawn(completions: list[str], file: str, **kwargs: Any) -> list[float]:
    """Start a process that would live on, write down its number, and hang."""
    child = subprocess.Popen(["sleep", "600"])
    Path(file).write_text(str(child.pid), encoding="utf-8")
    time.sleep(600)
    return [0.0]
