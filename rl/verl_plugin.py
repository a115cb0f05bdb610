"""The verl plug-in: budget-rl's estimators, HAPO's policy loss and the reward manager under names that verl's config may use.

``VERL_USE_EXTERNAL_MODULES=rl.verl_plugin`` has verl import this module in the driver and in every worker, in the middle of its
own import. Importing it again, or reloading it, changes nothing. See docs/verl-plugin.md.

`algorithm.adv_estimator`: budget_rl_hierarchical, budget_rl_token_average; `actor.policy_loss.loss_mode`: budget_rl_hapo;
`reward.reward_manager.name`: budget_rl. The trainers that add the columns which the first and third of these need are in
`rl.verl_trainer`.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

from verl.experimental.reward_loop.reward_manager.registry import REWARD_MANAGER as REWARD_MANAGERS
from verl.trainer.ppo.core_algos import ADV_ESTIMATOR_REGISTRY, POLICY_LOSS_REGISTRY

from rl.errors import ConfigError
from rl.verl_estimators import hierarchical, token_average
from rl.verl_loss import hapo
from rl.verl_options import HIERARCHICAL, LOSS, REWARD_MANAGER, TOKEN_AVERAGE
from rl.verl_reward import BudgetRewardManager


def register() -> None:
    """Enter everything into verl's registries; harmless when done before. Raises ConfigError where a name is another's."""
    _enter(ADV_ESTIMATOR_REGISTRY, HIERARCHICAL, hierarchical)
    _enter(ADV_ESTIMATOR_REGISTRY, TOKEN_AVERAGE, token_average)
    _enter(POLICY_LOSS_REGISTRY, LOSS, hapo)
    _enter(REWARD_MANAGERS, REWARD_MANAGER, BudgetRewardManager)


def _enter(registry: MutableMapping[str, Any], name: str, entry: Any) -> None:
    """Not by verl's decorators: they refuse, or silently replace, an entry that a reload has made anew."""
    known = registry.get(name)
    if known is not None and (known.__module__, known.__qualname__) != (entry.__module__, entry.__qualname__):
        raise ConfigError(
            f"verl already has {name!r}, from {known.__module__}.{known.__qualname__}",
            fix="take the other module out of VERL_USE_EXTERNAL_MODULES, or register it under another name",
        )
    registry[name] = entry


register()
