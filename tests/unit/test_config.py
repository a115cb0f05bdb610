"""Composition, overrides and the errors of launch/config.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hypothesis import given
from hypothesis import strategies as st

from launch.config import PACKAGED, load_settings, resolved_yaml, settings_from_mapping
from launch.config_errors import known_keys, nearest_key
from rl.budget_settings import BudgetRange, BudgetSchedule
from rl.errors import ConfigError

ROOT = PACKAGED.parent
MINIMAL: dict[str, Any] = {
    "model": {"path": "org/name"},
    "data": {"source": "reasoning_gym:chain_sum", "task": {"min_terms": 3}},
    "rollout": {"budgets": [32, 64, 96, "free"], "samples_per_prompt": 8, "max_length": 160},
    "reward": {"method": "hbpo"},
    "prompts_per_step": 8,
    "max_steps": 60,
}


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return write(tmp_path / "run.yaml", MINIMAL)


def write(file: Path, content: dict[str, Any] | str) -> Path:
    file.write_text(content if isinstance(content, str) else yaml.safe_dump(content), encoding="utf-8")
    return file


def refusal(file: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_settings(file, overrides)
    return str(caught.value)


def test_overrides_are_typed_by_the_grammar_of_hydra(config: Path) -> None:
    settings = load_settings(
        config,
        [
            "learner.lr=3e-5",
            "rollout.budgets=[16, 48, free]",
            "rollout.samples_per_prompt=6",
            "rollout.free_template='<think> '",
            "max_steps=null",
            "max_tokens=1000",
            "learner.betas=[0.9,0.95]",
            "eval.before=false",
            "+data.task.max_terms=5",
            "data.grader=exact",
        ],
    )
    assert settings.learner.lr == 3e-5
    assert settings.rollout.budgets == [16, 48, "free"]
    assert settings.rollout.free_template == "<think> "
    assert (settings.max_steps, settings.max_tokens) == (None, 1000)
    assert settings.learner.betas == (0.9, 0.95)
    assert settings.eval.before is False
    assert settings.data.task == {"min_terms": 3, "max_terms": 5}


def test_model_and_data_as_plain_names_mean_path_and_source(config: Path) -> None:
    settings = load_settings(config, ["model=org/other-1.5B", "data=/some/file.jsonl", "data.held_out=10"])
    assert settings.model.path == "org/other-1.5B"
    assert settings.data.source == "/some/file.jsonl"
    assert settings.data.held_out == 10


def test_a_new_data_source_drops_the_parameters_of_the_old_task(config: Path) -> None:
    assert load_settings(config, ["data.task.n=2", "data=reasoning_gym:gcd"]).data.task == {"n": 2}
    assert load_settings(config, ["data=reasoning_gym:chain_sum"]).data.task == {"min_terms": 3}


def test_model_and_data_as_plain_names_work_in_a_file(tmp_path: Path) -> None:
    settings = load_settings(write(tmp_path / "a.yaml", {**MINIMAL, "model": "org/name", "data": "rows.parquet"}))
    assert (settings.model.path, settings.data.source) == ("org/name", "rows.parquet")


def test_a_key_is_removed_with_a_tilde(config: Path) -> None:
    assert load_settings(config, ["~data.task"]).data.task == {}
    assert "not set" in refusal(config, "~data.tusk")


def test_a_file_composes_packaged_ones_and_wins_over_them(tmp_path: Path) -> None:
    without_self = load_settings(write(tmp_path / "a.yaml", "defaults: [/quickstart]\nmax_steps: 7\n"))
    with_self = load_settings(write(tmp_path / "b.yaml", "defaults: [quickstart, _self_]\nmax_steps: 7\n"))
    base = load_settings(PACKAGED / "quickstart.yaml")
    assert without_self == with_self == base.model_copy(update={"max_steps": 7})


def test_a_file_composes_its_neighbour(tmp_path: Path) -> None:
    write(tmp_path / "base.yaml", MINIMAL)
    assert load_settings(write(tmp_path / "a.yaml", "defaults: [base]\nlearner: {lr: 0.5}\n")).learner.lr == 0.5


@pytest.mark.parametrize("name", sorted(file.stem for file in (PACKAGED / "hardware").glob("*.yaml")))
def test_a_hardware_profile_lies_over_any_file_and_under_overrides(config: Path, name: str) -> None:
    profile = yaml.safe_load((PACKAGED / "hardware" / f"{name}.yaml").read_text(encoding="utf-8"))
    settings = load_settings(config, [f"hardware={name}", "rollout.max_concurrent=3"])
    assert settings.rollout.workers == profile["rollout"]["workers"]
    assert settings.rollout.max_concurrent == 3
    assert settings.rollout.budgets == MINIMAL["rollout"]["budgets"]
    composed = write(config.with_name("b.yaml"), f"defaults: [run, /hardware/{name}, _self_]\nrollout: {{max_concurrent: 3}}\n")
    assert load_settings(composed) == settings


def test_an_unknown_hardware_profile_names_those_there_are(config: Path) -> None:
    assert "gpu_node, laptop" in refusal(config, "hardware=gpu_nod")


def test_every_packaged_configuration_is_valid() -> None:
    files = [*PACKAGED.glob("*.yaml"), *PACKAGED.glob("recipes/*.yaml"), *(ROOT / "launch").glob("*.yaml")]
    assert len(files) >= 5
    for file in files:
        load_settings(file)


def test_the_job_file_is_executable_and_runs_the_launcher() -> None:
    job = ROOT / "launch" / "hbpo.yaml"
    assert job.read_text(encoding="utf-8").splitlines()[0] == "#!/usr/bin/env -S python -m launch"
    assert job.stat().st_mode & 0o111


def test_the_resolved_yaml_reads_back_to_the_same_settings(config: Path, tmp_path: Path) -> None:
    settings = load_settings(config, ["output.name='1e5'", "data.answer_column='no'", "learner.lr=1e-7", "warm_start=null"])
    assert load_settings(write(tmp_path / "resolved.yaml", resolved_yaml(settings))) == settings


def test_settings_of_a_checkpoint_take_overrides_too(config: Path) -> None:
    saved = load_settings(config).model_dump(mode="json")
    assert settings_from_mapping(saved, ["eval.samples=2"], origin="checkpoint").eval.samples == 2
    with pytest.raises(ConfigError, match="did you mean eval.samples"):
        settings_from_mapping(saved, ["eval.sample=2"], origin="checkpoint")


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("learner.lrr", "learner.lr"),
        ("learnr.lr", "learner.lr"),
        ("lrr", "learner.lr"),
        ("rollout.budget", "rollout.budgets"),
        ("max_step", "max_steps"),
        ("warm_start.layer", "warm_start.layers"),
        ("samples_per_prompt", "rollout.samples_per_prompt"),
    ],
)
def test_an_unknown_key_names_the_nearest(config: Path, written: str, meant: str) -> None:
    assert f"unknown key {written}; did you mean {meant}?" in refusal(config, f"{written}=1")


def test_an_unknown_key_in_the_file_names_the_nearest(tmp_path: Path) -> None:
    file = write(tmp_path / "a.yaml", {**MINIMAL, "learner": {"learning_rate": 1.0, "weight_decai": 0.1}})
    message = refusal(file)
    assert "unknown key learner.weight_decai; did you mean learner.weight_decay?" in message
    assert "unknown key learner.learning_rate" in message


def test_a_key_like_nothing_gets_no_suggestion() -> None:
    assert nearest_key("qqqq.zzzz") is None


@given(st.sampled_from(sorted(known_keys())))
def test_the_nearest_key_of_a_known_key_is_itself(key: str) -> None:
    assert nearest_key(key) == key


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("learner.lr=fast", "learner.lr='fast': expected a valid number"),
        ("rollout.workers='2'", "rollout.workers='2': expected a valid integer"),
        ("rollout.workers=true", "rollout.workers=True: expected a valid integer"),
        ("rollout.workers=1.5", "rollout.workers=1.5: expected a valid integer"),
        ("rollout.workers=0", "rollout.workers=0: expected a number greater than 0"),
        ("model.path=3", "model.path=3: expected a valid string"),
        ("eval.before=1", "eval.before=1: expected a valid boolean"),
        ("learner=3", "learner=3: expected a section with keys of its own"),
        ("reward.method=hbpoo", "reward.method='hbpoo': expected one of 25 names, which docs/"),
        ("reward.method=hbpoo", "; did you mean 'hbpo'?"),
        ("rollout.budgets=[32,many]", "rollout.budgets.1='many': expected a valid integer or 'free'"),
        ("learner.lr=inf", "learner.lr=inf is not a finite number"),
        ("reward.beta=nan", "reward.beta=nan is not a finite number"),
    ],
)
def test_a_wrong_type_names_key_value_and_what_is_expected(config: Path, override: str, expected: str) -> None:
    assert expected in refusal(config, override)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["rollout.budgets=[64,32]"], "must increase; write [32, 64]"),
        (["rollout.budgets=[32,free,64]"], "put `free` once, at the end"),
        (["rollout.budgets=[]"], "rollout.budgets is empty"),
        (["rollout.budgets=[32,999]"], "raise max_length to 999"),
        (["rollout.samples_per_prompt=7"], "use 4 or 8"),
        (
            ["rollout.budgets={kind: range, low: 8, hihg: 64}"],
            "unknown key rollout.budgets.hihg; did you mean rollout.budgets.high?",
        ),
        (["rollout.budgets={kind: range, low: 8}"], "rollout.budgets.high is missing"),
        (["rollout.budgets={kind: range, low: 8, high: many}"], "rollout.budgets.high='many': expected a valid integer"),
        (["rollout.budgets={kind: often}"], "expected a list, or a section whose kind is range, schedule, memory or effort"),
        (["learner.minibatches=3"], "use one of [1, 2, 4, 8]"),
        (["learner.ranks=100"], "lower learner.ranks"),
        (["max_steps=null"], "never stop"),
        (["rollout.top_p=0.9"], "rollout.top_p cuts the sampling distribution"),
        (["model.trust_remote_code=true"], "model.revision"),
        (["loss.dual_clip=1"], "loss.dual_clip=1: expected a number greater than 1"),
        (["learner.betas=[0.9,1.0]"], "learner.betas.1=1.0: expected a number less than 1"),
        (["learner.betas=[-0.1,0.9]"], "learner.betas.0=-0.1: expected a number greater than or equal to 0"),
        (["reward.overlong_buffer=161"], "rollout.max_length=160; use 160 or less"),
        (["learner.lr_schedule=cosine", "max_steps=null", "max_tokens=99"], "falls to 0 at max_steps, which is not set"),
        (["learner.offload_optimizer=true", "learner.zero_stage=0"], "use zero_stage 1, 2 or 3"),
        (["model=embedded", "warm_start={traces: 63}"], "do not fill one warm_start.batch_size=64"),
        (["advantage.estimator=hierarchical", "reward.method=correct"], "needs reward.method=hbpo"),
    ],
)
def test_values_that_do_not_fit_together_say_what_would(config: Path, overrides: list[str], expected: str) -> None:
    assert expected in refusal(config, *overrides)


def test_a_source_of_budgets_takes_the_place_of_a_list_and_a_list_that_of_a_source(config: Path) -> None:
    drawn = {"kind": "range", "low": 8, "high": 64, "scale": "uniform", "per": "prompt"}
    for form in ("{kind: range, low: 8, high: 64}", "[{kind: range, low: 8, high: 64}]"):
        assert load_settings(config, [f"rollout.budgets={form}"]).rollout.budgets.model_dump() == drawn  # type: ignore[union-attr]
    saved = load_settings(config, ["rollout.budgets={kind: range, low: 8, high: 64}"]).model_dump(mode="json")
    assert settings_from_mapping(saved, ["rollout.budgets=[32,free]"], origin="saved").rollout.budgets == [32, "free"]
    assert settings_from_mapping(saved, origin="saved").rollout.budgets.model_dump() == drawn  # type: ignore[union-attr]


def test_a_file_may_put_a_source_over_the_list_it_builds_on_and_an_override_reaches_into_it(config: Path) -> None:
    above = config.with_name("b.yaml")
    write(above, "defaults: [run, _self_]\nrollout: {budgets: [{kind: range, low: 8, high: 64}]}\n")
    budgets = load_settings(above, ["rollout.budgets.low=16"]).rollout.budgets
    assert isinstance(budgets, BudgetRange) and (budgets.low, budgets.high) == (16, 64)
    higher = write(config.with_name("c.yaml"), "defaults: [b, _self_]\nrollout: {budgets: [{kind: schedule, start: 90}]}\n")
    assert isinstance(load_settings(higher).rollout.budgets, BudgetSchedule)
    write(above, "defaults: [run, _self_]\nrollout: {budgets: {kind: range, low: 8, high: 64}}\n")
    assert "write the section as a list of one" in refusal(above)


def test_all_errors_are_listed_one_line_each(config: Path) -> None:
    lines = refusal(config, "learner.lrr=1", "learner.lr=x", "eval.samples=0", "reward.form=max").splitlines()
    assert len([line for line in lines if line.startswith("  - ")]) == 4


def test_missing_sections_are_named(tmp_path: Path) -> None:
    message = refusal(write(tmp_path / "a.yaml", "max_steps: 3\n"))
    assert "model is missing" in message
    assert "data is missing" in message


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("learner.lr", "cannot read the override"),
        ("rollout.free_template=<think> x", "quote"),
        ("learner.lr=1,2", "sweep"),
        ("learner.lr=range(1,5)", "sweep"),
        ("learner@x=1", "package"),
        ("hydra.run.dir=/x", "unknown key hydra.run.dir"),
        ("learner.lr.x=1", "learner.lr={'x': 1}: expected a valid number"),
        ("model.path=???", "must be set"),
    ],
)
def test_a_bad_override_says_why(config: Path, override: str, expected: str) -> None:
    assert expected in refusal(config, override)


def test_one_setting_may_name_another(config: Path) -> None:
    settings = load_settings(config, ["data.split=test", "output.name=${data.split}-${max_steps}"])
    assert settings.output.name == "test-60"
    assert "nope.x" in refusal(config, "output.name=${nope.x}")


@pytest.mark.parametrize(
    "text", ["${oc.env:SECRET_FOR_TEST}", "a ${oc.env:SECRET_FOR_TEST,b}", "${${data.split}:x}", "${now:%Y}"]
)
def test_a_resolver_is_refused_and_its_value_never_shown(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setenv("SECRET_FOR_TEST", "do-not-show")
    in_override = refusal(config, f"output.name='{text}'")
    in_file = refusal(write(tmp_path / "a.yaml", {**MINIMAL, "output": {"name": text}}))
    in_defaults = refusal(write(tmp_path / "b.yaml", {**MINIMAL, "defaults": [f"/{text}"]}))
    assert "resolver" in in_override
    assert "resolver" in in_file
    assert "interpolation" in in_defaults
    assert "do-not-show" not in in_override + in_file + in_defaults


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: [1\n", "not valid YAML"),
        ("a: 1\na: 2\n", "duplicate key a"),
        ("- 1\n", "holds no settings"),
        ("", "holds no settings"),
        ("model: !!python/object/apply:os.getcwd []\n", "not valid YAML"),
        ("hydra: {searchpath: [pkg://x]}\n", "configures Hydra itself"),
        ("defaults: [/nothing]\n", "Could not load 'nothing'"),
        ("defaults: 3\n", "must be a list"),
        ("defaults: [{a: {b: c}}]\n", "Unsupported"),
        ("defaults: [/bad]\n", "leads back to the file itself"),
        ("output: {name: !!binary aGVsbG8=}\n", "is no text, number, list or mapping"),
    ],
)
def test_a_file_that_cannot_be_read_says_why(tmp_path: Path, text: str, expected: str) -> None:
    assert expected in refusal(write(tmp_path / "bad.yaml", text))


def test_a_missing_file_lists_those_there_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    message = refusal(Path("configs/mine.yaml"))
    assert "configs/mine.yaml" in message
    assert str(tmp_path) in message
    assert str(PACKAGED / "quickstart.yaml") in message
    assert "--working-dir ." in message


def test_a_missing_file_lists_the_configurations_of_the_current_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "configs").mkdir()
    write(tmp_path / "configs" / "own.yaml", MINIMAL)
    monkeypatch.chdir(tmp_path)
    assert "configs/own.yaml" in refusal(Path("mine.yaml"))


def test_other_files_than_yaml_are_refused(tmp_path: Path) -> None:
    assert "not a .yaml file" in refusal(write(tmp_path / "a.json", MINIMAL))
    assert "not a .yaml file" in refusal(tmp_path)
    assert "end in .yaml" in refusal(write(tmp_path / "a.yml", MINIMAL))


def test_a_model_that_the_warm_start_would_ignore_is_refused(config: Path) -> None:
    assert "add warm_start=null" in refusal(config, "warm_start={}")
    assert "needs warm_start" in refusal(config, "model=embedded")
    assert load_settings(config, ["warm_start={}", "model=embedded"]).warm_start is not None


def test_no_state_of_hydra_is_left_behind(config: Path) -> None:
    load_settings(config)
    assert not GlobalHydra.instance().is_initialized()
    with initialize_config_dir(str(PACKAGED), version_base="1.3"):
        before = GlobalHydra.instance().hydra
        load_settings(config)
        refusal(config, "learner.lrr=1")
        assert GlobalHydra.instance().hydra is before


def test_nothing_a_configuration_names_is_run(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    task = {"_target_": "pathlib.Path.touch", "self": str(trace)}
    settings = load_settings(write(tmp_path / "a.yaml", {**MINIMAL, "data": {"source": "x.json", "task": task}}))
    assert settings.data.task == task
    assert not trace.exists()
