from __future__ import annotations

import json
import logging
import math
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow.entities import Run
from mlflow.tracking import MlflowClient

from rl.errors import ConfigError
from rl.run_folder import RunFolder, read_lines
from rl.settings import OutputSettings, TrackingSettings
from rl.tracking import Tracker, tracking_uri
from rl.types import StepReport

CLOSED_PORT = "http://127.0.0.1:9"
LOCAL = TrackingSettings()
# Far above what any call needs, so that a loaded machine does not fail a test.
PATIENCE_S = 180.0


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A parent folder whose MLflow database exists already; making one takes several seconds."""
    parent = tmp_path_factory.mktemp("runs")
    tracker = Tracker(LOCAL, _folder(parent, "first"), run_name="first", finish_deadline_s=PATIENCE_S)
    tracker.start(parent / "first" / "config.yaml", {})
    tracker.finish("FINISHED")
    assert tracker.run_id is not None
    return parent


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    # The application's logger may have been given handlers and a level by a console of another test.
    with caplog.at_level(logging.INFO, logger="budget_rl"):
        yield caplog


def _folder(parent: Path, name: str) -> RunFolder:
    folder = RunFolder.create(OutputSettings(dir=str(parent / name)), name)
    folder.write_config({"lr": 0.001})
    return folder


def _tracker(
    folder: RunFolder, settings: TrackingSettings = LOCAL, *, run_id: str | None = None, retry_s: float = 0.0
) -> Tracker:
    return Tracker(settings, folder, run_name=folder.name, run_id=run_id, retry_s=retry_s, finish_deadline_s=PATIENCE_S)


def _run(store: Path, tracker: Tracker) -> Run:
    assert tracker.run_id is not None
    return _client(store).get_run(tracker.run_id)


def _client(store: Path) -> MlflowClient:
    return MlflowClient(tracking_uri=f"sqlite:///{store / 'mlflow.db'}")


def _history(store: Path, tracker: Tracker, metric: str) -> list[tuple[int, float]]:
    return [(point.step, point.value) for point in _client(store).get_metric_history(str(tracker.run_id), metric)]


def _warned(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [
        record.getMessage()
        for record in caplog.records
        if record.name.startswith("budget_rl") and record.levelno >= logging.WARNING
    ]


def test_every_metric_param_and_artifact_arrives(store: Path, warnings: pytest.LogCaptureFixture) -> None:
    folder = _folder(store, "whole")
    folder.figure.write_bytes(b"\x89PNG")
    tracker = _tracker(folder)
    tracker.start(folder.config, {"learner.lr": 0.001, "long": "x" * 3000})
    tracker.step(StepReport(1, {"train/accuracy": 0.25, "budget/64/tokens": 60.0}))
    tracker.step(StepReport(2, {"train/accuracy": 0.5, "learn/grad_norm": math.nan}))
    tracker.artifact(folder.figure)
    tracker.finish("FINISHED")
    run = _run(store, tracker)
    assert run.info.status == "FINISHED" and run.info.run_name == "whole"
    assert _history(store, tracker, "train/accuracy") == [(1, 0.25), (2, 0.5)]
    assert run.data.metrics["budget/64/tokens"] == 60.0 and math.isnan(run.data.metrics["learn/grad_norm"])
    assert run.data.params["learner.lr"] == "0.001"
    assert len(run.data.params["long"]) == 500 and "config.yaml" in run.data.params["long"]
    assert {file.path for file in _client(store).list_artifacts(run.info.run_id)} == {"config.yaml", "curves.png"}
    assert next(store.glob(f"mlartifacts/{run.info.run_id}/artifacts/config.yaml")).read_text() == "lr: 0.001\n"
    assert not folder.spool.exists()
    assert _warned(warnings) == []


@pytest.mark.parametrize("status", ["FINISHED", "FAILED", "KILLED"])
def test_the_run_is_closed_with_the_right_status(store: Path, status: str) -> None:
    folder = _folder(store, f"ends-{status}")
    tracker = _tracker(folder)
    tracker.start(folder.config, {})
    tracker.finish(status)  # pyright: ignore[reportArgumentType]
    tracker.finish("FINISHED")
    assert _run(store, tracker).info.status == status


def test_a_resumed_run_continues_under_the_same_id(store: Path) -> None:
    folder = _folder(store, "resumed")
    first = _tracker(folder)
    first.start(folder.config, {"lr": 1})
    first.step(StepReport(1, {"a": 1.0}))
    first.finish("KILLED")
    for run_id in (first.run_id, None):
        again = _tracker(folder, run_id=run_id)
        again.start(folder.config, {"lr": 2, "new": 3})
        again.step(StepReport(2, {"a": 2.0}))
        again.finish("FINISHED")
        assert again.run_id == first.run_id
    run = _run(store, first)
    assert run.info.status == "FINISHED"
    assert run.data.params == {"lr": "1", "new": "3"}
    assert [step for step, _ in _history(store, first, "a")] == [1, 2, 2]


def test_a_fresh_run_in_the_same_folder_is_a_new_mlflow_run(store: Path) -> None:
    folder = _folder(store, "over")
    ids = []
    for _ in range(2):
        tracker = _tracker(folder)
        tracker.start(folder.config, {})
        tracker.finish("FINISHED")
        ids.append(tracker.run_id)
        folder.append_metrics(StepReport(1, {"a": 1.0}))
        folder.set_aside_earlier_run().write_config({"lr": 0.001})
    assert ids[0] != ids[1]


def test_a_run_deleted_in_mlflow_is_replaced_by_a_new_one(store: Path) -> None:
    folder = _folder(store, "deleted")
    for lost in ("0" * 32, None):
        tracker = _tracker(folder, run_id=lost)
        tracker.start(folder.config, {})
        tracker.finish("FINISHED")
        run = _run(store, tracker)
        assert run.info.status == "FINISHED" and run.info.run_id != lost
        _client(store).delete_run(run.info.run_id)


def test_an_unreachable_server_loses_nothing_and_warns_once(tmp_path: Path, warnings: pytest.LogCaptureFixture) -> None:
    folder = _folder(tmp_path, "away")
    tracker = _tracker(folder, TrackingSettings(mlflow=CLOSED_PORT), retry_s=1000.0)
    tracker.start(folder.config, {"lr": 1})
    for step in range(1, 4):
        tracker.step(StepReport(step, {"a": float(step)}))
    tracker.finish("FAILED")
    assert tracker.run_id is None
    records = read_lines(folder.spool)
    assert [record["kind"] for record in records] == ["text", "params", "metrics", "metrics", "metrics", "status"]
    assert [record["metrics"] for record in records if record["kind"] == "metrics"] == [{"a": "1.0"}, {"a": "2.0"}, {"a": "3.0"}]
    (warning,) = _warned(warnings)
    assert CLOSED_PORT in warning and str(folder.spool) in warning and "training goes on" in warning


def test_a_server_that_never_answers_holds_nothing_up(tmp_path: Path, warnings: pytest.LogCaptureFixture) -> None:
    folder = _folder(tmp_path, "silent")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        uri = f"http://127.0.0.1:{silent.getsockname()[1]}"
        tracker = Tracker(TrackingSettings(mlflow=uri), folder, run_name="silent", retry_s=1000.0, finish_deadline_s=0.2)
        tracker.start(folder.config, {})
        steps = 3000
        for step in range(1, steps + 1):
            tracker.step(StepReport(step, {"a": 1.0}))
        tracker.finish("FINISHED")
    records = read_lines(folder.spool)
    assert {record["step"] for record in records if record["kind"] == "metrics"} == set(range(1, steps + 1))
    assert {record["kind"] for record in records} == {"text", "params", "metrics", "status"}
    assert len(_warned(warnings)) == 1


def test_the_spool_is_sent_when_the_store_comes_back(store: Path, tmp_path: Path, warnings: pytest.LogCaptureFixture) -> None:
    folder = _folder(tmp_path, "back")
    later = tmp_path / "later"
    later.write_text("a file where the store's folder will be")
    settings = TrackingSettings(mlflow=f"sqlite:///{later / 'mlflow.db'}")
    tracker = _tracker(folder, settings, retry_s=1000.0)
    tracker.start(folder.config, {"lr": 1})
    tracker.step(StepReport(1, {"a": 1.0}))
    later.unlink()
    later.mkdir()
    shutil.copy(store / "mlflow.db", later / "mlflow.db")
    tracker.step(StepReport(2, {"a": 2.0}))
    tracker.finish("FINISHED")
    assert _history(later, tracker, "a") == [(1, 1.0), (2, 2.0)]
    assert _run(later, tracker).info.status == "FINISHED"
    assert not folder.spool.exists()
    assert len(_warned(warnings)) <= 1


def test_the_spool_of_a_stopped_run_is_sent_by_the_run_that_resumes_it(store: Path) -> None:
    folder = _folder(store, "later")
    away = _tracker(folder, TrackingSettings(mlflow=CLOSED_PORT), retry_s=1000.0)
    away.start(folder.config, {"lr": 1})
    for step in (1, 2, 3):
        away.step(StepReport(step, {"a": float(step)}))
    away.finish("KILLED")
    folder.truncate_after(2)
    again = _tracker(folder)
    again.start(folder.config, {"lr": 1})
    again.step(StepReport(3, {"a": 30.0}))
    again.finish("FINISHED")
    assert _history(store, again, "a") == [(1, 1.0), (2, 2.0), (3, 30.0)]
    assert _run(store, again).info.status == "FINISHED"
    assert not folder.spool.exists()


def test_a_record_mlflow_refuses_does_not_block_the_next(store: Path, warnings: pytest.LogCaptureFixture) -> None:
    folder = _folder(store, "refused")
    tracker = _tracker(folder)
    tracker.start(folder.config, {})
    tracker.step(StepReport(1, {"no such name!": 1.0}))
    tracker.artifact(folder.path / "missing.png")
    tracker.step(StepReport(2, {"a": 2.0}))
    tracker.finish("FINISHED")
    assert _history(store, tracker, "a") == [(2, 2.0)]
    assert not folder.spool.exists()
    assert len(_warned(warnings)) == 1


def test_no_secret_reaches_mlflow_or_its_spool(
    store: Path, monkeypatch: pytest.MonkeyPatch, warnings: pytest.LogCaptureFixture
) -> None:
    canaries = ("hf_canaryCANARY123", "orange-canary-77", "canary-in-a-url", "canary-named")
    monkeypatch.setenv("A_SERVICE_TOKEN", canaries[1])
    for name, uri in (("secret", "local"), ("secret-away", f"http://me:{canaries[2]}@127.0.0.1:9")):
        folder = _folder(store, name)
        folder.config.write_text(f"model: {canaries[0]}\nnote: {canaries[1]}\napi_key: {canaries[3]}\n")
        folder.table.write_text(" ".join(canaries[:2]))
        tracker = _tracker(folder, TrackingSettings(mlflow=uri), retry_s=1000.0)
        tracker.start(folder.config, {"note": canaries[1], "hub_token": canaries[3]})
        tracker.artifact(folder.table)
        tracker.finish("FINISHED")
        folder.config.unlink()
        folder.table.unlink()
    written = b"".join(path.read_bytes() for path in store.rglob("*") if path.is_file()) + " ".join(_warned(warnings)).encode()
    assert [canary for canary in canaries if canary.encode() in written] == []


def test_tracking_off_writes_nothing(tmp_path: Path) -> None:
    folder = _folder(tmp_path, "off")
    tracker = _tracker(folder, TrackingSettings(mlflow="off"))
    tracker.start(folder.config, {"lr": 1})
    tracker.step(StepReport(1, {"a": 1.0}))
    tracker.finish("FINISHED")
    assert tracker.run_id is None
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["checkpoints", "config.yaml", "off"]


@pytest.mark.parametrize("value", ["lokal", "localhost:5000"])
def test_a_setting_that_is_no_uri_is_refused(tmp_path: Path, value: str) -> None:
    with pytest.raises(ConfigError, match=f"'{value}' is no tracking URI(?s:.*)with its scheme"):
        tracking_uri(TrackingSettings(mlflow=value), RunFolder(tmp_path))


def test_the_folder_remembers_its_run_only_for_the_same_store(store: Path) -> None:
    folder = _folder(store, "moved")
    folder.mlflow_run.write_text(json.dumps({"run_id": "a" * 32, "store": "http://elsewhere"}))
    assert _tracker(folder).run_id is None
