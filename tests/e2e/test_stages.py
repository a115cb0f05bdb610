"""The stages through all real parts: pairs from rollouts, two models, a teacher, a distilled student; and token rewards in RL."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from rl.pairs import load_pairs
from tests.e2e.conftest import Finished
from tests.e2e.runs import RUN_DEADLINE_S, SMALL, Workplace, records, step_records

STEPS = 4
SHARED = (
    *SMALL,
    "preference.pairs={source: rollouts, prompts: 96, samples: 8, per_prompt: 2, held_out: 4, prefer_short: false}",
    "preference.pairs_per_step=4", "preference.lr=2e-5", "output.checkpoint_every=2", "eval.after=true",
    "rollout.budgets=[free]", "learner.threads_per_rank=1",
)  # fmt: skip
PIPELINE = (
    *SHARED, f"preference.steps={STEPS}", "max_steps=2",
    "distil.teacher={mode: topk, top_k: 8, student_k: 8, threads_per_worker: 1}",
)  # fmt: skip


@pytest.fixture(scope="module")
def pipeline(workplace: Workplace, warm_model: Path) -> Finished:
    """AlignDistil: DPO, reverse DPO, two steps of distillation, by one command."""
    folder = workplace.folder / "aligned"
    launched = workplace.train(folder, *PIPELINE, f"model={warm_model}", config="configs/recipes/aligndistil.yaml")
    return Finished(folder, launched.wait(RUN_DEADLINE_S), launched.text, frozenset())


def _pair_steps(folder: Path) -> list[dict[str, Any]]:
    kept = ("time/", "rate/")
    lines = [line for line in records(folder / "metrics.jsonl") if "pair/loss" in line]
    return [{name: value for name, value in line.items() if not name.startswith(kept)} for line in lines]


def test_one_command_makes_both_models_and_distils_from_them(pipeline: Finished) -> None:
    assert pipeline.code == 0, pipeline.console
    dpo, reverse = (pipeline.folder.with_name(f"aligned-{name}") for name in ("dpo", "reverse"))
    for folder in (dpo, reverse):
        assert [line["step"] for line in _pair_steps(folder)] == list(range(1, STEPS + 1))
        assert _pair_steps(folder)[0]["pair/loss"] == pytest.approx(0.6931, abs=1e-3)  # ln 2: the reference is the start policy
        assert (folder / "checkpoints" / f"step-{STEPS:06d}" / "model" / "model.safetensors").is_file()
    steps = step_records(pipeline.folder)
    assert len(steps) == 2
    for step in steps:
        assert step["distil/kl"] >= 0 and step["distil/tokens"] == 1.0
        # log pi*, log pi_d, log pi_r of the token, alpha, tail; 16 ids and log-probs
        assert step["distil/traffic_bytes_per_token"] == pytest.approx(16 + 16 * 8 + 4, abs=8)
        assert step["mismatch/max"] < 1e-3
    (evaluation,) = [line for line in records(dpo / "metrics.jsonl") if "eval/pair_accuracy" in line]
    assert 0 <= evaluation["eval/pair_accuracy"] <= 1


def test_the_second_model_learns_the_same_pairs_turned_round(pipeline: Finished) -> None:
    there, back = (pipeline.folder.with_name(f"aligned-{name}") for name in ("dpo", "reverse"))
    assert len(load_pairs(there / "pairs.jsonl")) >= 8
    assert load_pairs(there / "pairs.jsonl") == load_pairs(back / "pairs.jsonl")
    files = [safe_open(folder / "pairs.safetensors", framework="pt") for folder in (there, back)]
    columns = [file.get_tensor("reference_lengths") for file in files]
    # the answers of each pair have changed places
    assert torch.equal(columns[0].reshape(-1, 2).flip(1), columns[1].reshape(-1, 2))


def test_a_stopped_preference_stage_goes_on_with_its_pairs_and_equals_the_uninterrupted_one(
    pipeline: Finished, workplace: Workplace, warm_model: Path
) -> None:
    folder = workplace.folder / "preferred"
    arguments = (*SHARED, f"model={warm_model}", "eval.after=false")
    first = workplace.train(folder, *arguments, "preference.steps=2", config="configs/recipes/dpo.yaml")
    assert first.wait(RUN_DEADLINE_S) == 0, first.text
    second = workplace.train(folder, *arguments, f"preference.steps={STEPS}", config="configs/recipes/dpo.yaml")
    assert second.wait(RUN_DEADLINE_S) == 0, second.text
    assert "resumed from step-000002" in second.text
    assert _pair_steps(folder) == _pair_steps(pipeline.folder.with_name("aligned-dpo"))
    digest = json.loads((folder / "checkpoints" / f"step-{STEPS:06d}" / "state.json").read_text())["pairs"]["digest"]
    assert json.loads((folder / "pairs.jsonl").read_text().splitlines()[0])["sha256"] == digest


def test_the_pipeline_given_again_says_that_it_is_done_and_trains_nothing(pipeline: Finished, workplace: Workplace) -> None:
    model = json.loads((pipeline.checkpoint / "manifest.json").read_text())["config"]["model"]["path"]
    again = workplace.train(pipeline.folder, *PIPELINE, f"model={model}", config="configs/recipes/aligndistil.yaml")
    assert again.wait(RUN_DEADLINE_S) == 0, again.text
    assert "had reached its end at step 2" in again.text and "pairs:" not in again.text


def test_token_rewards_reshape_advantages_beside_a_budget_reward(workplace: Workplace, warm_model: Path) -> None:
    folder = workplace.folder / "credited"
    # a model after a short warm start tells right from wrong no better than chance, so its token rewards are not tested here
    launched = workplace.train(
        folder, *SMALL, f"model={warm_model}", "max_steps=1", "treg.self_test=false", "treg.weight=0.5",
        # uncentred, an all-wrong group of this weak model has advantages too
        "scorer.threads_per_worker=1", "advantage.centre=none", "advantage.intra_scale=none",
        config="configs/recipes/hbpo_treg.yaml",
    )  # fmt: skip
    assert launched.wait(RUN_DEADLINE_S) == 0, launched.text
    (step,) = step_records(folder)
    assert step["treg/rollouts"] > 0 and step["treg/too_long"] == 0
    assert 0 < step["treg/credit_size"] <= 0.5 and torch.isfinite(torch.tensor(step["treg/credit_mean"]))
