"""Which busy engine was not heard for too long; pure, times come from outside."""

from __future__ import annotations

import math
from collections.abc import Collection


class Heartbeats:
    """When each engine that owes rollouts was last heard; times are seconds of one monotonic clock."""

    def __init__(self, limit_s: float) -> None:
        self.limit_s = limit_s
        self._heard: dict[int, float] = {}

    def expect(self, busy: Collection[int], now: float) -> None:
        """These engines owe work: the time of one that did not before starts now; an idle one may be silent."""
        self._heard = {engine: self._heard.get(engine, now) for engine in sorted(busy)}

    def heard(self, engine: int, now: float) -> None:
        """An engine answered."""
        if engine in self._heard:
            self._heard[engine] = now

    def silent(self, now: float) -> list[int]:
        """The busy engines not heard for the limit or longer."""
        return [engine for engine, last in self._heard.items() if now - last >= self.limit_s]

    def patience_s(self, now: float) -> float:
        """Seconds until the next engine counts as silent, at least 0; infinite when none owes anything."""
        return max(0.0, min(self._heard.values(), default=math.inf) + self.limit_s - now)
