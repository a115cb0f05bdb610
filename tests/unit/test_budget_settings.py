"""Sources of budgets as settings: what they compute without a model, what they say of themselves, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from rl.budget_settings import (
    BudgetSchedule,
    budget_bounds,
    calibration_efforts,
    describe_budgets,
    gives_one_per_group,
    largest_budget,
    length_cap,
    scheduled_budget,
)
from rl.settings import RolloutSettings, Settings

RANGE = {"kind": "range", "low": 100, "high": 4000}
SCHEDULE = {"kind": "schedule"}
MEMORY = {"kind": "memory", "start": 64, "floor": 16}
EFFORT = {"kind": "effort"}
SHORT = {"max_length": 160, "length_schedule": [[0, 160], [40, 120], [80, 80]]}
EXITS = {"budgets": ["free"], "exits": 5}


def source_of(budgets: object, **changes: object) -> Any:
    return RolloutSettings.model_validate({"budgets": budgets, "samples_per_prompt": 6} | changes).budgets


def settings_of(rollout: dict[str, Any], **sections: Any) -> Settings:
    base = {"model": {"path": "org/name"}, "data": {"source": "x.json"}, "max_steps": 1}
    return Settings.model_validate({**base, "rollout": rollout, **sections})


@pytest.mark.parametrize(
    ("step", "budget"),
    [(0, 800), (100, 681), (250, 534), (300, 493), (500, 357), (700, 259), (750, 239), (900, 187), (1000, 160)],
)
def test_the_schedule_of_rmt_falls_from_800_to_160_over_1000_steps(step: int, budget: int) -> None:
    assert scheduled_budget(source_of(SCHEDULE), step, 1000) == budget


def test_a_schedule_stays_at_its_end_and_never_falls_below_its_floor() -> None:
    assert scheduled_budget(source_of(SCHEDULE), 5000, 1000) == 160
    floored = source_of({"kind": "schedule", "floor": 300})
    assert [scheduled_budget(floored, step, 1000) for step in (500, 700, 1000)] == [357, 300, 300]


def test_a_budget_that_is_whole_is_not_rounded_down_by_a_floating_point_error() -> None:
    assert 100 * 0.29 < 29
    assert scheduled_budget(BudgetSchedule(kind="schedule", start=100, gamma=0.29), 1, 1) == 29


@pytest.mark.parametrize(
    ("budgets", "largest", "bounds"),
    [
        (["free"], None, None),
        ([32, 64, "free"], 64, (32, 64)),
        (RANGE, 4000, (100, 4000)),
        (SCHEDULE, 800, (160, 800)),
        (MEMORY, 64, (16, 4096)),
        (["free", "no_think"], None, None),
        ([32, "no_think"], 32, (32, 32)),
        (EFFORT, None, None),
    ],
)
def test_a_source_knows_the_budgets_it_can_name(budgets: object, largest: int | None, bounds: tuple[int, int] | None) -> None:
    source = source_of(budgets)
    assert largest_budget(source) == largest
    assert budget_bounds(source, room=4096) == bounds


@pytest.mark.parametrize(
    ("budgets", "said"),
    [
        ([32, 64, "free"], "32, 64, free"),
        (RANGE | {"scale": "log_uniform", "per": "member"}, "100 to 4000, log-uniform, one per member"),
        (SCHEDULE, "800 falling to 160 over max_steps"),
        (SCHEDULE | {"steps": 50, "floor": 200}, "800 falling to 200 over 50 steps"),
        (MEMORY | {"factor": 0.9}, "64, then 0.9 x the shortest correct answer of the prompt, at least 16"),
        ({"kind": "memory", "start": 64, "statistic": "mean"}, "64, then 1 x the mean correct answer of the prompt"),
        (["free", "no_think"], "free, no_think"),
        (EFFORT, "efforts 0.5 to 3, log-uniform, one per prompt"),
        (EFFORT | {"levels": [0.5, 1, 2], "per": "member"}, "efforts 0.5, 1, 2, one per member"),
    ],
)
def test_a_source_says_what_it_is_as_read_and_as_saved(budgets: object, said: str) -> None:
    assert describe_budgets(source_of(budgets)) == said
    saved = RolloutSettings.model_validate({"budgets": budgets, "samples_per_prompt": 6}).model_dump(mode="json")
    assert describe_budgets(saved["budgets"]) == said


def test_a_section_in_brackets_is_the_section() -> None:
    assert source_of([RANGE]) == source_of(RANGE)


@pytest.mark.parametrize(
    ("rollout", "told"),
    [
        ({"budgets": {"kind": "range", "low": 9, "high": 8}}, "low=9 is above high=8; swap them"),
        ({"budgets": SCHEDULE | {"floor": 801}}, "floor=801 is above start=800"),
        ({"budgets": MEMORY | {"floor": 65}}, "floor=65 is above start=64"),
        ({"budgets": {"kind": "memory", "start": 64}, "max_length": 63}, "64 is above rollout.max_length=63"),
        ({"budgets": {"kind": "often"}}, "a list, or a section whose kind is range, schedule, memory or effort"),
        ({"budgets": [RANGE, RANGE]}, "valid integer"),
        ({"budgets": RANGE, "hard_budgets": True, "max_length": 4000}, "leaves no answer inside rollout.max_length=4000"),
        ({"budgets": MEMORY, "budget_place": "none"}, "budget_place=none tells nobody the budget"),
        ({"budgets": MEMORY, "budget_place": "none", "hard_budgets": True, "free_template": "hm"}, "put <think> into it"),
        (
            {"budgets": MEMORY, "budget_template": "in {budget}", "hard_budgets": True},
            "rollout.budget_template='in {budget}' does",
        ),
        ({"budgets": EFFORT | {"low": 2, "high": 1}}, "low=2 is above high=1; swap them"),
        ({"budgets": EFFORT | {"low": 0.125}}, "an effort is said with two decimals; write 0.12 instead of 0.125"),
        ({"budgets": EFFORT | {"low": 0.0}}, "greater than or equal to 0.01"),
        ({"budgets": EFFORT | {"levels": [0.5, 0.755]}}, "write 0.76 instead of 0.755"),
        ({"budgets": EFFORT | {"levels": [1, 1]}}, "must be efforts that increase"),
        ({"budgets": EFFORT | {"levels": []}}, "must be efforts that increase"),
        ({"budgets": EFFORT | {"levels": [1, 2], "high": 2}}, "low and high have no effect beside levels"),
        ({"budgets": EFFORT | {"per": "member"}}, "set levels beside per: member, such as [0.5, 1, 2], or per: prompt"),
        (
            {"budgets": EFFORT | {"per": "member", "levels": [1, 2]}, "samples_per_prompt": 5},
            "rollout.samples_per_prompt=5 cannot be dealt evenly over 2 efforts; use 4 or 6",
        ),
        (
            {"budgets": EFFORT | {"per": "member", "levels": [1, 2]}, "samples_per_prompt": 2},
            "leaves one member for each of 2 efforts and none to compare it with; use 4 or more, or per: prompt",
        ),
        ({"budgets": EFFORT, "hard_budgets": True}, "hard_budgets=true has no budget to enforce"),
        ({"budgets": EFFORT, "budget_place": "none"}, "budget_place=none tells nobody the budget"),
        ({"budgets": EFFORT, "effort_template": "Effort."}, "must hold {effort} exactly once"),
        ({"budgets": EFFORT, "effort_template": "<think> {effort}"}, "neither {budget} nor <think>, which is put in front"),
        ({"budgets": ["no_think", "free"]}, "put `free` once, at the end, and `no_think` once, behind it"),
        ({"budgets": ["no_think", "no_think"]}, "`no_think` once"),
        ({"no_think_template": "<think>"}, "rollout.no_think_template '<think>' must hold </think> exactly once"),
        ({"no_think_template": "</think><think>"}, "in front of it <think> at most once"),
        ({"exit_template": "stop"}, "rollout.exit_template 'stop' must hold </think> exactly once, and no <think>"),
        ({"exit_template": "<think></think>"}, "and no <think>"),
    ],
)
def test_a_source_that_cannot_work_is_refused_with_its_fix(rollout: dict[str, Any], told: str) -> None:
    with pytest.raises(ValidationError) as caught:
        settings_of(rollout)
    assert told in str(caught.value)


def test_a_schedule_needs_a_length_of_its_own_or_of_the_run() -> None:
    for lengths in ({"max_steps": 9}, {"max_steps": None, "max_minutes": 1.0}):
        steps = None if lengths["max_steps"] else 9
        settings_of({"budgets": SCHEDULE | {"steps": steps}}, **lengths)
    with pytest.raises(ValidationError, match="falls over max_steps, which is not set; set it, or steps"):
        settings_of({"budgets": SCHEDULE}, max_steps=None, max_minutes=1.0)


def test_members_with_a_budget_each_have_nobody_to_be_compared_with_in_hbpos_subgroups() -> None:
    hbpo = {"advantage": {"estimator": "hierarchical"}, "reward": {"method": "hbpo"}}
    with pytest.raises(ValidationError, match=r"set per=prompt in rollout\.budgets, or advantage\.estimator=group_normalised"):
        settings_of({"budgets": RANGE | {"per": "member"}}, **hbpo)
    settings_of({"budgets": RANGE}, **hbpo)
    settings_of({"budgets": RANGE | {"per": "member"}})


# -- efforts, members without thinking ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "efforts"),
    [
        ({}, (0.5, 0.75, 1.0, 1.5, 2.0, 3.0)),
        ({"low": 0.7, "high": 1.5}, (0.75, 1.0, 1.5)),
        ({"low": 1.1, "high": 1.4}, (1.1, 1.4)),
        ({"low": 1.1, "high": 1.1}, (1.1,)),
        ({"levels": [0.25, 1, 4]}, (0.25, 1.0, 4.0)),
    ],
)
def test_an_evaluation_asks_for_the_levels_or_for_the_calibration_grid_in_the_range(
    changes: dict[str, Any], efforts: tuple[float, ...]
) -> None:
    assert calibration_efforts(source_of(EFFORT | changes)) == efforts


@pytest.mark.parametrize(
    ("budgets", "one"),
    [
        (["free"], True),
        ([32, "free"], False),
        (RANGE, True),
        (RANGE | {"per": "member"}, False),
        (SCHEDULE, True),
        (MEMORY, True),
        (EFFORT, True),
        (EFFORT | {"levels": [1, 2], "per": "member"}, False),
    ],
)
def test_a_source_knows_whether_a_group_has_one_budget(budgets: object, one: bool) -> None:
    assert gives_one_per_group(source_of(budgets)) is one


def test_only_drawn_efforts_differ_from_step_to_step() -> None:
    listed = {"budgets": EFFORT | {"levels": [0.5, 2]}}
    assert RolloutSettings.model_validate(listed).has_listed_budgets
    assert not RolloutSettings.model_validate({"budgets": EFFORT}).has_listed_budgets


def test_efforts_may_end_the_question_beside_the_default_words_of_budgets_in_tokens() -> None:
    settings_of({"budgets": EFFORT, "budget_place": "suffix"})
    with pytest.raises(ValidationError, match="opens the thinking inside the question"):
        settings_of({"budgets": [32], "budget_place": "suffix"})


def test_members_that_do_not_think_need_no_place_for_a_budget() -> None:
    settings_of({"budgets": ["free", "no_think"], "budget_place": "none"})


# -- a falling cap -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("step", "cap"), [(0, 160), (39, 160), (40, 120), (79, 120), (80, 80), (9999, 80), (None, 160)])
def test_the_cap_is_that_of_the_last_entry_begun_and_max_length_outside_training(step: int | None, cap: int) -> None:
    assert RolloutSettings.model_validate(SHORT).longest_response(step) == cap


def test_a_run_without_a_schedule_has_one_cap() -> None:
    assert length_cap([], 7) is None
    assert RolloutSettings(max_length=99).longest_response(7) == 99


@pytest.mark.parametrize(
    ("schedule", "told"),
    [
        ([[1, 160]], "says nothing of step 0; begin it with [0, 160]"),
        ([[0, 160], [0, 80]], "its steps must increase"),
        ([[0, 160], [9, 80], [5, 60]], "its steps must increase"),
        ([[0, 120], [9, 120]], "its caps must fall"),
        ([[0, 161]], "begins above rollout.max_length=160"),
        ([[0, 0]], "greater than 0"),
        ([[-1, 100]], "greater than or equal to 0"),
    ],
)
def test_a_cap_that_could_not_fall_is_refused(schedule: object, told: str) -> None:
    with pytest.raises(ValidationError) as caught:
        settings_of({"max_length": 160, "length_schedule": schedule})
    assert told in str(caught.value)


def test_a_budget_above_the_last_cap_is_refused() -> None:
    for budgets in ([64, 96], {"kind": "range", "low": 8, "high": 96}):
        with pytest.raises(ValidationError, match=r"96 is above 80, the last cap of rollout\.length_schedule"):
            settings_of({"budgets": budgets, **SHORT})
    settings_of({"budgets": [64, 80], **SHORT})


# -- early exits -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"samples_per_prompt": 16}, "set it to 6, or exits to 15"),
        ({"budgets": [32, "free"]}, "so a group has one budget, neither hard nor no_think"),
        ({"budgets": ["no_think"]}, "so a group has one budget"),
        ({"budgets": RANGE | {"per": "member"}}, "so a group has one budget"),
        ({"budgets": [64], "hard_budgets": True}, "so a group has one budget, neither hard"),
        ({"reflex": {}}, "leave out rollout.reflex, or rollout.exits and no_think"),
    ],
)
def test_exits_that_could_not_leave_one_path_are_refused(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ValidationError) as caught:
        settings_of({"samples_per_prompt": 6, **EXITS, **changes})
    assert told in str(caught.value)


@pytest.mark.parametrize("budgets", [["free"], [64], RANGE, SCHEDULE, MEMORY, EFFORT])
def test_exits_leave_a_path_under_any_budget_that_its_group_shares(budgets: object) -> None:
    assert settings_of({**EXITS, "budgets": budgets, "samples_per_prompt": 6}, max_steps=9).rollout.exits == 5


def test_a_bias_on_reflection_words_is_refused_beside_members_that_never_write_the_end_of_thinking() -> None:
    with pytest.raises(ValidationError, match=r"leave out rollout\.reflex"):
        settings_of({"budgets": ["free", "no_think"], "reflex": {}})
