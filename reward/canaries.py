"""Tasks with known verdicts: what shows that a grader process still judges as it should."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

from reward.grading import GradeTask
from rl.types import VerdictStatus

Canaries = Callable[[int], tuple[GradeTask, GradeTask]]
"""From a turn number to a right and a wrong task; other turns give other ones, so that no cache can answer for the grader."""


def _pair(grader: str, right: str, wrong: str, gold: str, *, options: str = "{}") -> tuple[GradeTask, GradeTask]:
    return GradeTask(grader, right, (gold,), options=options), GradeTask(grader, wrong, (gold,), options=options)


def _math(turn: int) -> tuple[GradeTask, GradeTask]:
    # A percentage, so that math-verify decides and not the comparison of plain numbers.
    return _pair("math", str(turn), str(turn + 1), f"{turn}\\%")


def _reasoning_gym(turn: int) -> tuple[GradeTask, GradeTask]:
    metadata = {"source_dataset": "chain_sum", "source_index": 0}
    entry = json.dumps({"question": f"{turn} + 1 =", "answer": str(turn + 1), "metadata": metadata})
    answers = (str(turn + 1), str(turn))
    right, wrong = (GradeTask("reasoning_gym", a, (answers[0],), entry, '{"task": "chain_sum"}') for a in answers)
    return right, wrong


CANARIES: Mapping[str, Canaries] = MappingProxyType(
    {
        "choice": lambda turn: _pair("choice", f"({'ABCD'[turn % 4]})", f"{'BCDA'[turn % 4]}.", "ABCD"[turn % 4]),
        "exact": lambda turn: _pair("exact", f" word {turn}", f"word {turn}1", f"word  {turn}"),
        "format": lambda turn: _pair("format", f"<a>{turn}</a>", f"<a>{turn}", "", options='{"pattern": "<a>.*</a>"}'),
        "math": _math,
        "numeric": lambda turn: _pair("numeric", f"{turn}.50", f"-{turn}.5", f"{turn} 1/2"),
        "reasoning_gym": _reasoning_gym,
    }
)
"""Grader -> its canaries; for a grader without any, those of ``exact`` stand in."""


def canaries_of(graders: Sequence[str], turn: int, table: Mapping[str, Canaries]) -> list[tuple[GradeTask, VerdictStatus]]:
    """A right and a wrong task of each grader, with the verdicts they must get."""
    expected = (VerdictStatus.CORRECT, VerdictStatus.WRONG)
    pairs = [table.get(grader, CANARIES["exact"])(turn) for grader in graders]
    return [(task, status) for pair in pairs for task, status in zip(pair, expected, strict=True)]
