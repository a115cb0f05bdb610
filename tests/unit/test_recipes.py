"""The shipped recipes: each is a method and nothing else."""

from __future__ import annotations

import pytest

from launch.config import PACKAGED, load_settings

REWARD_OF = {"hapo_temperature": "correct", "cyclicreflex": "correct", "grpo": "correct", "hbpo_shaped": "hbpo"}


@pytest.mark.parametrize("recipe", ["grpo", "dapo", "hbpo", "hapo_temperature", "cyclicreflex", "hbpo_shaped"])
def test_a_recipe_changes_only_the_method_of_the_quickstart(recipe: str) -> None:
    method = ("reward", "advantage", "loss", "correction")
    base = load_settings(PACKAGED / "quickstart.yaml").model_dump()
    found = load_settings(PACKAGED / "recipes" / f"{recipe}.yaml").model_dump()
    assert found["reward"]["method"] == REWARD_OF.get(recipe, recipe)
    for settings in (base, found):
        del settings["rollout"]["budgets"], settings["learner"]["train_prefix"]
        del settings["rollout"]["adaptive"], settings["rollout"]["reflex"], settings["eval"]["shaped"]
        for section in method:
            del settings[section]
    assert found == base


def test_the_hbpo_recipe_is_the_form_of_the_paper() -> None:
    settings = load_settings(PACKAGED / "recipes" / "hbpo.yaml")
    advantage = settings.advantage
    assert (advantage.estimator, advantage.intra_coef, advantage.intra_scale, advantage.centre) == (
        "hierarchical",
        1.0,
        "none",
        "none",
    )
    assert (settings.reward.form, settings.reward.beta, settings.reward.alpha) == ("piecewise", 4.0, None)
    assert (settings.loss.clip_low, settings.loss.clip_high) == (0.2, 0.28)


def test_the_dapo_recipe_keeps_its_overlong_buffer_inside_the_response() -> None:
    settings = load_settings(PACKAGED / "recipes" / "dapo.yaml")
    assert 0 < settings.reward.overlong_buffer < settings.rollout.max_length
