"""The allow-list of graders; loaded by the grader child, so nothing heavy is imported before it is asked for."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from types import MappingProxyType

from reward import math_grader
from reward.grading import Grader
from reward.gym_grader import grade_reasoning_gym
from reward.math_grader import grade_math
from reward.numeric_grader import grade_numeric
from reward.text_graders import grade_choice, grade_exact, grade_format

GRADERS: Mapping[str, Grader] = MappingProxyType(
    {
        "choice": grade_choice,
        "exact": grade_exact,
        "format": grade_format,
        "math": grade_math,
        "numeric": grade_numeric,
        "reasoning_gym": grade_reasoning_gym,
    }
)
"""Name -> function; all the child process may call."""

_PREPARATIONS: Mapping[str, Callable[[], object]] = MappingProxyType(
    {"math": math_grader.prepare, "reasoning_gym": lambda: importlib.import_module("reasoning_gym")}
)


def preload(grader: str) -> None:
    """Import the library of a grader now, so that the first answer does not pay for it inside its deadline."""
    _PREPARATIONS.get(grader, lambda: None)()
