from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from rl.embedded import VOCABULARY, tiny_tokenizer
from rl.settings import RolloutSettings
from rollout.budgets import BudgetPlan

TOKENIZER = tiny_tokenizer()
LEVELS = st.lists(st.integers(1, 9999), min_size=1, max_size=6, unique=True).map(sorted)


def settings(numbers: list[int], *, free: bool) -> RolloutSettings:
    budgets = [*numbers, *(["free"] if free else [])]
    return RolloutSettings.model_validate({"budgets": budgets, "samples_per_prompt": len(budgets), "max_length": 10_000})


@given(numbers=LEVELS, free=st.booleans(), share=st.integers(1, 5))
def test_every_budget_gets_the_same_number_of_neighbouring_members(numbers: list[int], free: bool, share: int) -> None:
    plan = BudgetPlan(settings(numbers, free=free), TOKENIZER)
    dealt = plan.budgets(share * len(plan.levels))
    assert set(Counter(dealt).values()) == {share}
    assert dealt == [level for level in plan.levels for _ in range(share)]


@given(
    numbers=LEVELS,
    free=st.booleans(),
    body=st.lists(st.integers(4, len(VOCABULARY) - 1), max_size=30),
    ending=st.sampled_from(["", "<think>", "<think>\n", "<think>\n\n", "<think> "]),
)
def test_prompt_and_opening_hold_exactly_one_think(numbers: list[int], free: bool, body: list[int], ending: str) -> None:
    plan = BudgetPlan(settings(numbers, free=free), TOKENIZER)
    prompt = [*body, *TOKENIZER.encode(ending)]
    for budget in plan.levels:
        prefill = plan.prefill_ids(budget, prompt)
        assert [*prompt, *prefill].count(TOKENIZER.convert_tokens_to_ids("<think>")) == 1
        text = str(TOKENIZER.decode([*prompt, *prefill]))
        assert budget.is_free or text.endswith(f"I will answer the question with {budget.tokens} tokens")


@given(numbers=LEVELS, free=st.booleans())
def test_opening_and_room_add_up_to_the_cap(numbers: list[int], free: bool) -> None:
    plan = BudgetPlan(settings(numbers, free=free), TOKENIZER)
    for budget in plan.levels:
        length = len(plan.prefill_ids(budget, ()))
        assert length + plan.max_new_tokens(length) == 10_000
