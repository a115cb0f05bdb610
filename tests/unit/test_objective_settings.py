"""Settings of the objective that do nothing, or turn signs round, are refused with what to change."""

from __future__ import annotations

from typing import Any

import pytest

from rl.settings import Settings

BASE: dict[str, Any] = {"model": {"path": "m"}, "data": {"source": "x.json"}, "max_steps": 1}


def _settings(**sections: Any) -> Settings:
    return Settings.model_validate(BASE | sections)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"loss": {"heterogeneous": {"clip": False, "redistribute": False}}}, "is the plain loss; switch one on"),
        ({"loss": {"heterogeneous": {"clip": False, "zone": "adapted"}}}, "set zone=base, or clip=true"),
        ({"loss": {"heterogeneous": {"redistribute_kappa": 1.5}}}, "less than or equal to 1"),
        ({"loss": {"heterogeneous": {"clip_kappa": 0.0}}}, "greater than 0"),
        ({"loss": {"clip_low": 0.5, "heterogeneous": {}}}, "lower clip_low below 0.5"),
        ({"loss": {"heterogeneous": {"redistribute": False}}}, "set learner.minibatches or learner.epochs above 1"),
        ({"rollout": {"refill": -1}}, "greater than or equal to 0"),
        ({"advantage": {"guard": 0.0}}, "greater than 0"),
    ],
)
def test_settings_that_do_nothing_or_turn_signs_round_are_refused(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _settings(**sections)


def test_half_of_the_method_is_a_valid_setting() -> None:
    assert _settings(loss={"heterogeneous": {"clip": False}}).loss.heterogeneous is not None
    clipping = _settings(loss={"heterogeneous": {"redistribute": False}}, learner={"epochs": 2})
    assert clipping.loss.heterogeneous is not None and clipping.loss.heterogeneous.clip
