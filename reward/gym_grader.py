"""The grader of reasoning-gym's tasks: each by its own scorer, guarded against what those scorers let through."""

from __future__ import annotations

import ast
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

from reward.bounds import check_expression
from reward.extraction import MAX_ANSWER_CHARS, normalise
from reward.grading import Grade

Scorer = Callable[[str, dict[str, Any]], float]

# These scorers hand the answer to Python's eval, only to grant part of a point to a list instead of its text form.
_EVALUATES_ANSWERS = frozenset({"binary_matrix", "n_queens", "spiral_matrix", "string_insertion"})
# These hand it to sympy.parse_expr, which is eval with sympy's names and the built-in functions.
_PARSES_ANSWERS = frozenset(
    {"countdown", "intermediate_integration", "polynomial_multiplication", "puzzle24", "simple_integration"}
)
_FORMULA = re.compile(r"[\w\s+\-*/^().,=]*")
_FORMULA_NAME = re.compile(r"[^\W\d]\d*|a?(sin|cos|tan)|(sin|cos|tan)h|cot|sec|csc|exp|log|ln|sqrt|pi|[aA]bs|Integral")
_NOT_A_NUMBER = re.compile(r"\bnan", re.IGNORECASE)
_NONSENSE = "no answer to this"
MAX_NESTING = 100
"""Half of what Python's own parser takes; answers such as bracket sequences nest deeper than formulas."""


def grade_reasoning_gym(answer: str, golds: Sequence[str], entry: Mapping[str, Any], options: Mapping[str, Any]) -> Grade:
    """Right when the task's own scorer gives exactly 1.0; scorers are fractional ("14" for "4" earns 0.5), so less is wrong.

    ``options``: ``task`` (registered name; else the entry's ``source_dataset``) and ``params`` (its configuration). An answer is
    also wrong where the scorer gives 1.0 to nonsense as well, unless it is the entry's own. Raises MalformedAnswer for an
    expression beyond the bounds of ``reward.bounds``, ValueError when the entry is not one of reasoning-gym's or its scorer
    refuses the entry's own answer.
    """
    task = options.get("task") or entry.get("metadata", {}).get("source_dataset")
    if not task:
        raise ValueError("the entry names no reasoning-gym task; give data.source=reasoning_gym:<task> or another data.grader")
    scorer = _own_scorer(task, json.dumps(options.get("params", {}), sort_keys=True))
    _check_scorer(scorer, task, entry)
    own = str(entry.get("answer") or "")
    if normalise(answer) != normalise(own):
        parses = task in _PARSES_ANSWERS
        check_expression(answer, max_chars=MAX_ANSWER_CHARS, **({} if parses else {"max_nesting": MAX_NESTING}))
        if parses and not _is_plain_formula(answer):
            return False, "refused: more than a formula in an answer that the scorer would evaluate"
        if _NOT_A_NUMBER.search(answer) and not _NOT_A_NUMBER.search(own):
            return False, "refused: NaN passes comparisons with any number"
    score = _score(scorer, answer, entry, own)
    if isinstance(score, str):
        return False, score
    if score == 1.0 and normalise(answer).lower() != normalise(own).lower() and _score(scorer, _NONSENSE, entry, own) == 1.0:
        return False, "refused: the scorer gives 1 to nonsense too"
    return score == 1.0, f"scored {score:.4g}"


def _score(scorer: Scorer, answer: str, entry: Mapping[str, Any], own: str) -> float | str:
    """The score; or why the answer has none, if the scorer raises on this answer but not on the entry's own."""
    try:
        return float(scorer(answer, dict(entry)))
    except MemoryError:
        raise
    except Exception as error:  # scorers raise anything on odd input
        scorer(own, dict(entry))  # raises too where the entry or the scorer is at fault: then nothing is known of the answer
        return f"the scorer cannot read it: {type(error).__name__}"


def _is_plain_formula(answer: str) -> bool:
    names = re.findall(r"[^\W\d]\w*", answer)
    known = all(_FORMULA_NAME.fullmatch(name) for name in names)
    return known and _FORMULA.fullmatch(answer) is not None and not re.search(r"\.\s*[^\W\d]", answer)


@lru_cache(maxsize=64)
def _own_scorer(task: str, params: str) -> Scorer:
    import reasoning_gym

    dataset = reasoning_gym.create_dataset(task, **json.loads(params))
    if task in _EVALUATES_ANSWERS:
        # A module's own name wins over the built-in one: literals still work, code does not run.
        vars(sys.modules[type(dataset).__module__])["eval"] = ast.literal_eval
    return dataset.score_answer


_checked_tasks: set[str] = set()


def _check_scorer(scorer: Scorer, task: str, entry: Mapping[str, Any]) -> None:
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
