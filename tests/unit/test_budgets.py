from __future__ import annotations

import pytest
from transformers import PreTrainedTokenizerBase

from rl.embedded import tiny_tokenizer
from rl.errors import ConfigError
from rl.settings import RolloutSettings
from rl.types import BudgetKind
from rollout.budgets import BudgetPlan


def plan(**changes: object) -> BudgetPlan:
    values: dict[str, object] = {"budgets": [32, 64, "free"], "samples_per_prompt": 6, "max_length": 160} | changes
    return BudgetPlan(RolloutSettings.model_validate(values), tiny_tokenizer())


def text_of(prompt: str, *, member: int, tokenizer: PreTrainedTokenizerBase | None = None) -> str:
    tokenizer = tokenizer or tiny_tokenizer()
    prompt_ids = tokenizer.encode(prompt)
    budgets = plan()
    prefill = budgets.prefill_ids(budgets.budgets(3)[member], prompt_ids)
    decoded = tokenizer.decode([*prompt_ids, *prefill])
    assert isinstance(decoded, str)
    return decoded


def test_members_are_dealt_slot_by_slot() -> None:
    assert [b.label for b in plan().budgets(6)] == ["32", "32", "64", "64", "free", "free"]


def test_a_free_member_has_no_number_and_its_own_opening() -> None:
    free = plan().budgets(3)[-1]
    assert (free.tokens, free.kind, free.sentence) == (0, BudgetKind.FREE, "<think>")


@pytest.mark.parametrize(("samples", "advice"), [(7, "use 6 or 9"), (2, "use 3"), (0, "use 3")])
def test_members_that_cannot_be_dealt_evenly_are_refused(samples: int, advice: str) -> None:
    with pytest.raises(ValueError, match=advice):
        plan().budgets(samples)


def test_a_plain_prompt_is_followed_by_the_whole_sentence() -> None:
    assert text_of("4 + 3 =", member=1) == "4 + 3 =<think> I will answer the question with 64 tokens"
    assert text_of("4 + 3 =", member=2) == "4 + 3 =<think>"


@pytest.mark.parametrize(
    ("ending", "sentence"),
    [
        ("<think>", " I will answer the question with 64 tokens"),
        ("<think>\n", "I will answer the question with 64 tokens"),
        ("<think>\n\n", "I will answer the question with 64 tokens"),
    ],
)
def test_a_prompt_that_opens_the_thinking_itself_is_not_opened_twice(ending: str, sentence: str) -> None:
    assert text_of("4 + 3 =" + ending, member=1) == "4 + 3 =" + ending + sentence
    assert text_of("4 + 3 =" + ending, member=2) == "4 + 3 =" + ending


def test_a_closed_thinking_earlier_in_the_prompt_does_not_count() -> None:
    assert text_of("<think>7</think>7\n4 + 3 =", member=2).endswith("4 + 3 =<think>")


def test_a_tokenizer_without_a_think_token_spells_it_and_still_opens_once() -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(set("<think> I will answer the question with 0123456789 tokens\n+=/"))
    characters = Tokenizer(models.WordLevel({c: i for i, c in enumerate(letters)}, unk_token="<unk>"))
    characters.pre_tokenizer = pre_tokenizers.Split("", behavior="isolated")
    characters.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=characters, clean_up_tokenization_spaces=False)
    budgets = BudgetPlan(RolloutSettings(budgets=[64], max_length=160), tokenizer)
    (budget,) = budgets.budgets(1)
    for ending in ("", "<think>", "<think>\n"):
        prompt_ids = tokenizer.encode("4 + 3 =" + ending)
        text = tokenizer.decode([*prompt_ids, *budgets.prefill_ids(budget, prompt_ids)])
        assert str(text).count("<think>") == 1
        assert str(text).endswith("I will answer the question with 64 tokens")


def test_the_opening_counts_in_the_length() -> None:
    assert plan().max_new_tokens(11) == 149
    assert plan().max_new_tokens(0) == 160


@pytest.mark.parametrize("prefill", [160, 161])
def test_an_opening_that_leaves_no_room_is_refused(prefill: int) -> None:
    with pytest.raises(ConfigError, match=r"rollout\.max_length=160 leaves no room"):
        plan().max_new_tokens(prefill)


def test_a_plan_whose_sentence_cannot_fit_is_refused_at_once() -> None:
    with pytest.raises(ConfigError, match=r"opening sentence of 10 tokens"):
        plan(budgets=[8], max_length=10)


def test_a_sentence_with_words_the_tokenizer_lacks_is_refused_at_once() -> None:
    with pytest.raises(ConfigError, match="cannot encode the opening sentence '<think> hurry up, 32'(?s:.*)budget_template"):
        plan(budget_template="<think> hurry up, {budget}")
