"""How the learner optimises: the learning rate of each step, and what DeepSpeed is told."""

from __future__ import annotations

import math
from typing import Any

from rl.settings import LearnerSettings


def learning_rate(settings: LearnerSettings, update: int, total_updates: int | None) -> float:
    """Learning rate of optimiser step ``update`` (0-based): linear warm-up, then constant, linear or cosine decay to 0."""
    if update < settings.warmup_steps:
        return settings.lr * (update + 1) / settings.warmup_steps
    if settings.lr_schedule == "constant" or not total_updates:
        return settings.lr
    span = max(total_updates - settings.warmup_steps, 1)
    done = min((update - settings.warmup_steps) / span, 1.0)
    if settings.lr_schedule == "linear":
        return settings.lr * (1.0 - done)
    return settings.lr * 0.5 * (1.0 + math.cos(math.pi * done))


def deepspeed_config(settings: LearnerSettings, *, dtype: str) -> dict[str, Any]:
    """DeepSpeed configuration of one engine; accumulation and scaling are ours, so its own batch sizes are 1."""
    zero: dict[str, Any] = {"stage": settings.zero_stage, "overlap_comm": False}
    if settings.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu"}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": settings.grad_clip,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": dtype == "bfloat16"},
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }
