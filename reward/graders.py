"""Finding the answer in a response and judging it: pure functions, run inside a killable child process.

This module is loaded by the grader child, so it imports nothing heavy; each grader loads its library when first used.
"""

from __future__ import annotations

import ast
import importlib
import json
import logging
import re
import sys
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from types import MappingProxyType
from typing import Any

THINK_END = "</think>"
MAX_ANSWER_CHARS = 20_000
"""Longest answer part handed to a parser; computer-algebra parsers are super-linear in their input."""

Grade = tuple[bool, str]
"""Whether the answer is right, and why."""
Grader = Callable[[str, str, Mapping[str, Any], Mapping[str, Any]], Grade]
"""``grader(answer, gold, entry, options)``; raises whatever its library raises, which the child reports as CRASHED."""


class MalformedAnswer(ValueError):
    """The response holds no answer where one was asked for; the message says what is missing."""


def extract_answer(text: str, *, how: str, special_tokens: Sequence[str] = ()) -> str:
    """Find the answer part of a response; ``how`` is ``after_think``, ``boxed`` or ``last_line``.

    ``after_think``: all text behind the first ``</think>``; ``boxed``: the last balanced ``\\boxed{}`` in it; ``last_line``: the
    last line that is not blank, behind ``</think>`` where there is one. Special tokens other than the think tags become blanks.
    Raises MalformedAnswer when there is no such part, it is blank, or it is longer than ``MAX_ANSWER_CHARS``.
    """
    _, found, tail = text.partition(THINK_END)
    if how not in ("after_think", "boxed", "last_line"):
        raise ValueError(f"unknown extraction {how!r}; use after_think, boxed or last_line")
    if not found and how != "last_line":
        raise MalformedAnswer(f"no {THINK_END} in the response")
    part = _without_special_tokens(tail if found else text, special_tokens).strip()
    if how == "last_line":
        part = part.rsplit("\n", 1)[-1].strip()
    if len(part) > MAX_ANSWER_CHARS:
        raise MalformedAnswer(f"the answer part has {len(part)} characters, more than {MAX_ANSWER_CHARS}")
    if how == "boxed":
        part = _last_boxed(part)
    if not part:
        raise MalformedAnswer("the answer is blank")
    return part


def _without_special_tokens(text: str, special_tokens: Sequence[str]) -> str:
    # The think tags stay: a second one inside the answer must not vanish and leave something that looks right.
    names = sorted((t for t in special_tokens if t and t not in ("<think>", THINK_END)), key=len, reverse=True)
    return re.sub("|".join(map(re.escape, names)), " ", text) if names else text


def _last_boxed(text: str) -> str:
    """Content of the ``\\boxed{...}`` that starts last among those whose braces balance, in one pass."""
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
    if best is None:
        raise MalformedAnswer(f"no complete \\boxed{{}} behind {THINK_END}")
    return text[best[0] : best[1]].strip()


def normalise(text: str) -> str:
    """Unicode form NFKC with every run of blanks as one space."""
    return " ".join(unicodedata.normalize("NFKC", text).split())


def grade_exact(answer: str, gold: str, entry: Mapping[str, Any], options: Mapping[str, Any]) -> Grade:
    """Right when both are the same text after ``normalise``; case counts."""
    return normalise(answer) == normalise(gold), "text compared"


def grade_math(answer: str, gold: str, entry: Mapping[str, Any], options: Mapping[str, Any]) -> Grade:
    """Right when math-verify finds both equal as mathematics (1/2 = 0.5 = \\frac{1}{2}).

    Of a gold answer in GSM8K's layout only the text behind ``####`` counts. Raises ValueError when the gold cannot be parsed.
    """
    gold = gold.rpartition("####")[2].strip()
    if normalise(answer) == normalise(gold):
        return True, "same text"
    gold_forms = _parse_math(gold)
    if not gold_forms:
        raise ValueError(f"the gold answer {gold[:80]!r} is no mathematics; set data.grader=exact")
    import math_verify

    try:
        answer_forms = _parse_math(answer)
        # math-verify's own time limits are off: they need the main thread's alarm, and the child's deadline covers them.
        equal = math_verify.verify(gold_forms, answer_forms, timeout_seconds=None, raise_on_error=True)
    except (MemoryError, RecursionError):
        raise
    except Exception as error:  # its parsers raise anything on odd input; that is a finding about the answer
        return False, f"not comparable: {type(error).__name__}"
    return bool(equal), "compared by math-verify"


def _parse_math(text: str) -> list[Any]:
    import math_verify

    marked = any(mark in text for mark in ("$", "\\(", "\\[", "\\boxed"))
    forms = math_verify.parse(text if marked else f"${text}$", parsing_timeout=None, raise_on_error=True)  # pyright: ignore[reportArgumentType]
    return list(forms) or list(math_verify.parse(text, parsing_timeout=None, raise_on_error=True))  # pyright: ignore[reportArgumentType]


def grade_reasoning_gym(answer: str, gold: str, entry: Mapping[str, Any], options: Mapping[str, Any]) -> Grade:
    """Right when the task's own scorer gives exactly 1.0; scorers are fractional ("14" for "4" earns 0.5), so less is wrong.

    ``options``: ``task`` (registered name; else the entry's ``source_dataset``) and ``params`` (its configuration).
    Raises ValueError when the entry is not one of reasoning-gym's or its scorer refuses the entry's own answer.
    """
    task = options.get("task") or entry.get("metadata", {}).get("source_dataset")
    if not task:
        raise ValueError("the entry names no reasoning-gym task; give data.source=reasoning_gym:<task> or another data.grader")
    scorer = _own_scorer(task, json.dumps(options.get("params", {}), sort_keys=True))
    _check_scorer(scorer, task, entry)
    if task in _PARSES_ANSWERS and not _is_plain_formula(answer):
        return False, "refused: more than a formula in an answer that the scorer would evaluate"
    score = float(scorer(answer, dict(entry)))
    return score == 1.0, f"scored {score:.4g}"


# These scorers hand the answer to Python's eval, only to grant part of a point to a list instead of its text form.
_EVALUATES_ANSWERS = frozenset({"binary_matrix", "n_queens", "spiral_matrix", "string_insertion"})
# These hand it to sympy.parse_expr, which is eval with sympy's names and the built-in functions.
_PARSES_ANSWERS = frozenset(
    {"countdown", "intermediate_integration", "polynomial_multiplication", "puzzle24", "simple_integration"}
)
_FORMULA = re.compile(r"[\w\s+\-*/^().,=]*")
_FORMULA_NAME = re.compile(r"[^\W\d]\d*|a?(sin|cos|tan)|(sin|cos|tan)h|cot|sec|csc|exp|log|ln|sqrt|pi|[aA]bs|Integral")


def _is_plain_formula(answer: str) -> bool:
    names = re.findall(r"[^\W\d]\w*", answer)
    known = all(_FORMULA_NAME.fullmatch(name) for name in names)
    return known and _FORMULA.fullmatch(answer) is not None and not re.search(r"\.\s*[^\W\d]", answer)


@lru_cache(maxsize=64)
def _own_scorer(task: str, params: str) -> Callable[[str, dict[str, Any]], float]:
    import reasoning_gym

    dataset = reasoning_gym.create_dataset(task, **json.loads(params))
    if task in _EVALUATES_ANSWERS:
        # A module's own name wins over the built-in one: literals still work, code does not run.
        vars(sys.modules[type(dataset).__module__])["eval"] = ast.literal_eval
    return dataset.score_answer


_checked_tasks: set[str] = set()


def _check_scorer(scorer: Callable[[str, dict[str, Any]], float], task: str, entry: Mapping[str, Any]) -> None:
    # A few tasks compare tuples and entries travel as JSON, where tuples are lists: there no answer could ever be right.
    own = entry.get("answer")
    if task in _checked_tasks or not isinstance(own, str) or not own:
        return
    score = float(scorer(own, dict(entry)))
    if score != 1.0:
        raise ValueError(
            f"reasoning-gym's scorer of {task} gives {score:.4g} to the entry's own answer; no answer could be CORRECT"
        )
    _checked_tasks.add(task)


def preload(grader: str) -> None:
    """Import the library of a grader now, so that the first answer does not pay for it inside its deadline."""
    for name in _LIBRARIES.get(grader, ()):
        importlib.import_module(name)
    if grader == "math":
        # It warns whenever its time limits are off, which here is on purpose.
        logging.getLogger("math_verify").setLevel(logging.ERROR)
        _parse_math("1")


_LIBRARIES: Mapping[str, tuple[str, ...]] = MappingProxyType({"reasoning_gym": ("reasoning_gym",), "math": ("math_verify",)})
GRADERS: Mapping[str, Grader] = MappingProxyType({"exact": grade_exact, "math": grade_math, "reasoning_gym": grade_reasoning_gym})
"""The allow-list of the child process."""
