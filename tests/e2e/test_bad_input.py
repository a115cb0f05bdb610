"""Every mistake of a user is one message, told before any worker starts and before the warm start is trained."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.e2e.conftest import UNREACHABLE, Finished
from tests.e2e.runs import Launched, Workplace, records, step_records

DEADLINE_S = 120.0
ACTORS_START = "WARNING verl"
"""What importing the learner group for its first actor leaves in run.log."""


@dataclass(frozen=True)
class Refused:
    launched: Launched
    output: Path
    ray: Path
    """Where Ray would keep its session."""


@pytest.fixture(scope="module")
def refused(workplace: Workplace) -> Mapping[str, Refused]:
    """All the commands at once: most of their time is imports."""
    folder = workplace.folder
    (folder / "rows.jsonl").write_text(json.dumps({"question": "1 + 1 =", "reply": "2"}) + "\n")
    (folder / "in-the-way").write_text("a file")
    bare = folder / "bare-model"
    bare.mkdir()
    (bare / "config.json").write_text("{}")
    mistakes = {
        "missing file": [f"data={folder}/row.jsonl"],
        "missing column": [f"data={folder}/rows.jsonl", "data.held_out=1"],
        "unknown task": ["data=reasoning_gym:chain_sun"],
        "no tokenizer": [f"model={bare}", "warm_start=null"],
        "too many CPUs": ["rollout.workers=99"],
        "no folder": [f"output.dir={folder}/in-the-way"],
    }
    started = {}
    for number, (name, overrides) in enumerate(mistakes.items()):
        output, ray = folder / f"refused-{number}", folder / f"ray-{number}"
        # A socket's path is limited to 107 characters, so Ray keeps its own place where it really starts.
        extra = {} if name == "too many CPUs" else {"RAY_TMPDIR": str(ray)}
        small = ["data.size=64", f"output.dir={output}", *overrides]
        launched = workplace.start("budget-rl", "train", "configs/quickstart.yaml", *small, extra=extra)
        started[name] = Refused(launched, output, ray)
    return started


@pytest.mark.parametrize(
    ("mistake", "told"),
    [
        ("missing file", ["data.source: no file", "row.jsonl", "did you mean rows.jsonl?"]),
        ("missing column", ["data.answer_column", "no column 'answer'", "question, reply"]),
        ("unknown task", ["no task 'chain_sun'", "did you mean", "chain_sum"]),
        ("no tokenizer", ["bare-model has no tokenizer", "tokenizer.save_pretrained"]),
        ("too many CPUs", ["the cluster has", "99 x rollout engine", "set rollout.workers=", "needs"]),
        ("no folder", ["in-the-way", "a file stands where the folder should be"]),
    ],
)
def test_a_mistake_is_one_clear_error_before_any_worker_starts(
    refused: Mapping[str, Refused], mistake: str, told: list[str]
) -> None:
    case = refused[mistake]
    code = case.launched.wait(DEADLINE_S)
    text = case.launched.text
    assert code == 2, text
    for part in told:
        assert part in text
    assert text.count("budget-rl: ") == 1
    assert "Traceback" not in text
    assert "warm start" not in text
    assert not case.ray.exists()
    assert not (case.output / "metrics.jsonl").exists()
    log = case.output / "run.log"
    assert not log.exists() or ACTORS_START not in log.read_text()


def test_an_unreachable_mlflow_server_warns_once_and_training_goes_on(own_data: Finished) -> None:
    assert own_data.code == 0, own_data.console
    assert len(step_records(own_data.folder)) == 2
    assert own_data.console.count("warning: MLflow at") == 1
    assert UNREACHABLE in own_data.console
    waiting = records(own_data.folder / "mlflow-spool.jsonl")
    assert [record["step"] for record in waiting if record["kind"] == "metrics"] == [1, 2]
    assert waiting[-1] | {"timestamp_ms": 0} == {"kind": "status", "status": "FINISHED", "timestamp_ms": 0}


def test_a_configuration_that_is_not_found_names_where_ray_was_started(workplace: Workplace) -> None:
    launched = workplace.budget_rl("missing.yaml")
    assert launched.wait(DEADLINE_S) == 2
    assert "missing.yaml" in launched.text
    assert "the directory is the one where `ray start` ran" in launched.text
    assert "--working-dir ." in launched.text
