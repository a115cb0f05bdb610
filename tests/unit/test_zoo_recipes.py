"""What a zoo is going to train, before anything runs."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from launch.config import PACKAGED, load_settings
from launch.plan_tables import show_zoo
from launch.zoo_recipes import ZooPlan, find_recipes, plan_zoo, token_allowance, write_configs
from rl.budget_settings import BudgetRange, BudgetSchedule
from rl.errors import ConfigError
from rl.settings import Settings

QUICKSTART = PACKAGED / "quickstart.yaml"
UNCOMPARED = {"dpo", "reverse_dpo", "treg", "aligndistil", "hbpo_aligndistil"}
"""Recipes that learn from pairs or make a teacher."""
PACKAGED_RECIPES = sorted({file.stem for file in (PACKAGED / "recipes").glob("*.yaml")} - UNCOMPARED)


def planned(names: str, *overrides: str, config: Path = QUICKSTART, max_tokens: int | None = None, output: Path) -> ZooPlan:
    return plan_zoo(config, names, overrides, output=output, max_tokens=max_tokens)


def settings_of(plan: ZooPlan, name: str) -> Settings:
    return next(recipe.settings for recipe in plan.recipes if recipe.name == name)


@pytest.fixture
def own_config(tmp_path: Path) -> Path:
    """A configuration on a model of one's own whose budgets are a section, not a list."""
    file = tmp_path / "own.yaml"
    file.write_text(
        "model: {path: someone/model}\n"
        "data: {source: sums.jsonl, held_out: 40}\n"
        "rollout: {max_length: 512, samples_per_prompt: 8, budgets: [{kind: range, low: 64, high: 256}]}\n"
        "prompts_per_step: 4\nmax_steps: 10\nseed: 7\n"
    )
    return file


def write_recipe(folder: Path, name: str, text: str) -> str:
    (folder / f"{name}.yaml").write_text(text)
    return str(folder / f"{name}.yaml")


# -- laying recipes over a configuration -------------------------------------------------------------------------------------


def test_every_packaged_recipe_can_be_laid_over_the_quickstart_alike(tmp_path: Path) -> None:
    plan = planned("all", output=tmp_path)
    assert [recipe.name for recipe in plan.recipes] == PACKAGED_RECIPES
    for recipe in plan.recipes:
        alone = load_settings(PACKAGED / "recipes" / f"{recipe.name}.yaml")
        assert recipe.settings.reward == alone.reward
        assert recipe.settings.advantage == alone.advantage
        assert recipe.settings.max_tokens == plan.allowance


@pytest.mark.parametrize("recipe", sorted(UNCOMPARED))
def test_a_recipe_that_learns_from_pairs_or_makes_a_teacher_is_refused_when_it_is_named(recipe: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"recipe {recipe} learns from pairs or from a teacher"):
        planned(f"grpo,{recipe}", output=tmp_path)


def test_a_recipe_brings_its_own_keys_and_the_configuration_all_others(own_config: Path, tmp_path: Path) -> None:
    plan = planned("grpo,dapo", config=own_config, output=tmp_path)
    grpo, dapo = settings_of(plan, "grpo"), settings_of(plan, "dapo")
    assert (grpo.model.path, grpo.data.source, grpo.seed) == ("someone/model", "sums.jsonl", 7)
    assert (grpo.rollout.max_length, grpo.rollout.samples_per_prompt, grpo.prompts_per_step) == (512, 8, 4)
    assert grpo.rollout.budgets == ["free"] and grpo.reward.method == "correct"
    assert grpo.learner.lr == 1e-6  # the default, not the quickstart's
    assert dapo.reward.overlong_buffer == 32


def test_a_list_takes_the_place_of_a_section_and_a_section_that_of_a_list(own_config: Path, tmp_path: Path) -> None:
    same = planned("base", config=own_config, output=tmp_path)
    assert settings_of(same, "base").rollout.budgets == BudgetRange(kind="range", low=64, high=256)
    ranged = planned("lcpo_exact", output=tmp_path)
    assert settings_of(ranged, "lcpo_exact").rollout.budgets == BudgetRange(kind="range", low=16, high=128)


def test_a_recipe_of_ones_own_may_build_on_a_packaged_one_or_on_nothing(tmp_path: Path) -> None:
    on_hbpo = write_recipe(tmp_path, "mild", "defaults: [/recipes/hbpo@_global_, _self_]\nadvantage: {intra_coef: 0.5}\n")
    bare = write_recipe(tmp_path, "bare", "learner: {lr: 3.0e-5}\n")
    plan = planned(f"{on_hbpo}, {bare}", "data.held_out=99", output=tmp_path / "zoo")
    mild = settings_of(plan, "mild")
    assert (mild.advantage.intra_coef, mild.advantage.intra_scale) == (0.5, "none")
    assert settings_of(plan, "bare").learner.lr == 3e-5
    assert {recipe.settings.data.held_out for recipe in plan.recipes} == {99}


def test_overrides_hold_for_every_recipe_and_come_last(tmp_path: Path) -> None:
    plan = planned("grpo,hbpo", "rollout.budgets=[64,free]", "learner.lr=1e-4", output=tmp_path)
    for recipe in plan.recipes:
        assert recipe.settings.rollout.budgets == [64, "free"]
        assert recipe.settings.learner.lr == 1e-4


# -- the same start, the same tokens -----------------------------------------------------------------------------------------


def test_all_recipes_begin_with_the_one_model_that_the_base_makes(tmp_path: Path) -> None:
    """Budgets are part of what a warm start learns from: left to themselves, these two would make two models."""
    plan = planned("grpo,lcpo_exact", "warm_start.traces=320", "model=embedded", output=tmp_path / "a zoo")
    assert plan.base.warm_start is not None and plan.base.warm_start.traces == 320
    for recipe in plan.recipes:
        assert recipe.settings.warm_start is None
        assert recipe.settings.model.path == str(tmp_path / "a zoo" / "start")
    assert any("lcpo_exact" in note and "may not have learnt" in note for note in plan.notes)


def test_every_recipe_may_spend_the_same_tokens_wherever_its_steps_end(tmp_path: Path) -> None:
    plan = planned("grpo,s_grpo", "max_steps=10", output=tmp_path)
    # 10 steps of 8 x 16 answers of half of 160 tokens.
    assert plan.allowance == 10 * 128 * 80
    grpo, other = settings_of(plan, "grpo"), settings_of(plan, "s_grpo")
    assert grpo.max_tokens == other.max_tokens == plan.allowance
    # Even at an eighth of the cap, 20 tokens an answer, steps do not end a run before its tokens do.
    for settings, rollouts in ((grpo, 8 * 16), (other, 24 * 5)):
        assert settings.max_steps is not None
        assert (settings.max_steps - 1) * rollouts * 20 < plan.allowance <= settings.max_steps * rollouts * 20


@pytest.mark.parametrize(
    ("overrides", "given", "expected"),
    [(("max_tokens=500",), None, 500), ((), 700, 700), (("max_tokens=700",), 700, 700), (("max_steps=1",), None, 10240)],
)
def test_the_allowance_is_what_was_said_or_follows_from_the_steps(
    overrides: tuple[str, ...], given: int | None, expected: int
) -> None:
    assert token_allowance(load_settings(QUICKSTART, overrides), given) == expected


@pytest.mark.parametrize(
    ("overrides", "given", "message"),
    [
        (("max_tokens=500",), 700, "contradict"),
        ((), 0, "lets no recipe train"),
        (("max_steps=null", "max_minutes=1"), None, "--max-tokens N"),
    ],
)
def test_an_allowance_that_is_unclear_is_refused(overrides: tuple[str, ...], given: int | None, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        token_allowance(load_settings(QUICKSTART, overrides), given)


def test_what_falls_over_max_steps_falls_as_the_configuration_says(tmp_path: Path) -> None:
    falling = write_recipe(
        tmp_path,
        "falling",
        "rollout: {budgets: [{kind: schedule, start: 128}]}\n"
        "reward: {method: correct}\nadvantage: {estimator: group_normalised, centre: none, intra_scale: none}\n",
    )
    cosine = write_recipe(tmp_path, "decay", "learner: {lr_schedule: cosine}\n")
    plan = planned(f"{falling},{cosine},o1_pruner", output=tmp_path / "zoo")
    budgets = settings_of(plan, "falling").rollout.budgets
    assert isinstance(budgets, BudgetSchedule) and budgets.steps == 100
    assert settings_of(plan, "falling").max_steps == 400
    for name in ("decay", "o1_pruner"):
        assert settings_of(plan, name).max_steps == 100
        assert any(name in note and "max_steps=100" in note for note in plan.notes)


def test_recipes_are_evaluated_a_few_times_and_under_budgets_where_they_have_some(tmp_path: Path) -> None:
    plan = planned("grpo,hbpo", output=tmp_path)
    assert {recipe.settings.eval.every for recipe in plan.recipes} == {25}
    assert [recipe.settings.eval.with_budgets for recipe in plan.recipes] == [False, True]
    asked = planned("grpo,hbpo", "eval.every=7", "eval.with_budgets=false", "eval.after=false", output=tmp_path)
    assert {(r.settings.eval.every, r.settings.eval.with_budgets, r.settings.eval.after) for r in asked.recipes} == {
        (7, False, True)
    }


# -- mistakes ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("gpro", "no recipe gpro; did you mean grpo"),
        ("grpo,grpo", "grpo twice"),
        ("all,grpo", "grpo twice"),
        (" , ", "names no recipe"),
        ("missing.yaml", r"missing\.yaml"),
    ],
)
def test_a_recipe_that_cannot_be_found_is_named(names: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        find_recipes(names)


@pytest.mark.parametrize("name", ["start", "zoo", "quickstart", "base", "with space"])
def test_a_file_may_not_have_the_name_of_a_part_of_the_zoo(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="rename the file"):
        find_recipes(write_recipe(tmp_path, name, "seed: 0\n"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learnr: {lr: 1.0}\n", "unknown key learnr.lr"),
        ("eval: {problems: 8}\n", r"eval\.problems=8, where the configuration has 256"),
        ("data: {task: {max_terms: 9}}\n", r"data\.task\.max_terms=9"),
        ("seed: 3\n", "seed=3"),
        ("rollout: {max_length: 170}\n", r"rollout\.max_length=170"),
        ("model: {path: other}\n", r"model\.path=other"),
        ("defaults: [/nowhere]\n", "nowhere"),
        ("a: [\n", "cannot be read"),
    ],
)
def test_the_first_recipe_that_is_wrong_or_not_comparable_is_named_before_any_run(
    own_config: Path, tmp_path: Path, text: str, message: str
) -> None:
    wrong = write_recipe(tmp_path, "wrong", text)
    config = own_config if "model" in text else QUICKSTART
    with pytest.raises(ConfigError, match=message) as caught:
        planned(f"grpo,{wrong}", config=config, output=tmp_path / "zoo")
    assert str(caught.value).startswith("recipe wrong: ")
    assert "budget-rl-zoo-" not in str(caught.value)  # the folder it was composed in


@pytest.mark.parametrize("key", ["output.dir", "output.name", "resume"])
def test_what_the_zoo_needs_for_itself_cannot_be_overridden(tmp_path: Path, key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        planned("grpo", f"{key}=x", output=tmp_path)


# -- on disk -----------------------------------------------------------------------------------------------------------------


def test_the_written_settings_are_those_that_were_planned_and_only_their_owner_reads_them(tmp_path: Path) -> None:
    plan = planned("grpo,lcpo_exact", output=tmp_path / "zoo")
    write_configs(plan)
    for recipe in plan.recipes:
        file = plan.config_of(recipe.name)
        assert load_settings(file) == recipe.settings
        assert recipe.settings.output.dir == str(tmp_path / "zoo" / "runs" / recipe.name)
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert load_settings(plan.config_of("start")) == plan.base


def test_the_same_zoo_and_more_recipes_and_other_placement_go_on(tmp_path: Path) -> None:
    write_configs(planned("grpo", output=tmp_path))
    write_configs(planned("grpo", output=tmp_path))
    plan = planned("dapo,grpo", "rollout.workers=1", "learner.tokens_per_microbatch=512", output=tmp_path)
    write_configs(plan)
    assert load_settings(plan.config_of("grpo")).rollout.workers == 1


def test_a_zoo_of_other_settings_is_refused_naming_each_and_left_as_it_was(tmp_path: Path) -> None:
    plan = planned("grpo", output=tmp_path)
    write_configs(plan)
    with pytest.raises(ConfigError) as caught:
        write_configs(planned("grpo", "learner.lr=0.5", "eval.problems=3", "max_steps=50", output=tmp_path))
    message = str(caught.value)
    assert "grpo: learner.lr: 2e-05 -> 0.5" in message
    assert "grpo: eval.problems: 256 -> 3" in message
    assert "grpo: max_tokens: 1024000 -> 512000" in message
    assert load_settings(plan.config_of("grpo")) == settings_of(plan, "grpo")


def test_a_changed_warm_start_is_a_changed_zoo_although_no_recipe_has_one(tmp_path: Path) -> None:
    write_configs(planned("grpo", output=tmp_path))
    with pytest.raises(ConfigError, match=r"start: warm_start\.traces: 16000 -> 320"):
        write_configs(planned("grpo", "warm_start.traces=320", output=tmp_path))


def test_a_dry_run_shows_every_recipe_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    show_zoo(planned("grpo,lcpo_exact", output=tmp_path / "zoo"))
    shown = capsys.readouterr().out
    assert "1,024,000 response tokens" in shown and "note: lcpo_exact" in shown
    assert "group_normalised" in shown and "25 steps" in shown
    assert not (tmp_path / "zoo").exists()
