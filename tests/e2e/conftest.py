"""Runs of the whole product that several tests look at; each is made once, since starting one takes half a minute."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.e2e.runs import COMMON, RUN_DEADLINE_S, SMALL, Launched, Workplace, step_records

REFERENCE = (
    *SMALL, "learner.lr=3e-5", "output.samples_per_step=32", "output.checkpoint_every=3", "output.keep_checkpoints=9",
    "rollout.adaptive={tau: 0.2}", "rollout.reflex={amplitude: 1.0, period: 20}",
)  # fmt: skip
"""One engine, sampling shaped by what the step before left, every rollout of a step written down: what runs that must be
identical share."""
REFERENCE_STEPS = 10
UNREACHABLE = "http://127.0.0.1:9"
"""The discard port, where nothing listens."""


@dataclass(frozen=True)
class Finished:
    """A run that has ended."""

    folder: Path
    code: int
    console: str
    titles: frozenset[str]
    """Every process title seen while it was training."""

    @property
    def checkpoint(self) -> Path:
        """The newest checkpoint."""
        return max((self.folder / "checkpoints").iterdir())


@pytest.fixture(scope="session")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workplace]:
    """Home folder and cache of all runs; whatever is still running at the end is killed."""
    place = Workplace(tmp_path_factory.mktemp("e2e"))
    yield place
    place.end()


def finish(launched: Launched, folder: Path) -> Finished:
    """Wait for a training run, noting the processes at work once it has made a step."""
    launched.running("step 1", lambda: step_records(folder))
    titles = frozenset(launched.titles())
    return Finished(folder, launched.wait(RUN_DEADLINE_S), launched.text, titles)


@pytest.fixture(scope="session")
def quickstart(workplace: Workplace) -> Finished:
    """The quickstart with fewer traces, smaller steps and a smaller evaluation: warm start, before, 8 steps, after."""
    folder = workplace.folder / "quickstart"
    launched = workplace.train(
        folder, *COMMON, "warm_start.traces=3200", "warm_start.warmup_steps=20", "eval.problems=32", "max_steps=8",
    )  # fmt: skip
    return finish(launched, folder)


@pytest.fixture(scope="session")
def warm_model(workplace: Workplace, quickstart: Finished) -> Path:
    """The model folder that the quickstart's warm start left in the cache."""
    assert quickstart.code == 0, quickstart.console
    (folder,) = (workplace.cache / "warm-start").iterdir()
    return folder


@pytest.fixture(scope="session")
def reference(workplace: Workplace, warm_model: Path) -> Finished:
    """Ten steps that nothing disturbs, on one engine."""
    folder = workplace.folder / "reference"
    launched = workplace.train(folder, *REFERENCE, f"model={warm_model}", f"max_steps={REFERENCE_STEPS}")
    return finish(launched, folder)


@pytest.fixture(scope="session")
def own_data(workplace: Workplace, warm_model: Path) -> Finished:
    """Two steps on a file of one's own, while the MLflow server is away."""
    file = workplace.folder / "sums.jsonl"
    sums = [(a, b, c) for a in range(1, 7) for b in range(1, 5) for c in range(1, 5)]
    question = "State the final answer to the following arithmetic problem: {} + {} + {} ="
    rows = [{"problem": question.format(a, b, c), "solution": str(a + b + c), "level": 1} for a, b, c in sums]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = workplace.folder / "own-data"
    launched = workplace.train(
        folder, *SMALL, f"model={warm_model}", f"data={file}", "data.question_column=problem", "data.answer_column=solution",
        "data.grader=exact", "data.extract=after_think", "max_steps=2", f"tracking.mlflow={UNREACHABLE}",
    )  # fmt: skip
    return finish(launched, folder)
