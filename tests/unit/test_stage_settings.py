"""What makes the runs of a stage end, and what the runs that make a teacher cannot do."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from rl.settings import Settings

TREE: dict[str, Any] = {"model": {"path": "m"}, "data": {"source": "p.jsonl"}}
PIPELINE: dict[str, Any] = {"stage": "distil", "distil": {}, "preference": {"steps": 3}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stage": "preference", "preference": {}, "max_rollouts": 9}, "max_rollouts counts .*; set max_steps"),
        (PIPELINE | {"preference": {}, "max_tokens": 9}, "would never stop; set preference.steps"),
        (PIPELINE | {"preference": {"steps": 3, "treg": {}}, "max_steps": 2}, "leave it out, or train the models by themselves"),
        (PIPELINE | {"preference": {"steps": 3, "reverse": True}, "max_steps": 2}, "leave it out in stage=distil"),
    ],
)
def test_a_stage_that_would_not_stop_or_would_contradict_itself_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Settings.model_validate(TREE | changes)


def test_steps_of_the_preference_stage_are_what_its_learning_rate_falls_over() -> None:
    stage = {"stage": "preference", "preference": {"steps": 3}, "learner": {"lr_schedule": "cosine"}}
    assert Settings.model_validate(TREE | stage).learner.lr_schedule == "cosine"
    with pytest.raises(ValidationError, match="falls to 0 at max_steps, which is not set"):
        Settings.model_validate(TREE | PIPELINE | {"max_tokens": 9, "learner": {"lr_schedule": "cosine"}})
