"""The learning-rate schedule by hand, and the DeepSpeed configuration the learner's arithmetic relies on."""

from __future__ import annotations

from typing import Any

import pytest

from rl.optimisation import deepspeed_config, learning_rate
from rl.settings import LearnerSettings


def _rates(total: int | None, count: int, **settings: Any) -> list[float]:
    learner = LearnerSettings(lr=8.0, **settings)
    return [learning_rate(learner, update, total) for update in range(count)]


def test_a_constant_rate_is_constant() -> None:
    assert _rates(3, 5) == [8.0] * 5


def test_warm_up_is_linear_never_zero_and_ends_at_the_full_rate() -> None:
    assert _rates(None, 6, warmup_steps=4) == [2.0, 4.0, 6.0, 8.0, 8.0, 8.0]


def test_linear_decay_starts_after_the_warm_up_and_ends_at_zero() -> None:
    assert _rates(6, 8, warmup_steps=2, lr_schedule="linear") == [4.0, 8.0, 8.0, 6.0, 4.0, 2.0, 0.0, 0.0]


def test_cosine_decay_is_half_way_at_half_time() -> None:
    rates = _rates(4, 6, lr_schedule="cosine")
    assert rates == pytest.approx([8.0, 8 * (0.5 + 0.5**1.5), 4.0, 8 * (0.5 - 0.5**1.5), 0.0, 0.0])


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_without_a_known_end_there_is_nothing_to_decay_towards(schedule: str) -> None:
    assert _rates(None, 4, lr_schedule=schedule) == [8.0] * 4


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_a_run_shorter_than_its_warm_up_only_warms_up(schedule: str) -> None:
    assert _rates(2, 2, warmup_steps=4, lr_schedule=schedule) == [2.0, 4.0]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_deepspeed_leaves_accumulation_and_batch_sizes_to_the_learner(stage: int) -> None:
    config = deepspeed_config(LearnerSettings(zero_stage=stage, grad_clip=0.5), dtype="float32")  # pyright: ignore[reportArgumentType]
    assert config["zero_optimization"]["stage"] == stage
    assert config["gradient_clipping"] == 0.5
    assert (config["train_micro_batch_size_per_gpu"], config["gradient_accumulation_steps"]) == (1, 1)
    # torch's AdamW is none of DeepSpeed's own optimisers
    assert config["zero_allow_untested_optimizer"] is True and config["zero_force_ds_cpu_optimizer"] is False


def test_deepspeed_computes_in_bfloat16_only_when_the_model_does() -> None:
    assert deepspeed_config(LearnerSettings(), dtype="float32")["bf16"] == {"enabled": False}
    assert deepspeed_config(LearnerSettings(), dtype="bfloat16")["bf16"] == {"enabled": True}


def test_the_optimiser_moves_to_the_cpu_only_when_asked() -> None:
    assert "offload_optimizer" not in deepspeed_config(LearnerSettings(), dtype="float32")["zero_optimization"]
    offloaded = deepspeed_config(LearnerSettings(offload_optimizer=True, zero_stage=2), dtype="float32")["zero_optimization"]
    assert offloaded["offload_optimizer"] == {"device": "cpu"}
