"""Turns a checkpoint into a Hugging Face folder that other programs load, and sends such a folder to a hub."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from reward.calibration import Calibration
from rl.budget_settings import describe_budgets
from rl.errors import BudgetRLError
from rl.manifest import MANIFEST_NAME, CheckpointError, latest, read_manifest, verify
from rl.models import MODEL_SUFFIXES
from rl.rollout_settings import RolloutSettings
from rl.sampling_state import STATE_NAME, SamplingState, read_sampling
from rl.types import Manifest
from rollout.parameters import to_extra_args
from rollout.sampling import engine_options

log = logging.getLogger("budget_rl")

MODEL_PREFIX = "model/"
_OTHER_WEIGHTS = frozenset((".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".ot"))
CALIBRATION_NAME = "effort-calibration.json"
_EFFORT_ACCURACY = re.compile(r"eval/x(\d+\.\d\d)/accuracy")
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


_STAGES = {
    "rl": ("reinforcement-learning", "reinforcement learning"),
    "preference": ("preference-optimization", "preference optimisation on pairs of answers"),
    "distil": ("distillation", "distillation from a composed teacher (AlignDistil)"),
}
"""Tag and words of a model card by `stage`."""


class ExportError(BudgetRLError):
    """A checkpoint cannot be written as a Hugging Face folder."""


class PushError(BudgetRLError):
    """A folder cannot be sent to the hub."""


def export_checkpoint(checkpoint: Path, target: Path) -> Path:
    """Write the model of ``checkpoint`` (or of a run folder's newest checkpoint) into ``target`` as a Hugging Face folder.

    The files are verified first; a model card and the end-of-sequence ids of the generation config are added, and what is no
    part of the model is left out. ``target`` must be absent or empty and appears only when all of it is written. Raises
    CheckpointError for a damaged checkpoint, ExportError else.
    """
    folder = find_checkpoint(checkpoint)
    manifest = read_manifest(folder)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ExportError(f"{target} exists and is not an empty folder", fix="name a new folder")
    verify(folder, manifest, only=MODEL_PREFIX)
    # The card quotes the run's figures from state.json, so that file has to be proven too.
    if "state.json" in manifest.files:
        verify(folder, manifest, only="state.json")
    names = _model_files(folder, manifest)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f"{target.name}.partial-") as scratch:
        staged = Path(scratch) / "model"
        for name in names:
            (staged / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / MODEL_PREFIX / name, staged / name)
        _complete_generation_config(staged)
        metrics = _run_metrics(folder)
        card = model_card(manifest, metrics, trained_decoding(manifest, folder))
        (staged / "README.md").write_text(card, encoding="utf-8")
        if (calibration := effort_calibration(metrics)) is not None:
            (staged / CALIBRATION_NAME).write_text(calibration.to_json() + "\n", encoding="utf-8")
        os.rename(staged, target)
    return target


def find_checkpoint(path: Path) -> Path:
    """The checkpoint folder meant by ``path``: itself, or the newest one of a run folder or of its ``checkpoints`` folder."""
    if (path / MANIFEST_NAME).is_file():
        return path
    newest = latest(path / "checkpoints") or latest(path)
    if newest is None:
        raise CheckpointError(
            f"{path} is neither a checkpoint nor a run with one", fix="name a run folder or a step-XXXXXX folder"
        )
    return newest


@dataclass(frozen=True)
class Decoding:
    """How vLLM's server decodes as training did: options to start it with, and keys of a request."""

    options: str
    temperature: float
    opening: str
    keys: dict[str, Any]

    def lines(self) -> list[str]:
        """A section of a model card."""
        return [
            *("## Decoding as in training", "", "Answers were drawn with shaped logits."),
            *("vLLM's server, with budget-rl beside it, does the same when it is started with", "", f"    {self.options}", ""),
            *(f"and asked with temperature {self.temperature:g}, top_p 1, the prompt opened by `{self.opening}`,", ""),
            *("and these `vllm_xargs`:", "", "```json", json.dumps(self.keys, indent=2), "```", ""),
        ]


def trained_decoding(manifest: Manifest, folder: Path) -> Decoding | None:
    """The shaping of the step after the checkpoint; None for plain sampling, or settings of a version that had no shaping."""
    try:
        rollout = RolloutSettings.model_validate(manifest.config.get("rollout", {}))
    except ValidationError:
        return None
    state = read_sampling(folder) if STATE_NAME in manifest.files else SamplingState()
    keys = to_extra_args(state.shaping(rollout))
    if keys is None:
        return None
    engine = engine_options(rollout)
    options = f"--generation-config vllm --logits-processors {engine['logits_processors'][0]}"
    if "additional_config" in engine:
        options += f" --additional-config '{json.dumps(engine['additional_config'])}'"
    keys = {name: round(value, 6) if isinstance(value, float) else value for name, value in keys.items()}
    return Decoding(options, rollout.temperature, rollout.free_template, keys)


def model_card(manifest: Manifest, metrics: Mapping[str, float], decoding: Decoding | None = None) -> str:
    """README.md of an exported model: what was trained, how, the run's evaluation figures, and how it was decoded if specially.

    Only the settings named here are quoted, and local paths only by their last part, so nothing private leaves with the card.
    """
    base = str(_setting(manifest, "model.path"))
    warm_started = _setting(manifest, "warm_start") is not None
    is_public = _is_hub_id(base) and not warm_started
    stage = str(_setting(manifest, "stage") or "rl")
    tag, learnt = _STAGES[stage]
    header = ["---", "library_name: transformers", "pipeline_tag: text-generation", f"tags: [budget-rl, {tag}]"]
    header += [f"base_model: {base}"] if is_public else []
    rows = {
        "base model": base if is_public else Path(base).name + (", made by a supervised warm start" if warm_started else ""),
        "method": _setting(manifest, "reward.method"),
        "advantage": _setting(manifest, "advantage.estimator"),
        "token budgets": describe_budgets(_setting(manifest, "rollout.budgets") or []),
        "budget sentence": f"`{_setting(manifest, 'rollout.budget_template')}`",
        "longest response": f"{_setting(manifest, 'rollout.max_length')} tokens",
        "rollouts per prompt": _setting(manifest, "rollout.samples_per_prompt"),
        "prompts per step": _setting(manifest, "prompts_per_step"),
        "data": _public_name(str(_setting(manifest, "data.source"))),
        "steps": manifest.step,
        "response tokens seen in training": manifest.tokens_seen,
    }
    if stage != "rl":  # nothing was rewarded: the answers of an RL step are none of these models'
        for name in ("method", "advantage", "rollouts per prompt", "prompts per step"):
            del rows[name]
        asked = {
            "preference loss": "preference.form", "answers exchanged": "preference.reverse", "beta": "preference.beta",
            "pairs": "preference.pairs.source", "pairs per step": "preference.pairs_per_step", "teacher": "distil.teacher.mode",
            "r": "distil.teacher.r",
        }  # fmt: skip
        found = {name: _setting(manifest, key) for name, key in asked.items()}
        rows |= {name: value for name, value in found.items() if value is not None}
    lines = [*header, "---", "", "# Model card", "", f"Trained by {learnt} with budget-rl.", ""]
    lines += ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items()), ""]
    if metrics:
        lines += ["## Figures of the run at this step", "", "| metric | value |", "|---|---|"]
        lines += [*(f"| {name} | {value:.4g} |" for name, value in sorted(metrics.items())), ""]
    if (calibration := effort_calibration(metrics)) is not None:
        lines += ["## Efforts", "", f"Also in `{CALIBRATION_NAME}`.", "", calibration.markdown()]
    lines += decoding.lines() if decoding is not None else []
    if _setting(manifest, "model.trust_remote_code"):
        revision = _setting(manifest, "model.revision")
        lines += [f"Loading needs `trust_remote_code=True`: the base model brings code, pinned at revision `{revision}`.", ""]
    return "\n".join(lines)


def effort_calibration(metrics: Mapping[str, float]) -> Calibration | None:
    """How length and accuracy follow the effort asked for; None where fewer than two efforts were evaluated."""
    efforts = sorted(float(found[1]) for name in metrics if (found := _EFFORT_ACCURACY.fullmatch(name)))
    if len(efforts) < 2:
        return None
    tokens, accuracy = (tuple(metrics[f"eval/x{r:.2f}/{what}"] for r in efforts) for what in ("tokens", "accuracy"))
    return Calibration(tuple(efforts), tokens, accuracy)


def push_folder(folder: Path, repo_id: str, *, private: bool = True) -> str:
    """Upload an exported folder to ``repo_id`` (``user/name``) of the hub at ``HF_ENDPOINT`` and return the repository's address.

    Prints every file and size before the first request. The token comes from ``HF_TOKEN`` or ``hf auth login`` only. Raises
    PushError: no token, refused, unreachable, or a repository that is public although ``private`` was asked for; and
    ExportError when the folder holds anything but model files.
    """
    # Imported here: exporting to disk needs no network client.
    import httpx
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    names = _pushable_files(folder, repo_id)
    if get_token() is None:
        raise PushError("there is no Hugging Face token", fix="run `hf auth login`, or set HF_TOKEN to a token that may write")
    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"))
    print(f"sending to {api.endpoint} as {'private' if private else 'PUBLIC'} repository {repo_id}:")
    for name in names:
        print(f"  {name}  {(folder / name).stat().st_size:,} bytes")
    try:
        url = api.create_repo(repo_id, private=private, exist_ok=True)
        if private and not api.model_info(repo_id).private:
            raise PushError(
                f"{repo_id} exists already and is public; nothing was sent", fix="choose another name, or ask for a public push"
            )
        api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="Upload model trained with budget-rl")
    except HFValidationError as error:
        raise PushError(f"{repo_id!r} is not the name of a repository: {error}", fix="write it as user/name") from error
    except HfHubHTTPError as error:
        raise _refused(error.response.status_code, repo_id, str(api.endpoint), error) from error
    except (httpx.HTTPError, OfflineModeIsEnabled) as error:
        raise _unreachable(str(api.endpoint), error) from error
    except RuntimeError as error:
        # The client wraps whatever stopped the upload of one large file.
        cause = f"upload to {repo_id} stopped: {error} {error.__cause__ or ''}"
        raise PushError(cause.rstrip(), fix="run the push again") from error
    return str(url)


def _pushable_files(folder: Path, repo_id: str) -> list[str]:
    if not _HUB_ID.fullmatch(repo_id):
        raise PushError(f"{repo_id!r} is not the name of a repository", fix="write it as user/name")
    if not (folder / "config.json").is_file():
        raise PushError(f"{folder} is not an exported model: it lacks config.json", fix="export a checkpoint first")
    names = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]
    _refuse_foreign_files(folder, names, _allowed(code=True) | {".md"})
    return names


def _refused(status: int, repo_id: str, endpoint: str, error: Exception) -> PushError:
    if status == 401:
        return PushError(f"{endpoint} refused the token (401)", fix="run `hf auth login` again, or set HF_TOKEN to a valid token")
    if status in (402, 403, 404):
        return PushError(
            f"{endpoint} refused to write {repo_id} ({status})", fix="use a token with write access to that user or organisation"
        )
    summary = " ".join(str(error).split())
    return PushError(f"{endpoint} answered {status} to the push of {repo_id}: {summary}", fix="try again later")


def _unreachable(endpoint: str, error: Exception) -> PushError:
    summary = " ".join(str(error).split()) or type(error).__name__
    return PushError(
        f"{endpoint} cannot be reached: {summary}", fix="check the network, HF_ENDPOINT and HF_HUB_OFFLINE; the folder is kept"
    )


def _model_files(folder: Path, manifest: Manifest) -> list[str]:
    """The files of the checkpoint's model, without what else lay in the base model's folder: a README, code nobody trusted."""
    names = [name.removeprefix(MODEL_PREFIX) for name in manifest.files if name.startswith(MODEL_PREFIX)]
    allowed = _allowed(code=bool(_setting(manifest, "model.trust_remote_code")))
    # Weights in another format are refused, not left out: nobody could say which ones were trained.
    left_out = sorted(name for name in names if Path(name).suffix not in allowed | _OTHER_WEIGHTS)
    if left_out:
        log.warning("left out of the export, as no part of the model: %s", ", ".join(left_out))
    kept = [name for name in names if name not in left_out]
    _refuse_foreign_files(folder, kept, allowed)
    return kept


def _allowed(*, code: bool) -> frozenset[str]:
    return MODEL_SUFFIXES | {".py"} if code else MODEL_SUFFIXES


def _refuse_foreign_files(folder: Path, names: list[str], allowed: frozenset[str]) -> None:
    foreign = sorted(name for name in names if Path(name).suffix not in allowed)
    if foreign:
        raise ExportError(
            f"{folder} holds {', '.join(foreign)}, which is no model file that may leave",
            fix="save the model as safetensors only",
        )
    if not any(name.endswith(".safetensors") for name in names):
        raise ExportError(f"{folder} holds no safetensors weights", fix="save the model as safetensors")


def _complete_generation_config(folder: Path) -> None:
    """Make sure that the generation config names the end-of-sequence ids: without them an engine generates to its limit."""
    path = folder / "generation_config.json"
    generation = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if generation.get("eos_token_id") is None:
        eos = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("eos_token_id")
        if eos is None:
            raise ExportError(
                "neither generation_config.json nor config.json names eos_token_id",
                fix="set it in the base model's configuration",
            )
        generation["eos_token_id"] = eos
        path.write_text(json.dumps(generation, indent=2) + "\n", encoding="utf-8")


def _run_metrics(folder: Path) -> dict[str, float]:
    """The evaluation figures that the driver stored under ``metrics`` in state.json; empty when it stored none."""
    path = folder / "state.json"
    state = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    metrics = state.get("metrics", {})
    return {name: float(value) for name, value in metrics.items() if name.startswith("eval/") and isinstance(value, int | float)}


def _setting(manifest: Manifest, name: str) -> Any:
    value: Any = manifest.config
    for key in name.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _is_hub_id(name: str) -> bool:
    return bool(_HUB_ID.fullmatch(name)) and not Path(name).exists()


def _public_name(source: str) -> str:
    return source if source.startswith("reasoning_gym:") or _is_hub_id(source) else Path(source).name
