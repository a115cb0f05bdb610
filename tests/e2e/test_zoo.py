from __future__ import annotations

import json
import signal
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from tests.e2e.runs import COMMON, EXIT_DEADLINE_S, RUN_DEADLINE_S, Launched, Workplace, mlflow_run, records, step_records, until

ALLOWANCE = 9000
"""Two or three steps of 64 answers."""
SETTINGS = (*COMMON, "warm_start.traces=3200", "warm_start.warmup_steps=20", "eval.problems=16")
"""The warm start is that of the other end-to-end runs, so that one cache serves all."""


@dataclass(frozen=True)
class Zoo:
    folder: Path
    stopped: Launched
    left: list[str]
    """Processes that outlived the interrupted command."""
    resumed: Launched

    def run(self, recipe: str) -> Path:
        return self.folder / "runs" / recipe


@pytest.fixture(scope="module")
def zoo(workplace: Workplace) -> Zoo:
    """Two recipes and one that cannot start, interrupted by Ctrl-C during the first and begun again by the same command."""
    folder = workplace.folder / "zoo"
    hasty = workplace.folder / "hasty.yaml"
    hasty.write_text("rollout: {start_deadline_s: 0.01}\n")
    arguments = (
        "zoo", "--recipes", f"grpo,{hasty},hbpo", "--config", "configs/quickstart.yaml", "--max-tokens", str(ALLOWANCE),
        "--output", str(folder), *SETTINGS,
    )  # fmt: skip
    stopped = workplace.budget_rl(*arguments)
    stopped.running("step 1 of grpo", lambda: step_records(folder / "runs" / "grpo"))
    stopped.send_group(signal.SIGINT)
    stopped.wait(EXIT_DEADLINE_S)
    until(lambda: not stopped.processes(), f"the processes to end: {stopped.titles()}", seconds=EXIT_DEADLINE_S)
    resumed = workplace.budget_rl(*arguments)
    resumed.wait(RUN_DEADLINE_S)
    return Zoo(folder, stopped, stopped.titles(), resumed)


def test_ctrl_c_stops_the_zoo_and_its_run_once_and_says_how_to_go_on(zoo: Zoo) -> None:
    assert zoo.stopped.process.returncode == 130, zoo.stopped.text
    assert zoo.left == []
    assert "the same command goes on from there" in zoo.stopped.text
    assert "Traceback" not in zoo.stopped.text and "ray" not in zoo.stopped.text.lower()  # nothing of the libraries
    assert "stopped (SIGINT" in (zoo.folder / "runs" / "grpo.log").read_text()


def test_the_same_command_trains_all_and_reports_the_one_that_failed(zoo: Zoo) -> None:
    assert zoo.resumed.process.returncode == 1, zoo.resumed.text
    content = json.loads((zoo.folder / "zoo.json").read_text())
    assert [(row["recipe"], row["status"]) for row in content["rows"]] == [
        ("start", "finished"), ("grpo", "finished"), ("hasty", "failed"), ("hbpo", "finished"),
    ]  # fmt: skip
    (failed,) = [row for row in content["rows"] if row["status"] == "failed"]
    assert "answers missing after" in failed["error"]
    assert f"hasty failed: {failed['error']}" in zoo.resumed.text
    assert (zoo.folder / "zoo.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_every_recipe_began_with_the_same_weights_and_spent_the_allowance(zoo: Zoo) -> None:
    for recipe in ("grpo", "hbpo"):
        config = yaml.safe_load((zoo.run(recipe) / "config.yaml").read_text())
        assert config["model"]["path"] == str(zoo.folder / "start") and config["warm_start"] is None
        steps = step_records(zoo.run(recipe))
        assert [step["step"] for step in steps] == list(range(1, len(steps) + 1))
        assert steps[-1]["tokens/total"] >= ALLOWANCE > steps[-2]["tokens/total"]
    assert (zoo.folder / "start" / "model.safetensors").is_file()


def test_figures_are_those_of_the_last_evaluation_against_the_one_of_the_start(zoo: Zoo) -> None:
    rows = {row["recipe"]: row for row in json.loads((zoo.folder / "zoo.json").read_text())["rows"]}
    assert (zoo.folder / "start-eval.json").read_text()
    for recipe in ("grpo", "hbpo"):
        evaluations = [line for line in records(zoo.run(recipe) / "metrics.jsonl") if "eval/accuracy" in line]
        last = evaluations[-1]
        assert rows[recipe]["accuracy"] == pytest.approx(last["eval/accuracy"])
        assert rows[recipe]["tokens"] == pytest.approx(last["eval/tokens"])
        assert rows[recipe]["gain"]["estimate"] == pytest.approx(rows[recipe]["accuracy"] - rows["start"]["accuracy"])
        assert [line["step"] for line in evaluations if line["step"] > 0] == [
            point["step"] for point in rows[recipe]["curve"] if point["step"] > 0
        ]
    assert 0 <= rows["hbpo"]["kept"] <= 1 and rows["grpo"]["kept"] is None
    assert 0 not in [line["step"] for line in records(zoo.run("hbpo") / "metrics.jsonl")]  # the start was evaluated once


def test_mlflow_has_the_zoo_as_the_parent_of_its_runs(zoo: Zoo) -> None:
    parent, child = mlflow_run(zoo.run("zoo")), mlflow_run(zoo.run("hbpo"))
    assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert child.info.experiment_id == parent.info.experiment_id
    assert parent.data.metrics["hbpo/accuracy"] == pytest.approx(child.data.metrics["eval/accuracy"])
    assert child.info.status == "FINISHED"
