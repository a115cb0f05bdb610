"""One MLflow run, spoken to through the client object: what a Tracker record means to MLflow.

Everything here may block or raise; only the tracker's background thread calls it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock
from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from rl.redaction import redact
from rl.run_folder import replace_text

LOCAL_PREFIX = "sqlite:///"
# MLflow accepts 6000 characters, its table of parameters is readable up to a few hundred; the whole value is in config.yaml.
_LONGEST_PARAM = 500
# Limits of MLflow's log_batch request.
_METRICS_PER_BATCH = 1000
_PARAMS_PER_BATCH = 100
_LOCK_DEADLINE_S = 60.0
_TEXT_SUFFIXES = (".yaml", ".yml", ".json", ".jsonl", ".md", ".txt", ".log")
_LONGEST_TEXT_BYTES = 20_000_000


def is_refusal(error: BaseException) -> bool:
    """Whether the record itself is at fault (a bad name, a file that is gone), so that sending it again cannot help."""
    return isinstance(error, FileNotFoundError) or _code(error) in ("INVALID_PARAMETER_VALUE", "BAD_REQUEST", "INVALID_STATE")


class MlflowRun:
    """Connects on construction: opens run `run_id` again where it exists, else creates one; raises what MLflow raises.

    `marker` is a JSON file that keeps run id and store, so that a later process finds the run before any checkpoint names it.
    """

    def __init__(
        self, uri: str, *, experiment: str, name: str, run_id: str | None, started_ms: int, artifacts: Path, marker: Path
    ) -> None:
        self._client = _client(uri)
        if run_id is None or not self._reopen(run_id):
            experiment_id = self._experiment(experiment, artifacts if uri.startswith(LOCAL_PREFIX) else None)
            run_id = self._client.create_run(experiment_id, start_time=started_ms, run_name=redact(name)).info.run_id
        self.run_id: str = run_id
        replace_text(marker, json.dumps({"run_id": run_id, "store": redact(uri)}) + "\n")

    def deliver(self, record: Mapping[str, Any]) -> None:
        """Hand one record to MLflow; see the methods of Tracker for what each kind holds."""
        match record["kind"]:
            case "metrics":
                self._metrics(record)
            case "params":
                self._params(record["params"])
            case "text":
                self._client.log_text(self.run_id, redact(record["text"]), record["name"])
            case "artifact":
                self._artifact(Path(record["path"]))
            case "status":
                self._client.set_terminated(self.run_id, status=record["status"], end_time=record["timestamp_ms"])
            case kind:
                raise ValueError(f"unknown kind of tracking record {kind!r}")

    def _metrics(self, record: Mapping[str, Any]) -> None:
        when, step = record["timestamp_ms"], record["step"]
        metrics = [Metric(name, float(value), when, step) for name, value in record["metrics"].items()]
        for first in range(0, len(metrics), _METRICS_PER_BATCH):
            self._client.log_batch(self.run_id, metrics=metrics[first : first + _METRICS_PER_BATCH])

    def _params(self, params: Mapping[str, str]) -> None:
        # MLflow forbids changing a parameter; after a resume the config.yaml artifact shows the present value.
        known = self._client.get_run(self.run_id).data.params
        fresh = [Param(name, _shortened(value)) for name, value in params.items() if name not in known]
        for first in range(0, len(fresh), _PARAMS_PER_BATCH):
            self._client.log_batch(self.run_id, params=fresh[first : first + _PARAMS_PER_BATCH])

    def _artifact(self, path: Path) -> None:
        if path.suffix in _TEXT_SUFFIXES and path.stat().st_size <= _LONGEST_TEXT_BYTES:
            self._client.log_text(self.run_id, redact(path.read_text(encoding="utf-8", errors="replace")), path.name)
        else:
            self._client.log_artifact(self.run_id, str(path))

    def _reopen(self, run_id: str) -> bool:
        try:
            run = self._client.get_run(run_id)
        except MlflowException as error:
            if _code(error) == "RESOURCE_DOES_NOT_EXIST":
                return False
            raise
        if run.info.lifecycle_stage != "active":
            return False
        self._client.update_run(run_id, status="RUNNING")
        self._client.log_batch(run_id, tags=[RunTag("budget_rl.resumed", "true")])
        return True

    def _experiment(self, name: str, artifacts: Path | None) -> str:
        found = self._client.get_experiment_by_name(name)
        if found is None:
            try:
                return self._client.create_experiment(name, artifact_location=artifacts.as_uri() if artifacts else None)
            except MlflowException as error:
                # Another run created it between the two calls.
                if _code(error) != "RESOURCE_ALREADY_EXISTS":
                    raise
                found = self._client.get_experiment_by_name(name)
        if found is None or found.lifecycle_stage != "active":
            raise MlflowException(f"MLflow experiment {name!r} was deleted; restore it or change tracking.experiment")
        return found.experiment_id


def _client(uri: str) -> MlflowClient:
    if not uri.startswith(LOCAL_PREFIX):
        return MlflowClient(tracking_uri=uri)
    database = Path(uri.removeprefix(LOCAL_PREFIX))
    # Two processes that create the tables of a new database at once fail on each other.
    with FileLock(database.with_suffix(".lock"), timeout=_LOCK_DEADLINE_S):
        client = MlflowClient(tracking_uri=uri)
        client.search_experiments(max_results=1)
    return client


def _shortened(value: str) -> str:
    value = redact(value)
    if len(value) <= _LONGEST_PARAM:
        return value
    tail = " ... (cut; whole in config.yaml)"
    return value[: _LONGEST_PARAM - len(tail)] + tail


def _code(error: BaseException) -> str:
    return str(error.error_code) if isinstance(error, MlflowException) else ""
