"""What ``data.grader_options`` may hold for each grader; checked when a configuration is read, before anything starts."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any


def check_options(grader: str, options: Mapping[str, Any]) -> None:
    """Raise ValueError for an option that the grader does not read, a value it cannot use, or one that is missing."""
    known = OPTIONS.get(grader, {})
    for name, value in options.items():
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            reads = f"it reads {', '.join(sorted(known))}" if known else "it reads none"
            raise ValueError(f"data.grader_options: data.grader={grader} has no option {name!r}{hint} ({reads})")
        problem = known[name](value)
        if problem:
            raise ValueError(f"data.grader_options.{name}={value!r} {problem}")
    if grader == "format" and "pattern" not in options:
        raise ValueError("data.grader=format needs data.grader_options.pattern, a regular expression for the whole answer part")


def _tolerance(value: Any) -> str | None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return None if is_number and 0 <= value < float("inf") else "is no tolerance; give a number from 0 on, such as 1e-6"


def _letters(value: Any) -> str | None:
    if isinstance(value, str) and value.isascii() and value.isalpha() and len(set(value.upper())) == len(value):
        return None
    return "is no list of choices; give each letter once, such as ABCD"


def _pattern(value: Any) -> str | None:
    if not isinstance(value, str):
        return "is no text; give a regular expression"
    try:
        re.compile(value)
    except (re.error, RecursionError, OverflowError) as error:
        return f"is no regular expression: {error}"
    return None


OPTIONS: Mapping[str, Mapping[str, Callable[[Any], str | None]]] = MappingProxyType(
    {
        "numeric": {"rel_tol": _tolerance, "abs_tol": _tolerance},
        "choice": {"letters": _letters},
        "format": {"pattern": _pattern},
    }
)
"""Grader -> option -> what is wrong with a value, None if nothing; graders that are not named read no options."""
