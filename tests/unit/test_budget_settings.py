"""Sources of budgets as settings: what they compute without a model, what they say of themselves, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from rl.budget_settings import BudgetSchedule, budget_bounds, describe_budgets, largest_budget, scheduled_budget
from rl.settings import RolloutSettings, Settings

RANGE = {"kind": "range", "low": 100, "high": 4000}
SCHEDULE = {"kind": "schedule"}
MEMORY = {"kind": "memory", "start": 64, "floor": 16}


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
        ({"budgets": {"kind": "often"}}, "a list, or a section whose kind is range, schedule or memory"),
        ({"budgets": [RANGE, RANGE]}, "valid integer"),
        ({"budgets": RANGE, "hard_budgets": True, "max_length": 4000}, "leaves no answer inside rollout.max_length=4000"),
        ({"budgets": MEMORY, "budget_place": "none"}, "budget_place=none tells nobody the budget"),
        ({"budgets": MEMORY, "budget_place": "none", "hard_budgets": True, "free_template": "hm"}, "put <think> into it"),
        (
            {"budgets": MEMORY, "budget_template": "in {budget}", "hard_budgets": True},
            "rollout.budget_template='in {budget}' does",
        ),
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
