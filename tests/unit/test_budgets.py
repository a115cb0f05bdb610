"""Which budgets a group gets from each kind of source, which an evaluation asks for, and what is refused at once."""

from __future__ import annotations

from typing import Any

import pytest

from rl.budget_draws import Turn
from rl.data import Problem
from rl.embedded import tiny_tokenizer
from rl.errors import ConfigError
from rl.memory import PromptMemory
from rl.prompts import PromptEncoder
from rl.settings import DataSettings, RolloutSettings
from rl.types import Budget, BudgetKind, Group, Prompt
from rollout.budgets import BudgetPlan
from tests.builders import NO_THINK, make_budget, make_effort, make_lease, make_prompt, make_rollout, make_scored

RANGE = {"kind": "range", "low": 16, "high": 128}
SCHEDULE = {"kind": "schedule", "start": 100, "gamma": 0.25}
MEMORY = {"kind": "memory", "start": 64, "floor": 16}
SUFFIX = {"budget_place": "suffix", "budget_template": " I will answer with {budget} tokens"}
EFFORT = {"kind": "effort"}
SAID = {"effort_template": "I will answer with {effort}"}
SHORT = {"length_schedule": [[0, 160], [2, 60]]}


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


def labels_of(plan: BudgetPlan, *, step: int = 0, position: int = 0, samples: int = 4) -> list[str]:
    turn = Turn(run_seed=1, step=step, position=position, prompt_id="q0")
    return [budget.label for budget in plan.budgets(samples, turn, PromptMemory())]


def remembered(*lengths: int) -> PromptMemory:
    """A memory in which prompt q0 has correct answers of these lengths."""
    memory = PromptMemory()
    answers = [make_scored(make_rollout(make_lease(member=m), generated=(5,) * n)) for m, n in enumerate(lengths)]
    memory.observe([Group(make_prompt(0), tuple(answers))])
    return memory


# -- what a budget says of itself --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("budget", "label", "sentence", "is_free"),
    [
        (make_budget(64), "64", "<think> I will answer the question with 64 tokens", False),
        (make_budget(), "free", "<think>", True),
        (NO_THINK, "no_think", "<think></think>", True),
        (make_effort(1.5), "x1.50", "<think> effort 1.50", True),
        (make_effort(0.07), "x0.07", "<think> effort 0.07", True),
    ],
)
def test_a_budget_has_a_label_a_sentence_and_says_whether_a_number_of_tokens_binds(
    budget: Budget, label: str, sentence: str, is_free: bool
) -> None:
    assert (budget.label, budget.sentence, budget.is_free) == (label, sentence, is_free)
    assert (budget.tokens > 0) is not is_free


@pytest.mark.parametrize(
    "parts",
    [
        {"kind": BudgetKind.EFFORT},
        {"kind": BudgetKind.FREE, "effort": 1.0},
        {"kind": BudgetKind.AT_MOST, "tokens": 8, "no_think": True},
        {"kind": BudgetKind.EFFORT, "effort": 1.0, "no_think": True},
    ],
)
def test_a_budget_whose_parts_contradict_each_other_cannot_be_made(parts: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="of kind"):
        Budget(**{"tokens": 0, "template": ""} | parts)


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


def test_half_a_group_may_start_with_its_thinking_closed() -> None:
    halves = plan(["free", "no_think"], samples_per_prompt=4)
    assert labels_of(halves) == ["free", "free", "no_think", "no_think"]
    assert labels_of(plan([32, "free", "no_think"]), samples=3) == ["32", "free", "no_think"]


def test_a_drawn_effort_is_one_for_the_group_and_another_at_each_turn() -> None:
    drawn = [labels_of(plan(EFFORT, **SAID), step=step, position=place) for step in range(5) for place in range(5)]
    assert all(len(set(group)) == 1 and 0.5 <= float(group[0][1:]) <= 3 for group in drawn)
    assert len({group[0] for group in drawn}) > 15


def test_levels_of_effort_go_to_prompts_in_turn_or_evenly_over_the_members() -> None:
    turns = plan(EFFORT | {"levels": [0.5, 2]}, **SAID)
    assert [labels_of(turns, position=place)[0] for place in range(3)] == ["x0.50", "x2.00", "x0.50"]
    assert set(labels_of(turns, step=1)) == {"x2.00"}
    dealt = plan(EFFORT | {"levels": [0.5, 2], "per": "member"}, samples_per_prompt=4, **SAID)
    assert labels_of(dealt, step=1) == ["x0.50", "x0.50", "x2.00", "x2.00"]


def test_a_memory_asks_for_no_more_than_the_cap_of_the_step_leaves() -> None:
    generous = plan(MEMORY | {"factor": 9}, **SHORT)
    assert tokens_of(generous, memory=remembered(40), step=1) == [160, 160, 160]
    assert tokens_of(generous, memory=remembered(40), step=2) == [60, 60, 60]
    assert tokens_of(generous, step=2) == [60, 60, 60]  # its start is 64


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
        ([32, "free", "no_think"], 3, ["32", "free", "no_think"]),
        (EFFORT, 3, ["x0.50", "x0.75", "x1.00", "x1.50", "x2.00", "x3.00"]),
        (EFFORT | {"levels": [0.25, 4]}, 3, ["x0.25", "x4.00"]),
    ],
)
def test_an_evaluation_asks_for_a_few_budgets_of_the_source(budgets: object, step: int | None, labels: list[str]) -> None:
    assert [level.label for level in plan(budgets, samples_per_prompt=6, **SAID).levels(step)] == labels


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


@pytest.mark.parametrize("budgets", [EFFORT, EFFORT | {"levels": [1]}])
@pytest.mark.parametrize("place", ["prefill", "suffix"])
def test_words_of_an_effort_that_the_tokenizer_lacks_are_refused_at_once(budgets: object, place: str) -> None:
    with pytest.raises(ConfigError, match="cannot encode"):
        plan(budgets, budget_place=place)


def test_words_for_members_that_do_not_think_are_spelt_before_anything_starts() -> None:
    with pytest.raises(ConfigError, match="cannot encode the opening sentence '<think>hurry</think>'"):
        plan(["free", "no_think"], no_think_template="<think>hurry</think>")


def test_a_plan_has_exit_words_exactly_where_a_run_has_exits() -> None:
    assert plan(["free"]).exit_words is None
    words = plan(["free"], exits=5, exit_template=" so</think>").exit_words
    assert words is not None and tiny_tokenizer().decode(list(words.ids)) == " so</think>"
    with pytest.raises(ConfigError, match="cannot encode the exit words"):
        plan(["free"], exits=5, exit_template="hurry</think>")


@pytest.mark.parametrize(
    ("budgets", "cap"),
    [([8], 9), (["free", "no_think"], 2), (EFFORT, 9), (SCHEDULE | {"start": 8}, 9), ({"kind": "memory", "start": 8}, 9)],
)
def test_a_cap_below_what_an_opening_needs_is_refused_at_once(budgets: object, cap: int) -> None:
    with pytest.raises(ConfigError, match=rf"rollout\.length_schedule \(a cap of {cap} at step 9\) leaves no room"):
        plan(budgets, length_schedule=[[0, 160], [9, cap]], **SAID)


def test_a_schedule_of_budgets_may_not_ask_for_more_than_the_cap_of_its_step() -> None:
    plan(SCHEDULE, **SHORT)  # 50 of 60 at step 2
    with pytest.raises(ConfigError, match="asks for 70 tokens at step 1, (?s:.*)caps responses at 60 there"):
        plan(SCHEDULE, length_schedule=[[0, 160], [1, 60]])


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


@pytest.mark.parametrize(
    ("changes", "longest"),
    [({}, "3.00"), ({"high": 2.6}, "2.09"), ({"levels": [0.5, 2]}, "2.00"), ({"levels": [2.08, 2.6]}, "2.08")],
)
def test_the_longest_words_of_an_effort_are_those_of_most_tokens(changes: dict[str, Any], longest: str) -> None:
    # 10 to 60 are one token behind the point, all other hundredths two.
    said = plan(EFFORT | changes, budget_place="suffix", **SAID)
    assert said.longest_suffix() == f" I will answer with {longest}"


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
