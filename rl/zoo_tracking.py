"""The MLflow run of a whole zoo, parent of its recipes' runs."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from rl.redaction import redact
from rl.run_folder import RunFolder
from rl.settings import TrackingSettings
from rl.tracking import Tracker, tracking_uri
from rl.types import StepReport

log = logging.getLogger("budget_rl")

PARENT_TAG = "mlflow.parentRunId"
"""How MLflow itself marks a nested run."""


def track_zoo(
    tracking: TrackingSettings,
    folder: RunFolder,
    *,
    config: Path,
    params: Mapping[str, object],
    metrics: Mapping[str, float],
    artifacts: Sequence[Path],
    runs: Sequence[RunFolder],
    complete: bool,
) -> None:
    """Log a zoo as one MLflow run, the same one when it is logged again, and make the recipes' runs its children.

    ``folder`` lies beside the recipes' run folders, so that a local store is theirs. MLflow that does not answer delays this by
    about half a minute, with a warning; it never raises.
    """
    folder.path.mkdir(parents=True, exist_ok=True)
    tracker = Tracker(tracking, folder, run_name="zoo")
    tracker.start(config, params)
    tracker.step(StepReport(0, dict(metrics)))
    for path in artifacts:
        tracker.artifact(path)
    tracker.finish("FINISHED" if complete else "FAILED")
    uri = tracking_uri(tracking, folder)
    if uri is not None and tracker.run_id is not None and not folder.spool.exists():
        _nest(uri, tracker.run_id, runs)


def _nest(uri: str, parent: str, runs: Sequence[RunFolder]) -> None:
    from mlflow.exceptions import MlflowException
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    for run in runs:
        if not run.mlflow_run.exists():
            continue
        known = json.loads(run.mlflow_run.read_text(encoding="utf-8"))
        try:
            client.set_tag(known["run_id"], PARENT_TAG, parent)
        except MlflowException as error:
            log.warning("the MLflow run of %s was not put under that of the zoo: %s", run.name, redact(str(error)))
