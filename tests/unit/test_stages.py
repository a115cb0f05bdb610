"""Stages: what each asks of the settings, and the runs that a teacher is made by."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from launch.config import load_settings
from rl.errors import ConfigError
from rl.manifest import MANIFEST_NAME
from rl.pair_run import PairRun
from rl.preflight import derived_plan
from rl.run import Run
from rl.run_folder import RunFolder
from rl.settings import Settings
from rl.stages import finished_model, made_model, run_class, staged, teacher_folder, teacher_settings, with_teachers
from rl.trainer import method_name
from rl.types import Manifest, WeightVersion

TREE: dict[str, Any] = {"model": {"path": "m"}, "data": {"source": "p.jsonl"}, "max_steps": 5}
PIPELINE = TREE | {"stage": "distil", "distil": {}, "preference": {"steps": 3, "lr": 1e-4, "pairs_per_step": 8}}


def _settings(**changes: Any) -> Settings:
    return Settings.model_validate(TREE | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stage": "preference"}, "there is no section preference; add `preference: {}`"),
        ({"stage": "distil"}, "there is no section distil"),
        ({"stage": "preference", "preference": {}, "distil": {}}, "has no teacher to distil from"),
        ({"preference": {}}, "never used in stage=rl"),
        ({"distil": {}}, "names no models: give distil.teacher.dpo"),
        ({"distil": {"teacher": {"dpo": "a"}}}, "distil.teacher.reverse is not given"),
        ({"distil": {"data": "pairs", "teacher": {"dpo": "a", "reverse": "b"}}}, "no rollouts to reward; set stage=distil"),
        (
            {"stage": "distil", "distil": {"data": "pairs", "teacher": {"dpo": "a", "reverse": "b"}}},
            "learns the chosen answers of preference.pairs",
        ),
        ({"distil": {"data": "pairs", "teacher": {"mode": "scalar"}}}, "learns from what the teacher says of sampled"),
        ({"distil": {"entropy_share": 0.5, "sstoken": {}, "teacher": {"dpo": "a", "reverse": "b"}}}, "both choose tokens"),
        ({"stage": "preference", "preference": {}, "treg": {}}, "reshapes advantages, which stage=preference has none of"),
        ({"stage": "preference", "preference": {}, "learner": {"epochs": 2}}, "set both to 1"),
        ({"stage": "preference", "preference": {}, "max_tokens": 9}, "this stage samples none; set max_steps"),
        ({"stage": "preference", "preference": {}, "rollout": {"refill": 1}}, "this stage has none; set it to 0"),
        ({"stage": "preference", "preference": {}, "max_steps": None}, "the run would never stop"),
        (
            {
                **{"stage": "preference", "preference": {"pairs": {"samples": 3}}},
                "rollout": {"budgets": [8, 16], "samples_per_prompt": 4},
            },
            "preference.pairs.samples=3 cannot be dealt evenly over the 2 budgets",
        ),
    ],
)
def test_a_stage_that_lacks_something_or_would_pass_over_it_is_refused_with_what_to_do(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValidationError, match=message):
        Settings.model_validate(TREE | changes)


def test_pairs_make_a_run_of_pairs_and_rollouts_one_of_rollouts() -> None:
    teacher = {"dpo": "a", "reverse": "b"}
    assert run_class(_settings()) is Run
    assert run_class(_settings(stage="preference", preference={})) is PairRun
    assert run_class(_settings(stage="distil", distil={"teacher": teacher})) is Run
    assert run_class(_settings(stage="distil", preference={}, distil={"data": "pairs", "teacher": teacher})) is PairRun


def test_the_preference_stages_own_steps_and_learning_rate_hold_in_it_alone() -> None:
    preference = {"steps": 3, "lr": 1e-4}
    own = staged(_settings(stage="preference", preference=preference))
    assert (own.max_steps, own.learner.lr) == (3, 1e-4)
    assert staged(_settings(stage="preference", preference={"steps": 3}, max_steps=None)).max_steps == 3
    distil = Settings.model_validate(PIPELINE)
    assert staged(distil) is distil


def test_a_teacher_is_made_by_two_runs_beside_the_run_itself_one_with_the_pairs_turned_round(tmp_path: Path) -> None:
    changes = {"learner": {"minibatches": 1, "epochs": 2}, "output": {"dir": str(tmp_path / "run")}}
    settings = Settings.model_validate(PIPELINE | changes)
    folder = RunFolder(tmp_path / "run")
    first, second = (teacher_settings(settings, folder, name) for name in ("dpo", "reverse"))
    assert first.preference is not None and second.preference is not None
    assert (first.preference.reverse, second.preference.reverse) == (False, True)
    # the second run learns the first one's pairs, not others sampled again
    assert first.preference.pairs.from_rollouts
    assert second.preference.pairs.source == str(tmp_path / "run-dpo" / "pairs.jsonl")
    assert {first.output.dir, second.output.dir} == {str(tmp_path / "run-dpo"), str(tmp_path / "run-reverse")}
    for made in (first, second):
        assert made.stage == "preference" and made.distil is None and made.learner.epochs == 1
        assert Settings.model_validate(made.model_dump()) == made  # also what is saved can be read again
    assert made.eval.before is False and teacher_folder(folder, "dpo").name == "run-dpo"


def test_a_finished_teacher_is_not_made_again_and_an_unfinished_or_unwanted_one_is(tmp_path: Path) -> None:
    settings = teacher_settings(Settings.model_validate(PIPELINE), RunFolder(tmp_path / "run"), "dpo")
    folder = tmp_path / "run-dpo"
    assert finished_model(settings, folder) is None
    _checkpoint(folder, 2, settings)
    assert finished_model(settings, folder) is None
    _checkpoint(folder, 3, settings)
    assert finished_model(settings, folder) == folder / "checkpoints" / "step-000003" / "model" == made_model(folder)
    assert finished_model(settings.model_copy(update={"resume": "never"}), folder) is None
    assert settings.preference is not None
    other = settings.model_copy(update={"preference": settings.preference.model_copy(update={"beta": 0.5})})
    with pytest.raises(ConfigError, match="preference.beta: 0.1 -> 0.5"):
        finished_model(other, folder)


def _checkpoint(folder: Path, step: int, settings: Settings) -> None:
    import json

    place = folder / "checkpoints" / f"step-{step:06d}"
    place.mkdir(parents=True)
    manifest = Manifest(step, staged(settings).model_dump(mode="json"), 0, 0, 0.0, None, WeightVersion(step, ""), 1)
    (place / MANIFEST_NAME).write_text(json.dumps(asdict(manifest)))


def test_a_run_with_made_teachers_reads_as_one_with_given_ones(tmp_path: Path) -> None:
    found = with_teachers(Settings.model_validate(PIPELINE), tmp_path / "a", tmp_path / "b")
    assert found.distil is not None and found.preference is None
    assert (found.distil.teacher.dpo, found.distil.teacher.reverse) == (str(tmp_path / "a"), str(tmp_path / "b"))
    assert Settings.model_validate(found.model_dump()) == found


def test_frozen_models_have_their_places_in_the_plan() -> None:
    settings = _settings(treg={}, distil={"teacher": {"dpo": "a", "reverse": "b"}})
    actors = {placement.actor: placement.total_cpus for placement in derived_plan(settings).placements}
    assert actors["teacher"] == 0.5 and actors["frozen start policy"] == 0.25
    assert len(derived_plan(_settings()).placements) == 3


@pytest.mark.parametrize(
    ("recipe", "name"),
    [
        ("dpo", "dpo on pairs"),
        ("reverse_dpo", "reverse dpo on pairs"),
        ("treg", "dpo with T-REG on pairs"),
        ("aligndistil", "AlignDistil on rollouts (hidden)"),
        ("hbpo_aligndistil", "hbpo / hierarchical + distillation (hidden)"),
        ("hbpo_treg", "hbpo / hierarchical + T-REG"),
    ],
)
def test_the_head_of_a_run_names_its_stage(recipe: str, name: str) -> None:
    assert method_name(load_settings(Path(f"configs/recipes/{recipe}.yaml"))) == name


def test_a_teacher_that_the_run_trains_stands_for_a_reward_of_its_own_beta(tmp_path: Path) -> None:
    tree = PIPELINE | {"preference": {"steps": 3, "beta": 0.4}}
    made = with_teachers(Settings.model_validate(tree), tmp_path / "a", tmp_path / "b")
    assert made.distil is not None and made.distil.scale == 0.4
    asked = with_teachers(Settings.model_validate(tree | {"distil": {"beta0": 0.2}}), tmp_path / "a", tmp_path / "b")
    assert asked.distil is not None and asked.distil.scale == 0.2
    given = _settings(distil={"teacher": {"dpo": "a", "reverse": "b"}})
    assert given.distil is not None and given.distil.scale == 0.1


@pytest.mark.parametrize(
    "changes", [{"rollout": {"temperature": 0.7}}, {"rollout": {"adaptive": {}}}, {"correction": "truncated"}]
)
def test_the_scalar_form_is_refused_where_tokens_are_not_the_policys_own(changes: dict[str, Any]) -> None:
    teacher = {"dpo": "a", "reverse": "b", "mode": "scalar"}
    with pytest.raises(ValidationError, match="takes sampled tokens for the policy's own"):
        _settings(distil={"teacher": teacher}, **changes)


def test_a_kl_that_the_preference_stage_would_not_read_is_refused_and_its_teachers_runs_have_none(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="stage=preference samples none"):
        _settings(stage="preference", preference={}, loss={"kl_coef": 0.1})
    made = teacher_settings(Settings.model_validate(PIPELINE | {"loss": {"kl_coef": 0.1}}), RunFolder(tmp_path / "run"), "dpo")
    assert made.loss.kl_coef == 0
