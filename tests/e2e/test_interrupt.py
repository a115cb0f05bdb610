from __future__ import annotations

import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from rl.checkpointing import find_resume
from rl.run_folder import RunFolder
from tests.e2e.conftest import REFERENCE, REFERENCE_STEPS, Finished
from tests.e2e.runs import EXIT_DEADLINE_S, Launched, Workplace, mlflow_run, records, step_records, until, without_times


@dataclass(frozen=True)
class Interrupted:
    folder: Path
    code: int
    console: str
    steps_when_asked: int
    mlflow_status: str


def interrupt(launched: Launched, folder: Path, send: Callable[[], None], *, after: int) -> Interrupted:
    """Send a signal once ``after`` steps are done; fails unless the driver and every process it started end in time."""
    launched.running(f"step {after}", lambda: len(step_records(folder)) >= after)
    steps = len(step_records(folder))
    send()
    code = launched.wait(EXIT_DEADLINE_S)
    until(lambda: not launched.processes(), f"the processes to end: {launched.titles()}", seconds=EXIT_DEADLINE_S)
    return Interrupted(folder, code, launched.text, steps, mlflow_run(folder).info.status)


@pytest.fixture(scope="module")
def arguments(warm_model: Path) -> tuple[str, ...]:
    return (*REFERENCE, f"model={warm_model}", "max_steps=100000", "output.checkpoint_every=0")


@pytest.fixture(scope="module")
def stopped(workplace: Workplace, arguments: tuple[str, ...]) -> Interrupted:
    """A run stopped by Ctrl-C after the reference's last step."""
    folder = workplace.folder / "interrupted"
    launched = workplace.train(folder, *arguments)
    return interrupt(launched, folder, lambda: launched.send_group(signal.SIGINT), after=REFERENCE_STEPS)


@pytest.fixture(scope="module")
def stopped_again(workplace: Workplace, arguments: tuple[str, ...], stopped: Interrupted) -> Interrupted:
    """The same command again, stopped by SIGTERM (what `kill` sends) after two more steps."""
    launched = workplace.train(stopped.folder, *arguments)
    return interrupt(launched, stopped.folder, lambda: launched.send(signal.SIGTERM), after=last_step(stopped.folder) + 2)


def last_step(folder: Path) -> int:
    return step_records(folder)[-1]["step"]


def test_ctrl_c_ends_the_run_with_130_and_leaves_no_process(stopped: Interrupted) -> None:
    assert stopped.code == 130, stopped.console
    assert "stopped (SIGINT" in stopped.console
    assert "Traceback" not in stopped.console


def test_the_checkpoint_after_ctrl_c_is_of_the_last_finished_step(stopped: Interrupted) -> None:
    from launch.config import load_settings

    settings = load_settings(stopped.folder / "config.yaml", [])
    found = find_resume(settings, RunFolder(stopped.folder))
    assert found is not None
    _, manifest = found
    assert manifest.step >= stopped.steps_when_asked


def test_ctrl_c_closes_the_mlflow_run_as_killed(stopped: Interrupted, stopped_again: Interrupted) -> None:
    assert (stopped.mlflow_status, stopped_again.mlflow_status) == ("KILLED", "KILLED")


def test_two_runs_of_one_seed_are_identical(stopped: Interrupted, reference: Finished) -> None:
    def steps(folder: Path) -> list[dict[str, object]]:
        return [without_times(record) for record in step_records(folder)[:REFERENCE_STEPS]]

    def answers(folder: Path) -> list[dict[str, object]]:
        return [sample for sample in records(folder / "samples.jsonl") if sample["step"] <= REFERENCE_STEPS]

    assert len(steps(reference.folder)) == REFERENCE_STEPS
    assert steps(stopped.folder) == steps(reference.folder)
    assert answers(stopped.folder) == answers(reference.folder)


def test_the_same_command_goes_on_and_sigterm_stops_it_as_cleanly(stopped: Interrupted, stopped_again: Interrupted) -> None:
    assert stopped_again.code == 130, stopped_again.console
    assert "resumed from step-" in stopped_again.console
    assert "stopped (SIGTERM" in stopped_again.console
    steps = [record["step"] for record in step_records(stopped_again.folder)]
    assert steps == list(range(1, len(steps) + 1))
    assert len(steps) > stopped.steps_when_asked
