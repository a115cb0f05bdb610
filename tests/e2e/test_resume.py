from __future__ import annotations

import json
import math
import shutil
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import REFERENCE, REFERENCE_STEPS, Finished, finish
from tests.e2e.runs import EXIT_DEADLINE_S, Workplace, mlflow_run, records, step_records, until, without_times

SAVED = 3
"""The step of the first checkpoint; the run is killed as soon as it is there."""


@dataclass(frozen=True)
class Resumed:
    """A killed run, as it was found, and the same run after the same command was given again."""

    found: Path
    found_steps: list[dict[str, Any]]
    found_run_id: str
    run: Finished


@pytest.fixture(scope="module")
def resumed(workplace: Workplace, warm_model: Path) -> Resumed:
    folder = workplace.folder / "killed"
    arguments = (*REFERENCE, f"model={warm_model}", f"max_steps={REFERENCE_STEPS}")
    first = workplace.train(folder, *arguments)
    first.running("the first checkpoint", (folder / "checkpoints" / f"step-{SAVED:06d}" / "manifest.json").is_file)
    assert first.process.poll() is None
    first.send_group(signal.SIGKILL)
    until(lambda: not first.processes(), "the processes of a killed driver to end", seconds=EXIT_DEADLINE_S)
    first.process.wait()
    found = shutil.copytree(folder, workplace.folder / "killed-as-found")
    run_id = json.loads((folder / "mlflow-run.json").read_text())["run_id"]
    return Resumed(found, step_records(folder), run_id, finish(workplace.train(folder, *arguments), folder))


def test_a_killed_run_goes_on_from_its_checkpoint_with_the_same_command(resumed: Resumed) -> None:
    assert len(resumed.found_steps) >= SAVED
    assert not (resumed.found / "checkpoints" / f"step-{REFERENCE_STEPS:06d}").exists()
    assert resumed.run.code == 0, resumed.run.console
    assert "resumed from step-" in resumed.run.console


def test_steps_after_a_resume_equal_those_of_the_uninterrupted_run(resumed: Resumed, reference: Finished) -> None:
    expected = [without_times(record) for record in step_records(reference.folder)]
    assert [record["step"] for record in expected] == list(range(1, REFERENCE_STEPS + 1))
    assert [without_times(record) for record in step_records(resumed.run.folder)] == expected
    assert any(record["learn/grad_norm"] > 0 for record in expected[SAVED:])


def test_the_resumed_run_was_drawn_at_temperatures_from_statistics_in_its_checkpoint(resumed: Resumed) -> None:
    steps = step_records(resumed.run.folder)
    assert all(math.isfinite(record["entropy/pivot"]) and 0 < record["mismatch/max"] < 1e-3 for record in steps)
    state = json.loads((resumed.run.folder / "checkpoints" / f"step-{SAVED:06d}" / "state.json").read_text())
    assert state["sampling"]["entropy_statistics"]["pivot"] == steps[SAVED - 1]["entropy/pivot"]


def test_answers_after_a_resume_equal_those_of_the_uninterrupted_run(resumed: Resumed, reference: Finished) -> None:
    expected = records(reference.folder / "samples.jsonl")
    assert len(expected) == 32 * REFERENCE_STEPS
    assert records(resumed.run.folder / "samples.jsonl") == expected


def test_metrics_read_as_if_the_run_had_never_stopped(resumed: Resumed) -> None:
    steps = step_records(resumed.run.folder)
    assert [record["step"] for record in steps] == list(range(1, REFERENCE_STEPS + 1))
    # Times too, which tell one process from the other: the lines before the checkpoint are those of the killed one.
    assert steps[:SAVED] == resumed.found_steps[:SAVED]


def test_the_mlflow_run_is_continued(resumed: Resumed) -> None:
    tracked = mlflow_run(resumed.run.folder)
    assert tracked.info.run_id == resumed.found_run_id
    assert tracked.info.status == "FINISHED"
    assert tracked.data.metrics["tokens/total"] == step_records(resumed.run.folder)[-1]["tokens/total"]


def test_a_changed_learning_rate_is_refused_with_both_values(
    workplace: Workplace, reference: Finished, warm_model: Path
) -> None:
    before = (reference.folder / "metrics.jsonl").read_bytes()
    launched = workplace.train(reference.folder, *REFERENCE, f"model={warm_model}", "max_steps=12", "learner.lr=1e-4")
    assert launched.wait() == 2
    assert "learner.lr: 3e-05 -> 0.0001" in launched.text
    assert "Traceback" not in launched.text
    assert (reference.folder / "metrics.jsonl").read_bytes() == before
