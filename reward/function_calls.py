"""One call of a reward function: from answers to the arguments that its library would give, and from what it returns to scores.

Pure but for the call itself. Used in the child process, so nothing heavy is imported.
"""

from __future__ import annotations

import asyncio
import inspect
import itertools
import json
import math
import re
import traceback
from collections.abc import Awaitable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, SupportsFloat

from reward.functions import RewardFunction, RewardFunctionError

MAX_EVIDENCE_CHARS = 300
MAX_EXTRAS_CHARS = 16_000
_THINK_TAGS = ("<think>", "</think>")
_OWN_COLUMNS = frozenset({"prompt", "completion", "prompts", "completions", "completion_ids", "prompt_ids"})
"""Columns of the data that would take the place of what the convention gives."""
_GOLD_COLUMNS = ("answer", "solution", "ground_truth")


@dataclass(frozen=True)
class FunctionRequest:
    """One answer for reward functions to judge."""

    prompt: str
    """The user's turn, or the whole prompt where no chat template is used."""
    completion: str
    """The response, prefill included, without special tokens; think tags stay."""
    golds: tuple[str, ...]
    """Accepted reference answers, at least one."""
    entry: str = "{}"
    """JSON object: the data row or reasoning-gym entry."""
    prompt_ids: tuple[int, ...] = ()
    completion_ids: tuple[int, ...] = ()
    """Response tokens, end of sequence included; per-token rewards have this length."""


@dataclass(frozen=True)
class Context:
    """What all answers of a run share."""

    data_source: str = ""
    """verl's `data_source` where the row has none."""
    messages: bool = False
    """Whether TRL's prompts and completions are lists of chat messages."""
    system_prompt: str | None = None
    """First of the messages of a prompt."""


@dataclass(frozen=True)
class Outcome:
    """What became of one answer; see rl.types.FunctionScore, which the parent makes of it."""

    status: Literal["ok", "none", "crashed"]
    value: float | None = None
    per_token: tuple[float | None, ...] | None = None
    correct: bool | None = None
    extras: Mapping[str, float] = field(default_factory=dict)
    evidence: str = ""


@dataclass
class Log:
    """What a function of TRL's convention says beside its rewards: ``log_extra(column, values)``, ``log_metric(name, value)``."""

    columns: dict[str, list[Any]] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)

    def extra(self, column: str, values: Iterable[Any]) -> None:
        self.columns.setdefault(column, []).extend(values)

    def metric(self, name: str, value: Any) -> None:
        self.metrics[name] = value


class WrongResult(ValueError):
    """A function gave back something that its convention does not know; the message names it."""


def arguments_of(
    function: RewardFunction, requests: Sequence[FunctionRequest], context: Context, *, step: int, log: Log
) -> list[dict[str, Any]]:
    """Keyword arguments of the calls that reward these answers: one call for all, or one for each (verl's plain form).

    Raises RewardFunctionError for a parameter that nothing gives, such as a column that the data lacks.
    """
    if function.convention == "trl":
        given = _trl_arguments(requests, context, step, log)
        if "prompt_ids" in function.names:  # TRL does not give them, so ``**kwargs`` does not get them
            given["prompt_ids"] = [list(request.prompt_ids) for request in requests]
        return [function.bound(given)]
    rows = [_verl_arguments(request, context) for request in requests]
    if function.convention == "verl":
        return [function.bound(row) for row in rows]
    return [function.bound({f"{name}s": [row[name] for row in rows] for name in rows[0]})]


def _trl_arguments(requests: Sequence[FunctionRequest], context: Context, step: int, log: Log) -> dict[str, Any]:
    entries = [json.loads(request.entry) for request in requests]
    columns = {name: [e.get(name) for e in entries] for name in dict.fromkeys(name for e in entries for name in e)}
    golds = {name: [_gold(request, {}) for request in requests] for name in _GOLD_COLUMNS}
    golds["ground_truth"] = [_gold(request, entry) for request, entry in zip(requests, entries, strict=True)]
    return {
        **golds,
        **{name: values for name, values in columns.items() if name not in _OWN_COLUMNS},
        "prompts": [_prompt(request, context) for request in requests],
        "completions": [_completion(request, context) for request in requests],
        "completion_ids": [list(request.completion_ids) for request in requests],
        "trainer_state": SimpleNamespace(global_step=step),
        "log_extra": log.extra,
        "log_metric": log.metric,
    }


def _prompt(request: FunctionRequest, context: Context) -> str | list[dict[str, str]]:
    if not context.messages:
        return request.prompt
    system = [] if context.system_prompt is None else [{"role": "system", "content": context.system_prompt}]
    return [*system, {"role": "user", "content": request.prompt}]


def _completion(request: FunctionRequest, context: Context) -> str | list[dict[str, str]]:
    return [{"role": "assistant", "content": request.completion}] if context.messages else request.completion


def _verl_arguments(request: FunctionRequest, context: Context) -> dict[str, Any]:
    entry = json.loads(request.entry)
    extra_info = entry.get("extra_info")
    return {
        "data_source": entry.get("data_source") or context.data_source,
        "solution_str": request.completion,
        "ground_truth": _gold(request, entry),
        "extra_info": extra_info if isinstance(extra_info, dict) else entry,
    }


def _gold(request: FunctionRequest, entry: Mapping[str, Any]) -> Any:
    """What verl's rows call the ground truth, else the reference answer: a text, or the list of all that are accepted."""
    model = entry.get("reward_model")
    if isinstance(model, dict) and model.get("ground_truth") is not None:
        return model["ground_truth"]
    return request.golds[0] if len(request.golds) == 1 else list(request.golds)


def invoke(function: RewardFunction, calls: Sequence[Mapping[str, Any]], runner: asyncio.Runner) -> list[Any]:
    """Call the function with each set of keyword arguments; what is awaitable is awaited together, on one lasting event loop.

    Raises whatever a call raises; of several awaited calls, each failure is an item of the result.
    """
    results = [function.call(**kwargs) for kwargs in calls]
    waiting = [result for result in results if inspect.isawaitable(result)]
    if not waiting:
        return results
    # One loop for all calls: clients that a module keeps, such as an HTTP session, belong to the loop they were first used on.
    answers = iter(runner.run(_gathered(waiting)))
    results = [next(answers) if inspect.isawaitable(result) else result for result in results]
    if len(results) == 1 and isinstance(results[0], BaseException):
        raise results[0]
    return results


async def _gathered(waiting: Iterable[Awaitable[Any]]) -> list[Any]:
    return await asyncio.gather(*waiting, return_exceptions=True)


def outcomes_of(
    function: RewardFunction, results: Sequence[Any], requests: Sequence[FunctionRequest], *, log: Log
) -> list[Outcome]:
    """One outcome per answer from what the calls returned. Raises WrongResult where it cannot be told whose it is."""
    if function.convention == "verl":
        return [_verl_outcome(result) for result in results]
    items = _items(results[0], len(requests))
    if function.convention == "verl_batch":
        return [_verl_outcome(item) for item in items]
    extras = _logged(log, len(requests))
    return [
        _trl_outcome(item, len(request.completion_ids), more) for item, request, more in zip(items, requests, extras, strict=True)
    ]


def _items(result: Any, count: int) -> list[Any]:
    result = _plain(result)
    if not isinstance(result, Iterable) or isinstance(result, str | bytes | Mapping):
        raise WrongResult(f"returned {described(result)} where a list with one item per completion is due")
    items = list(itertools.islice(result, count + 1))
    if len(items) != count:
        what = "more" if len(items) > count else str(len(items))
        raise WrongResult(f"returned {what} items for {count} completions; return exactly one each, None where it does not apply")
    return [_plain(item) for item in items]


def _trl_outcome(item: Any, tokens: int, extras: Mapping[str, float]) -> Outcome:
    if item is None:
        return Outcome("none", extras=extras)
    try:
        if not isinstance(item, list | tuple):
            return Outcome("ok", _number(item), extras=extras)
        if len(item) != tokens:
            raise WrongResult(f"returned {len(item)} rewards for a completion of {tokens} tokens; return one per token")
        per_token = tuple(None if x is None else _number(x) for x in map(_plain, item))
    except WrongResult as error:
        return crashed(error)
    given = [x for x in per_token if x is not None]
    return Outcome("ok", math.fsum(given), per_token, extras=extras) if given else Outcome("none", extras=extras)


def _verl_outcome(result: Any) -> Outcome:
    if isinstance(result, BaseException):
        return crashed(result)
    result = _plain(result)
    if result is None:
        return Outcome("none")
    try:
        if not isinstance(result, Mapping):
            return Outcome("ok", _number(result))
        if "score" not in result:
            raise WrongResult(f"returned a dict without `score` (it has: {', '.join(map(str, list(result)[:10]))})")
        extras = _numbers({name: value for name, value in result.items() if name != "score"})
        score = _plain(result["score"])
        if score is None:
            return Outcome("none", correct=_correct(extras), extras=extras)
        return Outcome("ok", _number(score), correct=_correct(extras), extras=extras)
    except WrongResult as error:
        return crashed(error)


def _correct(extras: Mapping[str, float]) -> bool | None:
    """verl's ``acc`` where it is a plain yes or no."""
    return bool(extras["acc"]) if extras.get("acc") in (0.0, 1.0) else None


def _logged(log: Log, count: int) -> list[dict[str, float]]:
    """Numbers said beside the rewards, by answer: of columns that have a value for each, and metrics, which count for all."""
    full = {name: values for name, values in log.columns.items() if len(values) == count}
    return [_numbers({**log.metrics, **{name: values[i] for name, values in full.items()}}) for i in range(count)]


def _numbers(values: Mapping[Any, Any]) -> dict[str, float]:
    """The finite numbers among them; texts and the like are no figures for a log."""
    found = {}
    for name, value in values.items():
        plain = _plain(value)
        if isinstance(plain, int | float) and _is_finite(plain):
            found[str(name)] = float(plain)
    if sum(len(name) + 32 for name in found) > MAX_EXTRAS_CHARS:
        raise WrongResult(f"returned {len(found)} further numbers for one answer; return fewer, or shorter names")
    return found


def _is_finite(value: int | float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond the floats
        return False


def _number(value: Any) -> float:
    if not isinstance(value, SupportsFloat) or isinstance(value, str | bytes):
        raise WrongResult(f"returned {described(value)} where a number is due")
    try:
        number = float(value)
    except (OverflowError, TypeError, ValueError) as error:
        raise WrongResult(f"returned {described(value)}, which is no number ({type(error).__name__})") from error
    if not math.isfinite(number):
        raise WrongResult(f"returned {number}; return a finite number, or None where the function does not apply")
    return number


def _plain(value: Any) -> Any:
    """Arrays and tensors as numbers and lists, whichever library made them."""
    tolist = getattr(value, "tolist", None)
    return tolist() if callable(tolist) else value


def described(value: Any) -> str:
    """What came back, in a few words; never calls the value's own ``repr``, which might do anything."""
    if value is None:
        return "None"
    if isinstance(value, str):
        return f"the text {value[:40]!r}" if len(value) <= 40 else f"a text of {len(value)} characters"
    if isinstance(value, bool | float):
        return repr(value)
    if isinstance(value, Sequence | Mapping):
        return f"a {type(value).__name__} of {len(value)}"
    return f"something of type {type(value).__name__}"


def crashed(error: BaseException) -> Outcome:
    """The outcome of an answer whose call raised."""
    return Outcome("crashed", evidence=evidence_of(error))


def evidence_of(error: BaseException) -> str:
    """An exception in a line: its kind, its words, and the place in the file it came from."""
    if isinstance(error, WrongResult | RewardFunctionError):
        return str(error).replace("\n", ";")[:MAX_EVIDENCE_CHARS]
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    words = " ".join(str(error)[:1000].split())
    return f"{type(error).__name__}: {words}"[: MAX_EVIDENCE_CHARS - len(place)] + place


def without_special_tokens(text: str, special_tokens: Sequence[str]) -> str:
    """A response as both libraries show it to reward functions: special tokens taken out, the think tags left in."""
    names = sorted((t for t in special_tokens if t and t not in _THINK_TAGS), key=len, reverse=True)
    return re.sub("|".join(map(re.escape, names)), "", text) if names else text
