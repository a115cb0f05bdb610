"""HAPO's heterogeneous signal, how unsure the policy was at a token among all of a step, and what the loss does with it."""

from __future__ import annotations

from typing import Literal

import torch

from rl.types import EntropyStatistics

ENTROPY_FLOOR = 1e-8
"""Entropies below it count as it, in nats; a token without any doubt would have ln 0."""


def entropy_statistics(entropy_T: torch.Tensor, *, rho: float = 0.8) -> EntropyStatistics:
    """Quantile, spread and extremes of a step's log entropies.

    ``l = ln max(H, 1e-8)``; pivot q: the order statistic of l with 0-based index round(rho (N - 1)), halves to even;
    spread ``s = sqrt(mean (l - q)^2)``; high and low: largest and smallest ``(l - q) / s``; deviation: standard deviation of l
    about its mean. All equal entropies give spread 0 and extremes 0.

    Shapes: entropy_T (T) floating point, nats, at least 0. Raises ValueError for no tokens, for a NaN or negative entropy, or
    for a rho outside (0, 1). Source: HAPO (arXiv 2509.16591), quantities of part A and of its published code.
    """
    if entropy_T.ndim != 1 or not entropy_T.is_floating_point():
        raise ValueError(f"entropy_T must be a floating point vector, got {entropy_T.dtype} of shape {tuple(entropy_T.shape)}")
    if not 0 < rho < 1:
        raise ValueError(f"rho must lie between 0 and 1, got {rho}")
    tokens = entropy_T.numel()
    if tokens == 0:
        raise ValueError("entropy_T is empty: there are no statistics of no tokens")
    # A flat distribution of one possible token may come out a rounding error below 0.
    if bool(torch.isnan(entropy_T).any()) or float(entropy_T.min()) < -1e-4:
        raise ValueError("entropy_T holds NaN or a negative value, which no entropy is")
    log_T = _log_entropy(entropy_T)
    pivot = log_T.sort().values[round(rho * (tokens - 1))]
    distance_T = log_T - pivot
    spread = distance_T.square().mean().sqrt()
    scaled_T = distance_T / spread if float(spread) > 0 else torch.zeros_like(distance_T)
    return EntropyStatistics(
        pivot=float(pivot),
        spread=float(spread),
        high=max(float(scaled_T.max()), 0.0),
        low=min(float(scaled_T.min()), 0.0),
        deviation=float(log_T.std(correction=0)),
        tokens=tokens,
    )


def signal(entropy_T: torch.Tensor, stats: EntropyStatistics, *, literal: bool = False) -> torch.Tensor:
    """The normalised signal of each token: near 1 where the policy is least sure, near -1 where it is surest.

    ``h = (l - pivot) / spread``; above 0 divided by the largest h of the statistics, else by the size of the smallest.
    ``literal`` divides by the smallest itself, as the published code does: then no signal is negative.

    Shapes: entropy_T (T) in nats; returns float32 (T), in [-1, 1] for the tokens the statistics were taken from; 0 where the
    scale is 0. Source: HAPO (arXiv 2509.16591), equation 6 and its published code.
    """
    distance_T = _log_entropy(entropy_T) - stats.pivot
    if not stats.spread > 0:
        return torch.zeros_like(distance_T, dtype=torch.float32)
    scaled_T = distance_T / stats.spread
    above = 1 / stats.high if stats.high > 0 else 0.0
    below = 1 / -stats.low if stats.low < 0 else 0.0
    result_T = torch.where(scaled_T > 0, scaled_T * above, scaled_T * (-below if literal else below))
    return result_T.float()


def clip_widths(
    signal_T: torch.Tensor, *, low: float = 0.2, high: float = 0.28, kappa: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """How far each token's ratio may fall below 1 and rise above it: ``1 - low_t <= r_t <= 1 + high_t``.

    ``low_t = low (1 - kappa h_t)`` where h_t <= 0, else low; ``high_t = high (1 + kappa h_t)`` where h_t > 0, else high: the
    floor falls where the policy is sure, the ceiling rises where it is not. A signal outside [-1, 1], which a token can have that
    the statistics were not taken from, counts as the nearer end.

    Shapes: signal_T (T) floating point, see :func:`signal`; returns two of its dtype, without gradient. Raises ValueError for a
    negative width, for a kappa outside [0, 1], or where the floor could reach a ratio of 0.
    Source: HAPO (arXiv 2509.16591), part D, equations 12 and 13.
    """
    _check_kappa(kappa)
    if low < 0 or high < 0:
        raise ValueError(f"low={low} and high={high} must not be negative")
    if low * (1 + kappa) >= 1:
        raise ValueError(f"low={low} widened by kappa={kappa} reaches a ratio of 0; lower low below {1 / (1 + kappa):g}")
    signal_T = signal_T.detach()
    # clamp, not where: a NaN has to stay one, and a comparison with it would pass as "not above 0"
    return low * (1 - kappa * signal_T.clamp(-1, 0)), high * (1 + kappa * signal_T.clamp(0, 1))


def redistribute(
    advantage_T: torch.Tensor,
    signal_T: torch.Tensor,
    ratio_T: torch.Tensor,
    *,
    low: float = 0.2,
    high: float = 0.28,
    kappa: float = 1.0,
    zone: Literal["base", "adapted"] = "base",
    clip_kappa: float = 1.0,
) -> torch.Tensor:
    """Advantages that grow where an unsure token moves, and shrink where a sure one does not.

    ``A'_t = A_t (1 + kappa h_t)`` where h_t > 0 and r_t lies outside the zone, or h_t <= 0 and r_t inside it; else A_t.
    The zone is ``1 - low / 2 < r_t < 1 + high / 2``, bounds outside; ``adapted`` puts the widths of :func:`clip_widths` with
    ``clip_kappa`` in place of low and high, as the published code does. Signals count as there. With the signed signal the factor
    lies in [0, 2], so that no advantage changes its sign.

    Shapes: all (T); signal_T from :func:`signal`; ratio_T new over old probability. Returns the advantage's dtype; no gradient
    passes through signal, ratio or zone. Raises ValueError for shapes that differ, for a kappa outside [0, 1] or an unknown zone.
    Source: HAPO (arXiv 2509.16591), part C.
    """
    _check_kappa(kappa)
    for name, value in (("signal_T", signal_T), ("ratio_T", ratio_T)):
        if value.shape != advantage_T.shape:
            raise ValueError(f"{name} has shape {tuple(value.shape)}, the advantages have {tuple(advantage_T.shape)}")
    if zone not in ("base", "adapted"):
        raise ValueError(f"zone must be base or adapted, got {zone!r}")
    signal_T, ratio_T = signal_T.detach().clamp(-1, 1), ratio_T.detach()
    # Plain numbers for the base zone: a ratio on its edge must not get in by a rounding of the signal's dtype.
    below, above = (low, high) if zone == "base" else clip_widths(signal_T, low=low, high=high, kappa=clip_kappa)
    inside_T = (ratio_T > 1 - below / 2) & (ratio_T < 1 + above / 2)
    # Which tokens stay as they are, so that a NaN signal is not among them.
    same_T = (signal_T > 0) & inside_T | (signal_T <= 0) & ~inside_T
    return torch.where(same_T, advantage_T, advantage_T * (1 + kappa * signal_T.to(advantage_T.dtype)))


def _check_kappa(kappa: float) -> None:
    if not 0 <= kappa <= 1:
        raise ValueError(f"kappa must lie between 0 and 1, got {kappa}")


def _log_entropy(entropy_T: torch.Tensor) -> torch.Tensor:
    return entropy_T.double().clamp(min=ENTROPY_FLOOR).log()
