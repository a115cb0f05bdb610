"""What a member starts from: its budget's words as tokens, in front of the response or behind the question, and the cap left."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from transformers import PreTrainedTokenizerBase

from rl.errors import ConfigError
from rl.prompts import PromptEncoder
from rl.settings import RolloutSettings
from rl.types import Budget, BudgetKind, Prompt
from rollout.markers import END_THINK, THINK

MARKER = 1
"""Tokens of `<think>` and of `</think>` where a budget is hard; other vocabularies are refused."""
TAIL = 16  # tokens decoded to see how a prompt ends: enough where <think> and a few newlines are spelt in pieces


@dataclass(frozen=True)
class Opening:
    """One member's start: all of a lease that follows from its budget."""

    budget: Budget
    prompt: Prompt
    """Its token ids hold the budget's words where they end the question."""
    prefill_ids: tuple[int, ...]
    """Response tokens put there by us."""
    max_new_tokens: int
    """Cap on generated tokens."""


@dataclass(frozen=True)
class ExitWords:
    """What leaves a thinking early."""

    ids: tuple[int, ...]
    """Token ids of `rollout.exit_template`."""
    end: int
    """Id of `</think>`, which is one token."""


class Openings:
    """Turns budgets into token ids by the templates of the settings and `budget_place`.

    Without an encoder, questions stay as they are: then `budget_place: suffix` is refused when a prompt is opened.
    """

    def __init__(
        self, settings: RolloutSettings, tokenizer: PreTrainedTokenizerBase, encoder: PromptEncoder | None = None
    ) -> None:
        self._settings = settings
        self._tokenizer = tokenizer
        self._encoder = encoder
        self._encoded: dict[str, tuple[int, ...]] = {}
        self.free = Budget(tokens=0, kind=BudgetKind.FREE, template=settings.free_template)
        self.no_think = Budget(tokens=0, kind=BudgetKind.FREE, template=settings.no_think_template, no_think=True)

    def budget(self, tokens: int) -> Budget:
        """The budget of so many tokens, as the settings want it said and kept."""
        s = self._settings
        kind, said = BudgetKind(s.budget_kind), s.budget_place
        if said == "none":
            return Budget(tokens, kind, s.free_template, hard=s.hard_budgets)
        return Budget(tokens, kind, s.budget_template, place=said, hard=s.hard_budgets)

    def effort(self, effort: float) -> Budget:
        """The budget that asks for an effort; its words come behind `<think>`, or end the question."""
        words = self._settings.effort_template
        words = words if words[0].isspace() else f" {words}"
        if self._settings.budget_place == "suffix":
            return Budget(0, BudgetKind.EFFORT, words, place="suffix", effort=effort)
        return Budget(0, BudgetKind.EFFORT, THINK + words, effort=effort)

    def open(self, prompt: Prompt, budget: Budget, *, step: int | None = None) -> Opening:
        """Everything a member of this budget starts from; ``prompt`` is the one without words about a budget.

        step: finished steps, which choose the cap of `rollout.length_schedule`; None outside training.

        Raises:
            ConfigError: the words cannot be spelt, or leave no room.
        """
        ids = prompt.token_ids if budget.place == "prefill" else self.prompt_ids(prompt.question, budget)
        prefill = self.prefill_ids(budget, ids)
        opened = prompt if ids is prompt.token_ids else replace(prompt, token_ids=ids)
        return Opening(budget, opened, prefill, self.max_new_tokens(budget, ids, prefill, step=step))

    def prompt_ids(self, question: str, budget: Budget) -> tuple[int, ...]:
        """Token ids of the prompt with the budget's words at the end of the question, where they belong there."""
        if self._encoder is None:
            raise ValueError("words after the question need the PromptEncoder that encodes the questions")
        return self._encoder.encode(question + (budget.sentence if budget.place == "suffix" else ""))

    def prefill_ids(self, budget: Budget, prompt_ids: Sequence[int]) -> tuple[int, ...]:
        """Token ids that open the response; prompt and opening together open the thinking once.

        Some chat templates already end in `<think>`, with or without a newline; then the opening's own one is left out.

        Raises:
            ConfigError: the tokenizer cannot spell the opening.
        """
        opening = budget.sentence if budget.place == "prefill" else self._settings.free_template
        tail = self._tokenizer.decode(list(prompt_ids[-TAIL:]), skip_special_tokens=False) if prompt_ids else ""
        assert isinstance(tail, str)
        if tail.rstrip().endswith(THINK):
            opening = opening.replace(THINK, "", 1)
            # After "<think>\n" the sentence starts a line; its space only made sense behind its own <think>.
            opening = opening.lstrip() if tail[-1].isspace() else opening
        return self._encode(opening, "the opening sentence")

    def suffix_ids(self, budget: Budget) -> tuple[int, ...]:
        """Token ids of the words alone that end the question; empty where they open the response.

        Raises:
            ConfigError: the tokenizer cannot spell them.
        """
        return self._encode(budget.sentence, "the end of the question") if budget.place == "suffix" else ()

    def exit_words(self) -> ExitWords:
        """Token ids of the words that leave a thinking early.

        Raises:
            ConfigError: the tokenizer cannot spell them, or has no token for `</think>` alone, which is searched for in a path.
        """
        ids = self._encode(self._settings.exit_template, "the exit words")
        end = self._encode(END_THINK, "the end of the thinking")
        if len(end) != MARKER:
            raise ConfigError(
                f"rollout.exits needs {END_THINK} as one token; this vocabulary spells it in {len(end)}",
                fix="set rollout.exits=0, or use a model that has it",
            )
        if end[0] not in ids:
            raise ConfigError(
                f"rollout.exit_template={self._settings.exit_template!r} merges {END_THINK} with its neighbours in this "
                "vocabulary, so that it would not end the thinking",
                fix=f"write {END_THINK} alone, or with other words around it",
            )
        return ExitWords(ids, end[0])

    def max_new_tokens(
        self, budget: Budget, prompt_ids: Sequence[int], prefill_ids: Sequence[int], *, step: int | None = None
    ) -> int:
        """Cap on generated tokens, always positive; the only one there is.

        ``L - p``, and for a hard budget with `answer_tokens` ``min(L - p, b - s + m + a)``: what is left of the thinking, the
        marker that ends it, and the answer.

        L: `rollout.max_length`, or the cap of `length_schedule` at this step; p: tokens of the prefill; b: budget; s: tokens of
        prompt and prefill behind `<think>`, which the engine counts as thinking; m: tokens of `</think>`, 1; a:
        `rollout.answer_tokens`. All in tokens.

        Raises:
            ConfigError: nothing is left, for the response, for the thinking under a hard budget, or for the answer after it.
        """
        longest, answer = self._settings.longest_response(step), self._settings.answer_tokens
        scheduled = longest != self._settings.max_length
        cap = f"rollout.length_schedule (a cap of {longest} at step {step})" if scheduled else f"rollout.max_length={longest}"
        key = "the caps of rollout.length_schedule" if scheduled else "rollout.max_length"
        room = longest - len(prefill_ids)
        if room <= 0:
            raise ConfigError(
                f"{cap} leaves no room after an opening sentence of {len(prefill_ids)} tokens",
                fix=f"raise {key}, or shorten the sentence (rollout.budget_template and its like)",
            )
        if not budget.hard:
            return room
        begun = self.thinking_begun(prompt_ids, prefill_ids)
        if begun >= budget.tokens:
            raise ConfigError(
                f"a hard budget of {budget.tokens} tokens is used up by the {begun} tokens of its opening behind {THINK}",
                fix=f"let the smallest of rollout.budgets be {begun + 1} or more, or set rollout.budget_place=suffix",
            )
        closed = budget.tokens - begun + MARKER
        if closed >= room:
            raise ConfigError(
                f"{cap} leaves no room for an answer after a hard budget of {budget.tokens} tokens",
                fix=f"raise {key} to {longest + closed - room + 1} or more, or lower the largest of rollout.budgets",
            )
        return room if answer is None else min(room, closed + answer)

    def thinking_begun(self, prompt_ids: Sequence[int], prefill_ids: Sequence[int]) -> int:
        """Tokens behind the last `<think>` of prompt and prefill, found by its ids as the engine finds it.

        Raises:
            ConfigError: it is not there.
        """
        think = self._encode(THINK, "the beginning of the thinking")
        end = self._encode(END_THINK, "the end of the thinking")
        if len(think) != MARKER or len(end) != MARKER:
            raise ConfigError(
                f"rollout.hard_budgets needs {THINK} and {END_THINK} as one token each; this vocabulary spells them in "
                f"{len(think)} and {len(end)}, and vLLM 0.31 then ends the thinking at another place than the budget",
                fix="set rollout.hard_budgets=false, or use a model that has both",
            )
        ids = (*prompt_ids[-TAIL:], *prefill_ids)
        for start in range(len(ids) - len(think), -1, -1):
            if ids[start : start + len(think)] == think:
                if end[0] in ids[start:]:
                    break
                return len(ids) - start - len(think)
        raise ConfigError(
            f"a hard budget counts from {THINK}, and where the response is opened there is none that {END_THINK} does not follow",
            fix=f"let the opening hold {THINK} last, or set rollout.hard_budgets=false",
        )

    def _encode(self, text: str, what: str) -> tuple[int, ...]:
        if text not in self._encoded:
            self._encoded[text] = self._spelt(text, what) if text else ()
        return self._encoded[text]

    def _spelt(self, text: str, what: str) -> tuple[int, ...]:
        try:
            return tuple(self._tokenizer.encode(text, add_special_tokens=False))
        except Exception as error:  # the tokenizers library raises plain Exception on a word it does not know
            raise ConfigError(
                f"the tokenizer of model.path cannot encode {what} {text!r} ({error})",
                fix="the embedded model only knows the words of the default rollout.budget_template; keep to them, or use "
                "another model",
            ) from error
