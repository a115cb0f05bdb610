"""Reward functions as their authors write them: good ones in both conventions, and one for each promise that can be broken."""

from __future__ import annotations

import itertools
import re
import time
from collections.abc import Callable
from typing import Any

Messages = list[list[dict[str, str]]]

# ---- good ------------------------------------------------------------------------------------------------------------


def last_number(text: str) -> str | None:
    found = re.findall(r"-?\d+", text[-200:])
    return found[-1] if found else None


def right_answer(completions: Messages, answer: list[str], **kwargs: Any) -> list[float]:
    """TRL's style: chat messages, a column of the data."""
    contents = [completion[0]["content"] for completion in completions]
    return [float(last_number(text) == gold) for text, gold in zip(contents, answer, strict=True)]


def easy_ones_only(
    prompts: Messages, completions: Messages, level: list[int], log_extra: Callable[..., None], **kwargs: Any
) -> list[float | None]:
    """TRL's style: None where it does not apply, something for the log."""
    log_extra("asked", [len(prompt[-1]["content"]) for prompt in prompts])
    return [1.0 if n < 3 else None for n in level]


async def judged(completions: list[str], **kwargs: Any) -> list[float]:
    """TRL's style, async, of plain texts."""
    return [float(last_number(text) is not None) for text in completions]


def late(completions: list[str], trainer_state: Any) -> list[float]:
    """TRL's style: depends on the progress of the training."""
    return [float(trainer_state.global_step)] * len(completions)


def think_end(completion_ids: list[list[int]], **kwargs: Any) -> list[list[float | None]]:
    """Rewards of single tokens: 1 for each token 7."""
    return [[1.0 if id_ == 7 else None for id_ in ids] for ids in completion_ids]


def graded(data_source: str, solution_str: str, ground_truth: str, extra_info: dict[str, Any]) -> dict[str, Any]:
    """verl's style."""
    right = last_number(solution_str) == ground_truth
    return {"score": 1.0 if right else -1.0, "acc": right, "pred": last_number(solution_str), "brief": len(solution_str) < 9}


# ---- each breaks one promise -------------------------------------------------------------------------------------------

_counter = itertools.count()


def too_few(completions: list[str]) -> list[float]:
    return [1.0 for _ in completions][:-1]


def infinite(completions: list[str]) -> list[float]:
    return [1.0 / len(text) if text else float("inf") for text in completions]


def text(solution_str: str) -> str:
    return "1.0"


def forgetful(solution_str: str) -> float:
    """Another value at each call."""
    return float(next(_counter))


def by_place(completions: list[str]) -> list[float]:
    return [float(i) for i, _ in enumerate(completions)]


def by_batch(completions: list[str]) -> list[float]:
    """Relative to the longest of the batch."""
    longest = max(len(text) for text in completions)
    return [len(text) / max(1, longest) for text in completions]


def emptying(completions: list[str], answer: list[str]) -> list[float]:
    answer.clear()
    return [float(len(text)) for text in completions]


def recursive(solution_str: str) -> float:
    """Breaks on deep nesting."""
    return 1.0 + recursive(solution_str.replace("(", "", 1)) if "(" in solution_str else 0.0


def slow_on_digits(solution_str: str) -> float:
    if "9" * 1000 in solution_str:
        time.sleep(600)
    return 0.0


def chatty(solution_str: str) -> float:
    print("judging", solution_str[:20])
    return 0.0


def needs_a_column(completions: list[str], difficulty: list[int]) -> list[float]:
    return [float(n) for n in difficulty]
