"""From what a trained model spends and scores at each effort to the effort that spends or scores a wanted share."""

from __future__ import annotations

import json
import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields

EFFORTS = (0.5, 0.75, 1.0, 1.5, 2.0, 3.0)
"""Efforts to measure: the ends and the middle of the range that training draws from."""
ROUNDING = 1e-9
"""Shares this close are equal: one hair above a level stretch would otherwise cost the whole stretch in effort."""


def isotonic(values: Sequence[float]) -> tuple[float, ...]:
    """The non-decreasing sequence nearest to the values in least squares, by pooling adjacent violators."""
    pools: list[tuple[float, int]] = []  # sum and number of values that share one level
    for value in values:
        total, count = value, 1
        while pools and pools[-1][0] * count > total * pools[-1][1]:
            above, more = pools.pop()
            total, count = total + above, count + more
        pools.append((total, count))
    return tuple(total / count for total, count in pools for _ in range(count))


@dataclass(frozen=True)
class Calibration:
    """Measured points of an effort-controlled model, and the knob that is linear in tokens or in accuracy.

    Noise may make a measured curve fall somewhere; what is inverted is its isotonic fit, linear between the points.
    Raises ValueError for points that cannot be measured ones. Source: Adaptive Effort Control (arXiv 2510.27042).
    """

    efforts: tuple[float, ...]
    """Multiples of the usual length, rising, above 0; at least two."""
    tokens: tuple[float, ...]
    """Mean response length at each effort, on held-out prompts."""
    accuracy: tuple[float, ...]
    """Share of correct answers at each effort, on the same prompts."""

    def __post_init__(self) -> None:
        counts = f"{len(self.efforts)} efforts, {len(self.tokens)} tokens and {len(self.accuracy)} accuracies"
        if not len(self.efforts) == len(self.tokens) == len(self.accuracy) >= 2:
            raise ValueError(f"got {counts}; give one of each per measured point, at least two points")
        if not all(math.isfinite(v) for v in (*self.efforts, *self.tokens, *self.accuracy)):
            raise ValueError("every measured value must be finite; leave out efforts that could not be measured")
        if self.efforts[0] <= 0 or any(a >= b for a, b in zip(self.efforts, self.efforts[1:], strict=False)):
            raise ValueError(f"efforts must be above 0 and rise, got {list(self.efforts)}")
        if min(self.tokens) <= 0:
            raise ValueError(f"tokens must be above 0, got {list(self.tokens)}")
        if not 0.0 <= min(self.accuracy) <= max(self.accuracy) <= 1.0:
            raise ValueError(f"accuracy must be in [0, 1], got {list(self.accuracy)}")

    def relative_tokens(self) -> tuple[float, ...]:
        """The isotonic fit of the tokens at each effort, as a share of the largest effort's."""
        fit = isotonic(self.tokens)
        return tuple(value / fit[-1] for value in fit)

    def relative_accuracy(self) -> tuple[float, ...]:
        """The isotonic fit of the accuracy at each effort, as a share of the largest effort's; raises ValueError if that is 0."""
        fit = isotonic(self.accuracy)
        if fit[-1] == 0:
            raise ValueError("accuracy is 0 at every effort; there is nothing to be relative to")
        return tuple(value / fit[-1] for value in fit)

    def effort_for_tokens(self, share: float) -> float:
        """The smallest effort that spends this share of the largest effort's tokens; ValueError outside what was measured."""
        return self._effort(share, self.relative_tokens())

    def effort_for_accuracy(self, share: float) -> float:
        """The smallest effort that reaches this share of the largest effort's accuracy; ValueError outside what was measured."""
        return self._effort(share, self.relative_accuracy())

    def _effort(self, share: float, reached: tuple[float, ...]) -> float:
        if not reached[0] - ROUNDING <= share <= 1.0:
            measured = f"[{reached[0]:.3f}, 1], what efforts from {self.efforts[0]} to {self.efforts[-1]} were measured to give"
            raise ValueError(f"share must be in {measured}; got {share}")
        i = bisect_left(reached, share - ROUNDING)
        if i == 0:
            return self.efforts[0]
        (low, high), (start, end) = reached[i - 1 : i + 1], self.efforts[i - 1 : i + 1]
        return start + (end - start) * min(1.0, (share - low) / (high - low))

    def markdown(self) -> str:
        """A table of the points for a model card: as measured, and the fitted shares that the knob inverts."""
        accuracy = self.relative_accuracy() if max(self.accuracy) > 0 else (0.0,) * len(self.accuracy)
        rows = zip(self.efforts, self.tokens, self.relative_tokens(), self.accuracy, accuracy, strict=True)
        lines = [f"| {e:g} | {n:.0f} | {share:.1%} | {a:.1%} | {part:.1%} |" for e, n, share, a, part in rows]
        head = "| effort | tokens | share of the tokens | accuracy | share of the accuracy |"
        return "\n".join([head, "|---:|---:|---:|---:|---:|", *lines]) + "\n"

    def to_json(self) -> str:
        """The points as a JSON object."""
        return json.dumps(asdict(self), indent=2)

    @classmethod
    def from_json(cls, text: str) -> Calibration:
        """The inverse of :meth:`to_json`; raises ValueError for text that is no calibration."""
        content = json.loads(text)
        names = [field.name for field in fields(cls)]
        if not isinstance(content, dict) or sorted(content) != sorted(names):
            raise ValueError(f"a calibration is a JSON object with {', '.join(names)} and nothing else")
        for name in names:
            values = content[name]
            if not isinstance(values, list) or not all(type(v) in (int, float) for v in values):
                raise ValueError(f"{name} must be a list of numbers, got {values!r}")
        return cls(**{name: tuple(map(float, content[name])) for name in names})
