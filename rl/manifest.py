"""Checkpoint folders on disk: written whole or not at all, proven by checksum before anything in them is loaded.

Layout: ``checkpoints/step-000010/`` holds ``manifest.json``, ``model/``, ``learner/``, ``rng/`` and ``state.json``. Everything is
written into ``step-000010.partial/`` first; the manifest comes last and a rename makes the folder a checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path, PurePosixPath
from typing import Any

from pydantic import TypeAdapter, ValidationError

from rl.errors import BudgetRLError, ConfigError
from rl.settings import Section, Settings
from rl.types import Manifest
from rl.upgrade import upgraded

FORMAT = 1
MANIFEST_NAME = "manifest.json"
PARTIAL = ".partial"
REPLACED = ".replaced"
ABANDONED = ".abandoned"
_STEP_FOLDER = re.compile(r"step-(\d{6,})")
_MANIFEST = TypeAdapter(Manifest)

# What a resumed run may change: how long it runs, where it writes, how it is placed and how long it waits. Every other
# setting, also one added later, decides what the following steps compute and has to stay as it was.
_FREE_SECTIONS = frozenset(("output", "tracking", "eval"))
_MAY_CHANGE = {
    "": {"max_steps", "max_tokens", "max_rollouts", "max_minutes", "resume", "allow_idle"},
    "preference": {"steps"},
    "scorer": {
        *("workers", "cpus_per_worker", "gpus_per_worker", "threads_per_worker", "tokens_per_pass", "deadline_s"),
    },
    "distil.teacher": {
        *("workers", "cpus_per_worker", "gpus_per_worker", "threads_per_worker", "tokens_per_pass", "deadline_s"),
    },
    "rollout": {
        *(
            "workers",
            "cpus_per_worker",
            "gpus_per_worker",
            "threads_per_worker",
            "tensor_parallel",
            "max_concurrent",
            "enforce_eager",
        ),
        *("kv_cache_gb", "gpu_memory_fraction", "deadline_s", "start_deadline_s", "heartbeat_s", "order", "weight_transport"),
    },
    "reward": {"workers", "cpus_per_worker", "processes", "grade_deadline_s", "function_deadline_s", "max_unscored"},
    "learner": {
        *("cpus_per_rank", "gpus_per_rank", "threads_per_rank", "tokens_per_microbatch", "gradient_checkpointing", "deadline_s"),
    },
    "warm_start": {"cache_dir"},
}
_UNSET = "(not set)"


class CheckpointError(BudgetRLError):
    """A checkpoint cannot be written, read or trusted."""


def begin(checkpoints_dir: Path, step: int) -> Path:
    """Return an empty ``step-XXXXXX.partial`` folder to write the checkpoint of ``step`` into.

    Left-overs of an interrupted write, of this or of any other step, are removed: one run has one writer.
    Raises CheckpointError when the folder cannot be made.
    """
    if step < 0:
        raise ValueError(f"step must be >= 0, got {step}")
    partial = checkpoints_dir / f"step-{step:06d}{PARTIAL}"
    try:
        checkpoints_dir.mkdir(parents=True, exist_ok=True)
        for folder in checkpoints_dir.iterdir():
            if folder.suffix in (PARTIAL, REPLACED) and _STEP_FOLDER.fullmatch(folder.stem):
                shutil.rmtree(folder)
        partial.mkdir()
    except OSError as error:
        raise CheckpointError(
            f"cannot start a checkpoint in {checkpoints_dir}: {error}", fix="free space or set output.dir"
        ) from error
    return partial


def commit(partial: Path, manifest_without_files: Manifest) -> Path:
    """Seal ``partial`` into a checkpoint and return its final folder.

    Flushes and hashes every file, writes the manifest, renames the folder and flushes its parent, in this order, so that a
    folder without the ``.partial`` ending is complete even after a power cut. A checkpoint of the same step is replaced.
    Raises CheckpointError when the disk refuses (the partial folder then stays and the older checkpoints are untouched).
    """
    if partial.suffix != PARTIAL:
        raise ValueError(f"{partial} was not made by begin(): its name does not end in {PARTIAL}")
    final = partial.with_suffix("")
    if f"step-{manifest_without_files.step:06d}" != final.name:
        raise ValueError(f"the manifest is of step {manifest_without_files.step}, the folder is {final.name}")
    try:
        manifest = replace(manifest_without_files, files=_seal_files(partial), format=FORMAT)
        _write_flushed(partial / MANIFEST_NAME, json.dumps(asdict(manifest), indent=2, allow_nan=False) + "\n")
        _flush_folders(partial)
        old = final.with_suffix(REPLACED)
        if final.exists():
            os.rename(final, old)
        os.rename(partial, final)
        _flush(final.parent)
        if old.exists():
            shutil.rmtree(old)
    except OSError as error:
        raise CheckpointError(
            f"cannot finish checkpoint {final.name}: {error}; earlier checkpoints are untouched",
            fix=f"free space in {final.parent}",
        ) from error
    return final


def read_manifest(folder: Path) -> Manifest:
    """Read ``folder/manifest.json``; raises CheckpointError when it is missing, damaged or of another format."""
    path = folder / MANIFEST_NAME
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder} is no checkpoint: it has no {MANIFEST_NAME}", fix="name a step-XXXXXX folder") from error
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}", fix=_advice(folder)) from error
    try:
        found = json.loads(text)
        if isinstance(found, dict) and found.get("format") != FORMAT:
            raise CheckpointError(
                f"{path} has format {found.get('format')!r}, this version reads {FORMAT}",
                fix="use the version of budget-rl that wrote it",
            )
        manifest = _MANIFEST.validate_json(text)
        return replace(manifest, config=upgraded(manifest.config))
    except (ValidationError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged: {error}", fix=_advice(folder)) from error


def verify(folder: Path, manifest: Manifest, *, only: str | None = None) -> None:
    """Check that ``folder`` holds exactly the files of ``manifest`` with the right SHA-256, ``only`` under that prefix if given.

    A file that the manifest does not know is an error too, because learner files are loaded by listing their folder.
    Raises CheckpointError naming the first bad file and the checkpoint to use instead.
    """
    prefix = only or ""
    expected = {name: digest for name, digest in manifest.files.items() if name.startswith(prefix)}
    if only and not expected:
        raise CheckpointError(f"{folder} has no files under {only!r} in its manifest", fix=_advice(folder))
    for name in expected:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise CheckpointError(f"{folder / MANIFEST_NAME} names {name!r}, outside the checkpoint", fix=_advice(folder))
    present = {name for name in _relative_files(folder) if name.startswith(prefix) and name != MANIFEST_NAME}
    for name in sorted(expected.keys() | present):
        if name not in present:
            raise CheckpointError(f"{folder / name} is missing", fix=_advice(folder))
        if name not in expected:
            raise CheckpointError(f"{folder / name} is not in the manifest", fix=f"remove it, or {_advice(folder)}")
        if _readable_sha256(folder, name) != expected[name]:
            raise CheckpointError(f"{folder / name} was changed or damaged (SHA-256 differs)", fix=_advice(folder))


def complete(checkpoints_dir: Path) -> list[Path]:
    """All finished checkpoints of a run, oldest step first; partial folders are not listed."""
    if not checkpoints_dir.is_dir():
        return []
    found = [p for p in checkpoints_dir.iterdir() if _STEP_FOLDER.fullmatch(p.name) and (p / MANIFEST_NAME).is_file()]
    return sorted(found, key=_step_of)


def latest(checkpoints_dir: Path) -> Path | None:
    """The finished checkpoint with the highest step, or None when there is none."""
    return complete(checkpoints_dir)[-1] if complete(checkpoints_dir) else None


def prune(checkpoints_dir: Path, keep: int) -> list[Path]:
    """Delete all but the newest ``keep`` (>= 1) finished checkpoints; returns the folders removed."""
    if keep < 1:
        raise ValueError(f"keep must be >= 1, got {keep}")
    removed = complete(checkpoints_dir)[:-keep]
    for folder in removed:
        # Renamed first: a crash half-way through the deletion must not leave something that looks finished.
        doomed = folder.with_name(folder.name + PARTIAL)
        os.rename(folder, doomed)
        shutil.rmtree(doomed)
    return removed


def abandon(checkpoints_dir: Path, kept: Path, step: int) -> list[Path]:
    """Rename the checkpoints of a course that is left by going on from ``kept``, of ``step``; returns the new folders.

    These are all others of ``step`` or later. As ``step-XXXXXX.abandoned`` nothing takes, counts or deletes them any more; a path
    can still name them. A number is added where an earlier course left one of that name.
    """
    renamed = []
    for folder in complete(checkpoints_dir):
        if _step_of(folder) < step or folder.resolve() == kept.resolve():
            continue
        target, number = folder.with_name(folder.name + ABANDONED), 1
        while target.exists():
            number += 1
            target = folder.with_name(f"{folder.name}{ABANDONED}-{number}")
        try:
            os.rename(folder, target)
            _flush(checkpoints_dir)
        except OSError as error:
            raise CheckpointError(
                f"cannot rename {folder}, which resuming from step {step} leaves behind: {error}",
                fix="make the folder writable, or set another output.dir",
            ) from error
        renamed.append(target)
    return renamed


def incompatible_keys(old_config: Mapping[str, Any], new_config: Mapping[str, Any]) -> list[str]:
    """Dotted names, sorted, of the settings that differ and that a resumed run may not change.

    Both are nested mappings of plain values; a setting that one of them lacks counts with its default, so that a checkpoint
    written before a setting existed can still be resumed.
    """
    old, new = _flat(old_config), _flat(new_config)
    names = [name for name in old.keys() | new.keys() if not _may_change(name)]
    return sorted(name for name in names if _value(old, name) != _value(new, name))


def check_resumable(manifest: Manifest, config: Mapping[str, Any]) -> None:
    """Raise ConfigError listing ``key: old -> new`` when ``config`` cannot continue the run of ``manifest``."""
    keys = incompatible_keys(manifest.config, config)
    if not keys:
        return
    old, new = _flat(manifest.config), _flat(config)
    changes = "\n".join(f"  {key}: {_shown(_value(old, key))} -> {_shown(_value(new, key))}" for key in keys)
    raise ConfigError(
        f"the checkpoint of step {manifest.step} was made with other settings:\n{changes}",
        fix="set them back to resume, or start a new run with resume=never and another output.dir",
    )


def _may_change(name: str) -> bool:
    section, _, key = name.rpartition(".")
    return name.partition(".")[0] in _FREE_SECTIONS or key in _MAY_CHANGE.get(section, ())


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted name -> value; tuples become lists, as they do on their way through JSON.

    A section of one kind among several, such as `rollout.budgets`, also counts as its kind: where it takes the place of a list or
    of another kind, that is one difference to name.
    """
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
            if f"{prefix}{key}.kind" in flat:
                flat[f"{prefix}{key}"] = flat.pop(f"{prefix}{key}.kind")
        else:
            flat[f"{prefix}{key}"] = list(value) if isinstance(value, tuple) else value
    return flat


def _value(flat: Mapping[str, Any], name: str) -> Any:
    return flat[name] if name in flat else _DEFAULTS.get(name, _UNSET)


def _defaults(section: type[Section], prefix: str = "") -> dict[str, Any]:
    defaults: dict[str, Any] = {}
    for name, info in section.model_fields.items():
        if isinstance(info.annotation, type) and issubclass(info.annotation, Section):
            defaults |= _defaults(info.annotation, f"{prefix}{name}.")
        elif not info.is_required():
            value = info.get_default(call_default_factory=True, validated_data={})
            defaults[f"{prefix}{name}"] = list(value) if isinstance(value, tuple) else value
    return defaults


def _shown(value: Any) -> str:
    text = value if value is _UNSET else json.dumps(value, default=str)
    return text if len(text) <= 80 else text[:77] + "..."


_DEFAULTS = _defaults(Settings)


def _step_of(folder: Path) -> int:
    match = _STEP_FOLDER.fullmatch(folder.name)
    return int(match.group(1)) if match else -1


def _advice(folder: Path) -> str:
    earlier = [p for p in complete(folder.parent) if _step_of(p) < _step_of(folder)]
    if earlier:
        return f"use the previous checkpoint: resume={earlier[-1]}"
    return "there is no earlier checkpoint beside it; start again with resume=never"


def _relative_files(folder: Path) -> Iterator[str]:
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            raise CheckpointError(f"{path} is a symbolic link; a checkpoint holds plain files only", fix="copy its target here")
        if path.is_file():
            yield path.relative_to(folder).as_posix()


def _seal_files(folder: Path) -> dict[str, str]:
    names = [name for name in _relative_files(folder) if name != MANIFEST_NAME]
    if not names:
        raise CheckpointError(f"{folder} is empty", fix="write model, learner and state before commit()")
    for name in names:
        _flush(folder / name)
    return {name: _sha256(folder / name) for name in names}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _readable_sha256(folder: Path, name: str) -> str:
    try:
        return _sha256(folder / name)
    except OSError as error:
        raise CheckpointError(f"{folder / name} cannot be read: {error}", fix=_advice(folder)) from error


def _write_flushed(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _flush(path: Path) -> None:
    """Force a file or the entries of a folder onto the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _flush_folders(folder: Path) -> None:
    for path in [*(p for p in folder.rglob("*") if p.is_dir()), folder]:
        _flush(path)
