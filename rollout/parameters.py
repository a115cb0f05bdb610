"""A request's shaping as flat keys (`SamplingParams.extra_args`, over the API `vllm_xargs`), checked both ways.

Over HTTP only strings, numbers and lists of them arrive, and `true` arrives as 1; so there is one key per number.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rl.types import AdaptiveTemperature, EntropyStatistics, Reflex, Shaping
from rollout.reflex import SCHEDULES, check_reflex

REFLEX_NUMBERS = ("amplitude", "period", "shift", "rate")
REFLEX_COUNTS = ("first", "last")
STATISTICS = ("pivot", "spread", "high", "low", "deviation")
NEEDED = {
    "signed": ("pivot", "spread", "high", "low"),
    "literal": ("pivot", "spread", "high", "low"),
    "zscore": ("pivot", "deviation"),
}
KEYS = (
    "reflex_schedule",
    *(f"reflex_{name}" for name in REFLEX_NUMBERS + REFLEX_COUNTS),
    "reflex_generated",
    "adaptive_form",
    "adaptive_tau",
    *(f"adaptive_{name}" for name in STATISTICS),
)
"""Every key of ours; other keys of a request belong to somebody else."""
PREFIXES = ("reflex_", "adaptive_")


@dataclass(frozen=True)
class RequestShaping:
    """What one request asked for, checked."""

    reflex: Reflex | None = None
    adaptive: AdaptiveTemperature | None = None
    generated: int = 0
    """The last so many tokens of the prompt were generated earlier: the answer goes on, and so does its count of tokens."""

    @property
    def is_plain(self) -> bool:
        return self.reflex is None and self.adaptive is None


def to_extra_args(shaping: Shaping) -> dict[str, Any] | None:
    """The flat keys of a lease's shaping; None where there is nothing but a base temperature."""
    arguments: dict[str, Any] = {}
    if (reflex := shaping.reflex) is not None:
        arguments["reflex_schedule"] = reflex.schedule
        arguments |= {f"reflex_{name}": getattr(reflex, name) for name in REFLEX_NUMBERS}
        arguments["reflex_first"] = reflex.first
        if reflex.last is not None:
            arguments["reflex_last"] = reflex.last
    if (adaptive := shaping.adaptive) is not None:
        arguments |= {"adaptive_form": adaptive.form, "adaptive_tau": adaptive.tau}
        arguments |= {f"adaptive_{name}": getattr(adaptive.statistics, name) for name in STATISTICS}
    return arguments or None


def from_extra_args(arguments: Mapping[str, Any] | None) -> RequestShaping:
    """The shaping a request asks for; keys of others are left alone.

    Raises ValueError naming the key for one of ours that is unknown, of the wrong type, out of range or missing.
    """
    ours = {key: value for key, value in (arguments or {}).items() if key.startswith(PREFIXES)}
    for key in ours:
        if key not in KEYS:
            near = difflib.get_close_matches(key, KEYS, n=1)
            raise ValueError(f"unknown key {key}" + (f"; did you mean {near[0]}?" if near else f"; there are {', '.join(KEYS)}"))
    generated = _count(ours, "reflex_generated") or 0
    return RequestShaping(_reflex(ours), _adaptive(ours), generated)


def _reflex(ours: Mapping[str, Any]) -> Reflex | None:
    if not any(key.startswith("reflex_") and key != "reflex_generated" for key in ours):
        return None
    chosen: dict[str, Any] = {}
    if "reflex_schedule" in ours:
        chosen["schedule"] = _choice(ours, "reflex_schedule", SCHEDULES)
    chosen |= {name: _number(ours, f"reflex_{name}") for name in REFLEX_NUMBERS if f"reflex_{name}" in ours}
    chosen |= {name: _count(ours, f"reflex_{name}") for name in REFLEX_COUNTS if f"reflex_{name}" in ours}
    reflex = Reflex(**chosen)
    try:
        check_reflex(reflex)
    except ValueError as error:
        raise ValueError(f"reflex_{error}") from error
    return reflex


def _adaptive(ours: Mapping[str, Any]) -> AdaptiveTemperature | None:
    if not any(key.startswith("adaptive_") for key in ours):
        return None
    form: Any = _choice(ours, "adaptive_form", tuple(NEEDED)) if "adaptive_form" in ours else "signed"
    missing = [f"adaptive_{name}" for name in NEEDED[form] if f"adaptive_{name}" not in ours]
    if missing:
        raise ValueError(f"{', '.join(missing)} missing: a temperature by entropy with adaptive_form={form} needs them")
    values = {name: _number(ours, f"adaptive_{name}") if f"adaptive_{name}" in ours else 0.0 for name in STATISTICS}
    for name in ("spread", "high", "deviation"):
        if values[name] < 0:
            raise ValueError(f"adaptive_{name} must be at least 0, got {values[name]}")
    if values["low"] > 0:
        raise ValueError(f"adaptive_low must be at most 0, got {values['low']}")
    tau = _number(ours, "adaptive_tau") if "adaptive_tau" in ours else 0.05
    if not 0 < tau < 1:
        raise ValueError(f"adaptive_tau must lie between 0 and 1, got {tau}")
    return AdaptiveTemperature(EntropyStatistics(**values, tokens=0), form, tau)


def _number(ours: Mapping[str, Any], key: str) -> float:
    value = ours[key]
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{key} must be a finite number, got {value!r}")
    return float(value)


def _count(ours: Mapping[str, Any], key: str) -> int | None:
    if key not in ours:
        return None
    value = ours[key]
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{key} must be a whole number of tokens, at least 0, got {value!r}")
    return value


def _choice(ours: Mapping[str, Any], key: str, options: tuple[str, ...]) -> str:
    if ours[key] not in options:
        raise ValueError(f"{key} must be one of {', '.join(options)}, got {ours[key]!r}")
    return ours[key]
