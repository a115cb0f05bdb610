"""The verl plug-in registers when verl is imported, and its advantages through verl's own `compute_advantage` are ours."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from tensordict import TensorDict
from verl import DataProto
from verl.trainer.ppo.core_algos import ADV_ESTIMATOR_REGISTRY, POLICY_LOSS_REGISTRY, get_adv_estimator_fn
from verl.trainer.ppo.ray_trainer import compute_advantage

import rl
import rl.verl_plugin
from reward import budget
from rl.advantage import hierarchical, token_level_group_average
from rl.errors import ConfigError
from rl.losses import policy_loss
from rl.verl_columns import MissingColumnError, columns

ROOT = Path(__file__).parent.parent.parent
NAMES = "budget_rl_hierarchical", "budget_rl_token_average"

# ---- registration ------------------------------------------------------------------------------------------------------


def test_importing_verl_with_the_variable_set_registers_everything() -> None:
    # The plug-in is imported by verl, in the middle of verl's own import; nothing here names it.
    asks = (
        "import verl, sys; assert 'rl.verl_plugin' in sys.modules; assert 'rl.cluster' not in sys.modules; "
        "from verl.trainer.ppo.core_algos import get_adv_estimator_fn as a, get_policy_loss_fn as p; "
        "from verl.experimental.reward_loop.reward_manager import get_reward_manager_cls as r; "
        "print(a('budget_rl_hierarchical').__name__, a('budget_rl_token_average').__name__, p('budget_rl_hapo').__name__, "
        "r('budget_rl').__name__)"
    )
    environment = os.environ | {"VERL_USE_EXTERNAL_MODULES": "rl.verl_plugin", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", asks], env=environment, capture_output=True, text=True, timeout=300)
    assert done.stdout.split() == ["hierarchical", "token_average", "hapo", "BudgetRewardManager"], done.stderr


def test_importing_it_again_changes_nothing() -> None:
    before = dict(ADV_ESTIMATOR_REGISTRY), dict(POLICY_LOSS_REGISTRY)
    importlib.reload(rl.verl_plugin)
    rl.verl_plugin.register()
    assert before == (ADV_ESTIMATOR_REGISTRY, POLICY_LOSS_REGISTRY)


def test_functions_made_anew_by_a_reload_take_the_place_of_the_old(monkeypatch: pytest.MonkeyPatch) -> None:
    plugin, old = rl.verl_plugin, get_adv_estimator_fn(NAMES[0])
    for module in ("rl.verl_plugin", "rl.verl_estimators"):
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setattr(rl, "verl_plugin", plugin)
    importlib.import_module("rl.verl_plugin")
    new = get_adv_estimator_fn(NAMES[0])
    plugin.register()  # as it was
    assert new is not old
    assert get_adv_estimator_fn(NAMES[0]) is old


def test_a_name_that_belongs_to_another_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(POLICY_LOSS_REGISTRY, "budget_rl_hapo", policy_loss)
    with pytest.raises(ConfigError, match="verl already has 'budget_rl_hapo', from rl.losses.policy_loss"):
        rl.verl_plugin.register()


# ---- advantages --------------------------------------------------------------------------------------------------------


def batch_of(rewards: Sequence[float], lengths: Sequence[int], uids: Sequence[str]) -> DataProto:
    """What verl's advantage stage holds: the reward at the last token of each response."""
    longest = max(*lengths, 1)
    mask_BT = (torch.arange(longest) < torch.tensor(lengths)[:, None]).long()
    reward_BT = torch.zeros(len(rewards), longest)
    for row, (reward, length) in enumerate(zip(rewards, lengths, strict=True)):
        reward_BT[row, max(length - 1, 0)] = reward
    batch = TensorDict({"token_level_rewards": reward_BT, "response_mask": mask_BT}, batch_size=len(rewards))
    return DataProto(batch=batch, non_tensor_batch={"uid": np.array(uids, dtype=object)})


def advantages(data: DataProto, estimator: str, options: Mapping[str, Any] | None = None) -> torch.Tensor:
    algorithm = OmegaConf.create({} if options is None else {"budget_rl": dict(options)})
    OmegaConf.set_struct(algorithm, True)
    return compute_advantage(data, adv_estimator=estimator, config=algorithm).batch["advantages"]


HBPO_BUDGETS = torch.tensor([512.0, 512, 1024, 1024, 2048, 2048, 2560, 2560], dtype=torch.float64)
HBPO_CEILINGS = budget.budget_ceiling(HBPO_BUDGETS, max_length=4096)
HBPO_REWARDS = (3.923141, 3.810838, 3.695518, 0.0, 2.828427, 2.036238, 0.0, 2.222281)
HBPO_ADVANTAGES = (0.952658, 0.882228, -0.981701, -3.299311, -0.073825, -0.570639, -2.562693, -1.169010)
HBPO_LENGTHS = (3, 1, 4, 2, 2, 5, 1, 3)


def test_hbpo_advantages_through_verl_have_the_values_worked_by_hand() -> None:
    data = batch_of(HBPO_REWARDS, HBPO_LENGTHS, ["q"] * 8)
    with columns(budget=HBPO_BUDGETS, ceiling=HBPO_CEILINGS):
        found = advantages(data, "budget_rl_hierarchical")
    expected = torch.tensor(HBPO_ADVANTAGES)[:, None] * data.batch["response_mask"]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(data.batch["returns"], found)
    ours = hierarchical(torch.tensor(HBPO_REWARDS), torch.zeros(8, dtype=torch.long), HBPO_BUDGETS, HBPO_CEILINGS)
    torch.testing.assert_close(found[:, 0], ours, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("rewards", "lengths", "expected"),
    [
        ((1, -1, 1, -1), (3, 5, 2, 4), (1.341639, -0.745355, 1.341639, -0.745355)),
        ((1, -1, -1, -1), (2, 2, 6, 4), (2.449486, -0.408248, -0.408248, -0.408248)),
        ((1, -1, -1, -1), (1, 10, 10, 9), (1.499999, -0.5, -0.5, -0.5)),
    ],
)
def test_hapo_advantages_through_verl_have_the_values_worked_by_hand(
    rewards: tuple[int, ...], lengths: tuple[int, ...], expected: tuple[float, ...]
) -> None:
    data = batch_of(rewards, lengths, ["q"] * 4)
    found = advantages(data, "budget_rl_token_average")
    torch.testing.assert_close(found, torch.tensor(expected)[:, None] * data.batch["response_mask"], atol=1e-5, rtol=0)
    ours = token_level_group_average(torch.tensor(rewards).float(), torch.tensor(lengths), torch.zeros(4, dtype=torch.long))
    torch.testing.assert_close(found[:, 0], ours, atol=1e-6, rtol=0)


def test_groups_are_verls_uids_in_any_order() -> None:
    rewards, lengths = (1.0, 1.0, -1.0, -1.0), (3, 2, 5, 4)
    alone = advantages(batch_of(rewards, lengths, ["q"] * 4), "budget_rl_token_average")[:, 0]
    mixed = advantages(
        batch_of((*rewards[:2], 7.0, *rewards[2:]), (*lengths[:2], 3, *lengths[2:]), ["q", "q", "other", "q", "q"]),
        "budget_rl_token_average",
    )[:, 0]
    torch.testing.assert_close(mixed, torch.cat([alone[:2], torch.zeros(1), alone[2:]]))


def test_rows_of_one_question_are_one_group_where_the_data_say_so() -> None:
    # verl gives each row of the data set a uid of its own; rows that differ in the budget alone are compared by this column.
    data = batch_of(HBPO_REWARDS, HBPO_LENGTHS, list("abcdefgh"))
    with columns(budget=HBPO_BUDGETS, ceiling=HBPO_CEILINGS, group=["q"] * 8):
        found = advantages(data, "budget_rl_hierarchical")[:, 0]
    torch.testing.assert_close(found, torch.tensor(HBPO_ADVANTAGES), atol=1e-5, rtol=0)


def test_a_row_that_verl_pads_a_batch_with_is_in_no_statistic() -> None:
    data = batch_of((*HBPO_REWARDS, 9.0), (*HBPO_LENGTHS, 0), ["q"] * 9)
    with columns(budget=torch.cat([HBPO_BUDGETS, HBPO_BUDGETS[:1]]), ceiling=torch.cat([HBPO_CEILINGS, HBPO_CEILINGS[:1]])):
        found = advantages(data, "budget_rl_hierarchical")
    torch.testing.assert_close(found[:, 0], torch.tensor((*HBPO_ADVANTAGES, 0.0)), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("estimator", "options", "check"),
    [
        (NAMES[0], {"centre": "batch"}, lambda found: abs(float(found.mean())) < 1e-6),
        (NAMES[0], {"intra_coef": 0.0}, lambda found: abs(float(found.mean())) < 1e-5),
        (NAMES[0], {"intra_coef": 0.0, "std_floor": 1e9}, lambda found: float(found.abs().max()) < 1e-8),
    ],
)
def test_options_come_from_verls_algorithm_section(estimator: str, options: Mapping[str, Any], check: Any) -> None:
    data = batch_of(HBPO_REWARDS, HBPO_LENGTHS, ["q"] * 8)
    with columns(budget=HBPO_BUDGETS, ceiling=HBPO_CEILINGS):
        assert check(advantages(data, estimator, options)[:, 0])
        assert not check(advantages(data, estimator)[:, 0])


def test_the_guard_against_lopsided_groups_can_be_switched_off() -> None:
    data = batch_of((1, -1, -1, -1), (1, 10, 10, 9), ["q"] * 4)
    found = advantages(data, "budget_rl_token_average", {"guard": None})[:, 0]
    # The worked values leave out the 1e-6 that is added to the spread.
    torch.testing.assert_close(found, torch.tensor([5.385165, -0.185695, -0.185695, -0.185695]), atol=2e-5, rtol=0)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"centr": "batch"}, r"unknown option algorithm.budget_rl.centr; did you mean centre\?"),
        ({"guard": 5.0}, "budget_rl_hierarchical reads intra_coef"),
        ({"centre": "all"}, "algorithm.budget_rl.centre: Input should be"),
    ],
)
def test_options_that_cannot_act_are_refused(options: Mapping[str, Any], says: str) -> None:
    data = batch_of(HBPO_REWARDS, HBPO_LENGTHS, ["q"] * 8)
    with columns(budget=HBPO_BUDGETS, ceiling=HBPO_CEILINGS), pytest.raises(ConfigError, match=says):
        advantages(data, "budget_rl_hierarchical", options)


@pytest.mark.parametrize("missing", ["budget", "ceiling"])
def test_without_a_column_the_estimator_refuses_by_name(missing: str) -> None:
    given = {"budget": HBPO_BUDGETS, "ceiling": HBPO_CEILINGS}
    del given[missing]
    with columns(**given), pytest.raises(MissingColumnError, match=rf"column '{missing}'.*\n.*reward_manager.name=budget_rl"):
        advantages(batch_of(HBPO_REWARDS, HBPO_LENGTHS, ["q"] * 8), "budget_rl_hierarchical")


def test_columns_end_with_their_block_and_must_fit_the_batch() -> None:
    with columns(budget=HBPO_BUDGETS[:4], ceiling=HBPO_CEILINGS), pytest.raises(ValueError, match="has 4 rows, the batch has 8"):
        advantages(batch_of(HBPO_REWARDS, HBPO_LENGTHS, ["q"] * 8), "budget_rl_hierarchical")
    with pytest.raises(MissingColumnError):
        advantages(batch_of(HBPO_REWARDS, HBPO_LENGTHS, ["q"] * 8), "budget_rl_hierarchical")
