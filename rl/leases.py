"""Leases of a step: one per prompt and member, each with its budget, its opening and a seed of its own."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from rl.budget_draws import Turn
from rl.memory import PromptMemory
from rl.types import Lease, Prompt, Shaping
from rollout.budgets import BudgetPlan
from rollout.openings import Opening

MEASURING_FROM = 999_996
"""Tickets from this step on are sampled for their verdicts and figures alone: no reward function is asked."""


@dataclass(frozen=True)
class Ticket:
    """What a ticket's name says: ``step-index.prompt-index.member``."""

    step: int
    """Finished steps."""
    position: int
    """Place of the prompt in the step."""
    member: int
    """Index inside the prompt's group."""

    @classmethod
    def read(cls, name: str) -> Ticket:
        """The inverse of :attr:`name`."""
        step, position, member = (int(part) for part in name.split("."))
        return cls(step, position, member)

    @property
    def name(self) -> str:
        return f"{self.step:06d}.{self.position:04d}.{self.member:03d}"

    def seed(self, run_seed: int, prompt_id: str) -> int:
        """Seed of the rollout: depends on run seed, step, prompt (and its place in the step) and member, never on the worker."""
        return ticket_seed(run_seed, self.step, f"{self.position}:{prompt_id}", self.member)


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
    """The leases of a training step: ``samples`` members per prompt, their budgets dealt by the plan, capped as at this step.

    step: finished steps. A function of the arguments alone, so that a resume or a second attempt gets the same.
    """
    groups = []
    for position, prompt in enumerate(prompts):
        budgets = plan.budgets(samples, Turn(run_seed, step, position, prompt.id), memory)
        openings = {budget: plan.open(prompt, budget, step=step) for budget in dict.fromkeys(budgets)}
        groups.append([openings[budget] for budget in budgets])
    return make_leases(groups, step=step, run_seed=run_seed, shaping=shaping, min_version=min_version)


def make_leases(
    groups: Sequence[Sequence[Opening]],
    *,
    step: int,
    run_seed: int,
    shaping: Shaping,
    min_version: int,
    first_member: int = 0,
) -> tuple[Lease, ...]:
    """One lease per opening. ``groups[p][m]`` is what member ``first_member + m`` of prompt p starts from."""
    return tuple(
        Lease(
            ticket=ticket.name,
            prompt=opening.prompt,
            member=ticket.member,
            budget=opening.budget,
            shaping=shaping,
            prefill_ids=opening.prefill_ids,
            max_new_tokens=opening.max_new_tokens,
            seed=ticket.seed(run_seed, opening.prompt.id),
            min_version=min_version,
        )
        for p, openings in enumerate(groups)
        for m, opening in enumerate(openings)
        for ticket in [Ticket(step, p, first_member + m)]
    )


def ticket_seed(run_seed: int, step: int, prompt_id: str, member: int) -> int:
    """31-bit seed of one rollout: first bytes of SHA-256 over what identifies it."""
    digest = hashlib.sha256(f"{run_seed}|{step}|{prompt_id}|{member}".encode()).digest()
    return int.from_bytes(digest[:4], "big") & 0x7FFFFFFF
