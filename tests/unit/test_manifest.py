"""Checkpoints on disk: whole or absent, proven by checksum, resumed only with the settings they were made with."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rl.errors import BudgetRLError, ConfigError
from rl.manifest import (
    CheckpointError,
    abandon,
    begin,
    check_resumable,
    commit,
    complete,
    incompatible_keys,
    latest,
    prune,
    read_manifest,
    verify,
)
from rl.settings import Settings
from rl.types import Manifest, WeightVersion

CONFIG: dict[str, Any] = Settings.model_validate(
    {"model": {"path": "org/model"}, "data": {"source": "reasoning_gym:chain_sum"}, "max_steps": 10}
).model_dump(mode="json")


def manifest_of(step: int) -> Manifest:
    return Manifest(
        step=step,
        config=CONFIG,
        cursor=160,
        tokens_seen=12345,
        minutes_spent=1.5,
        tracker_run_id=None,
        weights=WeightVersion(number=step, checksum="ab" * 32),
        world_size=2,
    )


def write_checkpoint(checkpoints_dir: Path, step: int) -> Path:
    partial = begin(checkpoints_dir, step)
    (partial / "model").mkdir()
    (partial / "learner" / "rank0").mkdir(parents=True)
    (partial / "model" / "model.safetensors").write_bytes(b"weights of step %d" % step)
    (partial / "learner" / "rank0" / "optim.pt").write_bytes(b"\x00\x01")
    (partial / "state.json").write_text("{}")
    return commit(partial, manifest_of(step))


def test_a_committed_checkpoint_reads_back_with_the_sha256_of_every_file(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, 10)
    manifest = read_manifest(folder)
    assert folder.name == "step-000010"
    assert manifest == replace(manifest_of(10), files=manifest.files)
    assert set(manifest.files) == {"model/model.safetensors", "learner/rank0/optim.pt", "state.json"}
    assert manifest.files["learner/rank0/optim.pt"] == hashlib.sha256(b"\x00\x01").hexdigest()
    verify(folder, manifest)


def test_a_partial_folder_is_never_the_latest_and_is_cleared_by_the_next_begin(tmp_path: Path) -> None:
    kept = write_checkpoint(tmp_path, 10)
    interrupted = begin(tmp_path, 20)
    (interrupted / "model.safetensors").write_bytes(b"half")
    (interrupted / "manifest.json").write_text("{}")
    assert latest(tmp_path) == kept
    assert list(begin(tmp_path, 30).iterdir()) == []
    assert not interrupted.exists()


def test_latest_is_the_highest_step_also_beyond_six_digits(tmp_path: Path) -> None:
    assert latest(tmp_path / "absent") is None
    for step in (999_999, 5, 1_000_000):
        write_checkpoint(tmp_path, step)
    newest = latest(tmp_path)
    assert newest is not None and newest.name == "step-1000000"


def test_a_checkpoint_of_the_same_step_is_replaced(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, 10)
    partial = begin(tmp_path, 10)
    (partial / "state.json").write_text('{"second": true}')
    folder = commit(partial, manifest_of(10))
    verify(folder, read_manifest(folder))
    assert [p.name for p in tmp_path.iterdir()] == ["step-000010"]
    assert list(read_manifest(folder).files) == ["state.json"]


def test_prune_keeps_the_newest(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        write_checkpoint(tmp_path, step)
    assert [p.name for p in prune(tmp_path, 2)] == ["step-000001", "step-000002"]
    assert [p.name for p in complete(tmp_path)] == ["step-000003", "step-000004"]
    assert len(list(tmp_path.iterdir())) == 2


def test_checkpoints_of_an_abandoned_course_are_kept_but_neither_taken_nor_counted(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        write_checkpoint(tmp_path, step)
    resumed = tmp_path / "step-000010"
    renamed = abandon(tmp_path, resumed, 10)
    assert [p.name for p in renamed] == ["step-000020.abandoned", "step-000030.abandoned"]
    assert latest(tmp_path) == resumed
    write_checkpoint(tmp_path, 20)
    assert prune(tmp_path, 2) == []
    verify(renamed[0], read_manifest(renamed[0]))
    # A second course left at the same step does not overwrite the first.
    assert [p.name for p in abandon(tmp_path, resumed, 10)] == ["step-000020.abandoned-2"]
    assert len(list(tmp_path.iterdir())) == 4


def test_going_on_from_an_abandoned_checkpoint_leaves_the_other_of_its_step(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, 10)
    resumed = write_checkpoint(tmp_path, 20).rename(tmp_path / "step-000020.abandoned")
    write_checkpoint(tmp_path, 20)
    assert [p.name for p in abandon(tmp_path, resumed, 20)] == ["step-000020.abandoned-2"]
    assert resumed.is_dir() and latest(tmp_path) == tmp_path / "step-000010"


def test_one_flipped_bit_is_found_and_the_previous_checkpoint_is_named(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, 10)
    folder = write_checkpoint(tmp_path, 20)
    path = folder / "model" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(CheckpointError, match=r"(?s)model\.safetensors was changed.*resume=.*step-000010"):
        verify(folder, read_manifest(folder))
    verify(folder, read_manifest(folder), only="learner/")


def test_a_missing_an_added_and_a_linked_file_are_refused(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, 10)
    manifest = read_manifest(folder)
    added = folder / "learner" / "rank1.pt"
    added.write_bytes(b"pickle")
    with pytest.raises(CheckpointError, match=r"rank1\.pt is not in the manifest"):
        verify(folder, manifest, only="learner/")
    added.unlink()
    added.symlink_to(folder / "state.json")
    with pytest.raises(CheckpointError, match=r"rank1\.pt is a symbolic link"):
        verify(folder, manifest)
    added.unlink()
    (folder / "state.json").unlink()
    with pytest.raises(CheckpointError, match=r"state\.json is missing\n  fix: there is no earlier checkpoint"):
        verify(folder, manifest)


def test_a_manifest_that_points_outside_the_checkpoint_is_refused(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, 10)
    manifest = read_manifest(folder)
    with pytest.raises(CheckpointError, match="outside the checkpoint"):
        verify(folder, replace(manifest, files={**manifest.files, "../secret": "00"}))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"format": 1, "step": 3', "is damaged"),
        ('{"format": 1, "step": "three"}', "is damaged"),
        ("[]", "is damaged"),
        ('{"format": 2}', "format 2, this version reads 1"),
    ],
)
def test_a_damaged_manifest_is_one_clear_error(tmp_path: Path, text: str, reason: str) -> None:
    folder = write_checkpoint(tmp_path, 10)
    (folder / "manifest.json").write_text(text)
    with pytest.raises(CheckpointError, match=reason):
        read_manifest(folder)


def test_a_folder_without_manifest_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(BudgetRLError, match="is no checkpoint"):
        read_manifest(tmp_path)


def test_an_empty_partial_and_a_wrong_step_are_refused(tmp_path: Path) -> None:
    partial = begin(tmp_path, 10)
    with pytest.raises(CheckpointError, match="is empty"):
        commit(partial, manifest_of(10))
    with pytest.raises(ValueError, match="the manifest is of step 11"):
        commit(partial, manifest_of(11))


def with_value(name: str, value: Any) -> dict[str, Any]:
    config = json.loads(json.dumps(CONFIG))
    section, _, key = name.rpartition(".")
    (config[section] if section else config)[key] = value
    return config


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_steps", 500),
        ("max_minutes", 3.0),
        ("resume", "never"),
        ("output.keep_checkpoints", 9),
        ("tracking.mlflow", "off"),
        ("eval.samples", 8),
        ("rollout.workers", 3),
        ("rollout.deadline_s", 5.0),
        ("reward.processes", 4),
        ("learner.tokens_per_microbatch", 64),
    ],
)
def test_length_output_placement_and_waiting_may_change_on_resume(name: str, value: Any) -> None:
    assert incompatible_keys(CONFIG, with_value(name, value)) == []


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model.path", "org/other"),
        ("data.held_out", 3),
        ("data.task", {"terms": 3}),
        ("seed", 7),
        ("prompts_per_step", 32),
        ("rollout.samples_per_prompt", 8),
        ("rollout.budgets", [32, 64]),
        ("rollout.free_template", ""),
        ("reward.method", "hbpo"),
        ("advantage.centre", "batch"),
        ("loss.clip_high", 0.2),
        ("learner.ranks", 2),
        ("learner.zero_stage", 3),
        ("learner.minibatches", 2),
        ("learner.lr", 1e-5),
        ("a_setting_of_tomorrow", 1),
    ],
)
def test_what_the_next_steps_compute_may_not_change_on_resume(name: str, value: Any) -> None:
    found = incompatible_keys(CONFIG, with_value(name, value))
    assert len(found) == 1 and found[0].startswith(name)


RANGE = {"kind": "range", "low": 16, "high": 128, "scale": "uniform", "per": "prompt"}
MEMORY = {"kind": "memory", "statistic": "shortest", "factor": 1.0, "start": 64, "floor": 1}


def test_drawn_budgets_resume_as_they_were_and_every_change_in_them_is_named() -> None:
    old = with_value("rollout.budgets", RANGE)
    assert incompatible_keys(old, with_value("rollout.budgets", dict(RANGE))) == []
    assert incompatible_keys(old, with_value("rollout.budgets", RANGE | {"high": 99})) == ["rollout.budgets.high"]
    assert "rollout.budgets" in incompatible_keys(old, with_value("rollout.budgets", MEMORY))


@pytest.mark.parametrize(
    ("before", "after", "told"),
    [
        ([32, 64], RANGE, 'rollout.budgets: [32, 64] -> "range"'),
        (["free"], RANGE, 'rollout.budgets: ["free"] -> "range"'),
        (RANGE, [32, 64], 'rollout.budgets: "range" -> [32, 64]'),
        (RANGE, MEMORY, 'rollout.budgets: "range" -> "memory"'),
        (MEMORY, MEMORY | {"floor": 9}, "rollout.budgets.floor: 1 -> 9"),
    ],
)
def test_another_source_of_budgets_is_one_clear_difference(before: Any, after: Any, told: str) -> None:
    manifest = replace(manifest_of(10), config=with_value("rollout.budgets", before))
    with pytest.raises(ConfigError) as caught:
        check_resumable(manifest, with_value("rollout.budgets", after))
    assert told in str(caught.value)


def test_check_resumable_lists_every_change_with_both_values() -> None:
    config = with_value("learner.ranks", 2)
    config["seed"] = 5
    with pytest.raises(ConfigError) as caught:
        check_resumable(manifest_of(10), config)
    message = str(caught.value)
    assert "learner.ranks: 1 -> 2" in message and "seed: 0 -> 5" in message and "resume=never" in message


def test_a_setting_younger_than_the_checkpoint_counts_with_its_default() -> None:
    old = with_value("seed", 0)
    del old["correction_cap"], old["learner"]["betas"]
    assert incompatible_keys(old, CONFIG) == []
    assert incompatible_keys(old, with_value("correction_cap", 3.0)) == ["correction_cap"]


def test_a_warm_start_that_was_switched_off_is_an_incompatible_change() -> None:
    old = with_value("warm_start", {"layers": 4, "cache_dir": "/a"})
    assert incompatible_keys(old, with_value("warm_start", {"layers": 4, "cache_dir": "/b"})) == []
    assert incompatible_keys(old, CONFIG) == ["warm_start.layers"]


@given(st.lists(st.sampled_from(["seed", "prompts_per_step", "max_steps", "correction"]), unique=True), st.integers(100, 200))
def test_incompatibility_is_symmetric_and_no_config_is_incompatible_with_itself(names: list[str], value: int) -> None:
    changed = {**CONFIG, **dict.fromkeys(names, value)}
    assert incompatible_keys(changed, changed) == []
    assert incompatible_keys(CONFIG, changed) == incompatible_keys(changed, CONFIG) == sorted(set(names) - {"max_steps"})
