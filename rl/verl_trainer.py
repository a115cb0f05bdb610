"""verl's own PPO trainers with the columns that verl does not carry: budgets for the advantages, entropies for the policy loss.

``VERL_USE_EXTERNAL_MODULES=rl.verl_plugin,rl.verl_trainer`` registers them; `trainer.v1.trainer_mode` chooses one:
budget_rl_sync, budget_rl_colocate_async, budget_rl_separate_async. Each is verl's trainer of the rest of its name in all but two
stages. Needs TransferQueue, which verl's trainers need and its plain installation leaves out. See docs/verl-plugin.md.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from omegaconf import DictConfig, open_dict
from tensordict import TensorDict

from rl.errors import ConfigError
from rl.verl_checks import check_config, check_keys, check_row, told_columns, uses_hapo
from rl.verl_columns import SIGNAL, Column, columns
from rl.verl_loss import batch_signal, with_signal
from rl.verl_options import ESTIMATORS, REWARD_MANAGER, heterogeneous_settings

try:
    import transfer_queue as tq  # pyright: ignore[reportMissingImports]
except ImportError as error:
    raise ConfigError("verl's trainers need the package TransferQueue", fix="pip install 'TransferQueue>=0.1.10'") from error

from verl.trainer.ppo.v1.trainer_base import TRAINER_REGISTRY, PPOTrainer
from verl.trainer.ppo.v1.trainer_colocate_async import PPOTrainerColocateAsync
from verl.trainer.ppo.v1.trainer_separate_async import PPOTrainerSeparateAsync
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync
from verl.utils.config import omega_conf_to_dataclass
from verl.workers.utils.losses import ppo_loss
from verl.workers.utils.padding import response_to_nested

PREFIX = "budget_rl_"


class BudgetColumns(PPOTrainer):
    """The two stages that differ; to be put in front of one of verl's trainers."""

    def __init__(self, config: DictConfig) -> None:
        with open_dict(config):
            # verl asks for its own names of modes in many places; ours has chosen this class and has done its work.
            config.trainer.v1.trainer_mode = config.trainer.v1.trainer_mode.removeprefix(PREFIX)
        check_config(config)
        super().__init__(config)

    def _init_dataloader(self) -> None:
        super()._init_dataloader()
        if self.config.reward.reward_manager.name == REWARD_MANAGER:
            check_row(self.train_dataset[0], self.config)

    def _setup(self) -> None:
        super()._setup()
        if uses_hapo(self.config):
            config = omega_conf_to_dataclass(self.config.actor_rollout_ref.actor)
            self.actor_rollout_wg.set_loss_fn(partial(with_signal, inner=partial(ppo_loss, config=config)))

    def _compute_advantage(self, batch: Any, metrics: dict[str, Any]) -> Any:
        if uses_hapo(self.config):
            self._put_signal(batch, metrics)
        found: dict[str, Column] = {}
        if self.config.algorithm.adv_estimator in ESTIMATORS:
            data = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=["extra_fields"])
            check_keys(batch.keys)
            # verl's queue wraps what is no tensor, or not, by its backend.
            extra: list[Any] = [getattr(fields, "data", fields) for fields in data["extra_fields"]]
            found = told_columns([fields.get("reward_extra_info", {}) for fields in extra])
        with columns(**found):
            return super()._compute_advantage(batch, metrics)

    def _put_signal(self, batch: Any, metrics: dict[str, Any]) -> None:
        """Add each token's signal, from the entropies that verl measured with the old log-probs, to the batch in the queue."""
        settings = heterogeneous_settings(self.config.actor_rollout_ref.actor.policy_loss)
        data = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=["entropy", "response_mask"])
        nested_mask = data["response_mask"]
        padded = data.to_padded_tensor()
        signal_BT, stats = batch_signal(padded["entropy"], padded["response_mask"], settings)
        nested = TensorDict({SIGNAL: response_to_nested(signal_BT, nested_mask)}, batch_size=len(batch))
        tq.kv_batch_put(keys=batch.keys, partition_id=batch.partition_id, fields=nested)
        metrics.update({"hapo/pivot": stats.pivot, "hapo/spread": stats.spread, "hapo/tokens": stats.tokens})


class BudgetSync(BudgetColumns, PPOTrainerSync):
    """Rollout and training take turns on the same GPUs."""


class BudgetColocateAsync(BudgetColumns, PPOTrainerColocateAsync):
    """The same GPUs, with rollouts that go on over a step's end."""


class BudgetSeparateAsync(BudgetColumns, PPOTrainerSeparateAsync):
    """GPUs of their own for rollouts; "the whole batch" of HAPO's statistics is one of the trainer's local updates."""


for _name, _trainer in {
    "sync": BudgetSync,
    "colocate_async": BudgetColocateAsync,
    "separate_async": BudgetSeparateAsync,
}.items():
    # Not by verl's decorator: it refuses the class that a reload has made anew.
    TRAINER_REGISTRY[PREFIX + _name] = _trainer
