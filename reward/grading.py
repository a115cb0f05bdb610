"""What a grader is given and what it says: shared by the graders, the child that runs them and the pool that feeds it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Grade = tuple[bool, str]
"""Whether the answer is right, and why."""
Grader = Callable[[str, Sequence[str], Mapping[str, Any], Mapping[str, Any]], Grade]
"""``grader(answer, golds, entry, options)``: right when any gold answer matches. Raises MalformedAnswer when there is nothing to
judge; anything else it raises is reported as CRASHED."""


class MalformedAnswer(ValueError):
    """There is no answer where one was asked for, or none that may be handed to a parser; the message says which."""


@dataclass(frozen=True)
class GradeTask:
    """One extracted answer to judge."""

    grader: str
    """Name in a ``GRADERS`` table."""
    answer: str
    golds: tuple[str, ...]
    """Gold answers; any one is right."""
    entry: str = "{}"
    """JSON object: the data row or reasoning-gym entry."""
    options: str = "{}"
    """JSON object of what the grader needs beside it."""
