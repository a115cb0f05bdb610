"""Which budgets a group gets from each kind of source, which an evaluation asks for, and what is refused at once."""

from __future__ import annotations

import pytest

from rl.budget_draws import Turn
from rl.data import Problem
from rl.embedded import tiny_tokenizer
from rl.errors import ConfigError
from rl.memory import PromptMemory
from rl.prompts import PromptEncoder
from rl.settings import DataSettings, RolloutSettings
from rl.types import Group, Prompt
from rollout.budgets import BudgetPlan
from tests.builders import make_lease, make_prompt, make_rollout, make_scored

RANGE = {"kind": "range", "low": 16, "high": 128}
SCHEDULE = {"kind": "schedule", "start": 100, "gamma": 0.25}
MEMORY = {"kind": "memory", "start": 64, "floor": 16}
SUFFIX = {"budget_place": "suffix", "budget_template": " I will answer with {budget} tokens"}


def plan(budgets: object = None, *, max_steps: int | None = 4, **changes: object) -> BudgetPlan:
    values = {"budgets": budgets or [32, 64, "free"], "samples_per_prompt": 6, "max_length": 160} | changes
    tokenizer = tiny_tokenizer()
    encoder = PromptEncoder(tokenizer, DataSettings(source="x.json", max_prompt_length=12))
    return BudgetPlan(RolloutSettings.model_validate(values), tokenizer, encoder=encoder, max_steps=max_steps)


def tokens_of(
    plan: BudgetPlan, *, step: int = 0, prompt: str = "q0", samples: int = 3, memory: PromptMemory | None = None
) -> list[int]:
    turn = Turn(run_seed=1, step=step, position=0, prompt_id=prompt)
    return [budget.tokens for budget in plan.budgets(samples, turn, memory or PromptMemory())]


def remembered(*lengths: int) -> PromptMemory:
    """A memory in which prompt q0 has correct answers of these lengths."""
    memory = PromptMemory()
    answers = [make_scored(make_rollout(make_lease(member=m), generated=(5,) * n)) for m, n in enumerate(lengths)]
    memory.observe([Group(make_prompt(0), tuple(answers))])
    return memory


# -- what a group gets -------------------------------------------------------------------------------------------------------


def test_members_are_dealt_slot_by_slot_from_a_list_whatever_the_turn() -> None:
    assert tokens_of(plan(), samples=6) == [32, 32, 64, 64, 0, 0]
    assert tokens_of(plan(), samples=6, step=9, prompt="q1") == [32, 32, 64, 64, 0, 0]
    assert plan().budgets(3, Turn(0, 0, 0, "q"), PromptMemory())[-1].is_free


@pytest.mark.parametrize(("samples", "advice"), [(7, "use 6 or 9"), (2, "use 3"), (0, "use 3")])
def test_members_that_cannot_be_dealt_evenly_are_refused(samples: int, advice: str) -> None:
    with pytest.raises(ValueError, match=advice):
        tokens_of(plan(), samples=samples)


def test_a_range_gives_a_whole_group_one_budget_and_each_step_and_prompt_another() -> None:
    drawn = [tokens_of(plan(RANGE), step=step, prompt=f"q{p}") for step in range(5) for p in range(5)]
    assert all(len(set(group)) == 1 and 16 <= group[0] <= 128 for group in drawn)
    assert len({group[0] for group in drawn}) > 15


def test_a_range_per_member_gives_each_member_its_own_budget() -> None:
    drawn = tokens_of(plan(RANGE | {"per": "member"}), samples=6)
    assert len(set(drawn)) == 6
    assert tokens_of(plan(RANGE | {"per": "member"}), samples=3) == drawn[:3]


def test_a_schedule_falls_over_the_run_or_over_steps_of_its_own() -> None:
    assert [tokens_of(plan(SCHEDULE), step=step)[0] for step in range(6)] == [100, 70, 50, 35, 25, 25]
    assert [tokens_of(plan(SCHEDULE | {"steps": 2}), step=step)[0] for step in range(4)] == [100, 50, 25, 25]
    with pytest.raises(ValueError, match="needs its length"):
        tokens_of(plan(SCHEDULE, max_steps=None))


def test_a_memory_gives_each_prompt_the_budget_of_its_own_correct_answers() -> None:
    memory = remembered(40, 30)
    assert tokens_of(plan(MEMORY), memory=memory) == [30, 30, 30]
    assert tokens_of(plan(MEMORY | {"statistic": "mean"}), memory=memory) == [35, 35, 35]
    assert tokens_of(plan(MEMORY), memory=memory, prompt="q1") == [64, 64, 64]
    assert tokens_of(plan(MEMORY | {"factor": 0.1}), memory=memory) == [16, 16, 16]


def test_a_memory_never_asks_for_more_than_a_response_has_room_for() -> None:
    generous = MEMORY | {"factor": 9}
    assert tokens_of(plan(generous), memory=remembered(40)) == [160, 160, 160]
    hard = plan(generous, hard_budgets=True, budget_place="none")
    assert tokens_of(hard, memory=remembered(40)) == [157, 157, 157]  # beside <think>, </think> and one token of answer
    opening = hard.open(make_prompt(0), hard.budgets(1, Turn(1, 0, 0, "q0"), remembered(40))[0])
    assert opening.max_new_tokens == 159


# -- what an evaluation asks for ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("budgets", "step", "labels"),
    [
        (["free"], 0, ["free"]),
        ([32, 64, "free"], 3, ["32", "64", "free"]),
        (RANGE, 3, ["16", "72", "128"]),
        (RANGE | {"scale": "log_uniform"}, 3, ["16", "45", "128"]),  # sqrt(16 * 128) = 45.25
        ({"kind": "range", "low": 16, "high": 16}, 0, ["16"]),
        (SCHEDULE, 0, ["100"]),
        (SCHEDULE, 2, ["50"]),
        (SCHEDULE, None, ["25"]),
        (MEMORY, 3, ["64"]),
    ],
)
def test_an_evaluation_asks_for_a_few_budgets_of_the_source(budgets: object, step: int | None, labels: list[str]) -> None:
    assert [level.label for level in plan(budgets, samples_per_prompt=6).levels(step)] == labels


# -- what is found before anything starts ------------------------------------------------------------------------------------


def test_a_plan_whose_sentence_cannot_fit_is_refused_at_once() -> None:
    with pytest.raises(ConfigError, match=r"opening sentence of 10 tokens"):
        plan([8], max_length=10)


@pytest.mark.parametrize("largest", [[16, 158], {"kind": "range", "low": 16, "high": 158}, {"kind": "schedule", "start": 158}])
def test_a_largest_hard_budget_that_leaves_no_answer_is_refused_at_once(largest: object) -> None:
    with pytest.raises(ConfigError, match="no room for an answer after a hard budget of 158 tokens"):
        plan(largest, hard_budgets=True)


@pytest.mark.parametrize("smallest", [[9, 64], {"kind": "range", "low": 9, "high": 64}, SCHEDULE | {"start": 39}])
def test_a_smallest_hard_budget_that_its_sentence_uses_up_is_refused_at_once(smallest: object) -> None:
    with pytest.raises(ConfigError, match="a hard budget of 9 tokens is used up by the 9 tokens"):
        plan(smallest, hard_budgets=True)


def test_a_memory_with_a_floor_below_its_own_hard_sentence_is_refused_at_once() -> None:
    with pytest.raises(ConfigError, match="hard budget of 1 tokens is used up by the 9 tokens"):
        plan({"kind": "memory", "start": 64}, hard_budgets=True)
    plan({"kind": "memory", "start": 64, "floor": 10}, hard_budgets=True)


@pytest.mark.parametrize("budgets", [[32], RANGE, SCHEDULE, MEMORY])
@pytest.mark.parametrize("place", ["prefill", "suffix"])
def test_words_the_tokenizer_lacks_are_refused_at_once_for_every_source(budgets: object, place: str) -> None:
    with pytest.raises(ConfigError, match=r"cannot encode(?s:.*)budget_template"):
        plan(budgets, budget_place=place, budget_template=" hurry up, {budget}")


def test_the_opening_of_evaluations_is_checked_although_no_member_is_free() -> None:
    with pytest.raises(ConfigError, match="cannot encode the opening sentence 'hurry'"):
        plan([32], free_template="hurry")


def test_a_prompt_that_opens_the_thinking_itself_shows_what_only_it_can_spoil() -> None:
    # Behind "<think>\n" one more token is thinking: of a hard budget of 10 none is left.
    hard = plan([10], hard_budgets=True)
    ids = tiny_tokenizer().encode("4 + 3 =<think>\n")
    with pytest.raises(ConfigError, match="hard budget of 10 tokens is used up by the 10 tokens"):
        hard.check(Prompt(id="q", question="4 + 3 =", answer="7", token_ids=tuple(ids)))
    hard.check(Prompt(id="q", question="4 + 3 =", answer="7", token_ids=tuple(ids[:4])))


# -- words behind the question -----------------------------------------------------------------------------------------------


def test_only_words_behind_the_question_make_prompts_longer() -> None:
    assert plan().longest_suffix() == ""
    assert plan(["free"], **SUFFIX).longest_suffix() == ""
    assert plan([32, 64, "free"], **SUFFIX).longest_suffix() == " I will answer with 64 tokens"


@pytest.mark.parametrize(
    ("budgets", "longest"),
    [([16, 60], 60), (RANGE, 128), (SCHEDULE, 100), (MEMORY, 160), ({"kind": "range", "low": 5, "high": 60}, 60)],
)
def test_the_longest_suffix_is_the_one_of_most_tokens_and_then_of_the_largest_number(budgets: object, longest: int) -> None:
    assert plan(budgets, **SUFFIX).longest_suffix() == f" I will answer with {longest} tokens"


def test_a_number_of_more_tokens_than_a_larger_one_has_the_longest_suffix() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["128"])  # then 100 to 127 are spelt in three digits, and 128 in one token
    values = {"budgets": RANGE, "max_length": 160, **SUFFIX}
    assert BudgetPlan(RolloutSettings.model_validate(values), tokenizer).longest_suffix().split()[-2] == "127"


def test_a_prompt_that_only_fits_without_its_budget_is_dropped_before_training() -> None:
    # "4 + 3 =" is 4 tokens; " I will answer with 64 tokens" is 8 more, " 100 tokens" 9.
    encoder = PromptEncoder(tiny_tokenizer(), DataSettings(source="x.json", max_prompt_length=12))
    problems = [
        Problem(question="4 + 3 =", answer="7", entry_json="{}"),
        Problem(question="4 + 3 + 1 =", answer="8", entry_json="{}"),
    ]
    kept, dropped = encoder.encode_all(problems, suffix=plan([64], **SUFFIX).longest_suffix())
    assert ([p.question for p in kept], dropped) == (["4 + 3 ="], 1)
    assert tiny_tokenizer().decode(list(kept[0].token_ids)) == "4 + 3 ="
    assert encoder.encode_all(problems)[1] == 0
