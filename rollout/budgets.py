"""Which budget each member of a group gets: dealt from a list, drawn, read off a schedule, remembered, or an effort."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from rl.budget_draws import Turn, between, dealt_level, drawn_effort, middle, remembered_budget
from rl.budget_settings import (
    HUNDRED,
    BudgetChoice,
    BudgetEffort,
    BudgetMemory,
    BudgetRange,
    BudgetSchedule,
    budget_bounds,
    calibration_efforts,
    hundredths,
    largest_budget,
    scheduled_budget,
)
from rl.errors import ConfigError
from rl.memory import PromptMemory
from rl.prompts import PromptEncoder
from rl.settings import RolloutSettings
from rl.types import Budget, Prompt
from rollout.openings import MARKER, ExitWords, Opening, Openings

SPELT = 20_000
"""Budgets of a range that are spelt to find the longest words; a wider range is looked at in even steps."""


class BudgetPlan:
    """Assigns budgets to the members of a group and opens each response (lists: HBPO, section 3.1).

    ``encoder`` is needed for words after the question, ``max_steps`` for a schedule without steps of its own.

    Raises:
        ConfigError: the words of some budget cannot be spelt, or leave no room below `rollout.max_length` or a cap of
            `rollout.length_schedule`; a schedule asks for more than the cap of its step.
    """

    def __init__(
        self,
        settings: RolloutSettings,
        tokenizer: PreTrainedTokenizerBase,
        *,
        encoder: PromptEncoder | None = None,
        max_steps: int | None = None,
    ) -> None:
        self._settings = settings
        self._source = source = settings.budgets
        self.openings = Openings(settings, tokenizer, encoder)
        self._steps = (source.steps or max_steps) if isinstance(source, BudgetSchedule) else None
        self._bounds = budget_bounds(source, room=self._room(None))
        self.exit_words: ExitWords | None = self.openings.exit_words() if settings.exits else None
        """With which words the exits of a group leave the thinking; None without `rollout.exits`."""
        # None, which is outside training, and the steps at which the cap of a response changes.
        for step in (None, *(first for first, _ in settings.length_schedule)):
            for budget in self._extremes(step):
                self.openings.suffix_ids(budget)
                self.openings.max_new_tokens(budget, (), self.openings.prefill_ids(budget, ()), step=step)

    @property
    def free(self) -> Budget:
        """No budget: how held-out problems are always asked."""
        return self.openings.free

    def open(self, prompt: Prompt, budget: Budget, *, step: int | None = None) -> Opening:
        """See :meth:`rollout.openings.Openings.open`."""
        return self.openings.open(prompt, budget, step=step)

    def budgets(self, samples: int, turn: Turn, memory: PromptMemory) -> list[Budget]:
        """One budget per member of a group, a function of the turn and of what is remembered of its prompt only.

        From a list slot-major: all members of the first budget, then all of the second, and so on; levels of effort `per: member`
        alike.

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
                tokens = [remembered_budget(source, memory.of(turn.prompt_id), room=self._room(turn.step))] * samples
            case BudgetEffort() as source:
                return self._efforts(source, samples, turn)
            case choices:
                return _dealt(self._named(choices), samples)
        return [self.openings.budget(n) for n in tokens]

    def levels(self, step: int | None = None) -> tuple[Budget, ...]:
        """The budgets a held-out problem is asked under, increasing; in a list, free comes behind the numbers and no_think last.

        A range: its ends and its middle. A schedule: the budget of ``step`` (finished steps), of its end for None. A memory: its
        start, for nothing is remembered of a held-out problem. Efforts: see :func:`rl.budget_settings.calibration_efforts`.
        """
        match self._source:
            case BudgetRange() as source:
                tokens = dict.fromkeys((source.low, middle(source), source.high))
            case BudgetSchedule() as source:
                tokens = [scheduled_budget(source, 1, 1) if step is None else self._scheduled(source, step)]
            case BudgetMemory() as source:
                tokens = [source.start]
            case BudgetEffort() as source:
                return tuple(self.openings.effort(effort) for effort in calibration_efforts(source))
            case choices:
                return self._named(choices)
        return tuple(self.openings.budget(n) for n in tokens)

    def longest_suffix(self) -> str:
        """The words at the end of a question at their longest in tokens; empty where the question stays as it is."""
        words = [budget for budget in self._spelt() if budget.place == "suffix"]
        longest = max(words, key=lambda b: (len(self.openings.suffix_ids(b)), b.tokens, b.effort or 0.0), default=None)
        return longest.sentence if longest is not None else ""

    def check(self, prompt: Prompt) -> None:
        """Open the smallest and the largest budget behind a real prompt, whose end may open the thinking already.

        Raises:
            ConfigError: as the constructor, which cannot know how prompts end.
        """
        for budget in self._extremes(None):
            self.open(prompt, budget)

    def _extremes(self, step: int | None) -> tuple[Budget, ...]:
        """The budgets that say whether all fit from this step on: those of a list, or the smallest, the first and the largest.

        Beside them the free one, under which evaluations ask.
        """
        match self._source:
            case BudgetSchedule() as source if step is not None:
                tokens = self._scheduled(source, step)
                if tokens > (cap := self._settings.longest_response(step)):
                    raise ConfigError(
                        f"rollout.budgets: the schedule asks for {tokens} tokens at step {step}, and rollout.length_schedule "
                        f"caps responses at {cap} there",
                        fix="raise that cap, or let the budget fall faster",
                    )
                numbers = {tokens, scheduled_budget(source, 1, 1)}
            case BudgetMemory() as source if step is not None:
                room = self._room(step)
                numbers = {min(source.floor, room), room}
            case BudgetEffort() as source:
                ends = (source.low, source.high) if source.levels is None else source.levels
                return *(self.openings.effort(effort) for effort in dict.fromkeys(ends)), self.free
            case list() as choices:
                return *(budget for budget in self._named(choices) if budget != self.free), self.free
            case source:
                numbers = {n for n in (*(self._bounds or ()), largest_budget(source)) if n is not None}
        return *(self.openings.budget(n) for n in sorted(numbers)), self.free

    def _spelt(self) -> tuple[Budget, ...]:
        """Every budget that can occur, or where they are very many some in even steps."""
        match self._source:
            case BudgetEffort(levels=None) as source:
                whole = range(hundredths(source.low), hundredths(source.high) + 1)
                return tuple(self.openings.effort(n / HUNDRED) for n in whole)
            case BudgetEffort():
                return self.levels()
            case list() as choices:
                return self._named(choices)
            case _ if self._bounds is not None:
                low, high = self._bounds
                numbers = {high, *range(low, high, max(1, (high - low) // SPELT))}
                return tuple(self.openings.budget(n) for n in sorted(numbers))
            case _:
                return ()

    def _efforts(self, source: BudgetEffort, samples: int, turn: Turn) -> list[Budget]:
        if source.levels is None:
            return [self.openings.effort(drawn_effort(source, turn.bits()))] * samples
        if source.per == "prompt":
            return [self.openings.effort(dealt_level(source.levels, turn))] * samples
        return _dealt(self.levels(), samples)

    def _named(self, choices: list[BudgetChoice]) -> tuple[Budget, ...]:
        named = {"free": self.free, "no_think": self.openings.no_think}
        return tuple(named[choice] if isinstance(choice, str) else self.openings.budget(choice) for choice in choices)

    def _scheduled(self, source: BudgetSchedule, step: int) -> int:
        if self._steps is None:
            raise ValueError("a schedule of budgets needs its length: give rollout.budgets.steps or max_steps")
        return scheduled_budget(source, step, self._steps)

    def _room(self, step: int | None) -> int:
        """The largest budget a response has room for: a hard one leaves a token for the answer behind `</think>`."""
        cap = self._settings.longest_response(step)
        if not self._settings.hard_budgets:
            return cap
        largest = self.openings.budget(cap)
        prefill = self.openings.prefill_ids(largest, ())
        before_thinking = len(prefill) - self.openings.thinking_begun((), prefill)
        return cap - before_thinking - MARKER - 1


def _dealt(levels: tuple[Budget, ...], samples: int) -> list[Budget]:
    share, rest = divmod(samples, len(levels))
    if rest or share < 1:
        low = max(share, 1) * len(levels)
        options = str(low) if share < 1 else f"{low} or {low + len(levels)}"
        raise ValueError(f"{samples} samples per prompt cannot be dealt evenly over {len(levels)} budgets; use {options}")
    return [budget for budget in levels for _ in range(share)]
