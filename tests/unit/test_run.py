"""A run's own duties, on a workforce without actors: what it shows before it refuses, and what it pushes before it starts."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rl.cluster import Workforce
from rl.collection import Collected
from rl.console import Console
from rl.embedded import tiny_tokenizer
from rl.errors import BudgetRLError
from rl.preparation import Prepared
from rl.prompts import PromptStream
from rl.run import Run
from rl.run_folder import RunFolder, read_lines
from rl.settings import OutputSettings, Settings, TrackingSettings
from rl.tracking import Tracker
from rl.trainer import stop_cleanly
from rl.types import Manifest, StepReport, WeightVersion
from rl.waiting import StopFlag, StopRequested
from rollout.budgets import BudgetPlan
from tests.builders import make_group, make_prompt


@pytest.fixture
def stream() -> io.StringIO:
    return io.StringIO()


@pytest.fixture
def run(tmp_path: Path, stream: io.StringIO) -> Iterator[Run]:
    settings = Settings.model_validate(
        {
            "model": {"path": "model"},
            "data": {"source": "problems.jsonl"},
            "rollout": {"samples_per_prompt": 2, "max_length": 64},
            "max_steps": 1,
            "prompts_per_step": 2,
        }
    )
    tokenizer = tiny_tokenizer()
    prompts = tuple(make_prompt(index) for index in range(2))
    plan = BudgetPlan(settings.rollout, tokenizer)
    prepared = Prepared(tmp_path / "model", tokenizer, PromptStream(prompts, 0), prompts, plan, dropped_share=1 / 3)
    folder = RunFolder.create(OutputSettings(dir=str(tmp_path / "run")), "run")
    console = Console(folder.log, stream=stream)
    tracker = Tracker(TrackingSettings(mlflow="off"), folder, run_name="run")
    yield Run(settings, prepared, Workforce(settings), folder, console, tracker, StopFlag())
    console.close()


def _manifest(step: int) -> Manifest:
    return Manifest(step, {}, 0, 0, 0.0, None, WeightVersion(step, ""), 1)


def test_a_first_step_without_signal_is_shown_and_written_before_it_is_refused(
    run: Run, stream: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups = tuple(make_group(index, [0.0, 0.0]) for index in range(2))
    monkeypatch.setattr(run.collector, "collect", lambda leases, stop: Collected(groups, (), generate_s=1.0, score_s=0.0))
    with pytest.raises(BudgetRLError, match="every advantage is zero"):
        run.one_step()
    shown = stream.getvalue()
    shares = ("cut at the length limit", "groups with all rewards equal", "prompts dropped as too long", "non-zero advantage")
    assert all(share in shown for share in shares)
    assert "33.3%" in shown and "100.0%" in shown
    (line,) = read_lines(run.folder.metrics)
    assert (line["step"], line["group/flat"], line["prompts/dropped"]) == (1, 1.0, pytest.approx(1 / 3))
    assert {(sample["step"], sample["verdict"]) for sample in read_lines(run.folder.samples)} == {(1, "wrong")}
    assert run.progress.step == 0


@pytest.mark.parametrize(("resumed", "version"), [(None, 0), (5, 5)])
def test_the_engines_get_the_learners_weights_once_before_anything_is_asked_of_them(
    run: Run, monkeypatch: pytest.MonkeyPatch, resumed: int | None, version: int
) -> None:
    pushed: list[int] = []
    monkeypatch.setattr(run, "push_weights", lambda: pushed.append(run.progress.step))
    monkeypatch.setattr("rl.run.wait_for", lambda *_, **__: [])
    monkeypatch.setattr(run.workforce, "learners", _Learners())
    run.begin(None if resumed is None else (Path(f"step-{resumed:06d}"), _manifest(resumed)))
    assert pushed == [version]


class _Learners:
    """Ranks whose answer nobody looks at."""

    def load(self, folder: str) -> list[Any]:
        return []


# -- what a stopped run says -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "resumed", "step", "advice"),
    [
        ("auto", None, 4, "checkpoint step-000004; the same command goes on from there"),
        ("auto", 2, 4, "checkpoint step-000004; the same command goes on from there"),
        ("never", None, 4, "checkpoint step-000004; the same command with resume=auto goes on from there"),
        ("/a/step-000002", 2, 4, "checkpoint step-000004; the same command with resume=auto goes on from there"),
        ("/a/step-000002", 2, 2, "no step was finished, the same command goes on from step-000002"),
        ("auto", 2, 2, "no step was finished, the same command goes on from step-000002"),
        ("never", None, 0, "no step was finished, nothing to keep"),
    ],
)
def test_a_stopped_run_names_the_command_that_goes_on(
    run: Run, stream: io.StringIO, monkeypatch: pytest.MonkeyPatch, asked: str, resumed: int | None, step: int, advice: str
) -> None:
    run.progress.step = step
    monkeypatch.setattr(run, "save", lambda: Path(f"step-{step:06d}"))
    resume = None if resumed is None else (Path(f"step-{resumed:06d}"), _manifest(resumed))
    stop_cleanly(run, resume, run.console, StopRequested("SIGINT after step 4"), asked=asked)
    assert stream.getvalue() == f"stopped (SIGINT after step 4); {advice}\n"


def test_a_finished_step_is_shown_with_its_alarms(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    metrics = {"adv/mean": 1.0, "adv/std": 0.5, "adv/nonzero_tokens": 1.0, "mismatch/max": 1e-6, "learn/skipped": 0.0}
    run.publish(StepReport(2, metrics))
    assert "mean advantage +1.00 at step 2" in caplog.text
    assert [line["step"] for line in read_lines(run.folder.metrics)] == [2]
