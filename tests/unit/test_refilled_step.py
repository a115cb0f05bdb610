"""A training step with rounds: what it trains on, and what it counts, on a workforce without actors."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rl.cluster import Workforce
from rl.collection import Collected
from rl.console import Console
from rl.embedded import tiny_tokenizer
from rl.preparation import Prepared
from rl.prompts import PromptStream
from rl.run import Run
from rl.run_folder import RunFolder
from rl.settings import OutputSettings, Settings, TrackingSettings
from rl.tracking import Tracker
from rl.types import Group, Lease, TrainBatch, VerdictStatus
from rl.waiting import StopFlag
from rollout.budgets import BudgetPlan
from tests.builders import make_prompt, make_rollout, make_scored


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    settings = Settings.model_validate(
        {
            "model": {"path": "model"},
            "data": {"source": "problems.jsonl"},
            "rollout": {"samples_per_prompt": 2, "max_length": 64, "refill": 1},
            "max_steps": 9,
            "prompts_per_step": 2,
        }
    )
    tokenizer = tiny_tokenizer()
    prompts = tuple(make_prompt(index) for index in range(8))
    prepared = Prepared(
        tmp_path / "model",
        tokenizer,
        PromptStream(prompts, 0),
        prompts,
        BudgetPlan(settings.rollout, tokenizer),
        dropped_share=0.0,
    )
    folder = RunFolder.create(OutputSettings(dir=str(tmp_path / "run")), "run")
    console = Console(folder.log, stream=io.StringIO())
    tracker = Tracker(TrackingSettings(mlflow="off"), folder, run_name="run")
    yield Run(settings, prepared, Workforce(settings), folder, console, tracker, StopFlag())
    console.close()


def _answered(run: Run, monkeypatch: pytest.MonkeyPatch, mixed: set[int]) -> list[TrainBatch]:
    """Answer every lease, wrongly but for the second member of the prompts at these places of the stream.

    Returns what will be trained on.
    """
    order = [prompt.id for prompt in run.prepared.stream.take(0, 8)[0]]
    trained: list[TrainBatch] = []

    def collect(leases: tuple[Lease, ...], stop: StopFlag) -> Collected:
        groups: dict[str, Group] = {}
        for lease in leases:
            right = lease.member == 1 and order.index(lease.prompt.id) in mixed
            status = VerdictStatus.CORRECT if right else VerdictStatus.WRONG
            key = lease.ticket.rpartition(".")[0]
            before = groups[key].members if key in groups else ()
            groups[key] = Group(lease.prompt, (*before, make_scored(make_rollout(lease), status=status)))
        return Collected(tuple(groups.values()), (), 1.0, 0.0)

    def update(batch: TrainBatch, *_: Any) -> dict[str, float]:
        trained.append(batch)
        return {}

    monkeypatch.setattr(run.collector, "collect", collect)
    monkeypatch.setattr(run, "update", update)
    monkeypatch.setattr(run, "push_weights", lambda: None)
    return trained


def test_a_step_trains_on_what_differs_and_counts_all_that_was_generated(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = _answered(run, monkeypatch, {0, 2})
    metrics = run.one_step().metrics
    (batch,) = trained
    assert batch.rollouts == 4 and (batch.advantage_T[batch.loss_mask_T] != 0).all()
    # Three groups of two members, two of six answers right, one group flat: figures of the policy are those of all groups.
    assert (metrics["train/accuracy"], metrics["group/flat"]) == (pytest.approx(2 / 6), pytest.approx(1 / 3))
    assert [metrics[f"rollouts/{name}"] for name in ("generated", "refilled_groups", "discarded_groups")] == [6, 1, 1]
    length = make_rollout().length
    assert run.progress.tokens_seen == metrics["tokens/total"] == 6 * (length + run_prefill(run))
    assert run.progress.cursor == 3


def run_prefill(run: Run) -> int:
    """Tokens with which a response without a budget opens."""
    return len(run.prepared.plan.open(make_prompt(), run.prepared.plan.free).prefill_ids)


def test_a_short_step_trains_on_what_there_is_and_warns_once(
    run: Run, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    trained = _answered(run, monkeypatch, {1, 5})
    with caplog.at_level(logging.WARNING):
        run.one_step()
        run.one_step()
    assert [batch.rollouts for batch in trained] == [2, 2]
    assert run.progress.cursor == 7  # three prompts, then four
    assert caplog.text.count("rewards differ in 1 groups of 3 after rollout.refill=1") == 1
