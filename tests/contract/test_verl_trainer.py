"""verl's trainers with our columns, as far as a CPU goes: how they are found and built, and their stages over verl's queue."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transfer_queue as tq
from hydra import compose, initialize_config_module
from omegaconf import DictConfig, OmegaConf
from verl.trainer.ppo.v1 import get_trainer_cls
from verl.utils import tensordict_utils
from verl.utils.config import omega_conf_to_dataclass
from verl.workers.utils.losses import ppo_loss

import rl.verl_plugin  # noqa: F401 - registers
from rl.errors import ConfigError
from rl.verl_columns import SIGNAL, MissingColumnError
from rl.verl_loss import with_signal
from rl.verl_trainer import BudgetColocateAsync, BudgetSeparateAsync, BudgetSync

ROOT = Path(__file__).parent.parent.parent
OVERRIDES = (
    "trainer.v1.trainer_mode=budget_rl_sync",
    "algorithm.adv_estimator=budget_rl_hierarchical",
    "reward.reward_manager.name=budget_rl",
    "+reward.reward_kwargs.method=hbpo",
    "actor_rollout_ref.actor.use_dynamic_bsz=true",
    "actor_rollout_ref.actor.policy_loss.loss_mode=budget_rl_hapo",
    "actor_rollout_ref.actor.clip_ratio_high=0.28",
    "actor_rollout_ref.actor.clip_ratio_c=10",
)
BUDGETS = (512, 512, 1024, 1024, 2048, 2048, 2560, 2560)
CEILINGS = (3.923141, 3.923141, 3.695518, 3.695518, 2.828427, 2.828427, 2.222281, 2.222281)
REWARDS = (3.923141, 3.810838, 3.695518, 0.0, 2.828427, 2.036238, 0.0, 2.222281)
ADVANTAGES = (0.952658, 0.882228, -0.981701, -3.299311, -0.073825, -0.570639, -2.562693, -1.169010)
ENTROPIES = ((0.002, 0.35, 1.9, 0.04, 0.9, 0.0001, 2.0, 0.5), (0.6, 0.0, 2.3, 0.15, 0.01, 0.7, 0.02))


def composed(*overrides: str) -> DictConfig:
    with initialize_config_module("verl.trainer.config", version_base=None):
        return compose("ppo_trainer", overrides=[*OVERRIDES, *overrides])


@pytest.fixture(scope="module")
def queue(ray_cluster: None) -> Iterator[None]:
    """verl's queue of samples, running."""
    tq.init(OmegaConf.create({"backend": {"SimpleStorage": {"num_data_storage_units": 1}}}))
    yield
    tq.close()


def put(told: list[dict[str, Any]], *, lengths: tuple[int, ...] = (8, 7, 1, 2, 3, 4, 5, 6)) -> tq.KVBatchMeta:
    """Eight answers of one question as verl's rollout and its old log-probs leave them in the queue."""
    rows, keys = [], [f"q{place}_0_0" for place in range(len(told))]
    for place, (info, length) in enumerate(zip(told, lengths, strict=True)):
        entropy = torch.tensor(ENTROPIES[place]) if place < len(ENTROPIES) else torch.full((length,), 0.9)
        rm_scores = torch.zeros(length)
        rm_scores[-1] = REWARDS[place]
        rows.append(
            {
                "uid": f"q{place}",
                "prompts": torch.ones(3, dtype=torch.long),
                "responses": torch.ones(length, dtype=torch.long),
                "response_mask": torch.ones(length, dtype=torch.long),
                "rm_scores": rm_scores,
                "old_log_probs": torch.zeros(length),
                "entropy": entropy,
                "extra_fields": {"reward_extra_info": info},
            }
        )
    fields = tensordict_utils.list_of_dict_to_tensordict(rows)
    return tq.kv_batch_put(keys=keys, partition_id="train", fields=fields, tags=[{}] * len(keys))


def told(**left_out: Any) -> list[dict[str, Any]]:
    rows = zip(BUDGETS, CEILINGS, strict=True)
    return [{"budget": float(b), "ceiling": c, "group": "q"} | left_out for b, c in rows]


def test_its_names_are_verls_trainers() -> None:
    for name, trainer in (("sync", BudgetSync), ("colocate_async", BudgetColocateAsync), ("separate_async", BudgetSeparateAsync)):
        assert get_trainer_cls(f"budget_rl_{name}") is trainer
        assert issubclass(trainer, get_trainer_cls(name))


def test_verl_is_asked_to_train_in_its_own_mode() -> None:
    trainer = BudgetSync(composed())
    assert trainer.trainer_mode == trainer.config.trainer.v1.trainer_mode == "sync"


def test_a_run_that_cannot_work_is_refused_when_it_is_built() -> None:
    with pytest.raises(ConfigError, match="did you mean centre"):
        BudgetSync(composed("+algorithm.budget_rl.center=batch"))


def test_budgets_and_entropies_reach_verls_advantages_and_its_loss(queue: None) -> None:
    trainer, metrics = BudgetSync(composed()), {}
    batch = put(told())
    batch = trainer._compute_advantage(batch, metrics)
    # What a worker of verl is then given: all fields of the batch.
    data = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id)
    assert [float(row[0]) for row in data["advantages"]] == pytest.approx(ADVANTAGES, abs=1e-5)
    signal = [row.tolist() for row in data[SIGNAL]]
    assert signal[0][:3] == pytest.approx([-0.333559, -0.051567, 0.796375], abs=1e-5)
    assert signal[1] == pytest.approx([-0.022138, -1, 1, -0.097828, -0.245686, -0.013722, -0.207840], abs=1e-5)
    assert signal[2:] == [pytest.approx([0.0] * (place + 1), abs=1e-6) for place in range(6)]
    assert metrics["hapo/tokens"] == 36
    tensordict_utils.assign_non_tensor(data, dp_size=1, batch_num_tokens=36, global_batch_size=8)
    lengths = data["responses"].offsets().diff().tolist()
    output = {"log_probs": torch.nested.as_nested_tensor([torch.zeros(3 + n) for n in lengths], layout=torch.jagged)}
    actor = omega_conf_to_dataclass(trainer.config.actor_rollout_ref.actor)
    loss, _ = with_signal(inner=partial(ppo_loss, config=actor), model_output=output, data=data)
    # At ratio 1 every token is inside the neutral zone: what is sure counts less, what is not counts as it is.
    damped = sum(a * (1 + min(s, 0.0)) for a, row in zip(ADVANTAGES, signal, strict=True) for s in row)
    assert float(loss) == pytest.approx(-damped / 36, abs=1e-5)


def test_answers_whose_rewards_say_nothing_of_a_budget_are_refused_by_its_name(queue: None) -> None:
    with pytest.raises(MissingColumnError, match="column 'budget'"):
        BudgetSync(composed())._compute_advantage(put([{"acc": 1.0}] * 8), {})


def test_importing_verl_with_the_variable_set_brings_the_trainers() -> None:
    # As verl's task runner asks for one, in a process in which nothing but the variable names us.
    asks = "import verl; from verl.trainer.ppo.v1 import get_trainer_cls as g; print(g('budget_rl_sync').__module__)"
    environment = os.environ | {"VERL_USE_EXTERNAL_MODULES": "rl.verl_plugin,rl.verl_trainer"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), environment.get("PYTHONPATH")]))
    done = subprocess.run([sys.executable, "-c", asks], env=environment, capture_output=True, text=True, timeout=300)
    assert done.stdout.split() == ["rl.verl_trainer"], done.stderr
