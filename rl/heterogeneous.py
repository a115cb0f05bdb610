"""HAPO's heterogeneous signal: how unsure the policy was at a token, against the log entropies of a whole step."""

from __future__ import annotations

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


def _log_entropy(entropy_T: torch.Tensor) -> torch.Tensor:
    return entropy_T.double().clamp(min=ENTROPY_FLOOR).log()
