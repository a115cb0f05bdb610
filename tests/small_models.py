"""Small random models on disk, adapters on them, and what transformers says of their tokens, for tests of frozen models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from rl.embedded import VOCABULARY, tiny_tokenizer

SIZES: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
V = len(VOCABULARY)


def save_model(folder: Path, *, seed: int = 0, model: Any = None, **config: Any) -> Path:
    """A small random Llama (or ``model``) with the embedded tokenizer; weights large enough that its opinions differ."""
    options = {**SIZES, "vocab_size": V, "max_position_embeddings": 64, "tie_word_embeddings": False, **config}
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**options)) if model is None else model
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def save_adapter(base: Path, folder: Path, *, seed: int = 0, **options: Any) -> Path:
    """A LoRA adapter on ``base`` that is no mere zero, as peft saves it."""
    torch.manual_seed(seed)
    config = peft.LoraConfig(**{"r": 4, "target_modules": ["q_proj", "v_proj", "up_proj"], "task_type": "CAUSAL_LM", **options})
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(str(folder))
    return folder


def batch(lengths: list[tuple[int, int]], *, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random sequences of (prompt, response) tokens: token_T, start_N, prompt_length_N."""
    start_N = torch.tensor([0, *(prompt + response for prompt, response in lengths)]).cumsum(0)
    token_T = torch.randint(V, (int(start_N[-1]),), generator=torch.Generator().manual_seed(seed))
    return token_T, start_N, torch.tensor([prompt for prompt, _ in lengths], dtype=torch.int64)


RAGGED = [(3, 4), (1, 9), (5, 1), (2, 0), (4, 4)]


def one_by_one(folder: Path, lengths: list[tuple[int, int]], token_T: torch.Tensor) -> torch.Tensor:
    """Log-probs of the response tokens by transformers, a sequence at a time."""
    lm = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found, start = [], 0
    for prompt, response in lengths:
        ids = token_T[start : start + prompt + response]
        with torch.no_grad():
            logp = lm(input_ids=ids[None]).logits[0, :, :V].log_softmax(dim=-1)
        found.append(logp[prompt - 1 : prompt + response - 1].gather(1, ids[prompt:, None])[:, 0])
        start += prompt + response
    return torch.cat(found)


def merged(base: Path, adapter: Path, folder: Path) -> Path:
    """The adapter's model as a whole one."""
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model: Any = peft.PeftModel.from_pretrained(plain, str(adapter)).merge_and_unload()
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder
