"""Answers sampled for their figures alone: the start policy on the run's prompts, and the monitor behind moving targets."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from reward.answers import Answers
from reward.controllers import laser_targets
from reward.relative import difficulty_bands
from rl.collection import Collector
from rl.leases import MEASURING_FROM, make_leases
from rl.prompts import PromptStream
from rl.reward_settings import MONITORED, MonitorSettings
from rl.reward_state import RewardState
from rl.settings import Settings
from rl.step_rules import unscored_error
from rl.types import Group, Prompt, Shaping
from rl.waiting import StopFlag
from rollout.budgets import BudgetPlan

log = logging.getLogger("budget_rl")

REFERENCE_STEP, MONITOR_STEP = MEASURING_FROM + 2, MEASURING_FROM + 1
"""Stand for the step in seeds, so that these answers are neither training's nor evaluation's."""

PORTION = 256
"""Prompts of the start policy that are measured at once."""


def prompts_ahead(stream: PromptStream, settings: Settings) -> list[Prompt]:
    """The distinct prompts a run can come to, in the order of their first turn: all of them where only max_steps can tell."""
    wanted = len(stream)
    if settings.max_steps is not None:
        wanted = min(wanted, settings.max_steps * settings.prompts_per_step * (1 + settings.rollout.refill))
    prompts, _ = stream.take(0, wanted)
    return list({prompt.id: prompt for prompt in prompts}.values())


def measure_reference(
    collector: Collector,
    plan: BudgetPlan,
    prompts: Sequence[Prompt],
    settings: Settings,
    state: RewardState,
    *,
    stop: StopFlag,
    advance: Callable[[int], None],
) -> int:
    """Sample the engines' policy, which must be the start policy, on the prompts it was not measured on yet; returns how many.

    A portion at a time, each under a deadline of its own; ``advance`` is told how many prompts are done. A prompt without any
    scored answer counts as the mean of the others. Raises BudgetRLError when too many answers could not be scored.
    """
    missing = [prompt for prompt in prompts if prompt.id not in state.reference]
    for first in range(0, len(missing), PORTION):
        portion = missing[first : first + PORTION]
        state.refer(_sampled(collector, plan, portion, settings, settings.reward.reference.samples, REFERENCE_STEP, 0, stop))
        advance(len(portion))
    unknown = [prompt.id for prompt in missing if prompt.id not in state.reference]
    if unknown:
        log.warning("the start policy has no scored answer to %d of %d prompts; their mean is taken", len(unknown), len(missing))
        state.refer_to_mean(unknown)
    return len(missing)


def monitor_is_due(settings: Settings, state: RewardState, step: int) -> bool:
    """Whether targets are to be measured before the next step; step: finished steps."""
    return settings.reward.method in MONITORED and (state.targets is None or step % settings.reward.monitor.every == 0)


def measure_targets(
    collector: Collector,
    plan: BudgetPlan,
    stream: PromptStream,
    settings: Settings,
    state: RewardState,
    *,
    version: int,
    stop: StopFlag,
) -> None:
    """Set the state's target lengths from the current policy's answers to the monitor's prompts, the same ones each time."""
    monitor = settings.reward.monitor
    prompts, _ = stream.take(0, min(monitor.prompts, len(stream)))
    groups = _sampled(collector, plan, prompts, settings, monitor.samples, MONITOR_STEP, version, stop)
    state.targets = targets_of(groups, monitor, max_length=settings.rollout.max_length)


def targets_of(groups: Sequence[Group], monitor: MonitorSettings, *, max_length: int) -> tuple[int, int, int]:
    """Target lengths in tokens for low, medium and high pass rates from the monitor's answers; see `laser_targets`."""
    answers = Answers.of(groups, max_length=max_length)
    band_N = difficulty_bands(answers.correct_N, answers.group_N)
    grid = sorted({*range(monitor.first, monitor.last + 1, monitor.by), monitor.last})
    low, medium, high = laser_targets(answers.length_N, band_N, grid=grid)
    return int(low), int(medium), int(high)


def _sampled(
    collector: Collector,
    plan: BudgetPlan,
    prompts: Sequence[Prompt],
    settings: Settings,
    samples: int,
    step: int,
    version: int,
    stop: StopFlag,
) -> tuple[Group, ...]:
    """Answers without a budget, drawn plainly at the training temperature; raises BudgetRLError when too many got no verdict."""
    leases = make_leases(
        [[plan.open(prompt, plan.free)] * samples for prompt in prompts],
        step=step,
        run_seed=settings.seed,
        shaping=Shaping(settings.rollout.temperature),
        min_version=version,
    )
    collected = collector.collect(leases, stop=stop)
    if (error := unscored_error(collected, settings.reward.max_unscored)) is not None:
        raise error
    return collected.groups
