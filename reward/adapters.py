"""LoRA adapters of frozen models: refused where they reach beyond the inner layers, several on one base in memory."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rl.errors import ConfigError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PARTS = (".lora_A.", ".lora_B.", ".lora_magnitude_vector")
_HEADS = ("lm_head", "embed_out", "output_layer")
_HARMLESS_STARTS = ("gaussian", "orthogonal", "eva")
"""Ways to start an adapter, by name, that leave the base model as it is."""


def is_adapter(folder: Path) -> bool:
    """Whether the folder holds a peft adapter rather than a model."""
    return (folder / CONFIG).is_file() and not (folder / "config.json").is_file()


def check_adapter(folder: Path, name: str) -> None:
    """Raise ConfigError unless ``folder`` holds a LoRA adapter of inner layers alone, as safetensors; ``name`` says whose it is.

    One base serves two models and both heads are the base's, so an adapter must not change the head, an embedding or a bias, nor
    bring whole modules along. Reads the adapter's configuration and the names of its tensors.
    """
    from safetensors import safe_open

    if not (folder / CONFIG).is_file():
        raise ConfigError(
            f"{name}={folder} is no LoRA adapter: it has no {CONFIG}",
            fix="name an adapter folder of peft, or leave distil.teacher.base out to use two whole models",
        )
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    if config.get("peft_type") != "LORA":
        raise ConfigError(f"{name}={folder} is an adapter of type {config.get('peft_type')}", fix="use a LoRA adapter")
    if saved := config.get("modules_to_save"):
        raise ConfigError(
            f"{name}={folder} brings whole modules along ({', '.join(saved)}), which two adapters on one base cannot both do",
            fix="train without modules_to_save, or merge each adapter and name the merged folders",
        )
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start not in _HARMLESS_STARTS:
        raise ConfigError(
            f"{name}={folder} was started by {start}, which changes the base model, and the base here serves two adapters",
            fix="convert it to a plain LoRA when saving it (path_initial_model_for_weight_conversion), or merge it",
        )
    if not (folder / WEIGHTS).is_file():
        raise ConfigError(
            f"{name}={folder} has no {WEIGHTS}", fix="save the adapter with safetensors (other formats may run code when loaded)"
        )
    with safe_open(folder / WEIGHTS, framework="pt") as handle:
        outside = sorted(key for key in handle.keys() if not _inner(key))  # noqa: SIM118 (not a dict)
    if outside:
        raise ConfigError(
            f"{name}={folder} changes more than inner layers: {', '.join(outside[:3])}",
            fix="train LoRA on attention and MLP layers only (no head, no embedding, bias none), or name merged folders",
        )


def _inner(key: str) -> bool:
    return any(part in key for part in _PARTS) and not any(head in key for head in _HEADS)


class AdapterBase:
    """A model and the adapters on it; :meth:`add` gives back what switches to the new one."""

    def __init__(self, lm: Any) -> None:
        self.lm = lm
        self._head = lm.get_output_embeddings()
        self._peft: Any = None
        self._count = 0

    def add(self, folder: Path) -> Callable[[], None]:
        """Put the adapter of ``folder`` on the model. Raises ConfigError where it does not fit."""
        import peft
        from peft.utils.save_and_load import set_peft_model_state_dict
        from safetensors.torch import load_file

        check_adapter(folder, "adapter")
        config = peft.PeftConfig.from_pretrained(str(folder))
        config.inference_mode = True
        config.base_model_name_or_path = None  # where it lay when it was trained; whether it fits is found out below
        called, self._count = f"adapter{self._count}", self._count + 1
        try:
            if self._peft is None:
                self._peft = peft.get_peft_model(self.lm, config, adapter_name=called)
            else:
                self._peft.add_adapter(called, config)
            found = set_peft_model_state_dict(self._peft, load_file(folder / WEIGHTS), adapter_name=called)
        except (ValueError, RuntimeError, KeyError) as error:
            raise ConfigError(
                f"the adapter {folder} does not fit the base model: {error}", fix="name the base it was trained on"
            ) from error
        absent = [key for key in found.missing_keys if f".{called}" in key]
        if absent or found.unexpected_keys:
            raise ConfigError(
                f"the adapter {folder} does not fit the base model: {[*absent, *found.unexpected_keys][0]} has no counterpart",
                fix="name the base it was trained on",
            )
        if self.lm.get_output_embeddings() is not self._head:
            raise ConfigError(f"the adapter {folder} changes the output head", fix="train LoRA without the head")
        self.lm.requires_grad_(False).eval()
        return lambda: self._peft.set_adapter(called)
