"""Derived sizes, resource and memory checks of rl/preflight.py and rl/memory_estimate.py against values worked by hand."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from launch.plan_tables import batch_table
from rl.errors import ConfigError, ModelError
from rl.memory_estimate import (
    GB,
    PROCESS_BYTES,
    ActorMemory,
    MemoryEstimate,
    check_memory,
    estimate_memory,
    planned_shape,
    read_model_shape,
)
from rl.preflight import check_resources, derived_plan
from rl.settings import Settings

N = 1_000_000


def make(**sections: Any) -> Settings:
    base: dict[str, Any] = {"model": {"path": "org/name"}, "data": {"source": "x.json"}, "max_steps": 1}
    return Settings.model_validate({**base, **sections})


def learner_of(**sections: Any) -> ActorMemory:
    return estimate_memory(make(**sections), N, 100, 64, 2).actors[1]


def engine_of(**sections: Any) -> ActorMemory:
    return estimate_memory(make(**sections), N, 100, 64, 2).actors[0]


def test_the_sizes_of_a_step_follow_from_the_settings() -> None:
    plan = derived_plan(
        make(
            data={"source": "x.json", "max_prompt_length": 40},
            rollout={"budgets": [32, 64, 96, "free"], "samples_per_prompt": 8, "max_length": 160},
            prompts_per_step=12,
            learner={"minibatches": 4, "epochs": 2, "ranks": 5},
        )
    )
    assert plan.rollouts_per_step == 96
    assert plan.rollouts_per_budget == {"32": 24, "64": 24, "96": 24, "free": 24}
    assert plan.rollouts_per_minibatch == 24
    assert plan.rollouts_per_rank == 5
    assert plan.updates_per_step == 8
    assert plan.tokens_per_step == 96 * 200


@pytest.mark.parametrize(
    ("budgets", "label"),
    [
        ({"kind": "range", "low": 16, "high": 128}, "16 to 128, uniform, one per prompt"),
        ({"kind": "schedule"}, "800 falling to 160 over max_steps"),
        ({"kind": "memory", "start": 64}, "64, then 1 x the shortest correct answer of the prompt"),
    ],
)
def test_budgets_that_differ_from_step_to_step_are_one_row_that_says_how(budgets: dict[str, Any], label: str) -> None:
    plan = derived_plan(make(rollout={"budgets": budgets, "samples_per_prompt": 8}, prompts_per_step=12))
    assert plan.rollouts_per_budget == {label: 96}
    shown = Console(file=io.StringIO(), width=120)
    shown.print(batch_table(plan))
    assert f"rollouts with budget {label}" in shown.file.getvalue()  # type: ignore[attr-defined]


@given(st.integers(1, 12), st.integers(1, 6), st.integers(1, 4), st.integers(1, 4))
def test_budgets_and_minibatches_account_for_every_rollout(prompts: int, per_budget: int, budgets: int, ranks: int) -> None:
    rollout = {"budgets": [16 * (i + 1) for i in range(budgets)], "samples_per_prompt": per_budget * budgets}
    ranks = min(ranks, per_budget * budgets)
    plan = derived_plan(make(rollout=rollout, prompts_per_step=prompts, learner={"minibatches": prompts, "ranks": ranks}))
    assert sum(plan.rollouts_per_budget.values()) == plan.rollouts_per_step
    assert plan.rollouts_per_minibatch * prompts == plan.rollouts_per_step
    assert plan.rollouts_per_rank * ranks >= plan.rollouts_per_minibatch


def test_the_placement_adds_up_fractions() -> None:
    plan = derived_plan(
        make(
            rollout={"workers": 2, "cpus_per_worker": 0.5, "gpus_per_worker": 1},
            learner={"ranks": 3, "cpus_per_rank": 0.25, "gpus_per_rank": 0.5},
            reward={"workers": 4, "cpus_per_worker": 0.1},
        )
    )
    assert math.isclose(plan.cpus, 1.0 + 0.75 + 0.4)
    assert plan.gpus == 3.5


def test_enough_resources_are_accepted_in_spite_of_rounding() -> None:
    settings = make(reward={"workers": 3, "cpus_per_worker": 0.1})
    check_resources(settings, cpus=derived_plan(settings).cpus - 1e-9, gpus=0)


def test_too_few_cpus_say_what_there_is_who_needs_them_and_what_to_lower() -> None:
    settings = make(rollout={"workers": 4, "cpus_per_worker": 2})
    with pytest.raises(ConfigError) as caught:
        check_resources(settings, cpus=6, gpus=0)
    message = str(caught.value)
    assert "needs 9.1 CPUs and the cluster has 6" in message
    assert "4 x rollout engine at 2; 1 x learner rank at 1; 1 x reward worker at 0.1" in message
    assert "rollout.workers=2" in message
    assert "rollout.cpus_per_worker=1.22" in message
    check_resources(make(rollout={"workers": 2, "cpus_per_worker": 2}), cpus=6, gpus=0)
    check_resources(make(rollout={"workers": 4, "cpus_per_worker": 1.22}), cpus=6, gpus=0)


def test_a_cluster_without_gpus_is_told_how_to_run_on_cpus() -> None:
    with pytest.raises(ConfigError, match="needs 1 GPUs and the cluster has 0.*\n.*gpus_per_worker=0"):
        check_resources(make(rollout={"gpus_per_worker": 1}), cpus=99, gpus=0)


def test_a_fraction_above_one_gpu_is_refused_because_ray_refuses_it() -> None:
    with pytest.raises(ConfigError, match=r"rollout.gpus_per_worker=1.5(.|\n)*or 2"):
        check_resources(make(rollout={"gpus_per_worker": 1.5}), cpus=99, gpus=99)


@pytest.mark.parametrize(
    ("sections", "fix"),
    [
        ({"learner": {"gpus_per_rank": 2, "ranks": 3}}, "learner.gpus_per_rank=1 learner.ranks=6"),
        ({"learner": {"gpus_per_rank": 0.5, "ranks": 2}}, "learner.ranks=1 or learner.gpus_per_rank=1"),
        ({"rollout": {"gpus_per_worker": 1, "weight_transport": "nccl"}}, "weight_transport=object_store"),
    ],
)
def test_gpus_that_a_rank_could_not_use_are_refused_with_what_to_write(sections: dict[str, Any], fix: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_resources(make(**sections), cpus=99, gpus=99)
    assert fix in str(caught.value)


def test_an_engine_and_a_rank_may_share_one_gpu() -> None:
    check_resources(make(rollout={"gpus_per_worker": 0.5}, learner={"gpus_per_rank": 0.5}), cpus=9, gpus=1)


def test_tensor_parallelism_needs_as_many_gpus() -> None:
    settings = make(rollout={"tensor_parallel": 2, "gpus_per_worker": 1})
    with pytest.raises(ConfigError, match="set rollout.gpus_per_worker=2"):
        check_resources(settings, cpus=99, gpus=99)


def test_the_learner_in_float32_holds_weights_gradients_moments_and_a_master_copy() -> None:
    learner = learner_of()
    assert (learner.weights, learner.gradients, learner.optimiser) == (4 * N, 4 * N, 12 * N)


def test_bfloat16_halves_weights_and_gradients_only() -> None:
    learner = learner_of(model={"path": "m", "dtype": "bfloat16"})
    assert (learner.weights, learner.gradients, learner.optimiser) == (2 * N, 2 * N, 12 * N)


@pytest.mark.parametrize(("stage", "weights", "gradients", "optimiser"), [(0, 4, 4, 8), (1, 4, 4, 6), (2, 4, 2, 6), (3, 2, 2, 6)])
def test_each_zero_stage_splits_one_thing_more_over_two_ranks(stage: int, weights: int, gradients: int, optimiser: int) -> None:
    learner = learner_of(learner={"zero_stage": stage, "ranks": 2})
    assert (learner.weights, learner.gradients, learner.optimiser) == (weights * N, gradients * N, optimiser * N)


def test_a_reference_model_adds_its_weights() -> None:
    assert learner_of(loss={"kl_coef": 0.1}).weights == 8 * N


def test_offloading_moves_the_optimiser_from_gpu_to_host() -> None:
    gpu = learner_of(learner={"gpus_per_rank": 1})
    offloaded = learner_of(learner={"gpus_per_rank": 1, "offload_optimizer": True})
    assert gpu.optimiser == 12 * N
    assert (offloaded.optimiser, offloaded.host_bytes - gpu.host_bytes) == (0, 12 * N)


def test_checkpointing_and_smaller_microbatches_lower_activations() -> None:
    full = learner_of().activations
    assert learner_of(learner={"gradient_checkpointing": True}).activations < full
    assert learner_of(learner={"tokens_per_microbatch": 1024}).activations < full


def test_the_engine_reserves_its_cache_on_cpu_and_at_least_one_sequence_on_gpu() -> None:
    assert engine_of(rollout={"kv_cache_gb": 2.0}).kv_cache == 2 * 2**30
    on_gpu = engine_of(rollout={"gpus_per_worker": 1, "max_length": 100}, data={"source": "x", "max_prompt_length": 50})
    assert on_gpu.kv_cache == 2 * 2 * 64 * 4 * 150
    assert on_gpu.host_bytes == PROCESS_BYTES + 4 * 100 * 64  # and one tensor at a time on its way in


@pytest.mark.parametrize(
    ("transport", "copies", "largest_tensor"), [("object_store", 3, 4 * 100 * 64), ("nccl", 2, 0)], ids=["object store", "NCCL"]
)
def test_weights_on_their_way_are_counted_on_the_host(transport: str, copies: int, largest_tensor: int) -> None:
    settings = make(rollout={"gpus_per_worker": 1, "weight_transport": transport}, learner={"gpus_per_rank": 1})
    engine, _, _, driver = estimate_memory(settings, N, 100, 64, 2).actors
    assert (driver.weight_copies, engine.weight_copies) == (copies * 4 * N, largest_tensor)
    assert driver.host_bytes == PROCESS_BYTES + copies * 4 * N


def test_host_memory_counts_every_actor() -> None:
    one, two = (estimate_memory(make(rollout={"workers": n}), N, 100, 64, 2) for n in (1, 2))
    assert two.host_bytes - one.host_bytes == one.actors[0].host_bytes


def test_too_much_memory_is_refused_with_the_largest_part_and_advice() -> None:
    estimate = estimate_memory(make(rollout={"kv_cache_gb": 500}), N, 100, 64, 2)
    with pytest.raises(ModelError) as caught:
        check_memory(estimate, 24 * GB)
    assert "24.0 GB is available" in str(caught.value)
    assert "kv cache of the rollout engine" in str(caught.value)
    assert "lower rollout.kv_cache_gb" in str(caught.value)


def test_enough_memory_is_accepted() -> None:
    estimate = estimate_memory(make(), N, 100, 64, 2)
    check_memory(estimate, estimate.host_bytes)
    with pytest.raises(ModelError):
        check_memory(estimate, estimate.host_bytes - 1)


def test_a_model_too_large_for_a_gpu_is_refused() -> None:
    settings = make(rollout={"gpus_per_worker": 1}, learner={"gpus_per_rank": 1})
    estimate = estimate_memory(settings, 8 * GB, 128_000, 4096, 32)
    with pytest.raises(ModelError, match="one rollout engine needs about .* a GPU has 24.0 GB"):
        check_memory(estimate, 10**13, gpu_bytes=24 * GB)


def test_what_shares_a_gpu_is_added_up_with_the_share_the_engine_claims() -> None:
    def check(**rollout: Any) -> None:
        settings = make(rollout={"gpus_per_worker": 0.5, **rollout}, learner={"gpus_per_rank": 0.5})
        check_memory(estimate_memory(settings, GB, 1000, 1024, 8), 10**13, gpu_bytes=40 * GB)

    check(gpu_memory_fraction=0.3)  # 12 GB beside a rank of about 22 GB
    with pytest.raises(ModelError) as caught:
        check(gpu_memory_fraction=0.6)
    assert "may share a GPU of 40.0 GB" in str(caught.value)
    assert "1 x rollout engine at 24.0 GB, 1 x learner rank at" in str(caught.value)
    assert "lower rollout.gpu_memory_fraction" in str(caught.value)
    with pytest.raises(ModelError, match="2 x rollout engine at 28.0 GB"):
        check(workers=2, gpu_memory_fraction=0.7)


def test_actors_with_a_gpu_each_are_not_added_up() -> None:
    settings = make(rollout={"gpus_per_worker": 1, "workers": 4}, learner={"gpus_per_rank": 1})
    check_memory(estimate_memory(settings, GB, 1000, 1024, 8), 10**13, gpu_bytes=40 * GB)


def test_an_empty_estimate_needs_nothing() -> None:
    assert MemoryEstimate(()).host_bytes == 0


@pytest.mark.parametrize("tied", [True, False])
def test_parameters_are_counted_from_the_configuration_alone(tmp_path: Path, tied: bool) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, tie_word_embeddings=tied
    )
    config.save_pretrained(tmp_path)
    config.architectures = ["LlamaForCausalLM"]
    assert not list(tmp_path.glob("*.safetensors"))
    real = sum(parameter.numel() for parameter in LlamaForCausalLM(config).parameters())
    shape = read_model_shape(tmp_path)
    assert (shape.parameters, shape.vocab, shape.hidden, shape.layers) == (real, 50, 32, 2)
    assert planned_shape(make(), tmp_path) == shape


def test_the_embedded_models_sizes_are_known_before_its_warm_start(tmp_path: Path) -> None:
    from rl.embedded import build_tiny

    settings = make(warm_start={"hidden_size": 64, "layers": 2, "heads": 2})
    assert settings.warm_start is not None
    build_tiny(tmp_path, settings.warm_start)
    assert planned_shape(settings, None) == read_model_shape(tmp_path)


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="config.json"):
        read_model_shape(tmp_path)


def test_a_teacher_holds_two_models_an_adapted_base_once_and_the_learner_two_heads_in_mode_hidden() -> None:
    def estimate(**distil: Any) -> dict[str, Any]:
        tree = {"model": {"path": "m"}, "data": {"source": "p.jsonl"}, "max_steps": 1, "distil": distil}
        found = estimate_memory(Settings.model_validate(tree), 1000, vocab=10, hidden=4, layers=2)
        return {actor.actor: actor for actor in found.actors}

    two = estimate(teacher={"dpo": "a", "reverse": "b"})
    adapters = estimate(teacher={"dpo": "a", "reverse": "b", "base": "c", "mode": "topk", "top_k": 2, "student_k": 2})
    assert (two["teacher"].weights, adapters["teacher"].weights) == (2 * 4 * 1000, 4 * 1000)
    assert two["learner rank"].weights - adapters["learner rank"].weights == 2 * 4 * 10 * 4
    assert "frozen start policy" not in two
    assert "frozen start policy" in estimate(teacher={"dpo": "a", "reverse": "b"}, sstoken={})
