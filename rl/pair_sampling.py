"""Pairs made of the model's own answers: sampled, graded, and the best of each prompt put beside the worst."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rl.collection import Collector
from rl.data import DataError
from rl.leases import MEASURING_FROM, step_leases
from rl.measuring import PORTION
from rl.memory import PromptMemory
from rl.pairs import FoundPairs, pairs_of
from rl.prompts import PromptStream
from rl.settings import Settings
from rl.step_rules import unscored_error
from rl.types import Group, Prompt, Rollout, Shaping
from rl.waiting import StopFlag
from rollout.budgets import BudgetPlan

PAIRS_STEP = MEASURING_FROM
"""Stands for the step in the seeds of these answers."""
RIGHT_PROMPTS = 64
"""Prompts that T-REG's self-test is answered on."""


def sample_pairs(
    collector: Collector,
    plan: BudgetPlan,
    stream: PromptStream,
    settings: Settings,
    *,
    stop: StopFlag,
    advance: Callable[[int], None],
) -> FoundPairs:
    """Pairs from `pairs.samples` answers to each of the stream's first `pairs.prompts` prompts, budgets dealt as in training.

    A portion of prompts at a time, each under `rollout.deadline_s`; ``advance`` is told how many are done. The engines must hold
    the start policy. Raises BudgetRLError when too many answers could not be scored.
    """
    assert settings.preference is not None
    asked = settings.preference.pairs
    prompts, _ = stream.take(0, min(asked.prompts, len(stream)))
    groups = sample_groups(collector, plan, prompts, settings, samples=asked.samples, stop=stop, advance=advance)
    return pairs_of(
        groups, per_prompt=asked.per_prompt, prefer_short=asked.prefer_short, max_length=longest_pair(settings)
    )


def longest_pair(settings: Settings) -> int:
    """Most tokens of a prompt with either answer: `preference.pairs.max_length`, else the longest prompt and response."""
    assert settings.preference is not None
    return settings.preference.pairs.max_length or settings.data.max_prompt_length + settings.rollout.max_length


def sample_groups(
    collector: Collector,
    plan: BudgetPlan,
    prompts: Sequence[Prompt],
    settings: Settings,
    *,
    samples: int,
    stop: StopFlag,
    advance: Callable[[int], None] = lambda _: None,
) -> list[Group]:
    """Graded answers of the start policy, budgets dealt as in training; a portion of prompts at a time."""
    groups: list[Group] = []
    for first in range(0, len(prompts), PORTION):
        portion = prompts[first : first + PORTION]
        leases = step_leases(
            portion,
            plan,
            samples=samples,
            step=PAIRS_STEP,
            run_seed=settings.seed + first,  # a ticket names its place in the portion: portions must not share their seeds
            shaping=Shaping(settings.rollout.temperature),
            min_version=0,
            memory=PromptMemory(),
        )
        collected = collector.collect(leases, stop=stop)
        if (error := unscored_error(collected, settings.reward.max_unscored)) is not None:
            raise error
        groups += collected.groups
        advance(len(portion))
    return groups


def right_answers(
    collector: Collector, plan: BudgetPlan, stream: PromptStream, settings: Settings, *, stop: StopFlag
) -> list[Rollout]:
    """One right answer of the start policy to each of up to `RIGHT_PROMPTS` prompts; all answers where none is right."""
    prompts, _ = stream.take(0, min(RIGHT_PROMPTS, len(stream)))
    groups = sample_groups(collector, plan, prompts, settings, samples=settings.rollout.samples_per_prompt, stop=stop)
    right = [[m.rollout for m in g.members if m.verdict.is_scored and m.verdict.is_correct] for g in groups]
    return [found[0] for found in right if found] or [m.rollout for g in groups for m in g.members if m.verdict.is_scored]


def counted(found: FoundPairs) -> str:
    """What became of everything that could have been a pair, in words."""
    return ", ".join(f"{count} {what}" for what, count in found.counts.items())


def check_enough(pairs: int, settings: Settings, *, what: str) -> None:
    """Raise DataError where the pairs do not fill a step beside the held-out ones."""
    assert settings.preference is not None
    asked = settings.preference.pairs
    needed = settings.preference.pairs_per_step + asked.held_out
    if pairs < needed:
        raise DataError(
            f"{pairs} pairs were found ({what}); a step of {settings.preference.pairs_per_step} and {asked.held_out} held-out "
            f"ones need {needed}",
            fix="raise preference.pairs.prompts or samples (rollouts) or size (a data set), or lower "
            "preference.pairs_per_step or preference.pairs.held_out",
        )
