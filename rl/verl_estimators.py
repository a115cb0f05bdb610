"""HBPO's and HAPO's advantage in the form in which verl calls an advantage estimator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from rl.advantage import ScoredBatch, compute
from rl.verl_columns import BUDGET, CEILING, GROUP, MissingColumnError, column, labels
from rl.verl_options import HIERARCHICAL, REWARD_MANAGER, TOKEN_AVERAGE, advantage_settings

_FIX = (
    f"set reward.reward_manager.name={REWARD_MANAGER} and trainer.v1.trainer_mode=budget_rl_sync (docs/verl-plugin.md), "
    "or call verl inside rl.verl_columns.columns(...)"
)


def hierarchical(
    token_level_rewards: torch.Tensor,
    response_mask: torch.Tensor,
    index: Any = None,
    config: Any = None,
    reward_baselines: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """HBPO's advantage, group term plus subgroup term, the same at every token of a response; see `rl.advantage.hierarchical`.

    Shapes: token_level_rewards and response_mask (B, T), mask 0 or 1; index (B) uids. Needs the columns ``budget`` and
    ``ceiling`` (B). A row without a masked token (verl's padding) is in no statistic. Returns advantages and returns, both
    (B, T) float32 and equal. Options: `algorithm.budget_rl`. Raises MissingColumnError, ConfigError.
    Source: HBPO (arXiv 2507.15844, equation 5).
    """
    rows = token_level_rewards.shape[0]
    budget_B = column(BUDGET, rows=rows, asked_by=HIERARCHICAL, fix=_FIX)
    ceiling_B = column(CEILING, rows=rows, asked_by=HIERARCHICAL, fix=_FIX)
    return _estimated(HIERARCHICAL, token_level_rewards, response_mask, index, config, budget_B, ceiling_B)


def token_average(
    token_level_rewards: torch.Tensor,
    response_mask: torch.Tensor,
    index: Any = None,
    config: Any = None,
    reward_baselines: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """HAPO's token-weighted group advantage (part B); see `rl.advantage.token_level_group_average`.

    A response weighs as many times as it has masked tokens. Shapes, returns and errors as `hierarchical`; needs no column.
    Source: HAPO (arXiv 2509.16591, equation 9).
    """
    nothing_B = torch.full(token_level_rewards.shape[:1], torch.nan)
    return _estimated(TOKEN_AVERAGE, token_level_rewards, response_mask, index, config, nothing_B, nothing_B)


@torch.no_grad()
def _estimated(
    estimator: str,
    reward_BT: torch.Tensor,
    mask_BT: torch.Tensor,
    index: Any,
    config: Any,
    budget_B: torch.Tensor,
    ceiling_B: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    device, rows = reward_BT.device, reward_BT.shape[0]
    tokens_B = mask_BT.sum(dim=-1)
    # NaN is "no reward": the row is in no group statistic. Rows that verl pads a batch with carry no loss token.
    reward_B = torch.where(tokens_B > 0, reward_BT.sum(dim=-1).double(), torch.nan)
    batch = ScoredBatch(
        reward_N=reward_B,
        group_N=_groups(index, rows).to(device),
        budget_N=budget_B.to(device),
        ceiling_N=ceiling_B.to(device),
        length_reward_N=torch.zeros_like(reward_B),
        correct_N=torch.zeros(rows, dtype=torch.bool, device=device),
        length_N=tokens_B.double(),
        max_length=reward_BT.shape[1],
    )
    advantage_BT = compute(batch, advantage_settings(config, estimator)).float()[:, None] * mask_BT
    return advantage_BT, advantage_BT


def _groups(index: Sequence[Any] | None, rows: int) -> torch.Tensor:
    """int64 (N): equal for rows that are compared, by the column ``group`` where there is one, else by verl's uid."""
    names = labels(GROUP, rows=rows)
    if names is None and index is None:
        raise MissingColumnError("a group advantage needs the column 'uid' of verl's batch", fix="let verl's trainer set it")
    names = [str(name) for name in index] if names is None and index is not None else names or []
    if len(names) != rows:
        raise ValueError(f"{len(names)} uids for {rows} rows")
    numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
    return torch.tensor([numbers[name] for name in names], dtype=torch.int64)
