"""The folder of a run: where it lies, what is in it, and the line files that survive a resume.

Layout, below ``output.dir`` (default ``~/budget-rl/<name>``)::

    config.yaml           the resolved configuration, secrets taken out
    metrics.jsonl         one JSON object per report: "step" and every metric of docs/metrics.md; null where not a finite number
    eval-<step>.json      every held-out problem at an evaluation: accuracy, tokens, and each answer's verdict and length
    samples.jsonl         a few rollouts of each step: prompt, answer, budget, verdict, reward parts, advantage
    unscored.jsonl        answers that no grader could judge, when too many of a step stopped the run
    run.log               step lines, notes, warnings, tracebacks and everything libraries say
    checkpoints/          one folder per checkpoint, each with its manifest
    table.md              the run as a table
    curves.png            accuracy and tokens over steps, and against each other
    mlflow-run.json       which MLflow run belongs to this folder
    mlflow-spool.jsonl    records MLflow has not taken yet; absent when all is well

The parent folder holds the local MLflow store shared by its runs: ``mlflow.db`` and ``mlartifacts/``.
"""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from rl.errors import BudgetRLError
from rl.redaction import redact_tree
from rl.settings import OutputSettings
from rl.types import StepReport

MINIMUM_FREE_BYTES = 200_000_000
"""A run with less free disk than this is refused: one checkpoint of the smallest model needs about a tenth of it."""

# Ray runs a job submitted with --working-dir in a copy below this; the copy is deleted when the cluster stops.
_RAY_COPY = "/runtime_resources/working_dir_files/"


class OutputError(BudgetRLError):
    """The output folder cannot be used; the message names the folder, the cause and the fix."""


@dataclass(frozen=True)
class RunFolder:
    """An absolute folder and the names of what lies in it (layout: module docstring)."""

    path: Path

    @classmethod
    def resolve(cls, output: OutputSettings, default_name: str) -> RunFolder:
        """The folder that `output` means, without touching the disk; relative folders start at the current directory.

        Raises OutputError where it would lie in Ray's temporary copy of the working directory, or the name is no folder name.
        """
        here = Path.cwd()
        if output.dir is None:
            return cls(_home() / "budget-rl" / _folder_name(output.name or default_name))
        path = Path(os.path.abspath(here / Path(output.dir).expanduser()))
        if _RAY_COPY in f"{path}/":
            raise OutputError(
                f"output.dir={output.dir} would lie in {path}, Ray's temporary copy of the working directory, and be lost; "
                "give an absolute path elsewhere or leave output.dir out (~/budget-rl/<name>)"
            )
        return cls(path)

    @classmethod
    def create(cls, output: OutputSettings, default_name: str, *, minimum_free: int = MINIMUM_FREE_BYTES) -> RunFolder:
        """Resolve, make the folder, prove it can be written; OutputError if not, or if under `minimum_free` bytes are free."""
        folder = cls.resolve(output, default_name)
        existing = next(p for p in (folder.path, *folder.path.parents) if p.exists())
        free = shutil.disk_usage(existing).free
        if free < minimum_free:
            raise OutputError(
                f"output folder {folder.path}: the disk is full ({free / 1e6:.0f} MB free, {minimum_free / 1e6:.0f} MB needed); "
                "free some space or set output.dir to a folder on another disk"
            )
        try:
            folder.checkpoints.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder.path) as probe:
                probe.write(b"0" * 4096)
                probe.flush()
                os.fsync(probe.fileno())
        except OSError as error:
            raise _unusable(folder.path, error) from error
        return folder

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def samples(self) -> Path:
        return self.path / "samples.jsonl"

    @property
    def unscored(self) -> Path:
        return self.path / "unscored.jsonl"

    @property
    def log(self) -> Path:
        return self.path / "run.log"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def table(self) -> Path:
        return self.path / "table.md"

    @property
    def figure(self) -> Path:
        return self.path / "curves.png"

    @property
    def spool(self) -> Path:
        return self.path / "mlflow-spool.jsonl"

    @property
    def mlflow_run(self) -> Path:
        return self.path / "mlflow-run.json"

    def write_config(self, config: Mapping[str, Any]) -> None:
        """Write the resolved configuration (plain mappings, lists and scalars) as config.yaml, secrets taken out."""
        text = yaml.safe_dump(redact_tree(config), sort_keys=False, allow_unicode=True)
        self._guarded(lambda: replace_text(self.config, text))

    def append_metrics(self, report: StepReport) -> None:
        """Add one report to metrics.jsonl; on disk when this returns."""
        line = {"step": report.step, **{name: float(value) for name, value in report.metrics.items()}}
        self._guarded(lambda: append_lines(self.metrics, [line]))

    def append_samples(self, step: int, samples: Iterable[Mapping[str, Any]]) -> None:
        """Add rollouts of `step` to samples.jsonl, secrets taken out; on disk when this returns."""
        lines = [{"step": step, **redact_tree(sample)} for sample in samples]
        self._guarded(lambda: append_lines(self.samples, lines))

    def append_unscored(self, step: int, samples: Iterable[Mapping[str, Any]]) -> None:
        """Add answers of `step` that no grader could judge to unscored.jsonl, secrets taken out; on disk when this returns."""
        lines = [{"step": step, **redact_tree(sample)} for sample in samples]
        self._guarded(lambda: append_lines(self.unscored, lines))

    def truncate_after(self, step: int) -> None:
        """Cut lines of later steps out of all line files, as if the run had never gone past `step`."""
        for path in (self.metrics, self.samples, self.unscored, self.spool):
            self._guarded(lambda path=path: _keep_until(path, step))

    def log_size(self) -> int:
        """Bytes in run.log; 0 where there is none."""
        return self.log.stat().st_size if self.log.exists() else 0

    def set_aside_earlier_run(self, *, log_from: int | None = None) -> RunFolder:
        """Make room for a fresh run: a folder with metrics or checkpoints is renamed to ``<name>.before-N``.

        Nothing is deleted. What run.log holds from byte ``log_from`` on is the fresh run's own and stays here.
        Returns this folder, otherwise empty; says in the log where the earlier run went.
        """
        if self.metrics.exists() or any(self.checkpoints.glob("step-*")):
            number = 1
            while (kept := self.path.with_name(f"{self.path.name}.before-{number}")).exists():
                number += 1
            self._guarded(lambda: self.path.rename(kept))
            self._guarded(lambda: self.checkpoints.mkdir(parents=True, exist_ok=True))
            if log_from is not None:
                self._guarded(lambda: _move_tail(RunFolder(kept).log, self.log, log_from))
            logging.getLogger("budget_rl").info("the earlier run of this name was kept as %s", kept)
        self._guarded(lambda: self.checkpoints.mkdir(parents=True, exist_ok=True))
        return self

    def _guarded(self, write: Callable[[], object]) -> None:
        try:
            write()
        except OSError as error:
            raise _unusable(self.path, error) from error


def append_lines(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """Append one JSON object per line and flush; NaN and infinities become null, for JSON has none.

    A last line torn by a crash is cut off first, so that it cannot swallow the new one.
    """
    text = "".join(json.dumps(_finite(line), ensure_ascii=False, allow_nan=False) + "\n" for line in lines)
    with path.open("ab+") as file:
        _cut_torn_tail(file)
        file.write(text.encode())
        file.flush()


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON objects of a line file, in order; a torn last line is left out, a missing file is empty.

    Raises ValueError naming file and line where a complete line is not a JSON object.
    """
    if not path.exists():
        return []
    complete = path.read_bytes().decode(errors="replace").split("\n")[:-1]
    return [_parsed(path, number, line) for number, line in enumerate(complete, start=1)]


def replace_text(path: Path, text: str) -> None:
    """Write `text` so that a reader sees the old file or the new one, never a part; durable when this returns."""
    draft = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}")
    try:
        with draft.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    except OSError:
        draft.unlink(missing_ok=True)
        raise


def _keep_until(path: Path, step: int) -> None:
    if not path.exists():
        return
    kept = [line for line in read_lines(path) if "step" not in line or line["step"] <= step]
    replace_text(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in kept))


def _move_tail(old: Path, new: Path, start: int) -> None:
    if not old.exists():
        return
    with old.open("rb+") as file:
        file.seek(start)
        new.write_bytes(file.read())
        file.truncate(start)


def _parsed(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} line {number} is not JSON ({error}); repair or remove that line") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} line {number} is not a JSON object; repair or remove that line")
    return value


def _cut_torn_tail(file: Any) -> None:
    end = file.seek(0, os.SEEK_END)
    while end:
        start = max(0, end - 65536)
        file.seek(start)
        newline = file.read(end - start).rfind(b"\n")
        if newline >= 0:
            file.truncate(start + newline + 1)
            break
        end = start
    if not end:
        file.truncate(0)
    file.seek(0, os.SEEK_END)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return value


def _home() -> Path:
    try:
        return Path.home()
    except RuntimeError as error:
        raise OutputError(f"no home folder is known ({error}); set output.dir to an absolute path") from error


def _folder_name(name: str) -> str:
    if re.fullmatch(r"[\w][\w .+=@-]*", name) is None:
        raise OutputError(f"run name {name!r} is no folder name; use letters, digits, dot, dash and underscore in output.name")
    return name


def _unusable(path: Path, error: OSError) -> OutputError:
    match error.errno:
        case errno.ENOSPC | errno.EDQUOT:
            cause, fix = "the disk is full", "free some space or set output.dir to a folder on another disk"
        case errno.EROFS | errno.EACCES | errno.EPERM:
            cause, fix = "it is read-only for this user", "make it writable or set output.dir to a folder of yours"
        case errno.ENOTDIR | errno.EEXIST:
            cause, fix = "a file stands where the folder should be", "move that file or set output.dir to another folder"
        case _:
            cause, fix = "it cannot be written", "set output.dir to a folder that can be"
    return OutputError(f"output folder {path}: {cause} ({error.strerror or error}); {fix}")
