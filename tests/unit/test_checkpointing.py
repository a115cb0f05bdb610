"""What becomes of the run that lies in the output folder when the next one takes it over."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from rl.checkpointing import find_resume, take_over
from rl.manifest import begin, commit, latest
from rl.run_folder import RunFolder, read_lines
from rl.settings import Settings
from rl.types import Manifest, StepReport, WeightVersion


def _settings(**changes: Any) -> Settings:
    return Settings.model_validate({"model": {"path": "model"}, "data": {"source": "problems.jsonl"}, "max_steps": 9} | changes)


def _checkpoint(folder: RunFolder, step: int) -> Path:
    partial = begin(folder.checkpoints, step)
    (partial / "state.json").write_text("{}")
    config = _settings().model_dump(mode="json")
    return commit(partial, Manifest(step, config, step, 0, 0.0, None, WeightVersion(step, ""), 1))


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    """A run of four steps with a checkpoint after each second one."""
    folder = RunFolder(tmp_path / "run")
    folder.checkpoints.mkdir(parents=True)
    for step in range(1, 5):
        folder.append_metrics(StepReport(step, {"train/accuracy": 0.5}))
        if step % 2 == 0:
            _checkpoint(folder, step)
    return folder


def _steps(folder: RunFolder) -> list[int]:
    return [line["step"] for line in read_lines(folder.metrics)]


def test_after_going_on_from_an_older_checkpoint_auto_does_not_take_the_abandoned_course(
    folder: RunFolder, caplog: pytest.LogCaptureFixture
) -> None:
    settings = _settings(resume=str(folder.checkpoints / "step-000002"))
    with caplog.at_level(logging.INFO, logger="budget_rl"):
        take_over(folder, settings, find_resume(settings, folder), log_from=0)
    assert _steps(folder) == [1, 2]
    assert sorted(p.name for p in folder.checkpoints.iterdir()) == ["step-000002", "step-000004.abandoned"]
    assert "step-000004.abandoned" in caplog.text
    again = find_resume(_settings(), folder)
    assert again is not None and again[1].step == 2


def test_the_newest_checkpoint_leaves_nothing_behind(folder: RunFolder) -> None:
    take_over(folder, _settings(), find_resume(_settings(), folder), log_from=0)
    assert _steps(folder) == [1, 2, 3, 4]
    assert sorted(p.name for p in folder.checkpoints.iterdir()) == ["step-000002", "step-000004"]


def test_a_checkpoint_of_another_folder_begins_a_run_that_does_not_mix_with_the_one_here(
    folder: RunFolder, tmp_path: Path
) -> None:
    other = RunFolder(tmp_path / "other")
    settings = _settings(resume=str(_checkpoint(other, 3)))
    take_over(folder, settings, find_resume(settings, folder), log_from=0)
    assert _steps(folder) == [] and latest(folder.checkpoints) is None
    assert _steps(RunFolder(tmp_path / "run.before-1")) == [1, 2, 3, 4]
    assert latest(other.checkpoints) is not None
