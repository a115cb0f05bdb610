"""``budget-rl reward-check``: tries a reward function on sample answers before a run depends on it."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

from reward.function_calls import FunctionRequest
from reward.function_pool import FunctionPool
from reward.functions import RewardFunctionError
from rl.data import Problem, to_json
from rl.reward_settings import FunctionSettings
from rl.types import FunctionScore

SAMPLE_PROBLEMS = tuple(
    Problem(question, answer, to_json({"question": question, "answer": answer}))
    for question, answer in (
        ("What is 12 + 30?", "42"),
        ("What is 7 * 11?", "77"),
        ("What is 144 / 12?", "12"),
        ("What is 5 - 8?", "-3"),
    )
)
"""What is asked where no data is named."""
_GOLD_FORMS = (
    "{gold}",
    "<think>\nLet me see.\n</think>\n{gold}",
    "<think>\nLet me see.\n</think>\nThe answer is $\\boxed{{{gold}}}$.",
    "<think>\nLet me see.\n</think>\n#### {gold}",
    "<think>\nLet me see.\n</think>\nAnswer: {gold}",
)
_GARBAGE = ("", "I would rather talk about the weather.", "<think>\nhm\n</think>\nThe answer is $\\boxed{none of these}$.")
NASTY = MappingProxyType(
    {
        "1 MB of text": "wait, so " * (2**20 // 9),
        "blanks alone": " \n\t ",
        "a NUL character": "<think>\0</think>\0#### 4\0",
        "unusual unicode": "\u202e\u200b\ufeff\u00bc \u0664\u0662 \U0001f9ee e\u0301 \U0001d7d8 \\boxed{\u221e}",
        "5000 times </think>": "</think>" * 5000,
        "5000 times \\boxed{": "\\boxed{" * 5000,
        "5000 open brackets": "\\boxed{" + "(" * 5000 + "}",
        "a number of 5000 digits": "\\boxed{" + "9" * 5000 + "} #### " + "9" * 5000,
        "a tower of powers": "\\boxed{9^{9^{9^{9}}}} #### 9**9**9**9",
        "50,000 equal characters": "a" * 50_000 + "!",
    }
)
"""What models write sooner or later, by name."""
CHARS_PER_TOKEN = 4
MAX_TRIED_ALONE = 16
_TOLERANCE = 1e-5  # a reward model rounds differently in batches of another shape
_NOT_TOLD = "cannot be told, for the same batch is not scored the same twice"


_LEFT_OUT = "such an answer earns the method's reward alone; with reward.method=none it is CRASHED"


@dataclass(frozen=True)
class Finding:
    """One thing tried: ``FAILED`` makes the check fail."""

    name: str
    status: Literal["ok", "warning", "FAILED"]
    found: str
    fix: str = ""


Scores = list[FunctionScore]


def check_function(
    function: FunctionSettings,
    problems: Sequence[Problem] = SAMPLE_PROBLEMS,
    *,
    deadline_s: float,
    data_source: str = "sample",
    system_prompt: str | None = None,
) -> list[Finding]:
    """Load the function in a process of its own and try it on gold answers, garbage and nasty texts.

    ``deadline_s``: of one call. Where `messages` is not set, a function of TRL's convention is tried with chat messages and with
    plain texts, and judged by the form that it takes. Raises ValueError without problems.
    """
    if not problems:
        raise ValueError("there are no problems to try the function on")
    requests = [request for problem in problems for request in _requests(problem)]
    with contextlib.ExitStack() as stack:
        pools: dict[bool, FunctionPool] = {}
        for messages in (True, False) if function.messages is None else (function.messages,):
            try:
                pool = FunctionPool(
                    [function], deadline_s, data_source=data_source, chat=messages, system_prompt=system_prompt, inspect=True
                )
                pools[messages] = stack.enter_context(pool)
                pool.wait_ready()
            except RewardFunctionError as error:
                return [Finding("loads", "FAILED", error.cause, error.fix)]
            if pool.conventions != ["trl"]:
                break  # verl's have one form
        scores = {messages: _scored(pool, requests) for messages, pool in pools.items()}
        # A function of texts that is given messages may well return numbers, but then as a rule the same one for all.
        chosen = max(scores, key=lambda messages: len({score.value for score in scores[messages] if score.value is not None}))
        trial = _Trial(pools[chosen], problems, requests)
        return [trial.loads(), *_forms(scores, chosen), *trial.findings()]


def show_findings(findings: Sequence[Finding], console: Console | None = None) -> None:
    """The findings as a table, then what to do about each that is not ok."""
    console = console or Console(highlight=False)
    table = Table("checked", "status", "found")
    for finding in findings:
        table.add_row(finding.name, finding.status, Text(finding.found))
    console.print(table)
    for finding in findings:
        if finding.fix:
            console.print(f"{finding.status}: {finding.name}: {finding.fix}", markup=False, soft_wrap=True)


class _Trial:
    """A loaded function under test."""

    def __init__(self, pool: FunctionPool, problems: Sequence[Problem], requests: Sequence[FunctionRequest]) -> None:
        self._pool, self._problems, self._requests = pool, problems, requests
        self._first = _scored(pool, requests)
        self._reports = list(pool.reports)
        self._is_dead = all(score.status in ("timed_out", "crashed") for score in self._first)
        """Not one answer was scored: trying more of them would cost a deadline each and tell nothing new."""
        self._repeats = self._is_dead or _differing(self._first, _scored(pool, requests)) is None

    def loads(self) -> Finding:
        how = {"trl": "TRL's convention", "verl": "verl's convention", "verl_batch": "verl's convention, batched"}
        return Finding("loads", "ok", how[self._pool.conventions[0]])

    def findings(self) -> Iterator[Finding]:
        yield self._results()
        if self._is_dead:
            return
        yield self._applies()
        yield self._same_twice()
        yield self._any_order()
        yield self._alone()
        yield self._inputs_unchanged()
        yield self._survives()
        yield self._tells_right_from_wrong()
        yield self._speed()
        yield self._prints()

    def _results(self) -> Finding:
        name = "type, length, finite"
        bad = [score for score in self._first if score.status in ("timed_out", "crashed")]
        failed = [report for report in self._reports if report.failed]
        if not bad and not failed:
            return Finding(name, "ok", f"{len(self._first)} answers scored")
        if bad:
            found = f"{len(bad)} of {len(self._first)} answers got no score; the first: {bad[0].evidence}"
        else:
            found = f"a call for {failed[0].rows} answers gave no scores, though each alone does: {failed[0].failed}"
        fix = "return a finite number for each answer, None where it does not apply; --data and --config name other data"
        return Finding(name, "FAILED", found, fix)

    def _applies(self) -> Finding:
        none = sum(score.status == "none" for score in self._first)
        found = f"{none} of {len(self._first)} answers got None"
        if none < len(self._first):
            return Finding("applies", "ok", found)
        return Finding("applies", "warning", found, _LEFT_OUT)

    def _same_twice(self) -> Finding:
        if self._repeats:
            return Finding("same twice", "ok", "equal scores")
        fix = "seed what it draws, keep no state between calls, ask a judge with temperature 0"
        return Finding("same twice", "FAILED", "the same batch got other scores the second time", fix)

    def _any_order(self) -> Finding:
        backwards = _scored(self._pool, self._requests[::-1])[::-1]
        fix = "let each answer's reward depend on that answer alone; a batch is what arrived together, not a group"
        return self._compared("any order", self._first, backwards, "batch backwards", fix)

    def _alone(self) -> Finding:
        some = self._requests[:MAX_TRIED_ALONE]
        alone = [_scored(self._pool, [request])[0] for request in some]
        fix = "do not compare or normalise over a batch: what arrives together changes with timing"
        return self._compared("alone as in a batch", self._first[: len(some)], alone, "alone", fix)

    def _compared(self, name: str, expected: Scores, scores: Scores, how: str, fix: str) -> Finding:
        if not self._repeats:
            return Finding(name, "warning", _NOT_TOLD)
        index = _differing(expected, scores)
        if index is None:
            return Finding(name, "ok", "equal scores")
        found = f"answer {index} got {_shown(expected[index])} in the batch and {_shown(scores[index])} {how}"
        return Finding(name, "FAILED", found, fix)

    def _inputs_unchanged(self) -> Finding:
        changed = sorted({name for report in self._reports for name in report.changed})
        if not changed:
            return Finding("leaves its inputs alone", "ok", "unchanged")
        return Finding("leaves its inputs alone", "FAILED", f"it changed {', '.join(changed)}", "work on copies")

    def _survives(self) -> Finding:
        requests = [_request(self._problems[0], text) for text in NASTY.values()]
        scores = dict(zip(NASTY, _scored(self._pool, requests), strict=True))
        bad = {name: score for name, score in scores.items() if score.status in ("timed_out", "crashed")}
        if not bad:
            return Finding("nasty texts", "ok", f"{len(scores)} survived")
        found = "; ".join(f"{name}: {score.status}, {score.evidence}" for name, score in bad.items())
        fix = "bound what it parses (the last few thousand characters), and treat what it cannot parse as wrong"
        return Finding("nasty texts", "FAILED", found, fix)

    def _tells_right_from_wrong(self) -> Finding:
        name = "gold above garbage"
        judged = above = 0
        size = len(self._first) // len(self._problems)
        for i in range(len(self._problems)):
            values = [score.value for score in self._first[i * size : (i + 1) * size]]
            gold, garbage = ([v for v in part if v is not None] for part in (values[: -len(_GARBAGE)], values[-len(_GARBAGE) :]))
            if gold and garbage:
                judged += 1
                above += max(gold) > max(garbage)
        found = f"for {above} of {judged} questions"
        if judged and above == judged:
            return Finding(name, "ok", found)
        fix = (
            "right if it rewards something else than correctness; otherwise see which column and which layout of answers it reads"
        )
        return Finding(name, "warning", found, fix)

    def _speed(self) -> Finding:
        seconds = sum(report.seconds for report in self._reports)
        slowest = max((report.seconds for report in self._reports), default=0.0)
        answers = sum(report.rows for report in self._reports)
        found = f"{answers / max(seconds, 1e-9):,.0f} answers/s; slowest call {slowest:.3g} s of {self._pool.deadline_s:g} s"
        if slowest <= self._pool.deadline_s / 2:
            return Finding("speed", "ok", found)
        return Finding("speed", "warning", found, "raise reward.function_deadline_s, or make it faster")

    def _prints(self) -> Finding:
        chars = sum(report.printed_chars for report in self._reports)
        if not chars:
            return Finding("prints", "ok", "nothing")
        start = next(report.printed for report in self._reports if report.printed)
        fix = "it is not shown in a run; return numbers to log instead (a dict, or log_metric)"
        return Finding("prints", "warning", f"{chars:,} characters: {start.strip()[:80]!r}", fix)


def _forms(scores: Mapping[bool, Scores], chosen: bool) -> Iterator[Finding]:
    """What TRL's functions can read: completions as chat messages, as texts, or both."""
    taken = [messages for messages, some in scores.items() if any(s.status in ("ok", "none") for s in some)]
    if len(scores) < 2 or not taken:
        return
    works = "chat messages" if chosen else "plain texts"
    if len(taken) == 1:
        found = f"takes only {works}"
    elif _differing(scores[True], scores[False]) is None:
        yield Finding("messages or texts", "ok", "takes both")
        return
    else:
        found = f"scores chat messages and plain texts differently; tried here with {works}"
    fix = "set `messages` to what it was written for, or it is given messages wherever the tokenizer has a chat template"
    yield Finding("messages or texts", "warning", found, fix)


def _requests(problem: Problem) -> list[FunctionRequest]:
    gold = problem.answer.rpartition("####")[2].strip()
    return [_request(problem, text) for text in (*(form.format(gold=gold) for form in _GOLD_FORMS), *_GARBAGE)]


def _request(problem: Problem, text: str) -> FunctionRequest:
    # No tokenizer is at hand: ids that follow from the text, ended by one that stands for the end of sequence.
    ids = (*(1 + ord(char) % 1000 for char in text[::CHARS_PER_TOKEN]), 0)
    return FunctionRequest(problem.question, text, (problem.answer, *problem.other_answers), problem.entry_json, (1, 2, 3), ids)


def _scored(pool: FunctionPool, requests: Sequence[FunctionRequest]) -> Scores:
    return [scores[0] for scores in pool.score(requests)]


def _differing(expected: Scores, scores: Scores) -> int | None:
    """Index of the first answer that is scored otherwise."""
    for index, (one, other) in enumerate(zip(expected, scores, strict=True)):
        same = one.status == other.status and _close([one.value], [other.value])
        if not same or not _close(one.per_token or (), other.per_token or ()):
            return index
    return None


def _close(one: Sequence[float | None], other: Sequence[float | None]) -> bool:
    return len(one) == len(other) and all(
        a == b or (a is not None and b is not None and math.isclose(a, b, rel_tol=_TOLERANCE, abs_tol=_TOLERANCE))
        for a, b in zip(one, other, strict=True)
    )


def _shown(score: FunctionScore) -> str:
    return score.status if score.value is None else f"{score.value:g}"
