from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from launch.config import load_settings
from rl.manifest import read_manifest, verify
from tests.e2e.conftest import Finished
from tests.e2e.runs import ROOT, mlflow_run, records, step_records

STEPS = 8
EVERY_STEP = {
    "train/accuracy", "train/tokens", "train/reward", "reward/budget", "group/flat",
    "adv/mean", "adv/std", "adv/nonzero_tokens", "policy/loss", "policy/entropy", "policy/approx_kl",
    "policy/clip_fraction", "policy/dual_clip_fraction", "learn/grad_norm", "learn/lr", "learn/skipped", "learn/padding",
    "mismatch/max", "mismatch/mean", "time/generate", "time/score", "time/learn", "time/sync", "time/step",
    "rate/tokens_per_s", "tokens/total", "prompts/dropped",
}  # fmt: skip
SAMPLE_FIELDS = {
    "step", "ticket", "prompt", "gold", "answer", "budget", "budget_kind", "length", "verdict", "evidence", "extracted", "reward",
    "advantage", "finish",
}  # fmt: skip
OWN_LINES = (
    r"output   ", r"version  ", r"model    ", r"data     ", r"method   ", r"warm start", r"step \d+: held-out accuracy",
    r" +step +acc", r" +\d+ [01]\.\d{3} ", r" *after step 1", r" *share of ", r" *─+", r" *answers (cut|that) ",
    r" *groups with ",
    r" *prompts dropped ", r" *tokens with ", r"held-out, no budget: ", r"curves ", r" *$",
)  # fmt: skip
"""How every line starts that the product itself prints off a terminal."""


@pytest.fixture(scope="module")
def run(quickstart: Finished) -> Iterator[Finished]:
    assert quickstart.code == 0, quickstart.console
    yield quickstart


def test_every_part_of_the_loop_is_a_process_of_its_own(run: Finished) -> None:
    def count(pattern: str) -> int:
        return sum(re.match(pattern, title) is not None for title in run.titles)

    assert count(r"ray::RolloutActor") >= 1
    assert count(r"ray::RewardActor") >= 1
    assert count(r"ray::LearnerWorker") >= 1
    assert sum("reward.child" in title for title in run.titles) >= 1
    assert sum("raylet" in title for title in run.titles) >= 1


def test_the_run_folder_holds_all_that_its_layout_promises(run: Finished) -> None:
    names = {path.name for path in run.folder.iterdir()}
    assert {"config.yaml", "metrics.jsonl", "samples.jsonl", "run.log", "mlflow-run.json"} <= names
    assert {"table.md", "curves.png", "checkpoints"} <= names
    assert "mlflow-spool.jsonl" not in names
    assert (run.folder / "curves.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert len((run.folder / "table.md").read_text().splitlines()) > STEPS
    assert "Started a local Ray instance" in (run.folder / "run.log").read_text()


def test_the_resolved_configuration_can_be_run_again(run: Finished, tmp_path: Path) -> None:
    again = tmp_path / "again.yaml"
    again.write_text((run.folder / "config.yaml").read_text())
    settings = load_settings(again, [])
    assert settings.model_dump(mode="json") == yaml.safe_load(again.read_text())
    assert settings.rollout.workers == 2 and settings.max_steps == STEPS


def test_every_step_has_every_family_of_metrics(run: Finished) -> None:
    steps = step_records(run.folder)
    assert [record["step"] for record in steps] == list(range(1, STEPS + 1))
    per_budget = {f"budget/{label}/{name}" for label in ("32", "64", "96", "free") for name in ("accuracy", "tokens")}
    verdicts = {f"verdict/{name}" for name in ("correct", "wrong", "malformed", "truncated", "timed_out", "crashed")}
    for record in steps:
        assert EVERY_STEP | per_budget | verdicts <= record.keys()
        assert all(value is not None for value in record.values())
        assert sum(record[name] for name in verdicts) == pytest.approx(1.0)


def test_engine_and_learner_agree_on_every_sampled_token(run: Finished) -> None:
    gaps = [record["mismatch/max"] for record in step_records(run.folder)]
    assert len(gaps) == STEPS and all(0 < gap < 1e-3 for gap in gaps), gaps


def test_the_evaluation_before_and_after_is_recorded_and_printed(run: Finished) -> None:
    evaluations = [record for record in records(run.folder / "metrics.jsonl") if "eval/accuracy" in record]
    assert [record["step"] for record in evaluations] == [0, STEPS]
    before, after = (record["eval/accuracy"] for record in evaluations)
    assert f"held-out, no budget: accuracy {before:.3f} -> {after:.3f}" in run.console


def test_samples_show_prompt_answer_budget_verdict_reward_and_advantage(run: Finished) -> None:
    samples = records(run.folder / "samples.jsonl")
    assert {sample["step"] for sample in samples} == set(range(1, STEPS + 1))
    for sample in samples:
        assert sample.keys() == SAMPLE_FIELDS
        asked = "" if sample["budget"] == "free" else f" I will answer the question with {sample['budget']} tokens"
        assert sample["answer"].startswith(f"<think>{asked}")
        assert sample["answer"].count("<think>") == 1
        assert (sample["verdict"] == "correct") <= (sample["extracted"] == sample["gold"])


def test_checkpoints_are_complete_and_verified(run: Finished) -> None:
    manifest = read_manifest(run.checkpoint)
    verify(run.checkpoint, manifest)
    assert manifest.step == STEPS
    assert manifest.tokens_seen == step_records(run.folder)[-1]["tokens/total"]
    assert {name.split("/")[0] for name in manifest.files} >= {"model", "learner", "rng"}


def test_mlflow_has_the_run_with_its_parameters_metrics_and_files(run: Finished) -> None:
    from mlflow.tracking import MlflowClient

    tracked = mlflow_run(run.folder)
    assert tracked.info.status == "FINISHED"
    assert tracked.data.params["reward.method"] == "hbpo"
    assert tracked.data.params["learner.lr"] == str(yaml.safe_load((run.folder / "config.yaml").read_text())["learner"]["lr"])
    last = step_records(run.folder)[-1]
    for name in EVERY_STEP:
        assert tracked.data.metrics[name] == pytest.approx(last[name]), name
    client = MlflowClient(tracking_uri=f"sqlite:///{run.folder.parent / 'mlflow.db'}")
    assert len(client.get_metric_history(tracked.info.run_id, "train/accuracy")) == STEPS
    assert {"config.yaml", "table.md", "curves.png"} <= {file.path for file in client.list_artifacts(tracked.info.run_id)}


def test_the_console_has_one_line_per_step_and_nothing_of_the_libraries(run: Finished) -> None:
    lines = run.console.splitlines()
    assert lines[0] == f"output   {run.folder}"
    shown = [int(line.split()[0]) for line in lines if re.match(r" +\d+ [01]\.\d{3} ", line)]
    assert shown == list(range(1, STEPS + 1))
    foreign = [line for line in lines if not any(re.match(start, line) for start in OWN_LINES)]
    assert foreign == []


def test_the_shipped_quickstart_uses_every_part(run: Finished) -> None:
    settings = load_settings(ROOT / "configs" / "quickstart.yaml", [])
    assert settings.rollout.workers == 2
    assert settings.warm_start is not None
    assert settings.reward.method == "hbpo" and settings.advantage.estimator == "hierarchical"
