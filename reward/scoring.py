"""From verdicts and the values of reward functions to rewards: method, functions, overlong penalty and policies put together."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

from reward.answers import Answers
from reward.budget import overlong
from reward.methods import LENGTH_PARTS, METHODS
from rl.reward_settings import FunctionSettings, RewardSettings
from rl.reward_state import RewardState
from rl.types import Group, Reward, Scored, VerdictStatus

PENALTY_PART = "penalty"


def with_rewards(
    groups: Sequence[Group], settings: RewardSettings, *, max_length: int, state: RewardState | None = None, step: int = 0
) -> tuple[Group, ...]:
    """The same groups, every scored member with its reward: ``total = sum of parts``.

    ``method_weight * METHODS[method] + sum_f weight_f * value_f + overlong``; `reward.penalty` alone where the verdict's policy
    is `penalise`. No reward where the verdict carries no score or its policy is `mask`: such a member is in no statistic and no
    loss. TRUNCATED and MALFORMED count as wrong. Lengths are response tokens, ``max_length`` is L_max, ``step`` counts finished
    steps. Raises ValueError where a method lacks what it compares with.
    """
    kept = tuple(replace(group, members=tuple(m for m in group.members if counts(m, settings))) for group in groups)
    found = iter(_rewards(Answers.of(kept, max_length=max_length, state=state, step=step), settings))
    return tuple(
        replace(group, members=tuple(replace(m, reward=next(found) if counts(m, settings) else None) for m in group.members))
        for group in groups
    )


def counts(member: Scored, settings: RewardSettings) -> bool:
    """Whether a member gets a reward: its verdict carries a score, and no policy leaves it out."""
    return member.verdict.is_scored and _policy(member, settings) != "mask"


def _rewards(answers: Answers, settings: RewardSettings) -> Iterator[Reward]:
    parts = {name: settings.method_weight * part_N for name, part_N in METHODS[settings.method](answers, settings).items()}
    if settings.overlong_buffer or settings.method == "dapo":
        parts["overlong"] = overlong(answers.length_N, max_length=answers.max_length, buffer=settings.overlong_buffer)
    columns = {name: part_N.tolist() for name, part_N in parts.items()}
    spared = {PENALTY_PART: 0.0} if "penalise" in settings.policies.model_dump().values() else {}
    for row, member in enumerate(answers.members):
        if _policy(member, settings) == "penalise":
            yield Reward(settings.penalty, {**dict.fromkeys(columns, 0.0), PENALTY_PART: settings.penalty})
        else:
            values = {name: float(column[row]) for name, column in columns.items()} | spared
            values |= function_parts(member, settings.functions)
            # A plain dict: it travels between actors.
            yield Reward(math.fsum(values.values()), values, per_token=_per_token(member, settings.functions))


def _policy(member: Scored, settings: RewardSettings) -> str:
    match member.verdict.status:
        case VerdictStatus.WRONG:
            return settings.policies.wrong
        case VerdictStatus.MALFORMED:
            return settings.policies.malformed
        case VerdictStatus.TRUNCATED:
            return settings.policies.truncated
        case _:
            return "shape"


def function_parts(member: Scored, functions: Sequence[FunctionSettings]) -> dict[str, float]:
    """``weight * value`` of each function that gave one value for the whole answer; one that does not apply adds nothing."""
    return {
        function_part(score.name): function.weight * score.value
        for function, score in zip(functions, member.functions, strict=True)
        if score.value is not None and score.per_token is None
    }


def length_parts(settings: RewardSettings) -> frozenset[str]:
    """The names of the parts that depend on how long an answer is."""
    return LENGTH_PARTS | {function_part(function.called) for function in settings.functions if function.length}


def function_part(name: str) -> str:
    """The part of a reward function: whatever it is called, it takes the place of no part of a method."""
    return f"function/{name}"


def _per_token(member: Scored, functions: Sequence[FunctionSettings]) -> tuple[float | None, ...] | None:
    """The weighted sum of what functions gave token by token; None where none did."""
    given = [(f.weight, s.per_token) for f, s in zip(functions, member.functions, strict=True) if s.per_token is not None]
    if not given:
        return None
    columns = zip(*(values for _, values in given), strict=True)
    weights = [weight for weight, _ in given]
    return tuple(
        math.fsum(w * v for w, v in zip(weights, column, strict=True) if v is not None)
        if any(v is not None for v in column)
        else None
        for column in columns
    )
