"""Where the budgets of a group come from: a list, a random range, a schedule over steps, a memory per prompt, or efforts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag, TypeAdapter, model_validator

from rl.sections import Positive, Section

BudgetChoice = Annotated[int, Field(gt=0)] | Literal["free", "no_think"]
Effort = Annotated[float, Field(ge=0.01, le=100)]

ROUNDING = 1e-9
"""Tokens added before rounding down, because 100 * 0.29 is 28.999999999999996."""
HUNDRED = 100
"""Efforts are whole hundredths, so that the number said to the model is the number a reward compares with."""
EFFORT_GRID = (0.5, 0.75, 1.0, 1.5, 2.0, 3.0)
"""The efforts that show over an evaluation how length and accuracy follow the effort asked for."""


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


class BudgetEffort(Section):
    """Lengths relative to the usual one instead of tokens: an effort of 0.5 asks for half of it (AEC, arXiv 2510.27042)."""

    kind: Literal["effort"]
    low: Effort = 0.5
    """Smallest effort."""
    high: Effort = 3.0
    """Largest effort; between them each doubling is drawn as often as any other (log-uniform)."""
    per: Literal["prompt", "member"] = "prompt"
    """`prompt`: one effort for the whole group; `member`: the levels are dealt evenly over the members of each group."""
    levels: list[Effort] | None = None
    """A few efforts instead of a range: dealt in turn to the prompts of a step, or over the members of a group."""

    @model_validator(mode="after")
    def _fits(self) -> BudgetEffort:
        for effort in (self.low, self.high, *(self.levels or ())):
            if abs(HUNDRED * effort - hundredths(effort)) > ROUNDING * HUNDRED:
                raise ValueError(f"rollout.budgets: an effort is said with two decimals; write {effort:.2f} instead of {effort}")
        if self.low > self.high:
            raise ValueError(f"rollout.budgets: low={self.low:g} is above high={self.high:g}; swap them")
        if self.levels is None:
            if self.per == "member":
                raise ValueError(
                    "rollout.budgets: efforts drawn for each member leave none to compare it with; "
                    "set levels beside per: member, such as [0.5, 1, 2], or per: prompt"
                )
            return self
        if not self.levels or any(a >= b for a, b in zip(self.levels, self.levels[1:], strict=False)):
            raise ValueError(f"rollout.budgets: levels={self.levels} must be efforts that increase, such as [0.5, 1, 2]")
        defaults = type(self).model_fields
        if (self.low, self.high) != (defaults["low"].default, defaults["high"].default):
            raise ValueError("rollout.budgets: low and high have no effect beside levels; leave them out")
        return self


def _check_floor(floor: int, start: int) -> None:
    if floor > start:
        raise ValueError(f"rollout.budgets: floor={floor} is above start={start}; lower floor or raise start")


def hundredths(effort: float) -> int:
    """An effort in hundredths, which are whole numbers."""
    return round(HUNDRED * effort)


def only_section(value: Any) -> Any:
    """The section inside ``[{kind: ...}]``; any other value as it is.

    A list takes the place of the list in the file that a file builds on; a section would be merged into it, which YAML
    composition cannot do. Hence the form with brackets.
    """
    return value[0] if isinstance(value, list) and len(value) == 1 and isinstance(value[0], dict) else value


def _kind(value: Any) -> str:
    if isinstance(value, (BudgetRange, BudgetSchedule, BudgetMemory, BudgetEffort)):
        return value.kind
    return str(value.get("kind", "range")) if isinstance(value, dict) else "list"


BudgetSource = Annotated[
    Annotated[list[BudgetChoice], Tag("list")]
    | Annotated[BudgetRange, Tag("range")]
    | Annotated[BudgetSchedule, Tag("schedule")]
    | Annotated[BudgetMemory, Tag("memory")]
    | Annotated[BudgetEffort, Tag("effort")],
    Discriminator(
        _kind,
        custom_error_type="budget_kind",
        custom_error_message="a list, or a section whose kind is range, schedule, memory or effort",
    ),
    BeforeValidator(only_section),
]
Source = list[BudgetChoice] | BudgetRange | BudgetSchedule | BudgetMemory | BudgetEffort
_SOURCE: TypeAdapter[Source] = TypeAdapter(BudgetSource)


def largest_budget(source: Source) -> int | None:
    """The largest budget that is written down, in tokens; None where there is none. A memory may go above it, up to the room."""
    match source:
        case BudgetRange():
            return source.high
        case BudgetSchedule() | BudgetMemory():
            return source.start
        case BudgetEffort():
            return None
        case _:
            numbers = [choice for choice in source if isinstance(choice, int)]
            return max(numbers) if numbers else None


def gives_one_per_group(source: Source) -> bool:
    """Whether all members of a group get the same budget."""
    match source:
        case BudgetRange() | BudgetEffort():
            return source.per == "prompt"
        case BudgetSchedule() | BudgetMemory():
            return True
        case _:
            return len(source) == 1


def calibration_efforts(source: BudgetEffort) -> tuple[float, ...]:
    """The efforts an evaluation asks for, increasing: the levels, or those of EFFORT_GRID in the range, or else its ends."""
    if source.levels is not None:
        return tuple(source.levels)
    grid = tuple(effort for effort in EFFORT_GRID if source.low <= effort <= source.high)
    return grid or tuple(dict.fromkeys((source.low, source.high)))


def scheduled_budget(source: BudgetSchedule, step: int, steps: int) -> int:
    """``B_t = max(floor, floor(start * gamma^(t / T)))`` in tokens, from step T on that of T.

    step t: finished steps, 0 at the first. steps T: length of the schedule. Source: RMT (arXiv 2509.24375).
    """
    share = min(step, steps) / steps
    return max(source.floor, math.floor(source.start * source.gamma**share + ROUNDING))


def length_cap(schedule: Sequence[tuple[int, int]], step: int) -> int | None:
    """Cap on response tokens after ``step`` finished steps: that of the last entry (first step, cap) begun; None without one.

    Source: ThinkPrune (arXiv 2504.01296), which trains on under one smaller limit after the other.
    """
    begun = [cap for first, cap in schedule if first <= step]
    return begun[-1] if begun else None


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
        case BudgetEffort():
            return None
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
        case BudgetEffort(levels=None):
            return f"efforts {checked.low:g} to {checked.high:g}, log-uniform, one per {checked.per}"
        case BudgetEffort():
            efforts = ", ".join(f"{effort:g}" for effort in checked.levels or ())
            return f"efforts {efforts}, one per {checked.per}"
        case _:
            return ", ".join(str(choice) for choice in checked)
