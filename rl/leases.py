"""Leases of a step: one per prompt and member, each with its budget, its opening and a seed of its own."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from rl.budget_draws import Turn
from rl.memory import PromptMemory
from rl.types import Lease, Prompt, Shaping
from rollout.budgets import BudgetPlan
from rollout.openings import Opening


def step_leases(
    prompts: Sequence[Prompt],
    plan: BudgetPlan,
    *,
    samples: int,
    step: int,
    run_seed: int,
    shaping: Shaping,
    min_version: int,
    memory: PromptMemory,
) -> tuple[Lease, ...]:
    """The leases of a training step: ``samples`` members per prompt, their budgets dealt by the plan.

    step: finished steps. A function of the arguments alone, so that a resume or a second attempt gets the same.
    """
    groups = []
    for position, prompt in enumerate(prompts):
        budgets = plan.budgets(samples, Turn(run_seed, step, position, prompt.id), memory)
        openings = {budget: plan.open(prompt, budget) for budget in dict.fromkeys(budgets)}
        groups.append([openings[budget] for budget in budgets])
    return make_leases(groups, step=step, run_seed=run_seed, shaping=shaping, min_version=min_version)


def make_leases(
    groups: Sequence[Sequence[Opening]], *, step: int, run_seed: int, shaping: Shaping, min_version: int
) -> tuple[Lease, ...]:
    """One lease per opening. ``groups[p][m]`` is what member m of prompt p starts from.

    A lease's seed depends on run seed, step, prompt (and its place in the step) and member, never on the worker.
    """
    return tuple(
        Lease(
            ticket=f"{step:06d}.{p:04d}.{m:03d}",
            prompt=opening.prompt,
            member=m,
            budget=opening.budget,
            shaping=shaping,
            prefill_ids=opening.prefill_ids,
            max_new_tokens=opening.max_new_tokens,
            seed=ticket_seed(run_seed, step, f"{p}:{opening.prompt.id}", m),
            min_version=min_version,
        )
        for p, openings in enumerate(groups)
        for m, opening in enumerate(openings)
    )


def ticket_seed(run_seed: int, step: int, prompt_id: str, member: int) -> int:
    """31-bit seed of one rollout: first bytes of SHA-256 over what identifies it."""
    digest = hashlib.sha256(f"{run_seed}|{step}|{prompt_id}|{member}".encode()).digest()
    return int.from_bytes(digest[:4], "big") & 0x7FFFFFFF
