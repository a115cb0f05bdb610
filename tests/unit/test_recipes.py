"""The shipped recipes: each is a method and nothing else."""

from __future__ import annotations

from typing import Any

import pytest

from launch.config import PACKAGED, leaves, load_settings
from rl.reward_settings import OPTIONS

REWARD_OF = {
    "hapo": "dapo",
    "hapo_average": "dapo",
    "hapo_clipping": "dapo",
    "hapo_redistribution": "dapo",
    "hapo_temperature": "dapo",
    "cyclicreflex": "correct",
    "grpo": "correct",
    "hbpo_shaped": "hbpo",
    "thinkprune": "correct",
    "decoupled": "correct",
    "dpo": "correct",
    "reverse_dpo": "correct",
    "treg": "correct",
    "aligndistil": "correct",
    "hbpo_aligndistil": "hbpo",
    "hbpo_treg": "hbpo",
}
RECIPES = sorted(path.stem for path in (PACKAGED / "recipes").glob("*.yaml"))
HAPO = ("hapo", "hapo_average", "hapo_clipping", "hapo_redistribution", "hapo_temperature")
NEEDED = {
    "s_grpo": {("prompts_per_step",), ("rollout", "samples_per_prompt"), ("rollout", "exits")},
    "history_min": {("data", "size")},
    "thinkprune": {("rollout", "length_schedule")},
    "aec": {("rollout", "effort_template"), ("eval", "with_budgets")},
    # an engine less makes room for the workers of frozen models
    "hbpo_treg": {("treg",), ("rollout", "workers")},
    "hbpo_aligndistil": {("preference",), ("distil",), ("rollout", "workers")},
    "aligndistil": {("stage",), ("preference",), ("distil",), ("rollout", "workers"), ("max_steps",)},
}
NEEDED |= dict.fromkeys(("dpo", "reverse_dpo", "treg"), {("stage",), ("preference",), ("learner", "lr"), ("max_steps",)})
NEEDED |= dict.fromkeys(("dapo", *HAPO), {("rollout", "refill"), ("learner", "minibatches")})
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


def _differences(recipe: str, base: str) -> dict[str, Any]:
    """Key -> value of each setting of a recipe that another recipe has otherwise."""
    found, other = (dict(leaves(load_settings(PACKAGED / "recipes" / f"{name}.yaml").model_dump())) for name in (recipe, base))
    return {key: value for key, value in found.items() if other.get(key, "absent") != value}


def test_the_dapo_recipe_is_that_of_the_paper() -> None:
    settings = load_settings(PACKAGED / "recipes" / "dapo.yaml")
    assert (settings.loss.clip_low, settings.loss.clip_high, settings.loss.dual_clip) == (0.2, 0.28, 10.0)
    assert (settings.rollout.refill, settings.advantage.length_guard, settings.learner.minibatches) == (2, False, 4)
    assert settings.rollout.adaptive is None and settings.loss.heterogeneous is None


@pytest.mark.parametrize(
    ("recipe", "sections"),
    [
        ("hapo_temperature", {"rollout.adaptive"}),
        ("hapo_average", {"advantage.estimator"}),
        ("hapo_redistribution", {"loss.heterogeneous"}),
        ("hapo_clipping", {"loss.heterogeneous"}),
        ("hapo", {"rollout.adaptive", "advantage.estimator", "loss.heterogeneous"}),
    ],
)
def test_each_part_of_hapo_is_dapo_and_that_part(recipe: str, sections: set[str]) -> None:
    changed = {".".join(key.split(".")[:2]) for key in _differences(recipe, "dapo")}
    assert changed == sections


def test_the_two_parts_of_hapos_loss_are_told_apart() -> None:
    files = [PACKAGED / "recipes" / f"hapo{part}.yaml" for part in ("_clipping", "_redistribution", "")]
    chosen = [part for part in (load_settings(file).loss.heterogeneous for file in files) if part is not None]
    assert [(part.clip, part.redistribute) for part in chosen] == [(True, False), (False, True), (True, True)]
    assert {(part.zone, part.entropy, part.scope, part.literal) for part in chosen} == {("base", "old", "batch", False)}
