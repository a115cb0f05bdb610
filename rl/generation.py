"""A step's rollouts, generated and scored: members at once, or early exits after the paths that they leave; in rounds or one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest

from reward.scoring import with_rewards
from rl.collection import Collected, Collector
from rl.exits import exit_leases, join, path_leases
from rl.leases import Ticket, step_leases
from rl.prompts import PromptStream
from rl.refill import Refill
from rl.reward_state import RewardState
from rl.sampling_state import SamplingState
from rl.settings import Settings
from rl.types import Prompt, Rollout, Shaping
from rl.waiting import StopFlag
from rollout.budgets import BudgetPlan
from rollout.progress import total


@dataclass(frozen=True)
class Generated:
    """Everything that a step generated, and what of it is trained on."""

    collected: Collected
    """Of all rounds together."""
    refill: Refill
    """The groups with their rewards."""
    cursor: int
    """Place in the prompt stream behind all prompts taken."""


def generate_step(
    collector: Collector,
    plan: BudgetPlan,
    stream: PromptStream,
    settings: Settings,
    *,
    cursor: int,
    step: int,
    shaping: Shaping,
    sampling: SamplingState,
    rewards: RewardState,
    stop: StopFlag,
    check: Callable[[Collected], None],
) -> Generated:
    """The groups of the step after ``step`` finished ones, with rewards; up to `rollout.refill` rounds replace flat ones.

    A round takes as many further prompts from the stream as groups are missing. All rounds are sampled by the same weights and
    rewarded under the same ``rewards``, and each has `rollout.deadline_s` of its own. What there is after a round is given to
    ``check``, which raises when too many answers could not be scored.
    """
    found = Refill(settings.prompts_per_step, settings.rollout.refill)
    prompts: list[Prompt] = []
    together: Collected | None = None
    while found.missing:
        taken, cursor = stream.take(cursor, found.missing)
        first, prompts = len(prompts), prompts + taken
        collected = collect_step(
            collector, plan, prompts, settings, step=step, shaping=shaping, sampling=sampling, stop=stop, first=first
        )
        together = collected if together is None else one_after_another(together, collected)
        check(together)
        scored = with_rewards(collected.groups, settings.reward, max_length=settings.rollout.max_length, state=rewards, step=step)
        found = found.with_round(scored, settings)
    assert together is not None  # a step has at least one prompt
    return Generated(together, found, cursor)


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
    first: int = 0,
) -> Collected:
    """The groups of a step's prompts from place ``first`` on, after ``step`` finished steps.

    ``step`` is also the version of the weights that may serve them. ``prompts`` are all of the step so far: a place in the step
    is part of a ticket, a seed and a drawn budget, so that those of a later round repeat none of an earlier one's.
    """
    rollout = settings.rollout
    leased = (
        partial(path_leases, exits=rollout.exits) if rollout.exits else partial(step_leases, samples=rollout.samples_per_prompt)
    )
    leases = leased(prompts, plan, step=step, run_seed=settings.seed, shaping=shaping, min_version=step, memory=sampling.memory)
    leases = tuple(lease for lease in leases if Ticket.read(lease.ticket).position >= first)
    if not rollout.exits:
        return collector.collect(leases, stop=stop)
    paths = collector.collect(leases, stop=stop)
    found = [member.rollout for group in paths.groups for member in group.members]
    leaving = exit_leases(found, plan.exit_words, exits=rollout.exits, run_seed=settings.seed)
    return join(paths, collector.collect(leaving, stop=stop))


def one_after_another(first: Collected, second: Collected) -> Collected:
    """Two rounds of a step as one: groups and losses of both, times added, engines put together by place."""
    pairs = zip_longest(first.stats, second.stats)
    return Collected(
        groups=(*first.groups, *second.groups),
        lost=(*first.lost, *second.lost),
        generate_s=first.generate_s + second.generate_s,
        score_s=first.score_s + second.score_s,
        stats=tuple(total([one for one in pair if one is not None]) for pair in pairs),
    )


def new_tokens(rollout: Rollout, settings: Settings) -> int:
    """Response tokens that a rollout adds to the run's count: an early exit repeats those of the path that it leaves."""
    is_exit = rollout.lease.member < settings.rollout.exits
    return rollout.length - (rollout.prefill_length if is_exit else 0)
