"""What a run remembers about each prompt from step to step: the lengths of its correct answers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from rl.types import Group


@dataclass(frozen=True)
class CorrectLengths:
    """The lengths of a prompt's correct answers; whole numbers, so that a sum over any number of steps stays exact."""

    shortest: int
    """Tokens, prefill and end of sequence included."""
    total: int
    """Sum of the lengths in tokens."""
    count: int
    """Correct answers."""

    @property
    def mean(self) -> float:
        return self.total / self.count

    def with_length(self, length: int) -> CorrectLengths:
        """These and one more."""
        return CorrectLengths(min(self.shortest, length), self.total + length, self.count + 1)


class PromptMemory:
    """Prompt id -> lengths of its correct answers so far; what `rollout.budgets` of kind `memory` looks up.

    A step is observed once, when it is finished: an observation made twice would count twice in the means.
    """

    def __init__(self) -> None:
        self._seen: dict[str, CorrectLengths] = {}

    def __len__(self) -> int:
        """Prompts with at least one correct answer."""
        return len(self._seen)

    def of(self, prompt_id: str) -> CorrectLengths | None:
        """What is known about a prompt; None before its first correct answer."""
        return self._seen.get(prompt_id)

    def observe(self, groups: Iterable[Group]) -> None:
        """Take in the correct answers of a finished step; wrong, cut and unscored ones leave no trace."""
        for group in groups:
            for member in group.members:
                if member.verdict.is_scored and member.verdict.is_correct:
                    self._add(group.prompt.id, member.rollout.length)

    def _add(self, prompt_id: str, length: int) -> None:
        seen = self._seen.get(prompt_id)
        self._seen[prompt_id] = CorrectLengths(length, length, 1) if seen is None else seen.with_length(length)

    def to_json(self) -> dict[str, list[int]]:
        """``{prompt id: [shortest, total, count]}``, in the order of the ids."""
        return {prompt_id: [seen.shortest, seen.total, seen.count] for prompt_id, seen in sorted(self._seen.items())}

    @classmethod
    def from_json(cls, content: Mapping[str, Iterable[int]]) -> PromptMemory:
        """The memory that :meth:`to_json` wrote; raises ValueError for an entry that no answers can have left."""
        memory = cls()
        for prompt_id, entry in content.items():
            numbers = list(entry)
            if len(numbers) != 3 or not all(type(n) is int for n in numbers):
                raise ValueError(f"the memory of prompt {prompt_id} is {entry!r}, not [shortest, total, count]")
            shortest, total, count = numbers
            if not (shortest > 0 and count > 0 and total >= shortest * count):
                raise ValueError(f"the memory of prompt {prompt_id} is {entry!r}: no such answers can exist")
            memory._seen[prompt_id] = CorrectLengths(shortest, total, count)
        return memory
