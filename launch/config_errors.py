"""Turns pydantic's findings about a configuration into one plain line each, naming the nearest key for an unknown one."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from rl.settings import Settings

SIMILAR = 0.6
"""Least difflib ratio of a key worth suggesting."""

UNREPLAYABLE = {
    "repetition_penalty": "makes the distribution depend on every token before",
    "presence_penalty": "makes the distribution depend on every token before",
    "frequency_penalty": "makes the distribution depend on every token before",
    "bad_words": "takes words out of the sampling distribution",
    "logit_bias": "moves single logits",
    "min_tokens": "forbids the end of an answer before a length",
    "allowed_token_ids": "takes tokens out of the sampling distribution",
}
"""Sampling options that users of vLLM know, and what each does to the distribution that tokens are drawn from."""


MANY_NAMES = 12
"""Up to so many names are all shown."""


def explain_validation(error: ValidationError, data: Mapping[str, Any]) -> str:
    """One indented line per problem, in the order of the settings; ``data`` is what was validated."""
    unions: dict[str, list[str]] = {}
    lines: dict[str, str] = {}
    for detail in error.errors(include_url=False):
        key = _key(detail, data)
        if detail["type"] in ("extra_forbidden", "missing", "value_error"):
            lines[f"{key}:{detail['msg']}"] = _named_problem(detail, key)
            continue
        # A value that fits no branch of a union has one finding per branch: they are one problem.
        expected = unions.setdefault(key, [])
        expected.append(_expected(detail["msg"]) if detail["type"] != "literal_error" else _names(detail))
        # A dict keeps first insertion order, so a repeated key stays in its place.
        lines[f"{key}:type"] = f"{key}={detail['input']!r}: expected {' or '.join(dict.fromkeys(expected))}"
    return "\n".join(f"  - {line}" for line in lines.values())


def nearest_key(unknown: str) -> str | None:
    """The existing dotted key most like ``unknown``, by whole path or by last part; None when nothing is alike."""
    last = unknown.rpartition(".")[2]

    def likeness(known: str) -> tuple[float, float]:
        whole = difflib.SequenceMatcher(None, unknown, known).ratio()
        tail = difflib.SequenceMatcher(None, last, known.rpartition(".")[2]).ratio()
        return max(whole, tail), whole

    best = max(known_keys(), key=likeness)
    return best if likeness(best)[0] >= SIMILAR else None


def known_keys(model: type[BaseModel] = Settings, prefix: str = "") -> Iterator[str]:
    """Every dotted key of the settings, sections included."""
    for name, field in model.model_fields.items():
        yield prefix + name
        for section in _sections(field.annotation):
            yield from known_keys(section, f"{prefix}{name}.")


def _sections(annotation: Any) -> list[type[BaseModel]]:
    if get_origin(annotation) in (Union, UnionType):
        return [section for option in get_args(annotation) for section in _sections(option)]
    if get_origin(annotation) is Annotated:
        return _sections(get_args(annotation)[0])
    return [annotation] if isinstance(annotation, type) and issubclass(annotation, BaseModel) else []


def _key(detail: ErrorDetails, data: Any) -> str:
    """The dotted part of pydantic's location that is a place in the data: the rest names branches of a union."""
    parts: list[str] = []
    for part in detail["loc"]:
        if isinstance(data, Mapping):
            last = part == detail["loc"][-1]
            if part not in data and not (last and detail["type"] == "missing"):
                continue
            data = data.get(part)
        elif isinstance(data, list):
            if not isinstance(part, int):
                continue
            data = data[part] if part < len(data) else None
        else:
            break
        parts.append(str(part))
    return ".".join(parts)


def _named_problem(detail: ErrorDetails, key: str) -> str:
    if detail["type"] == "missing":
        return f"{key} is missing; set it in the file or with {key}=..."
    if detail["type"] == "value_error":
        return detail["msg"].removeprefix("Value error, ")
    # An unknown section is best recognised by the key inside it: `learnr.lr` rather than `learnr`.
    unknown, inner = key, detail["input"]
    while isinstance(inner, dict) and len(inner) == 1:
        name, inner = next(iter(inner.items()))
        unknown = f"{unknown}.{name}"
    if (reason := UNREPLAYABLE.get(unknown.rpartition(".")[2])) is not None:
        return f"{unknown} {reason}, which the learner cannot replay: importance ratios would be wrong; leave it out in training"
    nearest = nearest_key(unknown)
    return f"unknown key {unknown}" + (f"; did you mean {nearest}?" if nearest else "")


def _names(detail: ErrorDetails) -> str:
    """The names that are allowed; of many only the nearest, with how many there are."""
    names = re.findall(r"'([^']*)'", detail["msg"])
    if len(names) <= MANY_NAMES:
        return _expected(detail["msg"])
    close = difflib.get_close_matches(str(detail["input"]), names, n=3)
    hint = f"; did you mean {' or '.join(map(repr, close))}?" if close else ""
    return f"one of {len(names)} names, which docs/configuration.md lists or refers to{hint}"


def _expected(message: str) -> str:
    """pydantic's ``Input should be a valid number`` as ``a valid number``."""
    text = message.removeprefix("Input should be ")
    if text.startswith(("greater", "less")):
        return f"a number {text}"
    return "a section with keys of its own" if text == "an object" else text[0].lower() + text[1:]
