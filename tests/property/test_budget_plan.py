from __future__ import annotations

import math
from collections import Counter
from typing import Any, Literal

from hypothesis import given
from hypothesis import strategies as st

from rl.budget_draws import Turn, between, drawn_effort, remembered_budget
from rl.budget_settings import BudgetEffort, BudgetMemory, BudgetSchedule, hundredths, length_cap, scheduled_budget
from rl.embedded import VOCABULARY, tiny_tokenizer
from rl.memory import CorrectLengths, PromptMemory
from rl.settings import RolloutSettings
from rl.step_metrics import half_octave, octave
from rl.types import Prompt
from rollout.budgets import BudgetPlan

TOKENIZER = tiny_tokenizer()
LEVELS = st.lists(st.integers(1, 9999), min_size=1, max_size=6, unique=True).map(sorted)
ENDS = st.tuples(st.integers(1, 9999), st.integers(1, 9999)).map(sorted)
BITS = st.integers(0, 2**64 - 1)
SCALES = st.sampled_from(["uniform", "log_uniform"])
TURNS = st.builds(Turn, st.integers(0, 99), st.integers(0, 9999), st.integers(0, 99), st.text(max_size=4))
Scale = Literal["uniform", "log_uniform"]


def settings(numbers: list[int], *, free: bool) -> RolloutSettings:
    budgets = [*numbers, *(["free"] if free else [])]
    return RolloutSettings.model_validate({"budgets": budgets, "samples_per_prompt": len(budgets), "max_length": 10_000})


@given(numbers=LEVELS, free=st.booleans(), share=st.integers(1, 5), turn=TURNS)
def test_every_budget_of_a_list_gets_the_same_number_of_neighbouring_members(
    numbers: list[int], free: bool, share: int, turn: Turn
) -> None:
    plan = BudgetPlan(settings(numbers, free=free), TOKENIZER)
    dealt = plan.budgets(share * len(plan.levels()), turn, PromptMemory())
    assert set(Counter(dealt).values()) == {share}
    assert dealt == [level for level in plan.levels() for _ in range(share)]


@given(
    numbers=LEVELS,
    free=st.booleans(),
    body=st.lists(st.integers(4, len(VOCABULARY) - 1), max_size=30),
    ending=st.sampled_from(["", "<think>", "<think>\n", "<think>\n\n", "<think> "]),
)
def test_prompt_and_opening_hold_exactly_one_think(numbers: list[int], free: bool, body: list[int], ending: str) -> None:
    plan = BudgetPlan(settings(numbers, free=free), TOKENIZER)
    prompt = Prompt(id="q", question="", answer="", token_ids=(*body, *TOKENIZER.encode(ending)))
    for budget in plan.levels():
        opening = plan.open(prompt, budget)
        ids = [*opening.prompt.token_ids, *opening.prefill_ids]
        assert ids.count(TOKENIZER.convert_tokens_to_ids("<think>")) == 1
        assert budget.is_free or str(TOKENIZER.decode(ids)).endswith(f"I will answer the question with {budget.tokens} tokens")


@given(numbers=LEVELS, free=st.booleans())
def test_opening_and_room_add_up_to_the_cap(numbers: list[int], free: bool) -> None:
    plan = BudgetPlan(settings(numbers, free=free), TOKENIZER)
    for budget in plan.levels():
        opening = plan.open(Prompt(id="q", question="", answer="", token_ids=(5,)), budget)
        assert len(opening.prefill_ids) + opening.max_new_tokens == 10_000


@given(
    budget=st.integers(1, 400),
    answer=st.none() | st.integers(1, 200),
    longest=st.integers(405, 900),
    ending=st.sampled_from(["", "<think>", "<think>\n"]),
)
def test_a_hard_cap_ends_the_thinking_at_the_budget_and_keeps_response_and_answer_within_theirs(
    budget: int, answer: int | None, longest: int, ending: str
) -> None:
    values = {"budgets": [budget], "samples_per_prompt": 1, "max_length": longest, "budget_place": "none"}
    plan = BudgetPlan(RolloutSettings.model_validate(values | {"hard_budgets": True, "answer_tokens": answer}), TOKENIZER)
    prompt = Prompt(id="q", question="", answer="", token_ids=(5, *TOKENIZER.encode(ending)))
    begun = 1 if ending.endswith("\n") else 0
    if begun >= budget:
        return  # a budget of the newline alone is refused, which another test shows
    opening = plan.open(prompt, plan.levels()[0])
    left = opening.max_new_tokens - (budget - begun) - 1  # what is generated after the thinking and its marker
    assert left >= 1
    assert len(opening.prefill_ids) + opening.max_new_tokens <= longest
    assert answer is None or left <= answer
    reaches_end = len(opening.prefill_ids) + opening.max_new_tokens == longest
    assert reaches_end or left == answer  # nothing is given away


@given(ends=ENDS, bits=BITS, more=BITS, scale=SCALES)
def test_a_draw_lies_in_its_range_and_grows_with_its_bits(ends: list[int], bits: int, more: int, scale: Scale) -> None:
    low, high = ends
    small, large = (between(low, high, b, scale=scale) for b in sorted((bits, more)))
    assert low <= small <= large <= high
    assert (between(low, high, 0, scale=scale), between(low, high, 2**64 - 1, scale=scale)) == (low, high)


@given(turn=TURNS, member=st.none() | st.integers(0, 63))
def test_a_turn_draws_the_same_bits_again(turn: Turn, member: int | None) -> None:
    again = Turn(turn.run_seed, turn.step, turn.position, turn.prompt_id)
    assert again.bits(member) == turn.bits(member)
    assert 0 <= turn.bits(member) < 2**64


@given(start=st.integers(1, 9999), gamma=st.floats(0.01, 1.0), floor=st.integers(1, 9999), steps=st.integers(1, 5000))
def test_a_schedule_never_rises_and_stays_between_floor_and_start(start: int, gamma: float, floor: int, steps: int) -> None:
    source = BudgetSchedule(kind="schedule", start=start, gamma=gamma, floor=min(floor, start))
    course = [scheduled_budget(source, steps * i // 10, steps) for i in range(13)]
    assert course[0] == start
    assert course == sorted(course, reverse=True)
    assert course[-1] == course[10] >= source.floor
    assert abs(course[10] - max(source.floor, start * gamma)) <= 1


@given(lengths=st.lists(st.integers(1, 9999), min_size=1, max_size=9), values=st.data())
def test_a_remembered_budget_stays_between_floor_and_room(lengths: list[int], values: st.DataObject) -> None:
    start = values.draw(st.integers(1, 9999))
    fields: dict[str, Any] = {
        "factor": values.draw(st.floats(0.01, 20)),
        "floor": values.draw(st.integers(1, start)),
        "statistic": values.draw(st.sampled_from(["shortest", "mean"])),
    }
    source = BudgetMemory(kind="memory", start=start, **fields)
    room = values.draw(st.integers(start, 20_000))
    budget = remembered_budget(source, CorrectLengths(min(lengths), sum(lengths), len(lengths)), room=room)
    assert source.floor <= budget <= room
    wanted = source.factor * (min(lengths) if source.statistic == "shortest" else sum(lengths) / len(lengths))
    assert budget in (source.floor, room) or math.isclose(budget, wanted, abs_tol=1)


@given(tokens=st.integers(1, 10**6))
def test_a_bin_of_budgets_holds_its_number_and_bins_do_not_overlap(tokens: int) -> None:
    low, _, high = octave(tokens).partition("-")
    assert int(low) <= tokens <= int(high or low)
    assert octave(int(low)) == octave(int(high or low)) == octave(tokens)
    assert octave(int(high or low) + 1) != octave(tokens)


EFFORTS = st.integers(1, 10_000).map(lambda n: n / 100)


@given(ends=st.tuples(EFFORTS, EFFORTS).map(sorted), bits=BITS, more=BITS)
def test_a_drawn_effort_lies_in_its_range_grows_with_its_bits_and_is_said_exactly(
    ends: list[float], bits: int, more: int
) -> None:
    source = BudgetEffort(kind="effort", low=ends[0], high=ends[1])
    small, large = (drawn_effort(source, b) for b in sorted((bits, more)))
    assert ends[0] <= small <= large <= ends[1]
    assert (drawn_effort(source, 0), drawn_effort(source, 2**64 - 1)) == (ends[0], ends[1])
    assert float(f"{small:.2f}") == small


@given(effort=EFFORTS)
def test_a_bin_of_efforts_holds_its_number_and_bins_do_not_overlap(effort: float) -> None:
    low, high = (float(end) for end in half_octave(effort)[1:].split("-"))
    assert low <= effort <= high
    assert half_octave(low) == half_octave(high) == half_octave(effort)
    assert half_octave((hundredths(high) + 1) / 100) != half_octave(effort)
    assert hundredths(high) == hundredths(low) or high / low < 2**0.5


@given(
    firsts=st.lists(st.integers(1, 999), max_size=6, unique=True).map(sorted),
    caps=st.lists(st.integers(20, 999), min_size=7, max_size=7, unique=True).map(lambda caps: sorted(caps, reverse=True)),
    step=st.integers(0, 1200),
)
def test_a_cap_never_rises_and_is_the_room_of_prefill_and_generated_tokens_together(
    firsts: list[int], caps: list[int], step: int
) -> None:
    schedule = list(zip([0, *firsts], caps, strict=False))
    values = {"budgets": [16, "free"], "samples_per_prompt": 2, "max_length": 1000, "length_schedule": schedule}
    plan = BudgetPlan(RolloutSettings.model_validate(values), TOKENIZER)
    prompt = Prompt(id="q", question="", answer="", token_ids=(5,))
    for budget in plan.levels():
        now, later = (plan.open(prompt, budget, step=s) for s in (step, step + 1))
        assert len(now.prefill_ids) + now.max_new_tokens == length_cap(schedule, step)
        assert now.max_new_tokens >= later.max_new_tokens
        assert (now.max_new_tokens == later.max_new_tokens) == (step + 1 not in firsts)
        assert plan.open(prompt, budget).max_new_tokens == 1000 - len(now.prefill_ids)
