"""Which budget each member of a group gets: dealt from a list, drawn from a range, read off a schedule, or remembered."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from rl.budget_draws import Turn, between, middle, remembered_budget
from rl.budget_settings import (
    BudgetChoice,
    BudgetMemory,
    BudgetRange,
    BudgetSchedule,
    budget_bounds,
    largest_budget,
    scheduled_budget,
)
from rl.memory import PromptMemory
from rl.prompts import PromptEncoder
from rl.settings import RolloutSettings
from rl.types import Budget, Prompt
from rollout.openings import MARKER, Opening, Openings

SPELT = 20_000
"""Budgets of a range that are spelt to find the longest words; a wider range is looked at in even steps."""


class BudgetPlan:
    """Assigns budgets to the members of a group and opens each response (lists: HBPO, section 3.1).

    ``encoder`` is needed for words after the question, ``max_steps`` for a schedule without steps of its own.

    Raises:
        ConfigError: the words of some budget cannot be spelt, or leave no room below `rollout.max_length`.
    """

    def __init__(
        self,
        settings: RolloutSettings,
        tokenizer: PreTrainedTokenizerBase,
        *,
        encoder: PromptEncoder | None = None,
        max_steps: int | None = None,
    ) -> None:
        self._source = source = settings.budgets
        self.openings = Openings(settings, tokenizer, encoder)
        self._steps = (source.steps or max_steps) if isinstance(source, BudgetSchedule) else None
        self._room = self._largest_with_room(settings)
        self._bounds = budget_bounds(source, room=self._room)
        for budget in self._extremes():
            self.openings.suffix_ids(budget)
            self.openings.max_new_tokens(budget, (), self.openings.prefill_ids(budget, ()))

    @property
    def free(self) -> Budget:
        """No budget: how held-out problems are always asked."""
        return self.openings.free

    def open(self, prompt: Prompt, budget: Budget) -> Opening:
        """See :meth:`rollout.openings.Openings.open`."""
        return self.openings.open(prompt, budget)

    def budgets(self, samples: int, turn: Turn, memory: PromptMemory) -> list[Budget]:
        """One budget per member of a group, a function of the turn and of what is remembered of its prompt only.

        From a list slot-major: all members of the first budget, then all of the second, and so on.

        Raises:
            ValueError: the members cannot be dealt evenly over the list.
        """
        match self._source:
            case BudgetRange() as source:
                members = list(range(samples)) if source.per == "member" else [None] * samples
                tokens = [between(source.low, source.high, turn.bits(member), scale=source.scale) for member in members]
            case BudgetSchedule() as source:
                tokens = [self._scheduled(source, turn.step)] * samples
            case BudgetMemory() as source:
                tokens = [remembered_budget(source, memory.of(turn.prompt_id), room=self._room)] * samples
            case choices:
                return _dealt(self._named(choices), samples)
        return [self.openings.budget(n) for n in tokens]

    def levels(self, step: int | None = None) -> tuple[Budget, ...]:
        """The budgets a held-out problem is asked under, increasing, the free one of a list last.

        A range: its ends and its middle. A schedule: the budget of ``step`` (finished steps), of its end for None. A memory: its
        start, for nothing is remembered of a held-out problem.
        """
        match self._source:
            case BudgetRange() as source:
                tokens = dict.fromkeys((source.low, middle(source), source.high))
            case BudgetSchedule() as source:
                tokens = [scheduled_budget(source, 1, 1) if step is None else self._scheduled(source, step)]
            case BudgetMemory() as source:
                tokens = [source.start]
            case choices:
                return self._named(choices)
        return tuple(self.openings.budget(n) for n in tokens)

    def longest_suffix(self) -> str:
        """The words at the end of a question at their longest in tokens; empty where the question stays as it is."""
        if isinstance(self._source, list):
            named = self._named(self._source)
        elif self._bounds is not None:
            low, high = self._bounds
            numbers = {high, *range(low, high, max(1, (high - low) // SPELT))}
            named = tuple(self.openings.budget(n) for n in sorted(numbers))
        else:
            named = ()
        words = [budget for budget in named if budget.place == "suffix"]
        return max(words, key=lambda budget: (len(self.openings.suffix_ids(budget)), budget.tokens)).sentence if words else ""

    def check(self, prompt: Prompt) -> None:
        """Open the smallest and the largest budget behind a real prompt, whose end may open the thinking already.

        Raises:
            ConfigError: as the constructor, which cannot know how prompts end.
        """
        for budget in self._extremes():
            self.open(prompt, budget)

    def _extremes(self) -> tuple[Budget, ...]:
        """The budgets that say whether all fit: those of a list, or the smallest, the first and the largest; and the free one."""
        if isinstance(self._source, list):
            return *(budget for budget in self._named(self._source) if not budget.is_free), self.free
        numbers = {n for n in (*(self._bounds or ()), largest_budget(self._source)) if n is not None}
        return *(self.openings.budget(n) for n in sorted(numbers)), self.free

    def _named(self, choices: list[BudgetChoice]) -> tuple[Budget, ...]:
        return tuple(self.free if choice == "free" else self.openings.budget(int(choice)) for choice in choices)

    def _scheduled(self, source: BudgetSchedule, step: int) -> int:
        if self._steps is None:
            raise ValueError("a schedule of budgets needs its length: give rollout.budgets.steps or max_steps")
        return scheduled_budget(source, step, self._steps)

    def _largest_with_room(self, settings: RolloutSettings) -> int:
        """The largest budget a response has room for: a hard one leaves a token for the answer behind `</think>`."""
        if not settings.hard_budgets:
            return settings.max_length
        largest = self.openings.budget(settings.max_length)
        prefill = self.openings.prefill_ids(largest, ())
        before_thinking = len(prefill) - self.openings.thinking_begun((), prefill)
        return settings.max_length - before_thinking - MARKER - 1


def _dealt(levels: tuple[Budget, ...], samples: int) -> list[Budget]:
    share, rest = divmod(samples, len(levels))
    if rest or share < 1:
        low = max(share, 1) * len(levels)
        options = str(low) if share < 1 else f"{low} or {low + len(levels)}"
        raise ValueError(f"{samples} samples per prompt cannot be dealt evenly over {len(levels)} budgets; use {options}")
    return [budget for budget in levels for _ in range(share)]
