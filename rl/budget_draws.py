"""The budgets of one prompt's turn in a step, where they are drawn or remembered; no state, and no random state of anybody's."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from rl.budget_settings import HUNDRED, ROUNDING, BudgetEffort, BudgetMemory, BudgetRange, hundredths
from rl.memory import CorrectLengths

BITS = 64
"""Of one draw."""


@dataclass(frozen=True)
class Turn:
    """One prompt in one step: all that a drawn budget may depend on, so that a retry or a resume draws the same again."""

    run_seed: int
    step: int
    """Finished steps, 0 at the first."""
    position: int
    """Place of the prompt in the step: a prompt may come twice in one."""
    prompt_id: str

    def bits(self, member: int | None = None, *, what: Literal["budget", "exit"] = "budget") -> int:
        """64 random bits for a member, or for the whole group: the first bytes of SHA-256 over what identifies it.

        They are none of the bits of the member's sampling seed, so that a budget says nothing about the answer.
        """
        who = "group" if member is None else str(member)
        name = f"{what}|{self.run_seed}|{self.step}|{self.position}:{self.prompt_id}|{who}"
        return int.from_bytes(hashlib.sha256(name.encode()).digest()[: BITS // 8], "big")


def between(low: int, high: int, bits: int, *, scale: Literal["uniform", "log_uniform"]) -> int:
    """A whole number in [low, high] from 64 random bits.

    With u = bits / 2^64, uniform: ``low + floor(u (high - low + 1))``; log-uniform: ``floor(low ((high + 1) / low)^u)``, so that
    n has probability ``ln((n + 1) / n) / ln((high + 1) / low)`` and every octave about the same.
    """
    if not 0 < low <= high:
        raise ValueError(f"between needs 0 < low <= high, got low={low} and high={high}")
    if scale == "uniform":
        return low + (bits * (high - low + 1) >> BITS)
    drawn = math.floor(low * ((high + 1) / low) ** (bits / 2**BITS))
    return min(max(drawn, low), high)


def drawn_effort(source: BudgetEffort, bits: int) -> float:
    """An effort from 64 random bits: a log-uniform number of hundredths in [low, high]; see :func:`between`."""
    return between(hundredths(source.low), hundredths(source.high), bits, scale="log_uniform") / HUNDRED


def dealt_level(levels: Sequence[float], turn: Turn) -> float:
    """The level of a prompt's group, ``levels[(step + place in the step) mod their number]``: each as often as any other."""
    return levels[(turn.step + turn.position) % len(levels)]


def distinct(low: int, high: int, bits: Sequence[int]) -> tuple[int, ...]:
    """Different whole numbers in [low, high], increasing: one per 64 random bits, or all of them where they are fewer.

    Every choice of as many numbers is equally likely (Floyd's method; Bentley and Floyd, CACM 30(9), 1987).
    """
    size = max(high - low + 1, 0)
    if size <= len(bits):
        return tuple(range(low, high + 1))
    chosen: set[int] = set()
    for last, word in zip(range(size - len(bits), size), bits, strict=True):
        pick = word * (last + 1) >> BITS
        chosen.add(last if pick in chosen else pick)
    return tuple(low + place for place in sorted(chosen))


def middle(source: BudgetRange) -> int:
    """The middle of a range in tokens, rounded down: arithmetic mean of its ends, or geometric where it is log-uniform."""
    if source.scale == "uniform":
        return (source.low + source.high) // 2
    return math.isqrt(source.low * source.high)


def remembered_budget(source: BudgetMemory, seen: CorrectLengths | None, *, room: int) -> int:
    """``min(room, max(floor, floor(factor * statistic)))`` in tokens; `start` (within the room) before the first correct answer.

    seen: lengths of the prompt's correct answers so far, None without any. room: the largest budget a response has room for.
    """
    if seen is None:
        return min(room, source.start)
    statistic = seen.shortest if source.statistic == "shortest" else seen.mean
    return min(room, max(source.floor, math.floor(source.factor * statistic + ROUNDING)))
