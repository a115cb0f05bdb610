"""The budgets of one prompt's turn in a step, where they are drawn or remembered; no state, and no random state of anybody's."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import Literal

from rl.budget_settings import ROUNDING, BudgetMemory, BudgetRange
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

    def bits(self, member: int | None = None) -> int:
        """64 random bits for a member, or for the whole group: the first bytes of SHA-256 over what identifies it.

        They are none of the bits of the member's sampling seed, so that a budget says nothing about the answer.
        """
        who = "group" if member is None else str(member)
        name = f"budget|{self.run_seed}|{self.step}|{self.position}:{self.prompt_id}|{who}"
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
