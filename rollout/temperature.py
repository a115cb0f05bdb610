"""HAPO's adaptive temperature: hotter at tokens where the model is unsure, cooler where it is sure."""

from __future__ import annotations

from typing import Literal

import torch

from kernels import TemperatureRule
from rl.types import AdaptiveTemperature, EntropyStatistics

Form = Literal["signed", "literal", "zscore"]
ENTROPY_FLOOR = 1e-6
"""Entropies below it count as it, in nats."""
SPREAD_FLOOR = 1e-6
"""Added to the spread, as in the published code."""
FACTOR_LOW, FACTOR_HIGH = 0.1, 10.0
"""Bounds of the factor under `zscore`, which has none of its own: statistics of little spread would make it negative."""


def temperature_rule(stats: EntropyStatistics, *, tau: float = 0.05, form: Form = "signed") -> TemperatureRule:
    """The factor on the base temperature as numbers that one kernel can apply; see :func:`adaptive_temperature`."""
    if form == "zscore":
        slope = 1 / stats.deviation if stats.deviation > 0 else 0.0
        low, high = (FACTOR_LOW - 1) / tau, (FACTOR_HIGH - 1) / tau
        return TemperatureRule(stats.pivot, slope, slope, tau=tau, low=low, high=high, floor=ENTROPY_FLOOR)
    if form not in ("signed", "literal"):
        raise ValueError(f"form must be signed, literal or zscore, got {form!r}")
    spread = stats.spread + SPREAD_FLOOR
    above = 1 / (spread * stats.high) if stats.high > 0 else 0.0
    below = 1 / (spread * -stats.low) if stats.low < 0 else 0.0
    return TemperatureRule(
        stats.pivot, above, below if form == "signed" else -below, tau=tau, low=-1.0, high=1.0, floor=ENTROPY_FLOOR
    )


def rule_of(adaptive: AdaptiveTemperature | None) -> TemperatureRule | None:
    """The rule of a lease's shaping; None where the temperature does not depend on the entropy."""
    return None if adaptive is None else temperature_rule(adaptive.statistics, tau=adaptive.tau, form=adaptive.form)


def adaptive_temperature(
    entropy: torch.Tensor | float,
    stats: EntropyStatistics | None,
    *,
    base: float = 1.0,
    tau: float = 0.05,
    form: Form = "signed",
) -> torch.Tensor | float:
    """The temperature to sample a token at, from the entropy of its raw distribution and the statistics of the step before.

    ``h = (ln max(H, 1e-6) - pivot) / (spread + 1e-6)``; ``signed``: ``base (1 + tau clamp(h~, -1, 1))`` with h~ = h / high above
    0 and h / |low| below; ``literal``: the same with h / low below, as in the published code, which never cools; ``zscore``:
    ``base (1 + tau (ln max(H, 1e-6) - pivot) / deviation)``, the factor kept in [0.1, 10].

    entropy: nats, a number or a tensor of any shape; returns the same kind (float32 tensor). ``stats`` None, as at the first
    step, gives base. Raises ValueError for an unknown form, base or tau of 0 or less.
    Source: HAPO (arXiv 2509.16591), part A: its published code (signed by its equation 6), `zscore` its second version's Eq. 8.
    """
    if not base > 0 or not tau > 0:
        raise ValueError(f"base and tau must be above 0, got base={base}, tau={tau}")
    if form not in ("signed", "literal", "zscore"):
        raise ValueError(f"form must be signed, literal or zscore, got {form!r}")
    value = entropy if isinstance(entropy, torch.Tensor) else torch.tensor(float(entropy), dtype=torch.float64)
    if stats is None:
        result = torch.full_like(value, base, dtype=torch.float32 if value.dtype != torch.float64 else None)
    else:
        result = base * temperature_rule(stats, tau=tau, form=form)(value.double())
    return result.float() if isinstance(entropy, torch.Tensor) else float(result)
