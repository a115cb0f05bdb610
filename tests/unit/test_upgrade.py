"""Checkpoints of earlier versions are resumed with today's settings."""

from __future__ import annotations

from typing import Any

import pytest

from rl.manifest import incompatible_keys
from rl.settings import Settings
from rl.upgrade import upgraded

OLD = {"form": "piecewise", "beta": 4.0, "alpha": None, "bad_format": 0.0, "overlong_buffer": 0}


@pytest.mark.parametrize(
    ("old", "today"),
    [
        ({"method": "correct"}, {"method": "correct"}),
        ({"method": "hbpo"}, {"method": "hbpo"}),
        ({"method": "hbpo", "beta": 3.0}, {"method": "hbpo", "beta": 3.0}),
        ({"method": "dapo", "overlong_buffer": 32}, {"method": "dapo", "overlong_buffer": 32}),
        (
            {"method": "hbpo", "form": "min", "bad_format": -1.0},
            {"method": "hbpo", "form": "min", "policies": {"malformed": "penalise"}, "penalty": -1.0},
        ),
    ],
)
def test_a_reward_section_of_an_earlier_version_means_the_same_as_todays(old: dict[str, Any], today: dict[str, Any]) -> None:
    base = {"model": {"path": "m"}, "data": {"source": "x.json"}, "max_steps": 1}
    config = upgraded({**base, "reward": OLD | old})
    assert incompatible_keys(config, Settings.model_validate({**base, "reward": today}).model_dump(mode="json")) == []
    Settings.model_validate(config)


def test_todays_configurations_stay_as_they_are() -> None:
    config = {"reward": {"method": "hbpo", "beta": 4.0}, "seed": 3}
    assert upgraded(config) == config and upgraded({}) == {}
