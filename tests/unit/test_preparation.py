"""What a configuration names is found and fits together before Ray starts and before the warm start trains."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from launch.config import PACKAGED, load_settings
from rl.console import Console
from rl.data import DataError
from rl.embedded import build_tiny
from rl.errors import BudgetRLError, ConfigError
from rl.preparation import Inputs, find_inputs, prepare_run
from rl.settings import Settings, WarmStartSettings
from rl.sft import cached_folder

SMALL = ["data.size=16", "data.held_out=4", "warm_start.traces=32"]


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("BUDGET_RL_CACHE", str(tmp_path / "cache"))


def settings_of(*overrides: str) -> Settings:
    return load_settings(PACKAGED / "quickstart.yaml", [*SMALL, *overrides])


def inputs_of(*overrides: str) -> Inputs:
    return find_inputs(settings_of(*overrides))


@pytest.fixture
def local_model(tmp_path: Path) -> list[str]:
    """Overrides for a model in a folder of its own that takes 512 tokens."""
    build_tiny(tmp_path / "model", WarmStartSettings(hidden_size=32, layers=1, heads=1))
    return ["warm_start=null", f"model={tmp_path / 'model'}"]


def test_the_warm_start_has_its_traces_and_the_run_its_prompts_before_anything_trains() -> None:
    inputs = inputs_of("eval.problems=3")
    assert inputs.model is None
    assert len(inputs.traces) == 32
    assert len(inputs.held_out) == 3
    prompts, _ = inputs.stream.take(0, 16)
    assert len({prompt.id for prompt in prompts}) == 16
    assert inputs.dropped_share == 0


def test_a_cached_warm_start_is_taken_without_traces(tmp_path: Path) -> None:
    settings = settings_of()
    assert settings.warm_start is not None
    build_tiny(cached_folder(settings), settings.warm_start)
    inputs = find_inputs(settings)
    assert (inputs.model, inputs.traces) == (cached_folder(settings), ())
    assert prepare_run(settings, inputs, Console()).model == cached_folder(settings)


def test_a_model_of_ones_own_comes_with_its_tokenizer(local_model: list[str], tmp_path: Path) -> None:
    inputs = inputs_of(*local_model)
    assert inputs.model == tmp_path / "model"
    assert inputs.tokenizer.eos_token == "<eos>"


@pytest.mark.parametrize(
    ("overrides", "kind", "told"),
    [
        (["rollout.max_length=600"], ConfigError, "are 632 tokens together.* at most 512(?s:.*)max_length to 480 or less"),
        (["data.max_prompt_length=512"], ConfigError, "at most 512(?s:.*)lower both"),
        (["data=reasoning_gym:gcd"], DataError, "only has a teacher for that task"),
        (["rollout.max_length=20", "rollout.budgets=[16]"], ConfigError, "rollout.max_length=20 is too short"),
        (["rollout.max_length=8", "rollout.budgets=[8]"], ConfigError, "leaves no room"),
        (["rollout.free_template='hurry up'"], ConfigError, "cannot encode the opening sentence"),
        (["rollout.budgets=[9,64]", "rollout.hard_budgets=true"], ConfigError, "hard budget of 9 tokens is used up"),
        (["rollout.budget_place=suffix", "rollout.budget_template=' in {budget}'"], ConfigError, "cannot encode the end of"),
        (["data.template=solve"], ConfigError, "put {question} into it"),
        (["data.max_prompt_length=3"], DataError, "every prompt is longer than data.max_prompt_length=3"),
        (["warm_start.heads=1", "warm_start.hidden_size=384"], ConfigError, "use at least 3 heads"),
        (["prompts_per_step=32"], DataError, "a step needs 32"),
    ],
)
def test_a_mistake_is_told_with_its_fix(overrides: list[str], kind: type[BudgetRLError], told: str) -> None:
    with pytest.raises(kind, match=told) as caught:
        inputs_of(*overrides)
    assert caught.value.fix


def test_prompts_that_only_fit_without_their_budget_are_dropped_and_counted_before_training() -> None:
    long = ["data.size=64", "data.held_out=16"]
    place = ["rollout.budget_place=suffix", "rollout.budget_template=' I will answer with {budget} tokens'"]
    without = inputs_of(*long, "data.max_prompt_length=27")
    behind = inputs_of(*long, "data.max_prompt_length=27", *place)
    assert without.dropped_share == 0 < behind.dropped_share < 1
    lengths = [len(behind.plan.open(p, b).prompt.token_ids) for p in behind.stream.take(0, 64)[0] for b in behind.plan.levels()]
    assert max(lengths) == 27


def test_a_response_longer_than_a_local_model_takes_is_refused(local_model: list[str]) -> None:
    with pytest.raises(ConfigError, match="are 632 tokens together, and the model takes at most 512"):
        inputs_of(*local_model, "rollout.max_length=600")


def test_more_evaluation_problems_than_held_out_ones_are_told_where_they_were_asked_for(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING, logger="budget_rl"):
        inputs_of()
        assert "eval.problems" not in caplog.text
        inputs_of("eval.problems=5")
    assert "eval.problems=5, but only 4 held-out problems are left of data.held_out=4" in caplog.text
