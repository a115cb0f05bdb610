"""Which run a configuration means: its stage, the settings that stage has of its own, and the runs that make a teacher."""

from __future__ import annotations

from pathlib import Path

from rl.errors import BudgetRLError
from rl.manifest import check_resumable, latest, read_manifest
from rl.pair_run import PAIRS_NAME, PairRun
from rl.run import Run
from rl.run_folder import RunFolder
from rl.settings import Settings
from rl.stage_settings import learns_from_pairs

TEACHERS = {"dpo": False, "reverse": True}
"""The two models of a teacher, and whether the pairs are turned round for it."""


def run_class(settings: Settings) -> type[Run]:
    """What steps are made of: rollouts, or pairs."""
    return PairRun if learns_from_pairs(settings) else Run


def staged(settings: Settings) -> Settings:
    """The settings with those of the preference stage in the places that every run reads."""
    chosen = settings.preference
    if settings.stage != "preference" or chosen is None:
        return settings
    learner = settings.learner.model_copy(update={"lr": chosen.lr or settings.learner.lr})
    return settings.model_copy(update={"learner": learner, "max_steps": chosen.steps or settings.max_steps})


def teacher_settings(settings: Settings, folder: RunFolder, name: str) -> Settings:
    """The run that makes one of the teacher's models, in a folder beside that of the run it is made for.

    It is a run like any other: it can be stopped, resumed, looked at in MLflow and exported by itself.
    """
    assert settings.preference is not None
    pairs = settings.preference.pairs
    if name == "reverse" and pairs.from_rollouts:  # the pairs of the first run, which are there by now
        pairs = pairs.model_copy(update={"source": str(teacher_folder(folder, "dpo") / PAIRS_NAME)})
    preference = settings.preference.model_copy(update={"reverse": TEACHERS[name], "pairs": pairs})
    learner = settings.learner.model_copy(update={"minibatches": 1, "epochs": 1})
    output = settings.output.model_copy(update={"dir": str(teacher_folder(folder, name)), "name": None})
    return settings.model_copy(
        update={
            "stage": "preference",
            "preference": preference,
            "distil": None,
            "treg": None,
            "learner": learner,
            "loss": settings.loss.model_copy(update={"kl_coef": 0.0}),
            "output": output,
            "rollout": settings.rollout.model_copy(update={"refill": 0}),
            "max_tokens": None,
            "max_rollouts": None,
            # A checkpoint that was named is one of the whole run; its teachers are those that lie beside it.
            "resume": "never" if settings.resume == "never" else "auto",
            "eval": settings.eval.model_copy(update={"before": False}),
        }
    )


def teacher_folder(folder: RunFolder, name: str) -> Path:
    """Where the run lies that makes one of the teacher's models."""
    return folder.path.with_name(f"{folder.name}-{name}")


def finished_model(settings: Settings, folder: Path) -> Path | None:
    """The model of a run in ``folder`` that reached its last step; None where there is none yet.

    Raises ConfigError for one that was made with other settings, as resuming it would.
    """
    newest = latest(folder / "checkpoints")
    if newest is None or settings.resume == "never":
        return None
    wanted, manifest = staged(settings), read_manifest(newest)
    check_resumable(manifest, wanted.model_dump(mode="json"))
    return newest / "model" if wanted.max_steps is not None and manifest.step >= wanted.max_steps else None


def with_teachers(settings: Settings, dpo: Path, reverse: Path) -> Settings:
    """The settings of the run itself, its teacher's models being made."""
    assert settings.distil is not None
    teacher = settings.distil.teacher.model_copy(update={"dpo": str(dpo), "reverse": str(reverse)})
    keeps = settings.distil.data == "pairs"
    beta0 = settings.distil.beta0
    if beta0 is None and settings.preference is not None:
        beta0 = settings.preference.beta
    return settings.model_copy(
        update={
            "distil": settings.distil.model_copy(update={"teacher": teacher, "beta0": beta0}),
            "preference": settings.preference if keeps else None,
        }
    )


def made_model(folder: Path) -> Path:
    """The model of the finished run in ``folder``. Raises BudgetRLError where it did not finish."""
    newest = latest(folder / "checkpoints")
    if newest is None:
        raise BudgetRLError(f"{folder} holds no checkpoint: the teacher's model was not made", fix="look into its run.log")
    return newest / "model"
