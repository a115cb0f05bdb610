"""A request's shaping as flat keys: there and back, and every wrong key, type and range named."""

from __future__ import annotations

from typing import Any

import pytest
from vllm import SamplingParams

from rl.types import AdaptiveTemperature, EntropyStatistics, Reflex, Shaping
from rollout.parameters import KEYS, from_extra_args, to_extra_args
from rollout.processor import ShapingProcessor, TemperatureProcessor

STATISTICS = EntropyStatistics(pivot=-0.1, spread=5.8, high=0.16, low=-3.2, deviation=4.9, tokens=15)
ADAPTIVE = {"adaptive_pivot": -0.1, "adaptive_spread": 5.8, "adaptive_high": 0.16, "adaptive_low": -3.2}


@pytest.mark.parametrize(
    "shaping",
    [
        Shaping(0.7),
        Shaping(1.0, AdaptiveTemperature(STATISTICS, "zscore", 0.1)),
        Shaping(1.0, None, Reflex("silver", rate=1.2, first=3, last=9)),
        Shaping(1.0, AdaptiveTemperature(STATISTICS), Reflex(amplitude=5.0, period=7.5, shift=0.25)),
    ],
)
def test_a_shaping_comes_back_as_it_went(shaping: Shaping) -> None:
    arguments = to_extra_args(shaping)
    found = from_extra_args(arguments)
    assert found.reflex == shaping.reflex
    assert (found.adaptive is None) == (shaping.adaptive is None)
    if found.adaptive is not None and shaping.adaptive is not None:
        assert (found.adaptive.form, found.adaptive.tau) == (shaping.adaptive.form, shaping.adaptive.tau)
        assert found.adaptive.statistics == EntropyStatistics(**{**vars(STATISTICS), "tokens": 0})
    assert all(key in KEYS and not isinstance(value, (dict, bool)) for key, value in (arguments or {}).items())
    assert (arguments is None) == found.is_plain


def test_other_peoples_keys_are_left_alone_and_nothing_asked_is_nothing_done() -> None:
    assert from_extra_args(None).is_plain
    assert from_extra_args({"session_id": "x", "grammar": 3}).is_plain
    assert from_extra_args({"reflex_amplitude": 5}).reflex == Reflex(amplitude=5.0)
    assert from_extra_args({"reflex_amplitude": 5, "reflex_generated": 4}).generated == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"reflex_amplitud": 5}, "reflex_amplitud; did you mean reflex_amplitude"),
        ({"reflex_amplitude": "5"}, "reflex_amplitude must be a finite number, got '5'"),
        ({"reflex_amplitude": True}, "reflex_amplitude must be a finite number"),
        ({"reflex_amplitude": float("nan")}, "finite"),
        ({"reflex_amplitude": 1e4}, r"reflex_amplitude must lie in \[-100, 100\]"),
        ({"reflex_period": 0}, "reflex_period must be above 0"),
        ({"reflex_shift": 2}, "reflex_shift must lie in"),
        ({"reflex_schedule": "sine"}, "reflex_schedule must be one of wave, constant, silver"),
        ({"reflex_first": 1.5}, "reflex_first must be a whole number"),
        ({"reflex_first": 9, "reflex_last": 9}, "reflex_first=9 and last=9"),
        ({"reflex_generated": -1}, "reflex_generated must be a whole number"),
        ({"adaptive_tau": 0.05}, "adaptive_pivot, adaptive_spread, adaptive_high, adaptive_low missing"),
        ({"adaptive_form": "zscore", "adaptive_pivot": 0.0}, "adaptive_deviation missing"),
        ({**ADAPTIVE, "adaptive_tau": 1.5}, "adaptive_tau must lie between 0 and 1"),
        ({**ADAPTIVE, "adaptive_low": 1.0}, "adaptive_low must be at most 0"),
        ({**ADAPTIVE, "adaptive_spread": -1.0}, "adaptive_spread must be at least 0"),
        ({**ADAPTIVE, "adaptive_form": ["signed"]}, "adaptive_form must be one of"),
    ],
)
def test_every_wrong_parameter_is_refused_by_name(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_extra_args(arguments)
    with pytest.raises(ValueError, match=message):
        ShapingProcessor.validate_params(SamplingParams(extra_args=arguments))


def test_a_processor_without_words_refuses_a_reflex_and_takes_a_temperature() -> None:
    TemperatureProcessor.validate_params(SamplingParams(extra_args=ADAPTIVE))
    with pytest.raises(ValueError, match="ShapingProcessor"):
        TemperatureProcessor.validate_params(SamplingParams(extra_args={"reflex_amplitude": 5}))
