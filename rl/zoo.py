"""Recipes side by side: reads what their runs left on disk, compares them with the start they share, writes table and JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from rl.bootstrap import Interval, aligned, common_problems, difference, paired_bootstrap
from rl.efficiency import (
    Array,
    accuracy_efficiency,
    accuracy_within,
    adherence,
    efficiency_frontier,
    efficiency_gap,
    tokens_per_correct,
)
from rl.errors import BudgetRLError
from rl.figures import table_text
from rl.run_folder import read_lines, replace_text
from rl.types import BudgetKind

START = "start"
"""Name of the row of the model that every recipe began with."""
CAP_SHARES = (8, 4, 2, 1)
"""Accuracy is shown at these parts of max_length: an eighth, a quarter, a half, the whole."""
Status = Literal["finished", "failed", "unfinished"]


class ZooError(BudgetRLError):
    """Recipes cannot be compared: a run lacks what its comparison needs."""


Answers = Mapping[str, Mapping[str, Any]]
"""Problem id -> ``accuracy`` and ``tokens`` (means), ``correct`` and ``lengths`` (one entry per answer)."""


@dataclass(frozen=True)
class Evaluation:
    """Held-out answers at one step of a run."""

    step: int
    tokens_spent: float
    """Response tokens trained on before it."""
    free: Answers
    """Asked without a budget."""
    budgets: Mapping[int, Answers] = field(default_factory=dict)
    """Asked under a budget, by its tokens; empty where that was not evaluated."""


@dataclass(frozen=True)
class Result:
    """What the run of one recipe left on disk."""

    recipe: str
    status: Status
    error: str
    """First line of what went wrong; empty unless it failed."""
    steps: int
    tokens_spent: float
    """Response tokens trained on."""
    minutes: float
    """Of its training steps; evaluations and starts are left out."""
    evaluations: tuple[Evaluation, ...]
    """In the order of their steps."""
    budget_kind: BudgetKind | None
    """How its budgets bind; None where it has none that an answer's length could keep."""


@dataclass(frozen=True)
class Row:
    """One line of the table. Accuracies are shares, lengths response tokens; None where it is not known or does not apply."""

    recipe: str
    status: Status
    error: str = ""
    steps: int = 0
    tokens_spent: float = 0.0
    minutes: float = 0.0
    accuracy: float | None = None
    gain: Interval | None = None
    """Accuracy minus that of the start, with the 95 % interval of a paired bootstrap over the held-out problems."""
    tokens: float | None = None
    aes: float | None = None
    tokens_per_correct: float | None = None
    kept: float | None = None
    """Share of the answers within their AT_MOST budget."""
    distance: float | None = None
    """Mean distance in tokens from an EXACT budget."""
    gap: float | None = None
    accuracy_at: Mapping[int, float] = field(default_factory=dict)
    """Cap in tokens -> share of the answers that are correct and no longer than the cap."""
    curve: tuple[Mapping[str, float], ...] = ()
    """``step``, ``tokens_spent``, ``accuracy`` and ``tokens`` of every evaluation."""


# -- reading -----------------------------------------------------------------------------------------------------------------


def read_result(folder: Path, recipe: str, *, status: Status, error: str = "", budget_kind: BudgetKind | None = None) -> Result:
    """Steps, tokens, minutes and evaluations of the run in ``folder``, which may have ended anywhere, or never begun.

    Raises ZooError where an evaluation that metrics.jsonl reports has no readable file.
    """
    lines = read_lines(folder / "metrics.jsonl")
    trained = {line["step"]: line for line in lines if "tokens/total" in line}
    spent = {step: line["tokens/total"] for step, line in trained.items()}
    tested = sorted({line["step"] for line in lines if "eval/accuracy" in line})
    return Result(
        recipe=recipe,
        status=status,
        error=error,
        steps=max(trained, default=0),
        tokens_spent=max(spent.values(), default=0.0),
        minutes=sum(line["time/step"] for line in trained.values()) / 60,
        evaluations=tuple(read_evaluation(folder / f"eval-{step}.json", tokens_spent=spent.get(step, 0.0)) for step in tested),
        budget_kind=budget_kind,
    )


def read_evaluation(path: Path, *, tokens_spent: float = 0.0) -> Evaluation:
    """The held-out answers in an ``eval-<step>.json``; ZooError where it is missing, damaged or of a version without lengths."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        results: dict[str, Answers] = content["results"]
        lengths = [figures["lengths"] for figures in results["free"].values()]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ZooError(
            f"{path} does not hold the answers of an evaluation ({type(error).__name__}: {error})",
            fix="evaluate again: remove the folder of that run and start the same zoo once more",
        ) from None
    if not any(lengths):
        raise ZooError(f"{path} holds no answer", fix="remove the folder of that run and start the same zoo once more")
    budgets = {int(label): answers for label, answers in results.items() if label.isdigit()}
    return Evaluation(content["step"], tokens_spent, results["free"], budgets)


# -- comparing ---------------------------------------------------------------------------------------------------------------


def compare(start: Evaluation | None, results: Sequence[Result], *, max_length: int) -> list[Row]:
    """The row of the start, where it was evaluated, and one per result in order; figures only for finished runs.

    All are taken over the problems that every evaluation has. The frontier behind the gap is that of the start and of every
    evaluation here. ``max_length``: the cap of all responses, in tokens. Raises ZooError where evaluations share no problem, or a
    finished run has none.
    """
    for result in results:
        if result.status == "finished" and not result.evaluations:
            raise ZooError(f"recipe {result.recipe} was never evaluated", fix="remove the folder of its run and start again")
    tested = [*([start] if start else []), *(evaluation for result in results for evaluation in result.evaluations)]
    if not tested:
        return [_row(result, ()) for result in results]
    problems = _shared_problems(tested)
    frontier_L = efficiency_frontier([_within(evaluation, problems, max_length) for evaluation in tested])
    view = _View(start, tuple(problems), frontier_L, max_length)
    rows = [view.row(Result(START, "finished", "", 0, 0.0, 0.0, (start,), None))] if start else []
    return rows + [view.row(result) for result in results]


@dataclass(frozen=True)
class _View:
    """What every row is seen against."""

    start: Evaluation | None
    problems: tuple[str, ...]
    frontier_L: Array
    max_length: int

    def row(self, result: Result) -> Row:
        curve = tuple(self._point(evaluation) for evaluation in result.evaluations)
        if result.status != "finished":
            return _row(result, curve)
        last = result.evaluations[-1]
        accuracy, tokens = curve[-1]["accuracy"], curve[-1]["tokens"]
        within_L = _within(last, self.problems, self.max_length)
        caps = sorted({max(1, self.max_length // part) for part in CAP_SHARES})
        per_correct = tokens_per_correct(accuracy, tokens)
        return _row(
            result,
            curve,
            accuracy=accuracy,
            tokens=tokens,
            tokens_per_correct=per_correct if math.isfinite(per_correct) else None,
            gap=efficiency_gap(within_L, self.frontier_L),
            accuracy_at={cap: float(within_L[cap - 1]) for cap in caps},
            **self._against_start(last, accuracy, tokens),
            **_kept(last, result.budget_kind),
        )

    def _point(self, evaluation: Evaluation) -> Mapping[str, float]:
        correct_N, length_N = _answers(evaluation.free, self.problems)
        return {
            "step": evaluation.step,
            "tokens_spent": evaluation.tokens_spent,
            "accuracy": sum(correct_N) / len(correct_N),
            "tokens": sum(length_N) / len(length_N),
        }

    def _against_start(self, last: Evaluation, accuracy: float, tokens: float) -> dict[str, Any]:
        if self.start is None or last is self.start:
            return {}
        first = self._point(self.start)
        before, after = (aligned([evaluation.free], "accuracy", self.problems) for evaluation in (self.start, last))
        gain = paired_bootstrap(before, after, difference)
        if first["accuracy"] <= 0:
            return {"gain": gain}
        aes = accuracy_efficiency(accuracy, tokens, start_accuracy=first["accuracy"], start_tokens=first["tokens"])
        return {"gain": gain, "aes": aes}


def _row(result: Result, curve: tuple[Mapping[str, float], ...], **figures: Any) -> Row:
    spent = {"steps": result.steps, "tokens_spent": result.tokens_spent, "minutes": result.minutes}
    return Row(result.recipe, result.status, result.error, **spent, curve=curve, **figures)


def _shared_problems(tested: Sequence[Evaluation]) -> list[str]:
    """Problems that every evaluation has an answer to."""
    try:
        return common_problems([evaluation.free for evaluation in tested])
    except ValueError as error:
        raise ZooError(str(error), fix="every recipe needs the same data settings") from None


def _answers(answers: Answers, problems: Sequence[str]) -> tuple[list[int], list[int]]:
    """Of every answer to the problems: whether it is right, and its length in tokens."""
    chosen = [answers[problem] for problem in problems]
    return [c for figures in chosen for c in figures["correct"]], [n for figures in chosen for n in figures["lengths"]]


def _within(evaluation: Evaluation, problems: Sequence[str], max_length: int) -> Array:
    correct_N, length_N = _answers(evaluation.free, problems)
    return accuracy_within(correct_N, length_N, max_length=max_length)


def _kept(last: Evaluation, kind: BudgetKind | None) -> dict[str, float]:
    lengths = {budget: [n for f in answers.values() for n in f["lengths"]] for budget, answers in last.budgets.items()}
    if kind is None or not any(lengths.values()):
        return {}
    return {"kept" if kind is BudgetKind.AT_MOST else "distance": adherence(lengths, kind)}


# -- writing -----------------------------------------------------------------------------------------------------------------


def write_reports(folder: Path, rows: Sequence[Row], *, allowance: int, notes: Sequence[str]) -> None:
    """Write zoo.md and zoo.json into ``folder``; ``allowance`` is in response tokens."""
    parts = [f"# Recipes against each other\n\nEach from the same start, with {allowance:,} response tokens to train on.\n"]
    parts += [text for text in (figures_text(rows, markdown=True), caps_text(rows, markdown=True)) if text]
    failures = [f"- {row.recipe} failed: {row.error}" for row in rows if row.status == "failed"]
    parts += ["\n".join([*failures, *(f"- {note}" for note in notes)]) + "\n"] if failures or notes else []
    replace_text(folder / "zoo.md", "\n".join(parts))
    content = {"max_tokens": allowance, "notes": list(notes), "rows": [asdict(row) for row in rows]}
    replace_text(folder / "zoo.json", json.dumps(content, indent=2, allow_nan=False) + "\n")


def figures_text(rows: Sequence[Row], *, markdown: bool) -> str:
    """The main table; what is not known or does not apply is ``-``, a run that did not finish says so."""
    titles = [
        "recipe",
        "steps",
        "tokens spent",
        "accuracy",
        "points on start [95 %]",
        "tokens",
        "AES",
        "tokens/correct",
        "budgets",
    ]
    titles += ["gap", "minutes"]
    cells = [titles]
    for row in rows:
        spent = ["-", "-"] if row.recipe == START else [str(row.steps), f"{row.tokens_spent:,.0f}"]
        cells.append(
            [
                row.recipe,
                *spent,
                row.status if row.status != "finished" else _shown(row.accuracy, ".3f"),
                _points(row.gain),
                _shown(row.tokens, ".1f"),
                _shown(row.aes, "+.2f"),
                _shown(row.tokens_per_correct, ".1f"),
                _budgets(row),
                _shown(row.gap, ".3f"),
                "-" if row.recipe == START else f"{row.minutes:.1f}",
            ]
        )
    return table_text(cells, markdown=markdown)


def caps_text(rows: Sequence[Row], *, markdown: bool) -> str:
    """Accuracy at fixed caps, one column per cap; empty where no run has finished."""
    shown = [row for row in rows if row.accuracy_at]
    if not shown:
        return ""
    caps = sorted(shown[0].accuracy_at)
    titles = ["recipe", *(f"right within {cap}" for cap in caps)]
    return table_text(
        [titles, *([row.recipe, *(f"{row.accuracy_at[cap]:.3f}" for cap in caps)] for row in shown)], markdown=markdown
    )


def metrics_of(rows: Sequence[Row]) -> dict[str, float]:
    """``<recipe>/<figure>`` for every figure that a row has: what the tracker is given."""
    names = ("accuracy", "tokens", "aes", "tokens_per_correct", "kept", "distance", "gap", "steps", "tokens_spent", "minutes")
    found = {f"{row.recipe}/{name}": getattr(row, name) for row in rows for name in names}
    return {name: float(value) for name, value in found.items() if value is not None}


def _shown(value: float | None, style: str) -> str:
    return "-" if value is None else format(value, style)


def _points(gain: Interval | None) -> str:
    if gain is None:
        return "-"
    return f"{100 * gain.estimate:+.1f} [{100 * gain.low:+.1f}, {100 * gain.high:+.1f}]"


def _budgets(row: Row) -> str:
    if row.kept is not None:
        return f"{row.kept:.0%} kept"
    return "-" if row.distance is None else f"{row.distance:.1f} away"
