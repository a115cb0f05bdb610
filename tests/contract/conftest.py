"""verl's configuration with the plug-in's names, composed once for the tests that use it."""

from __future__ import annotations

from copy import deepcopy
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from omegaconf import DictConfig

OVERRIDES = (
    "reward.reward_manager.name=budget_rl",
    "+reward.reward_kwargs.method=hbpo",
    "+reward.reward_kwargs.extract=whole",
    "actor_rollout_ref.actor.use_dynamic_bsz=true",
    "actor_rollout_ref.actor.policy_loss.loss_mode=budget_rl_hapo",
    "actor_rollout_ref.actor.policy_loss._target_=rl.verl_loss.HapoLossConfig",
    "+actor_rollout_ref.actor.policy_loss.heterogeneous={}",
    "actor_rollout_ref.actor.clip_ratio_low=0.2",
    "actor_rollout_ref.actor.clip_ratio_high=0.28",
    "actor_rollout_ref.actor.clip_ratio_c=10",
    "actor_rollout_ref.rollout.response_length=4096",
)


@pytest.fixture(scope="session")
def composed() -> DictConfig:
    from hydra import compose, initialize_config_module

    import rl.verl_plugin  # noqa: F401 - what the configuration names must be registered

    with initialize_config_module("verl.trainer.config", version_base=None):
        return compose("ppo_trainer", overrides=list(OVERRIDES))


@pytest.fixture
def config(composed: DictConfig) -> DictConfig:
    """verl's default configuration with what docs/verl-plugin.md sets."""
    return deepcopy(composed)
