"""The output head of a frozen model: from hidden states to float32 logits, and its matrix alone read out of a model folder."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rl.errors import ConfigError

SCALES = ("logit_scale", "logits_scaling", "lm_head_multiplier")
"""Entries of a configuration that multiply or divide the logits."""
SOFTCAP = "final_logit_softcapping"
INDEX = "model.safetensors.index.json"
BLOCK_ROWS = 8192
"""Rows of a bfloat16 head that a CPU widens at a time."""


@dataclass(frozen=True)
class Head:
    """``z = W h + b``, with a softcap c then ``c tanh(z / c)``; the vocabulary is cut to the tokenizer's size."""

    weight_VH: torch.Tensor
    """Model dtype."""
    bias_V: torch.Tensor | None = None
    softcap: float | None = None

    def logits(self, hidden_RH: torch.Tensor) -> torch.Tensor:
        """Float32 logits (R, V) of hidden states (R, H) in the model's dtype.

        The product comes out in float32 whatever goes in: two bfloat16 logits differ by up to 1/16 from what they stand for at a
        size of 16, and the extrapolation multiplies the difference of two models by alpha.
        """
        logits_RV = _product(hidden_RH, self.weight_VH)
        if self.bias_V is not None:
            logits_RV = logits_RV + self.bias_V.float()
        return logits_RV if self.softcap is None else self.softcap * torch.tanh(logits_RV / self.softcap)


def _product(hidden_RH: torch.Tensor, weight_VH: torch.Tensor) -> torch.Tensor:
    if weight_VH.dtype == torch.float32:
        return hidden_RH @ weight_VH.T
    if weight_VH.is_cuda:
        return torch.mm(hidden_RH, weight_VH.T, out_dtype=torch.float32)  # pyright: ignore[reportCallIssue]
    hidden_RH = hidden_RH.float()
    logits_RV = hidden_RH.new_empty(hidden_RH.shape[0], weight_VH.shape[0])
    for start in range(0, weight_VH.shape[0], BLOCK_ROWS):
        block = slice(start, start + BLOCK_ROWS)
        logits_RV[:, block] = hidden_RH @ weight_VH[block].float().T
    return logits_RV


def refuse_head(name: str, config: Any, *, plain: bool) -> None:
    """Raise ConfigError for a model whose configuration says that its logits are more than head times hidden state.

    Scaled logits never work, a softcap only where not ``plain``: what goes through `kernels.linear_alignment_kl` or
    `kernels.linear_bucket_kl` is nothing but matrices.
    """
    text = config.get_text_config()
    for scale in SCALES:
        if (getattr(text, scale, None) or 1.0) != 1.0:
            raise ConfigError(
                f"{name}: model {text.model_type} scales its logits ({scale}={getattr(text, scale)}), which a frozen model's "
                "head does not do",
                fix=f"use models without {scale}",
            )
    if plain and getattr(text, SOFTCAP, None):
        raise ConfigError(
            f"{name}: model {text.model_type} caps its logits ({SOFTCAP}={getattr(text, SOFTCAP)}), and "
            "the mode of the teacher takes a plain head only",
            fix="use distil.teacher.mode=scalar, or another model",
        )


def read_head(folder: Path, *, vocabulary: int, dtype: str = "float32", trust_remote_code: bool = False) -> torch.Tensor:
    """The output embedding of the model in ``folder`` and nothing else of it: weight_VH in ``dtype``, ``vocabulary`` rows.

    Reads one tensor of the safetensors files, through their index where there are several; a tied head is the input embedding.
    Raises ConfigError where there is no such tensor or it has too few rows.
    """
    from safetensors import safe_open

    names = head_names(folder, trust_remote_code=trust_remote_code)
    places = tensor_files(folder)
    found = next((key for name in names for key in _spellings(name, places)), None)
    if found is None:
        raise ConfigError(
            f"{folder} holds no output embedding: none of its tensors is called {' or '.join(names)}",
            fix="save the model again with save_pretrained",
        )
    with safe_open(places[found], framework="pt") as handle:
        rows = handle.get_slice(found)
        if rows.get_shape()[0] < vocabulary:
            raise ConfigError(
                f"{folder}: the head has {rows.get_shape()[0]} rows and the tokenizer {vocabulary} tokens",
                fix="resize the model's embeddings to its tokenizer, or use the tokenizer it was saved with",
            )
        return rows[:vocabulary].to(getattr(torch, dtype))


def head_names(folder: Path, *, trust_remote_code: bool = False) -> list[str]:
    """Names under which the output embedding may be stored, the head's own first; torch's meta device allocates no weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(str(folder), trust_remote_code=trust_remote_code)
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    head = model.get_output_embeddings()
    shared = [name for name, value in model.named_parameters(remove_duplicate=False) if value is head.weight]
    own = {f"{name}.weight" for name, module in model.named_modules() if module is head}
    return sorted(shared, key=lambda name: name not in own)


def tensor_files(folder: Path) -> dict[str, Path]:
    """Name of each tensor of a model folder -> the safetensors file that holds it."""
    from safetensors import safe_open

    index = folder / INDEX
    if index.is_file():
        shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return {name: folder / shard for name, shard in shards.items()}
    places: dict[str, Path] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as handle:
            places |= dict.fromkeys(handle.keys(), file)
    return places


def _spellings(name: str, places: dict[str, Path]) -> list[str]:
    """Stored names that mean ``name``: itself, else the same with a module more or less in front (a base model saved alone)."""
    if name in places:
        return [name]
    return [key for key in places if key.endswith(f".{name}") or name.endswith(f".{key}")]
