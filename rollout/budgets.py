"""Which budget each member of a group gets, and the tokens its response is opened with."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from rl.errors import ConfigError
from rl.settings import RolloutSettings
from rl.types import Budget, BudgetKind

THINK = "<think>"
TAIL = 16  # tokens decoded to see how a prompt ends: enough where <think> and a few newlines are spelt in pieces


class BudgetPlan:
    """Deals budgets to the members of a group and opens each response with its sentence (HBPO, section 3.1).

    Raises:
        ConfigError: the sentence of some member leaves no room below `rollout.max_length`, or cannot be spelt.
    """

    def __init__(self, settings: RolloutSettings, tokenizer: PreTrainedTokenizerBase) -> None:
        self._max_length = settings.max_length
        self._tokenizer = tokenizer
        self._encoded: dict[str, tuple[int, ...]] = {}
        self._levels = tuple(
            Budget(tokens=0, kind=BudgetKind.FREE, template=settings.free_template)
            if choice == "free"
            else Budget(tokens=int(choice), kind=BudgetKind.AT_MOST, template=settings.budget_template)
            for choice in settings.budgets
        )
        for budget in self._levels:
            self.max_new_tokens(len(self.prefill_ids(budget, ())))

    @property
    def levels(self) -> tuple[Budget, ...]:
        """The distinct budgets, increasing, the free one last."""
        return self._levels

    def budgets(self, samples_per_prompt: int) -> list[Budget]:
        """One budget per member, slot-major: all members of the first budget, then all of the second, and so on.

        Raises:
            ValueError: the members cannot be dealt evenly.
        """
        share, rest = divmod(samples_per_prompt, len(self._levels))
        if rest or share < 1:
            low = max(share, 1) * len(self._levels)
            options = str(low) if share < 1 else f"{low} or {low + len(self._levels)}"
            raise ValueError(
                f"{samples_per_prompt} samples per prompt cannot be dealt evenly over {len(self._levels)} budgets; use {options}"
            )
        return [budget for budget in self._levels for _ in range(share)]

    def prefill_ids(self, budget: Budget, prompt_ids: Sequence[int]) -> tuple[int, ...]:
        """Token ids that open the response; prompt and sentence together open the thinking once.

        Some chat templates already end in `<think>`, with or without a newline; then the sentence's own one is left out.

        Raises:
            ConfigError: the tokenizer cannot spell the sentence.
        """
        sentence = budget.sentence
        tail = self._tokenizer.decode(list(prompt_ids[-TAIL:]), skip_special_tokens=False) if prompt_ids else ""
        assert isinstance(tail, str)
        if tail.rstrip().endswith(THINK):
            sentence = sentence.replace(THINK, "", 1)
            # After "<think>\n" the sentence starts a line; its space only made sense behind its own <think>.
            sentence = sentence.lstrip() if tail[-1].isspace() else sentence
        if sentence not in self._encoded:
            self._encoded[sentence] = self._encode(sentence) if sentence else ()
        return self._encoded[sentence]

    def _encode(self, sentence: str) -> tuple[int, ...]:
        try:
            return tuple(self._tokenizer.encode(sentence, add_special_tokens=False))
        except Exception as error:  # the tokenizers library raises plain Exception on a word it does not know
            raise ConfigError(
                f"the tokenizer of model.path cannot encode the opening sentence {sentence!r} ({error})",
                fix="the embedded model only knows the words of the default rollout.budget_template; keep to them, or use "
                "another model",
            ) from error

    def max_new_tokens(self, prefill_length: int) -> int:
        """Tokens left to generate: `rollout.max_length - prefill_length`, always positive.

        Raises:
            ConfigError: nothing is left.
        """
        left = self._max_length - prefill_length
        if left <= 0:
            raise ConfigError(
                f"rollout.max_length={self._max_length} leaves no room after an opening sentence of {prefill_length} tokens",
                fix="raise rollout.max_length, or shorten rollout.budget_template and rollout.free_template",
            )
        return left
