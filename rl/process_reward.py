"""Advantages from rewards of single tokens (process supervision)."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def reward_to_go(
    per_token: Sequence[Sequence[float | None] | None], group_N: torch.Tensor, *, std_floor: float = 1e-6
) -> list[torch.Tensor | None]:
    """What each token's advantage gains from token rewards: ``A_t = sum_{j >= t} (r_j - mean) / (std + std_floor)``.

    Mean and sample std are over all token rewards of the group; a token without a reward (None) adds nothing.

    per_token: for each of N rollouts one value or None per response token, or None for a rollout without any. group_N (N) integer
    ids. Returns float32 (response length) per rollout, None where there was nothing. Raises ValueError for lengths that differ.
    Source: DeepSeekMath (arXiv 2402.03300, section 4.1.3), which rewards the last token of each reasoning step.
    """
    if len(per_token) != group_N.numel():
        raise ValueError(f"{len(per_token)} rollouts have token rewards, but there are {group_N.numel()} group ids")
    owners = group_N.tolist()
    rewards: dict[int, list[float]] = {}
    for owner, values in zip(owners, per_token, strict=True):
        rewards.setdefault(owner, []).extend(v for v in values or () if v is not None)
    scale = {owner: _mean_and_std(values) for owner, values in rewards.items()}
    result: list[torch.Tensor | None] = []
    for owner, values in zip(owners, per_token, strict=True):
        if values is None or not any(v is not None for v in values):
            result.append(None)
            continue
        mean, std = scale[owner]
        normalised_T = torch.tensor([0.0 if v is None else (v - mean) / (std + std_floor) for v in values], dtype=torch.float64)
        result.append(normalised_T.flip(0).cumsum(0).flip(0).float())
    return result


def _mean_and_std(values: Sequence[float]) -> tuple[float, float]:
    value_T = torch.tensor(values, dtype=torch.float64)
    return (float(value_T.mean()) if values else 0.0), (float(value_T.std()) if len(values) > 1 else 0.0)
