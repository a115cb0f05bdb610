"""Where the token budgets of a group come from: a fixed list, a random range, a schedule over steps, or a memory per prompt."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag, TypeAdapter, model_validator

from rl.sections import Positive, Section

BudgetChoice = Annotated[int, Field(gt=0)] | Literal["free"]

ROUNDING = 1e-9
"""Tokens added before rounding down, because 100 * 0.29 is 28.999999999999996."""


class BudgetRange(Section):
    """A random budget, drawn anew at every step (L1: 100 to 4000, uniform, one per prompt; arXiv 2503.04697)."""

    kind: Literal["range"]
    low: Positive
    """Smallest budget in tokens."""
    high: Positive
    """Largest budget in tokens."""
    scale: Literal["uniform", "log_uniform"] = "uniform"
    per: Literal["prompt", "member"] = "prompt"
    """`prompt`: one budget for the whole group; `member`: each rollout its own."""

    @model_validator(mode="after")
    def _ordered(self) -> BudgetRange:
        if self.low > self.high:
            raise ValueError(f"rollout.budgets: low={self.low} is above high={self.high}; swap them")
        return self


class BudgetSchedule(Section):
    """One budget for all, falling exponentially over the run (RMT: 800 to 160, gamma 0.2; arXiv 2509.24375)."""

    kind: Literal["schedule"]
    start: Positive = 800
    """Budget in tokens at the first step."""
    gamma: float = Field(default=0.2, gt=0, le=1)
    """Share of `start` that is left after `steps` steps."""
    floor: Positive = 1
    """Smallest budget in tokens."""
    steps: Positive | None = None
    """Length of the schedule; None is max_steps."""

    @model_validator(mode="after")
    def _falls(self) -> BudgetSchedule:
        _check_floor(self.floor, self.start)
        return self


class BudgetMemory(Section):
    """A budget per prompt, from the lengths of its correct answers so far."""

    kind: Literal["memory"]
    statistic: Literal["shortest", "mean"] = "shortest"
    """Of the prompt's correct answers: the shortest ever, or their running mean."""
    factor: float = Field(default=1.0, gt=0)
    """The budget is so many times the statistic."""
    start: Positive
    """Budget in tokens of a prompt that was never answered correctly."""
    floor: Positive = 1
    """Smallest budget in tokens."""

    @model_validator(mode="after")
    def _starts_above_the_floor(self) -> BudgetMemory:
        _check_floor(self.floor, self.start)
        return self


def _check_floor(floor: int, start: int) -> None:
    if floor > start:
        raise ValueError(f"rollout.budgets: floor={floor} is above start={start}; lower floor or raise start")


def only_section(value: Any) -> Any:
    """The section inside ``[{kind: ...}]``; any other value as it is.

    A list takes the place of the list in the file that a file builds on; a section would be merged into it, which YAML
    composition cannot do. Hence the form with brackets.
    """
    return value[0] if isinstance(value, list) and len(value) == 1 and isinstance(value[0], dict) else value


def _kind(value: Any) -> str:
    if isinstance(value, (BudgetRange, BudgetSchedule, BudgetMemory)):
        return value.kind
    return str(value.get("kind", "range")) if isinstance(value, dict) else "list"


BudgetSource = Annotated[
    Annotated[list[BudgetChoice], Tag("list")]
    | Annotated[BudgetRange, Tag("range")]
    | Annotated[BudgetSchedule, Tag("schedule")]
    | Annotated[BudgetMemory, Tag("memory")],
    Discriminator(
        _kind,
        custom_error_type="budget_kind",
        custom_error_message="a list, or a section whose kind is range, schedule or memory",
    ),
    BeforeValidator(only_section),
]
Source = list[BudgetChoice] | BudgetRange | BudgetSchedule | BudgetMemory
_SOURCE: TypeAdapter[Source] = TypeAdapter(BudgetSource)


def largest_budget(source: Source) -> int | None:
    """The largest budget that is written down, in tokens; None where there is none. A memory may go above it, up to the room."""
    match source:
        case BudgetRange():
            return source.high
        case BudgetSchedule() | BudgetMemory():
            return source.start
        case _:
            numbers = [choice for choice in source if isinstance(choice, int)]
            return max(numbers) if numbers else None


def scheduled_budget(source: BudgetSchedule, step: int, steps: int) -> int:
    """``B_t = max(floor, floor(start * gamma^(t / T)))`` in tokens, from step T on that of T.

    step t: finished steps, 0 at the first. steps T: length of the schedule. Source: RMT (arXiv 2509.24375).
    """
    share = min(step, steps) / steps
    return max(source.floor, math.floor(source.start * source.gamma**share + ROUNDING))


def budget_bounds(source: Source, *, room: int) -> tuple[int, int] | None:
    """Smallest and largest budget that can occur, in tokens; None where there is none.

    room: the largest budget that a response has room for, which bounds a memory.
    """
    match source:
        case BudgetRange():
            return source.low, source.high
        case BudgetSchedule():
            return scheduled_budget(source, 1, 1), source.start
        case BudgetMemory():
            return source.floor, max(room, source.start)
        case _:
            numbers = [choice for choice in source if isinstance(choice, int)]
            return (min(numbers), max(numbers)) if numbers else None


def describe_budgets(source: Any) -> str:
    """The source in a few words, for tables and cards; ``source`` may be plain values of a saved configuration.

    Raises ValueError (pydantic's) for values that are no source.
    """
    match checked := _SOURCE.validate_python(source):
        case BudgetRange():
            return f"{checked.low} to {checked.high}, {checked.scale.replace('_', '-')}, one per {checked.per}"
        case BudgetSchedule():
            end = "max_steps" if checked.steps is None else f"{checked.steps} steps"
            return f"{checked.start} falling to {scheduled_budget(checked, 1, 1)} over {end}"
        case BudgetMemory():
            floor = f", at least {checked.floor}" if checked.floor > 1 else ""
            return f"{checked.start}, then {checked.factor:g} x the {checked.statistic} correct answer of the prompt{floor}"
        case _:
            return ", ".join(str(choice) for choice in checked)
