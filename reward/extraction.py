"""Finding the answer in a response: pure text work, linear in its length."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

from reward.grading import MalformedAnswer

THINK_END = "</think>"
MAX_ANSWER_CHARS = 20_000
"""Longest answer part that is handed to a grader."""
MAX_WHOLE_CHARS = 1_000_000
"""Longest response that is handed to a grader as a whole."""
EXTRACTIONS = ("after_think", "boxed", "last_line", "whole")


def extract_answer(text: str, *, how: str, special_tokens: Sequence[str] = ()) -> str:
    """Find the answer part of a response; ``how`` is ``after_think``, ``boxed``, ``last_line`` or ``whole``.

    ``after_think``: all text behind the first ``</think>``; ``boxed``: the last balanced ``\\boxed{}`` in it; ``last_line``: the
    last line that is not blank, behind ``</think>`` where there is one; ``whole``: the response, think tags included. Special
    tokens other than the think tags become blanks. Raises MalformedAnswer when there is no such part, it is blank, or it is
    longer than ``MAX_ANSWER_CHARS`` (``whole``: ``MAX_WHOLE_CHARS``).
    """
    if how not in EXTRACTIONS:
        raise ValueError(f"unknown extraction {how!r}; use {', '.join(EXTRACTIONS[:-1])} or {EXTRACTIONS[-1]}")
    _, found, tail = text.partition(THINK_END)
    if not found and how in ("after_think", "boxed"):
        raise MalformedAnswer(f"no {THINK_END} in the response")
    part = _without_special_tokens(tail if found and how != "whole" else text, special_tokens).strip()
    if how == "last_line":
        part = part.rsplit("\n", 1)[-1].strip()
    longest = MAX_WHOLE_CHARS if how == "whole" else MAX_ANSWER_CHARS
    if len(part) > longest:
        raise MalformedAnswer(f"the answer part has {len(part)} characters, more than {longest}")
    if how == "boxed":
        boxed = last_boxed(part)
        if boxed is None:
            raise MalformedAnswer(f"no complete \\boxed{{}} behind {THINK_END}")
        part = boxed
    if not part:
        raise MalformedAnswer("the answer is blank")
    return part


def _without_special_tokens(text: str, special_tokens: Sequence[str]) -> str:
    """The text with every special token but the think tags replaced by a blank."""
    # The think tags stay: a second one inside the answer must not vanish and leave something that looks right.
    names = sorted((t for t in special_tokens if t and t not in ("<think>", THINK_END)), key=len, reverse=True)
    return re.sub("|".join(map(re.escape, names)), " ", text) if names else text


def last_boxed(text: str) -> str | None:
    """Content of the ``\\boxed{...}`` that starts last among those whose braces balance, in one pass; None if there is none."""
    opened: list[tuple[int, bool]] = []
    best: tuple[int, int] | None = None
    for match in re.finditer(r"\\boxed\s*\{|\\.|[{}]", text, re.DOTALL):
        token = match.group()
        if token == "{" or token.startswith("\\boxed"):
            opened.append((match.end(), token != "{"))
        elif token == "}" and opened:
            start, is_boxed = opened.pop()
            if is_boxed and (best is None or start > best[0]):
                best = (start, match.start())
    return None if best is None else text[best[0] : best[1]].strip()


def final_part(text: str) -> str:
    """What counts of a longer text: the last complete ``\\boxed{}``, else what follows GSM8K's ``####``, else all of it."""
    boxed = last_boxed(text) if "\\boxed" in text else None
    return boxed if boxed is not None else text.rpartition("####")[2].strip()


def normalise(text: str) -> str:
    """Unicode form NFKC with every run of blanks as one space."""
    return " ".join(unicodedata.normalize("NFKC", text).split())
