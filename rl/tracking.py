"""Sends a run to MLflow without ever holding training up: a queue, a thread, and a spool file for the time MLflow is away."""

from __future__ import annotations

import json
import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rl.errors import ConfigError
from rl.redaction import is_secret_name, redact
from rl.run_folder import RunFolder, append_lines, read_lines, replace_text
from rl.settings import TrackingSettings
from rl.types import StepReport

if TYPE_CHECKING:
    from rl.mlflow_store import MlflowRun

Status = Literal["FINISHED", "FAILED", "KILLED"]
Record = dict[str, Any]

_log = logging.getLogger("budget_rl.tracking")
_QUEUE_LENGTH = 1024
# Read by MLflow when it is imported. Its default, eight attempts of 120 s each, would keep the thread on a dead server for
# a quarter of an hour.
_MLFLOW_ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_CONFIGURE_LOGGING": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}


class Tracker:
    """The MLflow run of a training run.

    No method waits for MLflow, except `finish`, up to `finish_deadline_s` seconds. Records MLflow does not take (server away or
    slow) go to the spool file of the run folder, with one warning for the whole run; they are sent when MLflow is back, tried
    every `retry_s` seconds and at `finish`, or by the next process that resumes the folder. A record that MLflow refuses for its
    content is left out. `run_id` continues that run; None continues the one the folder belongs to, if any. Raises ConfigError for
    a tracking setting that is neither ``local``, ``off`` nor a URI.
    """

    def __init__(
        self,
        settings: TrackingSettings,
        folder: RunFolder,
        *,
        run_name: str,
        run_id: str | None = None,
        retry_s: float = 30.0,
        finish_deadline_s: float = 20.0,
    ) -> None:
        self._uri = tracking_uri(settings, folder)
        self._settings, self._folder, self._run_name = settings, folder, run_name
        self._retry_s, self._finish_deadline_s = retry_s, finish_deadline_s
        self._run_id = run_id or (self._known_run_id() if self._uri else None)
        self._queue: queue.Queue[Record | None] = queue.Queue(_QUEUE_LENGTH)
        self._spool_lock = threading.Lock()
        self._in_hand: Record | None = None
        self._finished = False
        self._warned = False
        self._next_try = 0.0
        self._started_ms = _now_ms()
        self._run: MlflowRun | None = None
        self._open_run: Callable[..., MlflowRun]
        self._is_refusal: Callable[[BaseException], bool]
        self._thread: threading.Thread | None = None

    @property
    def run_id(self) -> str | None:
        """MLflow's id of the run; None while MLflow has not been reached, and when tracking is off."""
        return self._run_id

    def start(self, config_yaml_path: Path, params: Mapping[str, Any]) -> None:
        """Open the run; `params` are a few chosen settings (flat names), the configuration file goes along whole as artifact."""
        if self._uri is None:
            return
        for name, value in _MLFLOW_ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        # Here and not in the thread: two threads importing large packages at once can meet half-initialised modules.
        # Takes 3 to 5 s on 2 cores.
        from rl.mlflow_store import MlflowRun, is_refusal

        self._open_run, self._is_refusal = MlflowRun, is_refusal
        if self._folder.spool.exists():
            # The end of an earlier process must not close the run that goes on now.
            self._rewrite_spool([record for record in read_lines(self._folder.spool) if record["kind"] != "status"])
        self._thread = threading.Thread(target=self._work, name="mlflow-tracker", daemon=True)
        self._thread.start()
        text = redact(config_yaml_path.read_text(encoding="utf-8"))
        self._submit({"kind": "text", "name": config_yaml_path.name, "text": text})
        kept = {name: redact(str(value)) for name, value in params.items() if not is_secret_name(name)}
        self._submit({"kind": "params", "params": kept})

    def step(self, report: StepReport) -> None:
        """Record every metric of the report under its step number."""
        # Kept as text, since the spool is JSON, which has no NaN; MLflow stores NaN and infinities.
        metrics = {name: repr(float(value)) for name, value in report.metrics.items()}
        self._submit({"kind": "metrics", "step": report.step, "timestamp_ms": _now_ms(), "metrics": metrics})

    def artifact(self, path: Path) -> None:
        """Attach a file of the run folder (table, figure), which must stay there until `finish`; text goes without secrets."""
        self._submit({"kind": "artifact", "path": str(path)})

    def finish(self, status: Status) -> None:
        """Close the run; wait at most `finish_deadline_s` seconds for records to be sent, leave the rest in the spool."""
        if self._thread is None or self._finished:
            return
        self._submit({"kind": "status", "status": status, "timestamp_ms": _now_ms()})
        deadline = time.monotonic() + self._finish_deadline_s
        try:
            self._queue.put(None, timeout=self._finish_deadline_s)
        except queue.Full:
            self._warn_once(TimeoutError(f"queue still full {self._finish_deadline_s:.0f} s after the end of the run"))
        self._thread.join(max(0.0, deadline - time.monotonic()))
        self._finished = True
        if self._thread.is_alive():
            self._spool_unsent()
        if self._folder.spool.exists():
            self._warn_once(TimeoutError(f"not all was sent {self._finish_deadline_s:.0f} s after the end of the run"))

    def _known_run_id(self) -> str | None:
        if not self._folder.mlflow_run.exists():
            return None
        known = json.loads(self._folder.mlflow_run.read_text(encoding="utf-8"))
        return known["run_id"] if known["store"] == redact(str(self._uri)) else None

    def _submit(self, record: Record) -> None:
        if self._thread is None or self._finished:
            return
        try:
            self._queue.put_nowait(record)
        except queue.Full:
            self._warn_once(TimeoutError("it takes records more slowly than they come"))
            self._spool(record)

    def _work(self) -> None:
        while True:
            try:
                record = self._queue.get(timeout=max(1.0, self._retry_s))
            except queue.Empty:
                self._attempt()
                continue
            if record is None:
                self._next_try = 0.0
                self._attempt()
                return
            self._in_hand = record
            if self._folder.spool.exists() or not self._send(record):
                # Behind records that wait, so that the status stays the last one.
                self._spool(record)
                self._in_hand = None
                self._attempt()
            self._in_hand = None

    def _attempt(self) -> None:
        """Send what the spool holds, in order, if it is time to try again; stop at the first record that fails."""
        if time.monotonic() < self._next_try or not self._folder.spool.exists():
            return
        waiting = read_lines(self._folder.spool)
        sent = 0
        while sent < len(waiting) and not self._finished and self._send(waiting[sent]):
            sent += 1
        if not sent:
            return
        with self._spool_lock:
            # Lines may have been added behind those read above.
            self._rewrite_spool(read_lines(self._folder.spool)[sent:])
        if sent == len(waiting) and self._warned:
            _log.info("MLflow has taken the %d records that waited in %s", sent, self._folder.spool.name)

    def _send(self, record: Record) -> bool:
        """Whether MLflow is done with the record; False puts off the next try by `retry_s`."""
        try:
            if self._run is None:
                self._run = self._connect()
            self._run.deliver(record)
        except Exception as error:
            # Whatever goes wrong in MLflow, its database driver or the network must not end a training run. A refused record
            # would block everything behind it in the spool; its figures are in metrics.jsonl all the same.
            refused = self._run is not None and self._is_refusal(error)
            self._warn_once(error, outcome="it is left out" if refused else "")
            self._next_try = time.monotonic() + self._retry_s
            return refused
        return True

    def _connect(self) -> MlflowRun:
        run = self._open_run(
            str(self._uri),
            experiment=self._settings.experiment,
            name=self._run_name,
            run_id=self._run_id,
            started_ms=self._started_ms,
            artifacts=self._folder.path.parent / "mlartifacts",
            marker=self._folder.mlflow_run,
        )
        self._run_id = run.run_id
        return run

    def _spool(self, *records: Record) -> None:
        try:
            with self._spool_lock:
                append_lines(self._folder.spool, records)
        except OSError as error:
            _log.error("%d records for MLflow are lost, the spool cannot be written: %s", len(records), redact(str(error)))

    def _spool_unsent(self) -> None:
        """Called at the deadline, with the thread stuck in MLflow: the record in its hands may then be sent twice, never lost."""
        unsent = [self._in_hand] if self._in_hand is not None else []
        while True:
            try:
                record = self._queue.get_nowait()
            except queue.Empty:
                break
            if record is not None:
                unsent.append(record)
        self._spool(*unsent)
        # The thread ends when MLflow lets go of it.
        self._queue.put_nowait(None)

    def _rewrite_spool(self, records: list[Record]) -> None:
        if records:
            replace_text(self._folder.spool, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
        else:
            self._folder.spool.unlink(missing_ok=True)

    def _warn_once(self, error: BaseException, *, outcome: str = "") -> None:
        if self._warned:
            return
        self._warned = True
        cause = redact(f"{type(error).__name__}: {error}".splitlines()[0])[:160]
        outcome = outcome or f"records wait in {self._folder.spool} and are sent when it works again"
        _log.warning("MLflow at %s did not take a record (%s); training goes on, %s", redact(str(self._uri)), cause, outcome)


def tracking_uri(settings: TrackingSettings, folder: RunFolder) -> str | None:
    """The MLflow tracking URI that the setting means; None for ``off``. Raises ConfigError for anything that is not a URI."""
    if settings.mlflow == "off":
        return None
    if settings.mlflow == "local":
        return f"sqlite:///{folder.path.parent / 'mlflow.db'}"
    if "://" not in settings.mlflow and settings.mlflow != "databricks":
        raise ConfigError(
            f"tracking.mlflow={redact(settings.mlflow)!r} is no tracking URI",
            fix="write local, off, or a URI with its scheme, such as http://127.0.0.1:5000",
        )
    return settings.mlflow


def _now_ms() -> int:
    return int(time.time() * 1000)
