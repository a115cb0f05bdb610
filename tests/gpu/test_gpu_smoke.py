"""What only a GPU can show; run with `make gpu-test` (docs/gpu-checklist.md). Skipped elsewhere, by the marker alone."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import kernels

pytestmark = pytest.mark.gpu


def test_eager_log_probs_on_the_gpu_match_the_reference_in_float64() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden_TH = torch.randn(300, 64, generator=generator)
    weight_VH = torch.randn(1000, 64, generator=generator) / 8
    target_T = torch.randint(0, 1000, (300,), generator=generator)
    logp_T, entropy_T = kernels.linear_logprob_entropy(hidden_TH.cuda(), weight_VH.cuda(), target_T.cuda())
    exact_logp_T, exact_entropy_T = kernels.linear_logprob_entropy(
        hidden_TH.double(), weight_VH.double(), target_T, backend="reference"
    )
    assert (logp_T.cpu().double() - exact_logp_T).abs().max() < 1e-2  # TF32 may be on; the CPU tests hold 1e-5
    assert (entropy_T.cpu().double() - exact_entropy_T).abs().max() < 1e-2


def _train(tmp_path: Path, *overrides: str) -> list[dict[str, float]]:
    command = [sys.executable, "-m", "launch", "train", "configs/quickstart.yaml", f"output.dir={tmp_path / 'run'}"]
    command += ["max_steps=3", "eval.problems=16", "eval.samples=1", "warm_start.traces=3200", "allow_idle=true", *overrides]
    subprocess.run(command, check=True, timeout=570)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [row for row in map(json.loads, lines) if "train/accuracy" in row]


def test_the_quickstart_trains_with_engine_and_learner_sharing_one_gpu(tmp_path: Path) -> None:
    rows = _train(
        tmp_path,
        *("rollout.workers=1", "rollout.gpus_per_worker=0.5", "rollout.gpu_memory_fraction=0.3", "learner.gpus_per_rank=0.5"),
    )
    assert len(rows) == 3
    assert all(row["mismatch/mean"] < 1e-2 for row in rows)


def test_shaped_sampling_on_vllms_second_model_runner_is_replayed_by_the_learner(tmp_path: Path) -> None:
    rows = _train(
        tmp_path,
        *("rollout.workers=1", "rollout.gpus_per_worker=0.5", "rollout.gpu_memory_fraction=0.3", "learner.gpus_per_rank=0.5"),
        *("rollout.adaptive={tau: 0.2}", "rollout.reflex={amplitude: 2.0, period: 20}"),
    )
    assert all(row["mismatch/mean"] < 1e-2 for row in rows)
    assert "entropy/pivot" in rows[0]  # so the steps after the first were drawn at a temperature by entropy


def test_weights_go_by_nccl_where_there_are_two_gpus(tmp_path: Path) -> None:
    if torch.cuda.device_count() < 2:
        pytest.fail("the NCCL push needs two GPUs; deselect this test on a machine with one")
    rows = _train(
        tmp_path, "rollout.workers=1", "rollout.gpus_per_worker=1", "learner.gpus_per_rank=1", "rollout.weight_transport=nccl"
    )
    assert len(rows) == 3
    assert all(row["mismatch/mean"] < 1e-2 for row in rows)


def test_an_actor_computes_on_the_gpu_it_was_given_and_on_none_otherwise(ray_cluster: None) -> None:
    import ray

    from rl.cluster import device_environment

    @ray.remote(num_cpus=0)
    def visible() -> int:
        return torch.cuda.device_count()

    def seen(gpus: float) -> int:
        return ray.get(visible.options(num_gpus=gpus, runtime_env={"env_vars": device_environment(gpus)}).remote(), timeout=120)

    assert (seen(0), seen(0.5)) == (0, 1)
