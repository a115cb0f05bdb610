"""The frame around a run: what a refused one leaves alone, and that no clean-up hides or skips another."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rl.errors import BudgetRLError
from rl.run_folder import RunFolder
from rl.settings import OutputSettings, Settings
from rl.tracking import Tracker
from rl.trainer import run_training, tracked
from rl.types import StepReport
from rl.waiting import StopRequested


@pytest.fixture(autouse=True)
def logging_as_it_was() -> Iterator[None]:
    """Put the process-wide logging state back, which a run changes by design."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    for handler in root.handlers:
        if handler not in handlers:
            handler.close()
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.captureWarnings(False)


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder.create(OutputSettings(dir=str(tmp_path / "run")), "run")


def _settings(folder: RunFolder, **sections: Any) -> Settings:
    base = {
        "model": {"path": str(folder.path.parent / "typo")}, "data": {"source": "problems.jsonl"}, "max_steps": 1,
        "output": {"dir": str(folder.path)}, "tracking": {"mlflow": "off"},
    }  # fmt: skip
    return Settings.model_validate(base | sections)


def test_a_refused_run_leaves_the_earlier_one_as_it_was(folder: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    folder.write_config({"seed": 7})
    folder.append_metrics(StepReport(1, {"train/accuracy": 0.5}))
    before = {path.name: path.read_bytes() for path in folder.path.iterdir() if path.is_file()}
    with pytest.raises(BudgetRLError, match="there is no folder .*typo"):
        run_training(_settings(folder, resume="never"), config_path=Path("run.yaml"))
    assert [path.name for path in folder.path.parent.iterdir()] == ["run"]
    assert {name: (folder.path / name).read_bytes() for name in before} == before
    # The command line prints the message; the traceback belongs to the log alone.
    log = folder.log.read_text()
    assert "Traceback (most recent call last)" in log and "find_inputs" in log
    assert "Traceback" not in "".join(capsys.readouterr())


@pytest.mark.parametrize("metrics", ["", '{"step": 1}\nnot json\n', '{"no step": 1}\n'])
def test_metrics_that_cannot_be_drawn_neither_hide_the_error_nor_keep_the_tracker_open(
    folder: RunFolder, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, metrics: str
) -> None:
    ended: list[str] = []
    monkeypatch.setattr(Tracker, "finish", lambda _, status: ended.append(status))
    folder.metrics.write_text(metrics)
    with pytest.raises(RuntimeError, match="the first error"), tracked(_settings(folder), folder, run_id=None):
        raise RuntimeError("the first error")
    assert ended == ["FAILED"]
    assert "table and curves could not be drawn from metrics.jsonl" in caplog.text


@pytest.mark.parametrize(
    ("error", "status"), [(None, "FINISHED"), (StopRequested("SIGINT"), "KILLED"), (KeyboardInterrupt(), "KILLED")]
)
def test_the_tracker_is_told_how_the_run_ended(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch, error: BaseException | None, status: str
) -> None:
    ended: list[str] = []
    monkeypatch.setattr(Tracker, "finish", lambda _, status: ended.append(status))
    try:
        with tracked(_settings(folder), folder, run_id=None):
            if error is not None:
                raise error
    except (StopRequested, KeyboardInterrupt) as caught:
        assert caught is error
    assert ended == [status]
