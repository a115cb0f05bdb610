"""What a run will ask of Ray: batch sizes, CPUs and GPUs, worked out in milliseconds and refused if the cluster has too few.

What it will take of memory is in `rl/memory_estimate.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from rl.budget_settings import describe_budgets
from rl.errors import ConfigError
from rl.settings import Settings
from rl.stage_settings import learns_from_pairs


@dataclass(frozen=True)
class Placement:
    """One kind of Ray actor: how many, what each reserves, and the settings that say so."""

    actor: str
    count: int
    cpus: float
    """Ray CPUs of one actor."""
    gpus: float
    """Ray GPUs of one actor."""
    count_key: str
    cpus_key: str
    gpus_key: str | None

    @property
    def total_cpus(self) -> float:
        return self.count * self.cpus

    @property
    def total_gpus(self) -> float:
        return self.count * self.gpus


@dataclass(frozen=True)
class Plan:
    """Sizes that follow from the settings; nothing here is a setting of its own."""

    rollouts_per_step: int
    rollouts_per_budget: dict[str, int]
    """Per step, by budget label (``"64"``, ``"free"``); all of them under a range, a schedule or a memory, in words."""
    rollouts_per_minibatch: int
    rollouts_per_rank: int
    """Most rollouts of a mini-batch that one learner rank holds."""
    updates_per_step: int
    """Optimiser steps: mini-batches times epochs."""
    tokens_per_step: int
    """Upper bound in tokens: every prompt and every response at its longest."""
    placements: tuple[Placement, ...]
    pairs_per_step: int = 0
    """Of a stage that learns from pairs; 0 where a step is made of rollouts."""

    @property
    def cpus(self) -> float:
        return sum(placement.total_cpus for placement in self.placements)

    @property
    def gpus(self) -> float:
        return sum(placement.total_gpus for placement in self.placements)


def derived_plan(settings: Settings) -> Plan:
    """The batch sizes and Ray placements that ``settings`` imply."""
    rollout, learner, reward = settings.rollout, settings.learner, settings.reward
    rollouts = settings.prompts_per_step * rollout.samples_per_prompt
    minibatch = rollouts // learner.minibatches
    return Plan(
        rollouts_per_step=rollouts,
        rollouts_per_budget=(
            {str(budget): rollouts // len(rollout.budgets) for budget in rollout.budgets}
            if isinstance(rollout.budgets, list)
            else {describe_budgets(rollout.budgets): rollouts}
        ),
        rollouts_per_minibatch=minibatch,
        rollouts_per_rank=math.ceil(minibatch / learner.ranks),
        updates_per_step=learner.minibatches * learner.epochs,
        tokens_per_step=rollouts * (1 + rollout.refill) * (settings.data.max_prompt_length + rollout.max_length),
        placements=(
            Placement(
                *("rollout engine", rollout.workers, rollout.cpus_per_worker, rollout.gpus_per_worker),
                *("rollout.workers", "rollout.cpus_per_worker", "rollout.gpus_per_worker"),
            ),
            Placement(
                *("learner rank", learner.ranks, learner.cpus_per_rank, learner.gpus_per_rank),
                *("learner.ranks", "learner.cpus_per_rank", "learner.gpus_per_rank"),
            ),
            Placement(
                "reward worker", reward.workers, reward.cpus_per_worker, 0.0, "reward.workers", "reward.cpus_per_worker", None
            ),
            *frozen_placements(settings),
        ),
        pairs_per_step=settings.preference.pairs_per_step if settings.preference and learns_from_pairs(settings) else 0,
    )


def frozen_placements(settings: Settings) -> tuple[Placement, ...]:
    """The workers that hold frozen models: teachers, and one for the start policy where token rewards or ssToken need it."""
    found: list[Placement] = []
    if settings.distil is not None:
        teacher, key = settings.distil.teacher, "distil.teacher"
        found.append(
            Placement(
                *("teacher", teacher.workers, teacher.cpus_per_worker, teacher.gpus_per_worker),
                *(f"{key}.workers", f"{key}.cpus_per_worker", f"{key}.gpus_per_worker"),
            )
        )
    if settings.needs_scorer:
        scorer = settings.scorer
        found.append(
            Placement(
                *("frozen start policy", scorer.workers, scorer.cpus_per_worker, scorer.gpus_per_worker),
                *("scorer.workers", "scorer.cpus_per_worker", "scorer.gpus_per_worker"),
            )
        )
    return tuple(found)


def check_resources(settings: Settings, *, cpus: float, gpus: float) -> None:
    """Raise ConfigError when the actors reserve more CPUs or GPUs than the cluster has in all, or in a way Ray cannot give."""
    plan = derived_plan(settings)
    for placement in plan.placements:
        if placement.gpus > 1 and placement.gpus != int(placement.gpus):
            raise ConfigError(
                f"{placement.gpus_key}={placement.gpus:g}: Ray shares one GPU or gives whole ones",
                fix=f"use a fraction below 1, or {math.ceil(placement.gpus)}",
            )
    rollout = settings.rollout
    if 0 < rollout.gpus_per_worker < rollout.tensor_parallel > 1:
        raise ConfigError(
            f"rollout.tensor_parallel={rollout.tensor_parallel} needs as many GPUs per engine, "
            f"rollout.gpus_per_worker={rollout.gpus_per_worker:g}",
            fix=f"set rollout.gpus_per_worker={rollout.tensor_parallel} or lower rollout.tensor_parallel",
        )
    _check_learner_gpus(settings)
    _check_supply("CPUs", plan.cpus, cpus, [(p, p.cpus, p.cpus_key) for p in plan.placements])
    _check_supply("GPUs", plan.gpus, gpus, [(p, p.gpus, p.gpus_key) for p in plan.placements if p.gpus_key is not None])


def _check_learner_gpus(settings: Settings) -> None:
    """Raise ConfigError for GPUs that a learner rank could not use, wherever Ray finds them."""
    ranks, gpus = settings.learner.ranks, settings.learner.gpus_per_rank
    if gpus > 1:
        raise ConfigError(
            f"learner.gpus_per_rank={gpus:g}: a rank computes on one GPU",
            fix=f"set learner.gpus_per_rank=1 learner.ranks={ranks * math.ceil(gpus)}",
        )
    if 0 < gpus < 1 < ranks:
        raise ConfigError(
            f"learner.ranks={ranks} with learner.gpus_per_rank={gpus:g}: ranks could share a GPU, which NCCL refuses",
            fix="set learner.ranks=1 or learner.gpus_per_rank=1",
        )
    if gpus == 0 and settings.rollout.transport == "nccl":
        raise ConfigError(
            "weights by NCCL go from GPU to GPU, and learner.gpus_per_rank=0",
            fix="set learner.gpus_per_rank=1, or rollout.weight_transport=object_store",
        )


def _check_supply(unit: str, needed: float, has: float, demands: list[tuple[Placement, float, str]]) -> None:
    if needed <= has + 1e-6:  # sums of fractions such as 0.1 are not exact
        return
    needs = "; ".join(f"{p.count} x {p.actor} at {each:g}" for p, each, _ in demands if each)
    placement, each, each_key = max(demands, key=lambda demand: demand[0].count * demand[1])
    # What the largest kind may take when the others keep theirs.
    room = has - (needed - placement.count * each)
    fits = math.floor(room / each + 1e-6)
    options = [f"{placement.count_key}={fits}"] if 1 <= fits < placement.count else []
    share = math.floor(100 * room / placement.count) / 100
    options += [f"{each_key}={share:g}"] if share > 0 and (unit == "CPUs" or share < 1) else []
    options += ["gpus_per_worker=0 and gpus_per_rank=0 to run on CPUs"] if unit == "GPUs" and has == 0 else []
    fix = (
        "set " + " or ".join(options) if options else f"lower {placement.count_key} and {each_key} and those of the other actors"
    )
    raise ConfigError(f"the run needs {needed:g} {unit} and the cluster has {has:g}: {needs}", fix=fix)
