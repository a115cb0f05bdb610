"""Settings in which rewards and rollouts do not fit together are refused with what to change."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from rl.settings import Settings

BASE = {"model": {"path": "m"}, "data": {"source": "x.json"}, "max_steps": 1}
RANGE = {"kind": "range", "low": 16, "high": 32}
EFFORT = {"kind": "effort"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"reward": {"method": "lcpo_exact"}, "rollout": {"budgets": [32, "free"]}}, r"\(32, free\) leaves members without one"),
        ({"reward": {"method": "triangle"}, "rollout": {"budgets": EFFORT}}, "leaves members without one; use numbers alone"),
        ({"reward": {"method": "aec"}}, r"set rollout.budgets=\[\{kind: effort"),
        ({"reward": {"method": "adaptthink"}}, r"set rollout.budgets=\[free, no_think\]"),
        ({"reward": {"method": "s_grpo"}}, "set rollout.exits=4 and rollout.samples_per_prompt=5"),
        ({"reward": {"method": "laser_d"}, "rollout": {"max_length": 160}}, "monitor.first=4096 is above rollout.max_length=160"),
        ({"data": {"source": "x.json", "grader": "function"}}, "and there is none; name one"),
        ({"advantage": {"estimator": "decoupled"}, "reward": {"method": "kimi"}}, "so that reward.method would not count"),
        (
            {"advantage": {"estimator": "decoupled"}, "reward": {"overlong_buffer": 9, "policies": {"wrong": "penalise"}}},
            "so that reward.overlong_buffer, reward.policies would not count",
        ),
        (
            {"reward": {"method": "lcpo_max"}, "rollout": {"budgets": [16], "hard_budgets": True}},
            "set rollout.hard_budgets=false",
        ),
        (
            {
                "reward": {"method": "adaptthink"},
                "rollout": {"budgets": ["free", "no_think"]},
                "learner": {"train_prefix": False},
            },
            "set learner.train_prefix=true",
        ),
        ({"reward": {"method": "aec", "decay": 0.5}, "rollout": {"budgets": EFFORT}}, "without reward.average=ema"),
        (
            {"rollout": {"exits": 4, "samples_per_prompt": 5}, "learner": {"train_prefix": False}},
            "set learner.train_prefix=true",
        ),
        (
            {"rollout": {"length_schedule": [[0, 512], [9, 256]]}, "reward": {"overlong_buffer": 64}},
            "leave one of the two out",
        ),
    ],
)
def test_a_reward_that_could_never_be_given_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Settings.model_validate(BASE | settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"reward": {"method": "lcpo_max"}, "rollout": {"budgets": RANGE}},
        {"reward": {"method": "budgetthinker"}, "rollout": {"budgets": [16, 32]}},
        {"reward": {"method": "aec"}, "rollout": {"budgets": EFFORT}},
        {"reward": {"method": "adaptthink"}, "rollout": {"budgets": ["free", "no_think"]}},
        {"reward": {"method": "s_grpo"}, "rollout": {"exits": 4, "samples_per_prompt": 5}},
    ],
)
def test_each_of_them_runs_on_the_rollouts_it_asks_for(settings: dict[str, Any]) -> None:
    Settings.model_validate(BASE | settings)
