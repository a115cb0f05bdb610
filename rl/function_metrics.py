"""What the run's own reward functions said in a step, before weights, as figures of its report; pure."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from rl.types import Group


def function_metrics(groups: Sequence[Group]) -> dict[str, float]:
    """``function/<name>``: mean value over the answers it applies to; ``/failed``: share it failed on; ``/<extra>``: its numbers.

    Also of functions whose weight is 0. Empty where the run has none.
    """
    values: dict[str, list[float]] = defaultdict(list)
    for group in groups:
        for member in group.members:
            for score in member.functions:
                root = f"function/{score.name}"
                values[f"{root}/failed"].append(float(score.status in ("timed_out", "crashed")))
                if score.value is not None:
                    values[root].append(score.value)
                for name, value in score.extras.items():
                    values[f"{root}/{name}"].append(value)
    return {name: sum(found) / len(found) for name, found in sorted(values.items())}
