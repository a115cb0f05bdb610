"""The grader for mathematics: plain numbers compared exactly, everything else by math-verify."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from fractions import Fraction
from functools import lru_cache
from typing import Any

from reward.bounds import check_expression
from reward.extraction import final_part, normalise
from reward.grading import Grade, MalformedAnswer

SURELY_DIFFERENT = Fraction(1, 100_000)
"""Plain numbers further apart than this, absolutely and relatively, differ for math-verify too, which rounds to 6 decimals."""
_CACHED = 4096

_INTEGER = r"(?:\d{1,3}(?:,\d{3})+|\d+)"
_PLAIN_NUMBER = re.compile(
    rf"-?(?:(?P<decimal>{_INTEGER}(?:\.\d+)?)|(?P<over>\d+)/(?P<under>\d+)|\\[dt]?frac\{{(?P<top>\d+)\}}\{{(?P<bottom>\d+)\}})",
    re.ASCII,
)
_PLAIN_CHARS = 32


def grade_math(answer: str, golds: Sequence[str], entry: Mapping[str, Any], options: Mapping[str, Any]) -> Grade:
    """Right when the answer equals any gold as mathematics (1/2 = 0.5 = \\frac{1}{2}).

    Of a longer text only the last ``\\boxed{}`` counts, or what stands behind GSM8K's ``####``. Raises MalformedAnswer for an
    answer beyond the bounds of ``reward.bounds``, ValueError when no gold matches and one of them cannot be parsed.
    """
    answer = final_part(answer)
    if not answer:
        raise MalformedAnswer("the answer is blank")
    golds = [final_part(gold) for gold in golds]
    if any(normalise(answer) == normalise(gold) for gold in golds):
        return True, "same text"
    number = plain_number(answer)
    unsure = []
    for gold in golds:
        same = None if number is None else _same_number(number, plain_number(gold))
        if same:
            return True, "equal as numbers"
        if same is None:
            unsure.append(gold)
    if not unsure:
        return False, "compared as numbers"
    check_expression(answer)
    return _compare(answer, tuple(unsure))


def plain_number(text: str) -> Fraction | None:
    """The exact value of an integer, decimal or fraction of integers written in digits; None for anything else."""
    text = text.strip("$ ")
    match = _PLAIN_NUMBER.fullmatch(text) if len(text) <= _PLAIN_CHARS else None
    if match is None:
        return None
    if match["decimal"]:
        size = Fraction(match["decimal"].replace(",", ""))
    else:
        under = int(match["under"] or match["bottom"])
        if under == 0:
            return None
        size = Fraction(int(match["over"] or match["top"]), under)
    return -size if text.startswith("-") else size


def _same_number(answer: Fraction, gold: Fraction | None) -> bool | None:
    """Whether both are the same number; None where that takes math-verify to decide, with its rounding."""
    if gold is None:
        return None
    if answer == gold:
        return True
    distance = abs(answer - gold)
    return False if distance > SURELY_DIFFERENT and distance > SURELY_DIFFERENT * max(abs(answer), abs(gold)) else None


@lru_cache(maxsize=_CACHED)
def _compare(answer: str, golds: tuple[str, ...]) -> Grade:
    """What math-verify finds. Cached: the answers to one prompt are often the same."""
    import math_verify

    unreadable = None
    evidence = "compared by math-verify"
    answer_forms = None
    for gold in golds:
        gold_forms = _gold_forms(gold)
        if gold_forms is None:
            unreadable = gold
            continue
        try:
            answer_forms = parse_math(answer) if answer_forms is None else answer_forms
            # math-verify's own time limits are off: they need the main thread's alarm, and the child's deadline covers them.
            if math_verify.verify(list(gold_forms), list(answer_forms), timeout_seconds=None, raise_on_error=True):
                return True, evidence
        except MemoryError:
            raise
        except Exception as error:  # its parsers raise anything on odd input; that is a finding about the answer
            evidence = f"not comparable: {type(error).__name__}"
    if unreadable is not None:
        raise ValueError(f"the gold answer {unreadable[:80]!r} is no mathematics; set data.grader=exact")
    return False, evidence


def _gold_forms(gold: str) -> tuple[Any, ...] | None:
    try:
        check_expression(gold)
    except MalformedAnswer:
        return None
    return parse_math(gold) or None


@lru_cache(maxsize=_CACHED)
def parse_math(text: str) -> tuple[Any, ...]:
    """What math-verify reads in a text; empty when it finds nothing. Cached: the answers to one prompt share their golds."""
    import math_verify

    marked = any(mark in text for mark in ("$", "\\(", "\\[", "\\boxed"))
    forms = math_verify.parse(text if marked else f"${text}$", parsing_timeout=None, raise_on_error=True)  # pyright: ignore[reportArgumentType]
    return tuple(forms or math_verify.parse(text, parsing_timeout=None, raise_on_error=True))  # pyright: ignore[reportArgumentType]


def prepare() -> None:
    """Import the library and parse once, so that the first answer does not pay for it inside its deadline."""
    # It warns whenever its time limits are off, which here is on purpose.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    parse_math("1 + x")
