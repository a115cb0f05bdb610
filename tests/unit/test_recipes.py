"""The shipped recipes: each is a method and nothing else."""

from __future__ import annotations

from typing import Any

import pytest

from launch.config import PACKAGED, load_settings
from rl.reward_settings import OPTIONS

REWARD_OF = {
    "hapo_temperature": "correct",
    "cyclicreflex": "correct",
    "grpo": "correct",
    "hbpo_shaped": "hbpo",
    "thinkprune": "correct",
    "decoupled": "correct",
}
RECIPES = sorted(path.stem for path in (PACKAGED / "recipes").glob("*.yaml"))
NEEDED = {
    "s_grpo": {("prompts_per_step",), ("rollout", "samples_per_prompt"), ("rollout", "exits")},
    "history_min": {("data", "size")},
    "thinkprune": {("rollout", "length_schedule")},
    "aec": {("rollout", "effort_template"), ("eval", "with_budgets")},
}
"""What a method cannot do without beside its own sections."""
METHOD = {("reward",), ("advantage",), ("loss",), ("correction",), ("learner", "train_prefix"), ("eval", "shaped")}
METHOD |= {("rollout", key) for key in ("budgets", "budget_kind", "budget_place", "adaptive", "reflex")}


def _without(settings: dict[str, Any], keys: set[tuple[str, ...]]) -> dict[str, Any]:
    for *sections, last in keys:
        inner = settings
        for section in sections:
            inner = inner[section]
        del inner[last]
    return settings


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_changes_only_the_method_of_the_quickstart(recipe: str) -> None:
    base = load_settings(PACKAGED / "quickstart.yaml").model_dump()
    found = load_settings(PACKAGED / "recipes" / f"{recipe}.yaml").model_dump()
    assert found["reward"]["method"] == REWARD_OF.get(recipe, recipe)
    changed = METHOD | NEEDED.get(recipe, set())
    assert _without(found, changed) == _without(base, changed)


def test_every_reward_method_has_a_recipe_and_every_recipe_says_how_to_run_it() -> None:
    methods = {load_settings(PACKAGED / "recipes" / f"{recipe}.yaml").reward.method for recipe in RECIPES}
    assert methods == set(OPTIONS) - {"none"}
    for recipe in RECIPES:
        text = (PACKAGED / "recipes" / f"{recipe}.yaml").read_text()
        assert f"# Run it:  budget-rl train configs/recipes/{recipe}.yaml" in text


def test_the_hbpo_recipe_is_the_form_of_the_paper() -> None:
    settings = load_settings(PACKAGED / "recipes" / "hbpo.yaml")
    advantage = settings.advantage
    assert (advantage.estimator, advantage.intra_coef, advantage.intra_scale, advantage.centre) == (
        "hierarchical",
        1.0,
        "none",
        "none",
    )
    assert tuple(settings.reward.option(name) for name in ("form", "beta", "alpha")) == ("piecewise", 4.0, None)
    assert (settings.loss.clip_low, settings.loss.clip_high) == (0.2, 0.28)


def test_the_dapo_recipe_keeps_its_overlong_buffer_inside_the_response() -> None:
    settings = load_settings(PACKAGED / "recipes" / "dapo.yaml")
    assert 0 < settings.reward.overlong_buffer < settings.rollout.max_length
