"""What the verl trainers check before a run and read from a batch; importable without the queue that verl's trainers use."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from rl.errors import BudgetRLError, ConfigError
from rl.verl_columns import BUDGET, CEILING, GROUP, Column
from rl.verl_options import ESTIMATORS, HIERARCHICAL, LOSS, REWARD_MANAGER, advantage_settings, heterogeneous_settings
from rl.verl_reward import budget_of
from rl.verl_reward_settings import manager_settings


def uses_hapo(config: DictConfig) -> bool:
    return config.actor_rollout_ref.actor.policy_loss.loss_mode == LOSS


def told_columns(told: Sequence[Mapping[str, Any]]) -> dict[str, Column]:
    """The columns that the ``reward_extra_info`` of a batch's rows holds, in their order.

    ``budget`` and ``ceiling`` only where every row says something of them, None included; ``group`` only where every row has
    one. What is left out is refused by name where it is needed.
    """
    found: dict[str, Column] = {}
    for name, nothing in ((BUDGET, math.inf), (CEILING, math.nan)):
        if all(name in row for row in told):
            values = [nothing if row[name] is None else float(row[name]) for row in told]
            found[name] = torch.tensor(values, dtype=torch.float64)
    if told and all(row.get(GROUP) is not None for row in told):
        found[GROUP] = [str(row[GROUP]) for row in told]
    return found


def check_keys(keys: Sequence[str]) -> None:
    """Raise BudgetRLError for sessions of several outputs: each would count as an answer of its own in a group's statistics."""
    if any(key.rpartition("_")[2] != "0" for key in keys):
        raise BudgetRLError(
            "an agent loop gave several outputs for one session, which budget-rl's estimators would count as several answers",
            fix="use an agent loop with one output, or algorithm.adv_estimator=grpo",
        )


def check_config(config: DictConfig) -> None:
    """Raise ConfigError for a verl configuration whose parts do not fit together, before anything starts."""
    estimator = config.algorithm.adv_estimator
    is_ours = config.reward.reward_manager.name == REWARD_MANAGER
    reward = manager_settings(config).reward if is_ours else None
    if estimator in ESTIMATORS:
        advantage_settings(config.algorithm, estimator)
    if estimator == HIERARCHICAL and reward is not None and reward.method != "hbpo":
        raise ConfigError(
            f"algorithm.adv_estimator={HIERARCHICAL} compares with HBPO's ceilings, which reward method {reward.method} has not",
            fix="set +reward.reward_kwargs.method=hbpo, or another estimator",
        )
    if not uses_hapo(config):
        return
    heterogeneous_settings(config.actor_rollout_ref.actor.policy_loss)
    if (OmegaConf.select(config, "algorithm.rollout_correction") or {}).get("bypass_mode", False):
        raise ConfigError(
            f"{LOSS} needs the entropies of the sampling weights, which algorithm.rollout_correction.bypass_mode leaves out",
            fix="set algorithm.rollout_correction.bypass_mode=false",
        )
    if OmegaConf.select(config, "distillation.enabled"):
        raise ConfigError(f"{LOSS} and verl's distillation loss cannot be combined", fix="set distillation.enabled=false")


def check_row(row: Mapping[str, Any], config: DictConfig) -> None:
    """Raise ConfigError where the first row of the training data lacks the budget that the reward method needs."""
    settings = manager_settings(config)
    needs = settings.needs_budget or config.algorithm.adv_estimator == HIERARCHICAL
    if needs and math.isinf(budget_of(row, settings.budget)):
        raise ConfigError(
            f"the training data have no column extra_info.{settings.budget}: no answer has a budget",
            fix="add a number of tokens to each row, or name the column by +reward.reward_kwargs.budget",
        )
