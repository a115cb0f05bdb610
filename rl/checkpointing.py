"""Writing and reading checkpoints of a running job: the learner's files, the manifest, and the way back."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rl.cluster import Workforce
from rl.errors import ConfigError
from rl.manifest import abandon, begin, check_resumable, commit, latest, prune, read_manifest, verify
from rl.reward_state import RewardState
from rl.run_folder import RunFolder
from rl.sampling_state import STATE_NAME, SamplingState
from rl.settings import Settings
from rl.sft import copy_tokenizer
from rl.types import Manifest, WeightVersion
from rl.waiting import wait_for

log = logging.getLogger("budget_rl")

Resume = tuple[Path, Manifest]
"""A checkpoint to go on from, verified, and its manifest."""


def save_checkpoint(
    workforce: Workforce,
    folder: RunFolder,
    model: Path,
    settings: Settings,
    *,
    step: int,
    cursor: int,
    tokens_seen: int,
    rollouts_seen: int,
    minutes_spent: float,
    run_id: str | None,
    evaluation: Mapping[str, float],
    sampling: SamplingState,
    rewards: RewardState,
    extra: Mapping[str, Any],
) -> Path:
    """Write the state after ``step`` finished steps; the folder appears only when every byte is on disk.

    ``extra``: further sections of state.json.

    ``evaluation`` holds the held-out figures measured at this step, if any, for the model card of an export.
    """
    partial = begin(folder.checkpoints, step)
    refs = workforce.learners.save(str(partial))
    answers = wait_for(refs, seconds=settings.learner.deadline_s, what=f"learner writes checkpoint {step}")
    checksum = next(answer.checksum for answer in answers if answer is not None)
    copy_tokenizer(model, partial / "model")
    state = {"metrics": dict(evaluation), "sampling": sampling.to_json(), "rewards": rewards.to_json(), **extra}
    (partial / STATE_NAME).write_text(json.dumps(state) + "\n", encoding="utf-8")
    done = commit(
        partial,
        Manifest(
            step=step,
            config=settings.model_dump(mode="json"),
            cursor=cursor,
            tokens_seen=tokens_seen,
            rollouts_seen=rollouts_seen,
            minutes_spent=minutes_spent,
            tracker_run_id=run_id,
            weights=WeightVersion(step, checksum),
            world_size=settings.learner.ranks,
        ),
    )
    prune(folder.checkpoints, settings.output.keep_checkpoints)
    return done


def find_resume(settings: Settings, folder: RunFolder) -> Resume | None:
    """The checkpoint to continue from under `resume`, verified byte by byte and compatible; None for a fresh start."""
    if settings.resume == "never":
        return None
    if settings.resume == "auto":
        path = latest(folder.checkpoints)
        if path is None:
            return None
    else:
        path = Path(settings.resume).expanduser().resolve()
        if not path.is_dir():
            raise ConfigError(
                f"resume={settings.resume}: there is no such checkpoint folder", fix="use auto, never or a checkpoint"
            )
    manifest = read_manifest(path)
    check_resumable(manifest, settings.model_dump(mode="json"))
    # DeepSpeed unpickles its files, so nothing is loaded that is not exactly what we wrote.
    verify(path, manifest)
    return path, manifest


def take_over(folder: RunFolder, settings: Settings, resume: Resume | None, *, log_from: int) -> None:
    """Make ``folder`` that of the run which begins now, whose own lines in run.log start at byte ``log_from``.

    It is cut back to the checkpoint that is resumed. A fresh run, or one that goes on from a checkpoint of another folder, sets
    an earlier run of this name aside.
    """
    if resume is None or folder.path.resolve() not in resume[0].resolve().parents:
        folder.set_aside_earlier_run(log_from=log_from)
    else:
        checkpoint, manifest = resume
        # Checkpoints first: should this be cut short, `auto` goes on from the same one and cuts the lines then.
        for left in abandon(folder.checkpoints, checkpoint, manifest.step):
            log.info("the run goes on from step %d; a checkpoint of the course it leaves was kept as %s", manifest.step, left)
        folder.truncate_after(manifest.step)
    folder.write_config(settings.model_dump(mode="json"))
