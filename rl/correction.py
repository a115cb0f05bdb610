"""Off-policy correction: how far the learner's start policy is from what the engines sampled from, and what is done about it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from rl.losses import MAX_LOG_RATIO, truncated_weight


@dataclass(frozen=True)
class Correction:
    """The settings `correction`, `correction_cap`, `correction_mask` and `correction_bounds`, decided."""

    mode: Literal["none", "truncated", "replay"] = "none"
    cap: float = 2.0
    mask: Literal["none", "sequence", "geometric"] = "none"
    bounds: tuple[float, float] = (0.5, 2.0)


@dataclass(frozen=True)
class ImportanceWeight:
    """Detached weights of R tokens that belong to B rollouts."""

    weight_T: torch.Tensor
    """float32 (R): ``min(cap, pi_old / mu)``, 0 for every token of a rejected rollout."""
    capped_T: torch.Tensor
    """bool (R): tokens whose weight was cut at the cap."""
    rejected_B: torch.Tensor
    """bool (B)."""


def importance_weight(
    old_logp_T: torch.Tensor, sampled_logp_T: torch.Tensor, owner_T: torch.Tensor, rollouts: int, correction: Correction
) -> ImportanceWeight:
    """Truncated token weights, and the rollouts whose whole ratio is out of bounds.

    ``w_t = min(cap, exp(old_t - mu_t))``; with d the sum of ``old_t - mu_t`` over a rollout's n sampled tokens it is rejected
    where ``exp(d)`` (mask `sequence`) or ``exp(d / n)`` (`geometric`) is outside the bounds. The product grows with length, so
    `sequence` rejects long answers first; metrics by length show it.

    Shapes: old_logp_T, sampled_logp_T (R) in nats, the latter NaN where the engine did not sample (weight 1); owner_T (R) int64,
    each token's rollout, 0-based, below ``rollouts``. Raises ValueError for a cap of 0 or less, or an unknown mask.
    Source: truncated importance sampling (Ionides 2008); masks as in the field's RL systems (verl's rollout rejection).
    """
    weight_T = truncated_weight(old_logp_T, sampled_logp_T, cap=correction.cap)
    known_T = ~torch.isnan(sampled_logp_T)
    difference_T = torch.where(known_T, (old_logp_T - sampled_logp_T).detach(), 0.0)
    capped_T = difference_T.clamp(max=MAX_LOG_RATIO).exp() > correction.cap
    zeros_B = torch.zeros(rollouts, dtype=torch.float32, device=weight_T.device)
    rejected_B = zeros_B.bool()
    if correction.mask != "none":
        total_B = zeros_B.index_add(0, owner_T, difference_T.float())
        if correction.mask == "geometric":
            total_B = total_B / zeros_B.index_add(0, owner_T, known_T.float()).clamp(min=1.0)
        elif correction.mask != "sequence":
            raise ValueError(f"mask must be none, sequence or geometric, got {correction.mask!r}")
        low, high = (torch.tensor(bound).log() for bound in correction.bounds)
        rejected_B = (total_B < low) | (total_B > high)
        weight_T = torch.where(rejected_B[owner_T], 0.0, weight_T)
    return ImportanceWeight(weight_T, capped_T & known_T, rejected_B)
