"""A step's rollouts, generated and scored: all members at once, or early exits after the paths that they leave."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from rl.collection import Collected, Collector
from rl.exits import exit_leases, join, path_leases
from rl.leases import step_leases
from rl.sampling_state import SamplingState
from rl.settings import Settings
from rl.types import Prompt, Rollout, Shaping
from rl.waiting import StopFlag
from rollout.budgets import BudgetPlan


def collect_step(
    collector: Collector,
    plan: BudgetPlan,
    prompts: Sequence[Prompt],
    settings: Settings,
    *,
    step: int,
    shaping: Shaping,
    sampling: SamplingState,
    stop: StopFlag,
) -> Collected:
    """The groups of ``prompts`` after ``step`` finished steps, which is also the version of the weights that may serve them."""
    rollout = settings.rollout
    leased = (
        partial(path_leases, exits=rollout.exits) if rollout.exits else partial(step_leases, samples=rollout.samples_per_prompt)
    )
    leases = leased(prompts, plan, step=step, run_seed=settings.seed, shaping=shaping, min_version=step, memory=sampling.memory)
    if not rollout.exits:
        return collector.collect(leases, stop=stop)
    paths = collector.collect(leases, stop=stop)
    found = [member.rollout for group in paths.groups for member in group.members]
    leaving = exit_leases(found, plan.exit_words, exits=rollout.exits, run_seed=settings.seed)
    return join(paths, collector.collect(leaving, stop=stop))


def new_tokens(rollout: Rollout, settings: Settings) -> int:
    """Response tokens that a rollout adds to the run's count: an early exit repeats those of the path that it leaves."""
    is_exit = rollout.lease.member < settings.rollout.exits
    return rollout.length - (rollout.prefill_length if is_exit else 0)
