"""What a reward may depend on: a step's scored answers as columns, each worked out when a method asks for it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch

from reward.relative import difficulty_bands, group_mean_length
from reward.repetition import is_repetitive
from rl.comparison import advantage_groups
from rl.reward_state import Reference, RewardState
from rl.types import BudgetKind, Group, Scored, VerdictStatus


@dataclass(frozen=True)
class Answers:
    """The N scored members of a step's groups, in order, and what is remembered of their prompts."""

    members: Sequence[Scored]
    prompt_N: torch.Tensor
    """int64 (N): place of each member's prompt in the step."""
    max_length: int
    """L_max in tokens."""
    state: RewardState = field(default_factory=RewardState)
    step: int = 0
    """Finished steps."""

    @classmethod
    def of(cls, groups: Sequence[Group], *, max_length: int, state: RewardState | None = None, step: int = 0) -> Answers:
        """The answers of closed groups; those without a score are left out."""
        found = [(g, m) for g, group in enumerate(groups) for m in group.members if m.verdict.is_scored]
        prompt_N = torch.tensor([g for g, _ in found], dtype=torch.int64)
        return cls([m for _, m in found], prompt_N, max_length, RewardState() if state is None else state, step)

    @cached_property
    def group_N(self) -> torch.Tensor:
        """int64 (N): equal for members that are compared: those of one prompt and, where asked for, one effort."""
        return torch.tensor(advantage_groups(self.prompt_N.tolist(), [m.rollout.lease.budget for m in self.members])).long()

    @cached_property
    def correct_N(self) -> torch.Tensor:
        """bool (N)."""
        return torch.tensor([m.verdict.is_correct for m in self.members], dtype=torch.bool)

    @cached_property
    def length_N(self) -> torch.Tensor:
        """Response tokens, prefill and end of sequence included."""
        return self._column(lambda m: m.rollout.length)

    @cached_property
    def budget_N(self) -> torch.Tensor:
        """Tokens; inf for a member without a budget in tokens."""
        return self._column(budget_tokens)

    @cached_property
    def effort_N(self) -> torch.Tensor:
        """Effort as a multiple of the usual length; raises ValueError for a member that was asked for none."""

        def effort(member: Scored) -> float:
            asked = member.rollout.lease.budget
            if asked.kind is not BudgetKind.EFFORT or asked.effort is None:
                raise ValueError(
                    f"rollout {member.rollout.lease.ticket} was asked for no effort; set rollout.budgets to kind: effort"
                )
            return asked.effort

        return self._column(effort)

    @cached_property
    def no_think_N(self) -> torch.Tensor:
        """bool (N): whether the response was opened without thinking."""
        return torch.tensor([m.rollout.lease.budget.no_think for m in self.members], dtype=torch.bool)

    @cached_property
    def malformed_N(self) -> torch.Tensor:
        """bool (N)."""
        return torch.tensor([m.verdict.status is VerdictStatus.MALFORMED for m in self.members], dtype=torch.bool)

    @cached_property
    def exit_N(self) -> torch.Tensor:
        """Order of the exits from a path: members are numbered by where they leave it, and the path itself comes last."""
        return self._column(lambda m: m.rollout.lease.member)

    @cached_property
    def shortest_N(self) -> torch.Tensor:
        """Shortest correct answer ever to the prompt, in tokens; inf before the first."""

        def shortest(member: Scored) -> float:
            seen = self.state.memory.of(prompt_id(member))
            return math.inf if seen is None else seen.shortest

        return self._column(shortest)

    @cached_property
    def prompt_average_N(self) -> torch.Tensor:
        """Mean length of the prompt's answers in this step, whatever their efforts."""
        return group_mean_length(self.length_N, self.prompt_N)

    @cached_property
    def running_average_N(self) -> torch.Tensor:
        """Running mean length of the prompt before this step; this step's at its first visit."""
        known_N = self._column(lambda m: self.state.averages.get(prompt_id(m), math.nan))
        return torch.where(known_N.isnan(), self.prompt_average_N.to(known_N.dtype), known_N)

    @cached_property
    def reference_length_N(self) -> torch.Tensor:
        """The start policy's mean length on the prompt."""
        return self._column(lambda m: self._reference(m).length)

    @cached_property
    def reference_accuracy_N(self) -> torch.Tensor:
        """The start policy's accuracy on the prompt."""
        return self._column(lambda m: self._reference(m).accuracy)

    @cached_property
    def band_target_N(self) -> torch.Tensor:
        """Target length of the member's group by its pass rate; raises ValueError before the monitor has measured any."""
        if self.state.targets is None:
            raise ValueError("the monitor has measured no target lengths yet")
        return torch.tensor(self.state.targets, dtype=torch.float64)[difficulty_bands(self.correct_N, self.group_N)]

    @cached_property
    def repetitive_N(self) -> torch.Tensor:
        """bool (N)."""
        return torch.tensor([is_repetitive(m.rollout.response_ids) for m in self.members], dtype=torch.bool)

    def _reference(self, member: Scored) -> Reference:
        found = self.state.reference.get(prompt_id(member))
        if found is None:
            raise ValueError(f"the start policy was not measured on prompt {prompt_id(member)}")
        return found

    def _column(self, value: Callable[[Scored], float]) -> torch.Tensor:
        return torch.tensor([value(m) for m in self.members], dtype=torch.float64)


def budget_tokens(member: Scored) -> float:
    """The budget of a member in tokens; inf where it has none."""
    budget = member.rollout.lease.budget
    return float(budget.tokens) if budget.tokens > 0 else math.inf


def prompt_id(member: Scored) -> str:
    """The problem that was answered."""
    return member.rollout.lease.prompt.id
