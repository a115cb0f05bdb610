"""The verl plug-in through verl's own entry points: registries, `compute_advantage`, `ppo_loss` and the reward loop's worker."""

from __future__ import annotations

import asyncio
import importlib
import math
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_module
from hydra.errors import InstantiationException
from omegaconf import DictConfig, OmegaConf, open_dict
from tensordict import TensorDict
from verl import DataProto
from verl.experimental.reward_loop.reward_loop import RewardLoopWorker
from verl.experimental.reward_loop.reward_manager import get_reward_manager_cls
from verl.trainer.ppo.core_algos import ADV_ESTIMATOR_REGISTRY, POLICY_LOSS_REGISTRY, get_adv_estimator_fn, get_policy_loss_fn
from verl.trainer.ppo.ray_trainer import compute_advantage
from verl.utils import tensordict_utils
from verl.utils.config import omega_conf_to_dataclass
from verl.workers.utils.losses import ppo_loss

import rl
import rl.verl_plugin
from reward import budget
from rl.advantage import hierarchical, token_level_group_average
from rl.embedded import EOS, tiny_tokenizer
from rl.errors import BudgetRLError, ConfigError
from rl.losses import Heterogeneous, policy_loss
from rl.objective_settings import HeterogeneousSettings
from rl.reward_settings import RewardSettings
from rl.verl_checks import check_config, check_keys, check_row, told_columns
from rl.verl_columns import SIGNAL, MissingColumnError, columns
from rl.verl_loss import HapoLossConfig, batch_signal, with_signal
from rl.verl_reward import BudgetRewardManager, UnscoredError
from rl.verl_reward_settings import ALONE, manager_settings, reward_parts

ROOT = Path(__file__).parent.parent.parent
NAMES = "budget_rl_hierarchical", "budget_rl_token_average"
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


@pytest.fixture(scope="module")
def composed() -> DictConfig:
    with initialize_config_module("verl.trainer.config", version_base=None):
        return compose("ppo_trainer", overrides=list(OVERRIDES))


@pytest.fixture
def config(composed: DictConfig) -> DictConfig:
    """verl's default configuration with what docs/verl-plugin.md sets."""
    return deepcopy(composed)


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


# ---- the policy loss ---------------------------------------------------------------------------------------------------

ENTROPIES = ([0.002, 0.35, 1.9, 0.04, 0.9, 0.0001, 2.0, 0.5], [0.6, 0.0, 2.3, 0.15, 0.01, 0.7, 0.02])
RATIOS = ([1.0, 1.12, 1.5, 0.85, 1.3, 0.55, 1.2, 1.05], [0.95, 0.7, 0.8, 1.35, 0.65, 1.0, 0.88])
HAPO_ADVANTAGES = (0.8, -1.25)
PROMPTS = (3, 5)


def nested(rows: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.nested.as_nested_tensor(list(rows), layout=torch.jagged)


def micro_batch(
    rows: Sequence[int], settings: HeterogeneousSettings | None, *, dp_size: int = 1, tokens: int = 15, sequences: int = 2
) -> tuple[dict[str, torch.Tensor], TensorDict, list[torch.Tensor]]:
    """Model output and data of a micro-batch as verl's engines hand them to a loss, and the leaves that get the gradient."""
    padded = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in ENTROPIES], batch_first=True)
    mask_BT = torch.arange(8) < torch.tensor([8, 7])[:, None]
    logps = [torch.log(torch.tensor(RATIOS[row])).requires_grad_() for row in rows]
    # Position t of the output speaks of token t + 1: the response's values start one before it, and the last says nothing.
    output = [torch.cat([torch.zeros(PROMPTS[row] - 1), logp, torch.zeros(1)]) for row, logp in zip(rows, logps, strict=True)]
    fields = {
        "prompts": nested([torch.ones(PROMPTS[row], dtype=torch.long) for row in rows]),
        "responses": nested([torch.ones(len(RATIOS[row]), dtype=torch.long) for row in rows]),
        "response_mask": nested([torch.ones(len(RATIOS[row]), dtype=torch.long) for row in rows]),
        "old_log_probs": nested([torch.zeros(len(RATIOS[row])) for row in rows]),
        "advantages": nested([torch.full((len(RATIOS[row]),), HAPO_ADVANTAGES[row]) for row in rows]),
    }
    if settings is not None:
        signal_BT, _ = batch_signal(padded, mask_BT, settings)
        fields[SIGNAL] = nested([signal_BT[row, : len(RATIOS[row])] for row in rows])
    data = TensorDict(fields, batch_size=len(rows))
    tensordict_utils.assign_non_tensor(data, dp_size=dp_size, batch_num_tokens=tokens, global_batch_size=sequences)
    return {"log_probs": nested(output)}, data, logps


def lost(config: DictConfig, output: Any, data: Any) -> tuple[torch.Tensor, dict[str, Any]]:
    """As verl's engine calls the loss that `rl.verl_trainer` gives its workers."""
    loss = partial(with_signal, inner=partial(ppo_loss, config=omega_conf_to_dataclass(config.actor_rollout_ref.actor)))
    return loss(model_output=output, data=data, dp_group=None)


RECOMMENDED = HeterogeneousSettings()
CASES = {
    "recommended": (RECOMMENDED, 0.28, 0.048166),
    "signed, 0.2/0.2, base zone": (RECOMMENDED, 0.2, 0.062835),
    "signed, 0.2/0.28, adapted zone": (HeterogeneousSettings(zone="adapted"), 0.28, 0.087392),
    "published code": (HeterogeneousSettings(literal=True, zone="adapted"), 0.2, 0.142496),
}


@pytest.mark.parametrize("case", CASES)
def test_hapo_loss_through_verl_has_the_values_worked_by_hand(case: str, config: DictConfig) -> None:
    settings, high, expected = CASES[case]
    config.actor_rollout_ref.actor.clip_ratio_high = high
    with open_dict(config):
        config.actor_rollout_ref.actor.policy_loss.heterogeneous = {"literal": settings.literal, "zone": settings.zone}
    output, data, _ = micro_batch((0, 1), settings)
    loss, metrics = lost(config, output, data)
    assert float(loss) == pytest.approx(expected, abs=1e-6)
    assert metrics["actor/pg_loss"].aggregate() == pytest.approx(expected, abs=1e-6)


def test_hapo_loss_through_verl_is_ours_with_its_gradient(config: DictConfig) -> None:
    output, data, logps = micro_batch((0, 1), RECOMMENDED)
    loss, metrics = lost(config, output, data)
    loss.backward()
    logp_T = torch.log(torch.tensor(RATIOS[0] + RATIOS[1])).requires_grad_()
    advantage_T = torch.tensor([HAPO_ADVANTAGES[0]] * 8 + [HAPO_ADVANTAGES[1]] * 7)
    signal_BT, _ = batch_signal(torch.tensor([ENTROPIES[0] + ENTROPIES[1]]), torch.ones(1, 15), RECOMMENDED)
    ours = policy_loss(
        *(logp_T, torch.zeros(15), advantage_T, torch.ones(15, dtype=torch.bool)),
        dual_clip=10.0,
        heterogeneous=Heterogeneous(signal_BT[0]),
    )
    (ours.loss / 15).backward()
    assert logp_T.grad is not None
    torch.testing.assert_close(torch.cat([logp.grad for logp in logps if logp.grad is not None]), logp_T.grad)
    assert metrics["actor/hapo_redistributed"].aggregate() == pytest.approx(int(ours.redistributed) / 15)
    assert metrics["actor/pg_clipfrac"].aggregate() == pytest.approx(int(ours.clipped_T.sum()) / 15)


def test_hapo_loss_does_not_depend_on_how_micro_batches_are_cut(config: DictConfig) -> None:
    whole, _ = lost(config, *micro_batch((0, 1), RECOMMENDED)[:2])
    parts = [lost(config, *micro_batch((row,), RECOMMENDED)[:2])[0] for row in (0, 1)]
    torch.testing.assert_close(sum(parts), whole)


def test_two_ranks_lose_together_what_one_loses(config: DictConfig) -> None:
    # Gradients are averaged over ranks, so each rank's loss is scaled by their number.
    whole, _ = lost(config, *micro_batch((0, 1), RECOMMENDED)[:2])
    ranks = [lost(config, *micro_batch((row,), RECOMMENDED, dp_size=2)[:2])[0] for row in (0, 1)]
    torch.testing.assert_close((ranks[0] + ranks[1]) / 2, whole)


@pytest.mark.parametrize(
    "mode", ["token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"]
)
def test_without_any_difference_of_entropy_it_is_verls_own_loss(mode: str, config: DictConfig) -> None:
    generator = torch.Generator().manual_seed(3)
    old, new, advantage = (3 * torch.randn(4, 6, generator=generator) for _ in range(3))
    weight = torch.rand(4, 6, generator=generator)
    mask = torch.arange(6) < torch.tensor([6, 4, 1, 5])[:, None]
    actor = omega_conf_to_dataclass(config.actor_rollout_ref.actor)
    actor.global_batch_info.update(dp_size=2, batch_num_tokens=40, global_batch_size=8, loss_scale_factor=None)
    found = {}
    for name in ("vanilla", "budget_rl_hapo"):
        logp = new.clone().requires_grad_()
        with columns(**{SIGNAL: torch.zeros(4, 6)}):
            loss, metrics = get_policy_loss_fn(name)(
                old_log_prob=old,
                log_prob=logp,
                advantages=advantage,
                response_mask=mask,
                loss_agg_mode=mode,
                config=actor,
                rollout_is_weights=weight,
            )
        found[name] = loss, torch.autograd.grad(loss, logp)[0], metrics
    for one, other in zip(found["vanilla"][:2], found["budget_rl_hapo"][:2], strict=True):
        torch.testing.assert_close(one, other)
    assert found["vanilla"][2]["actor/pg_clipfrac_lower"] > 0  # the dual clip is at work, too
    for name, value in found["vanilla"][2].items():
        assert found["budget_rl_hapo"][2][name] == pytest.approx(value, rel=1e-5, abs=1e-6)


def test_without_the_signal_the_loss_refuses_by_name(config: DictConfig) -> None:
    output, data, _ = micro_batch((0, 1), None)
    with pytest.raises(MissingColumnError, match="column 'budget_rl_signal'.*\n.*trainer_mode=budget_rl_sync"):
        lost(config, output, data)


def test_verls_other_losses_run_as_ever_in_our_workers(config: DictConfig) -> None:
    config.actor_rollout_ref.actor.policy_loss.loss_mode = "vanilla"
    output, data, _ = micro_batch((0, 1), None)
    assert float(lost(config, output, data)[0]) == pytest.approx(0.104067, abs=1e-6)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"kapa": 1}, "unknown option actor_rollout_ref.actor.policy_loss.heterogeneous.kapa"),
        ({"entropy": "current"}, "heterogeneous.entropy"),
        ({"clip_kappa": 2.0}, "heterogeneous.clip_kappa: Input should be less than or equal to 1"),
        ({"clip": False, "redistribute": False}, "switch one on"),
    ],
)
def test_options_of_the_loss_are_checked_when_verl_reads_its_configuration(
    options: Mapping[str, Any], says: str, config: DictConfig
) -> None:
    with open_dict(config):
        config.actor_rollout_ref.actor.policy_loss.heterogeneous = dict(options)
    with pytest.raises(InstantiationException, match=says):
        omega_conf_to_dataclass(config.actor_rollout_ref.actor)
    with pytest.raises(ConfigError, match=says):
        check_config(config)


def test_the_loss_runs_with_verls_plain_section_too(config: DictConfig) -> None:
    section = config.actor_rollout_ref.actor.policy_loss
    with open_dict(config):
        section.pop("heterogeneous")
    section._target_ = "verl.workers.config.PolicyLossConfig"
    output, data, _ = micro_batch((0, 1), RECOMMENDED)
    assert float(lost(config, output, data)[0]) == pytest.approx(0.048166, abs=1e-6)


def test_statistics_are_of_the_masked_tokens_of_the_whole_batch() -> None:
    padded = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in ENTROPIES], batch_first=True, padding_value=99.0)
    signal_BT, stats = batch_signal(padded, torch.arange(8) < torch.tensor([8, 7])[:, None], RECOMMENDED)
    assert (stats.tokens, stats.pivot) == (15, pytest.approx(math.log(0.9), abs=1e-6))
    expected = torch.tensor([-0.333559, -0.051567, 0.796375, -0.169995, 0.0, -0.497124, 0.851043, -0.032093])
    torch.testing.assert_close(signal_BT[0], expected, atol=1e-5, rtol=0)
    assert float(signal_BT[1, 7]) == 0.0


# ---- the reward manager ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny_tokenizer().save_pretrained(folder)
    return folder


def rewarded(
    config: DictConfig,
    folder: Path,
    answers: Sequence[tuple[str, int]],
    row: Mapping[str, Any],
    options: Mapping[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """The answers, padded to their lengths by line breaks and ended, scored by verl's own worker of the reward loop."""
    config.actor_rollout_ref.model.path = str(folder)
    with open_dict(config):
        config.reward.reward_kwargs.update(dict(options or {}))
    tokenizer = tiny_tokenizer()
    batches = []
    for text, length in answers:
        ids = tokenizer.encode(text, add_special_tokens=False)
        ids = [*tokenizer.encode("\n") * (length - 1 - len(ids)), *ids, tokenizer.convert_tokens_to_ids(EOS)]
        batches.append(sample(ids, row))
    worker = RewardLoopWorker(config)
    manager = worker.reward_manager
    assert isinstance(manager, BudgetRewardManager)

    async def scored() -> list[dict[str, Any]]:
        return list(await asyncio.gather(*(worker.compute_score(data) for data in batches)))

    try:
        return asyncio.run(scored())
    finally:
        manager.close()


def sample(ids: Sequence[int], row: Mapping[str, Any]) -> DataProto:
    """One answer as verl's agent loop hands it to the reward loop."""
    prompts, responses = torch.ones(1, 4, dtype=torch.long), torch.tensor([list(ids)])
    batch = TensorDict(
        {"prompts": prompts, "responses": responses, "attention_mask": torch.ones(1, 4 + len(ids), dtype=torch.long)},
        batch_size=1,
    )
    return DataProto(batch=batch, non_tensor_batch={name: np.array([value], dtype=object) for name, value in row.items()})


def row_of(**extra: Any) -> dict[str, Any]:
    return {"data_source": "sums", "reward_model": {"ground_truth": "7"}, "extra_info": extra}


def test_hbpo_rewards_through_verls_worker_have_the_values_worked_by_hand(config: DictConfig, model_folder: Path) -> None:
    found = rewarded(config, model_folder, [("7", 300), ("7", 600), ("7", 1500), ("8", 600)], row_of(budget=512))
    assert [answer["reward_score"] for answer in found] == pytest.approx([3.923141, 3.873093, 3.115030, 0.0], abs=1e-5)
    told = [answer["reward_extra_info"] for answer in found]
    assert [info["correct"] for info in told] == [1.0, 1.0, 1.0, 0.0]
    assert [info["length"] for info in told] == [300, 600, 1500, 600]
    assert {info["budget"] for info in told} == {512.0}
    assert [info["ceiling"] for info in told] == pytest.approx([3.923141] * 4, abs=1e-5)
    assert [info["verdict"] for info in told] == ["correct", "correct", "correct", "wrong"]


def test_what_the_manager_says_of_answers_is_what_the_estimator_needs(config: DictConfig, model_folder: Path) -> None:
    rows = [row_of(budget=budget_tokens, group="q1") for budget_tokens in (512, 1024)]
    told = [rewarded(config, model_folder, [("7", 300)], row)[0]["reward_extra_info"] for row in rows]
    told.append(rewarded(config, model_folder, [("7", 300)], row_of(group="q2"))[0]["reward_extra_info"])
    found = told_columns(told)
    torch.testing.assert_close(found["budget"], torch.tensor([512.0, 1024.0, math.inf], dtype=torch.float64))
    expected = torch.tensor([3.923141, 3.695518, math.nan], dtype=torch.float64)
    torch.testing.assert_close(found["ceiling"], expected, atol=1e-5, rtol=0, equal_nan=True)
    assert found["group"] == ["q1", "q1", "q2"]
    with columns(**found):
        advantages(batch_of((1, 2, 3), (1, 1, 1), list("abc")), "budget_rl_hierarchical")


def test_what_rewards_do_not_say_is_left_out_and_so_refused() -> None:
    assert told_columns([{"acc": 1.0, "budget": 5.0}, {"acc": 0.0}]) == {}


def test_an_answer_that_was_cut_counts_as_wrong_and_says_so(config: DictConfig, model_folder: Path) -> None:
    config.actor_rollout_ref.rollout.response_length = 3
    config.actor_rollout_ref.model.path = str(model_folder)
    worker, ids = RewardLoopWorker(config), tiny_tokenizer().encode("7 = 7", add_special_tokens=False)
    found = asyncio.run(worker.compute_score(sample(ids, row_of(budget=2))))
    assert (found["reward_score"], found["reward_extra_info"]["verdict"]) == (0.0, "truncated")


def test_an_answer_without_the_part_to_judge_is_malformed(config: DictConfig, model_folder: Path) -> None:
    found = rewarded(config, model_folder, [("7", 30)], row_of(budget=512), {"extract": "after_think"})
    assert (found[0]["reward_score"], found[0]["reward_extra_info"]["verdict"]) == (0.0, "malformed")


def test_a_grader_that_overruns_gives_no_number(config: DictConfig, model_folder: Path) -> None:
    with pytest.raises(UnscoredError, match="timed_out"):
        rewarded(config, model_folder, [("7", 30)], row_of(budget=512), {"grade_deadline_s": 1e-9})


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("async def compute_score(**_):\n    await __import__('asyncio').Event().wait()", "no score within 0.05 s"),
        ("def compute_score(**_):\n    raise KeyError('judge')", "compute_score raised KeyError: 'judge'"),
        ("def compute_score(**_):\n    return float('nan')", "compute_score gave nan, which is no score"),
        ("def compute_score(**_):\n    return {'acc': 1.0}", "compute_score gave None"),
    ],
)
def test_a_reward_function_that_fails_gives_no_number(
    source: str, says: str, config: DictConfig, model_folder: Path, tmp_path: Path
) -> None:
    function = tmp_path / "judge.py"
    function.write_text(source)
    config.reward.custom_reward_function.path = str(function)
    options = {"grader": "compute_score", "grade_deadline_s": 0.05}
    with pytest.raises(UnscoredError, match=says):
        rewarded(config, model_folder, [("7", 30)], row_of(budget=512), options)


def test_verls_own_functions_may_say_what_is_correct(config: DictConfig, model_folder: Path) -> None:
    row = row_of(budget=512) | {"data_source": "math_dapo"}
    found = rewarded(config, model_folder, [("answer: 7", 30), ("answer: 8", 30), ("7", 30)], row, {"grader": "compute_score"})
    assert [answer["reward_extra_info"]["verdict"] for answer in found] == ["correct", "wrong", "wrong"]
    assert [answer["reward_score"] for answer in found] == pytest.approx([3.923141, 0.0, 0.0], abs=1e-5)


def test_a_score_counts_as_correct_from_a_threshold(config: DictConfig, model_folder: Path, tmp_path: Path) -> None:
    function = tmp_path / "judge.py"
    function.write_text("def compute_score(data_source, solution_str, ground_truth, extra_info): return {'score': 0.5}")
    config.reward.custom_reward_function.path = str(function)
    for correct_from, expected in ((0.5, 1.0), (0.6, 0.0)):
        options = {"grader": "compute_score", "correct_from": correct_from, "method": "correct"}
        assert rewarded(config, model_folder, [("7", 30)], row_of(), options)[0]["reward_score"] == expected


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (row_of(budget=np.int64(64)), 64.0),
        (row_of() | {"budget": 64}, 64.0),
        (row_of(budget=128) | {"tool_extra_fields": {"budget": 64}}, 64.0),
        (row_of(budget=None), None),
        (row_of(budget=math.inf), None),
    ],
)
def test_the_budget_is_data(row: Mapping[str, Any], expected: float | None, config: DictConfig, model_folder: Path) -> None:
    text = "I will answer the question with 9 9 tokens 7"  # words that no budget is read from
    info = rewarded(config, model_folder, [(text, 30)], row)[0]["reward_extra_info"]
    assert info["budget"] == expected
    assert (info["ceiling"] is None) == (expected is None)


@pytest.mark.parametrize("value", [0, -5, "64", True, math.nan])
def test_a_budget_that_is_no_number_of_tokens_is_refused(value: Any, config: DictConfig, model_folder: Path) -> None:
    with pytest.raises(BudgetRLError, match="the budget of an answer is"):
        rewarded(config, model_folder, [("7", 30)], row_of(budget=value))


@pytest.mark.parametrize("method", ["lcpo_exact", "lcpo_max", "triangle", "budgetthinker"])
def test_a_method_that_needs_a_budget_names_the_column(method: str, config: DictConfig, model_folder: Path) -> None:
    with pytest.raises(ConfigError, match="needs a budget for every answer.*\n.*extra_info.budget"):
        rewarded(config, model_folder, [("7", 30)], row_of(), {"method": method})


def test_each_method_is_the_function_of_its_name(config: DictConfig) -> None:
    correct_N, length_N, budget_N = torch.tensor([True]), torch.tensor([700.0]), torch.tensor([512.0])
    columns_N = correct_N, length_N, budget_N
    expected = {
        "correct": torch.ones(1),
        "dapo": torch.ones(1),
        "classic": budget.classic(correct_N, length_N, max_length=4096),
        "cosine": budget.cosine(correct_N, length_N, max_length=4096),
        "hbpo": budget.hbpo(*columns_N, max_length=4096),
        "lcpo_exact": budget.lcpo_exact(*columns_N),
        "lcpo_max": budget.lcpo_max(*columns_N),
        "laser": budget.laser(correct_N, length_N, torch.tensor([800.0])),
        "triangle": budget.triangle_mix(*columns_N),
        "budgetthinker": budget.budgetthinker(*columns_N),
    }
    assert set(expected) == set(ALONE) <= set(get_args(RewardSettings.model_fields["method"].annotation))
    for method, reward_N in expected.items():
        with open_dict(config):
            config.reward.reward_kwargs = {"method": method} | ({"target": 800} if method == "laser" else {})
        parts = reward_parts(manager_settings(config), correct=True, malformed=False, length=700, budget=512.0)
        assert math.fsum(parts.values()) == pytest.approx(float(reward_N), abs=1e-5), method


def test_a_buffer_adds_dapos_penalty_to_any_method(config: DictConfig) -> None:
    with open_dict(config):
        config.reward.reward_kwargs = {"method": "dapo", "max_length": 10240, "overlong_buffer": 4096}
    for length, expected in ((6144, 1.0), (7168, 0.75), (8192, 0.5), (10240, 0.0)):
        parts = reward_parts(manager_settings(config), correct=True, malformed=False, length=length, budget=math.inf)
        assert math.fsum(parts.values()) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"method": "alp"}, "reads one answer at a time, and this method compares answers"),
        ({"method": "history_min"}, "reads one answer at a time"),
        ({"method": "hbop"}, "does not know"),
        ({"method": None}, "does not know"),
        ({"metod": "hbpo"}, r"unknown option reward.reward_kwargs.metod; did you mean method\?"),
        ({"method": "hbpo", "delta": 0.5}, "delta has no effect with reward.method=hbpo"),
        ({"method": "laser"}, "needs reward.target"),
        ({"method": "hbpo", "grader": "gusess"}, "reward.reward_kwargs.grader: Input should be"),
        ({"method": "hbpo", "grader": "format"}, "needs reward.reward_kwargs.grader_options.pattern"),
        ({"method": "hbpo", "grader": "compute_score", "grader_options": {"letters": "AB"}}, "reads no grader_options"),
    ],
)
def test_options_of_the_reward_manager_are_checked(options: Mapping[str, Any], says: str, config: DictConfig) -> None:
    with open_dict(config):
        config.reward.reward_kwargs = dict(options)
    with pytest.raises(ConfigError, match=says):
        manager_settings(config)


def test_a_reward_function_that_nobody_would_ask_is_refused(config: DictConfig) -> None:
    config.reward.custom_reward_function.path = "judge.py"
    with pytest.raises(ConfigError, match="grader=math decides what is correct"):
        manager_settings(config)


def test_verl_finds_the_manager_by_its_name() -> None:
    assert get_reward_manager_cls("budget_rl") is BudgetRewardManager


# ---- what is checked before a run --------------------------------------------------------------------------------------


def test_a_configuration_that_fits_together_passes(config: DictConfig) -> None:
    config.algorithm.adv_estimator = "budget_rl_hierarchical"
    check_config(config)
    check_row(row_of(budget=512), config)
    assert isinstance(omega_conf_to_dataclass(config.actor_rollout_ref.actor).policy_loss, HapoLossConfig)


def test_ceilings_that_the_reward_method_lacks_are_missed_before_the_run(config: DictConfig) -> None:
    config.algorithm.adv_estimator = "budget_rl_hierarchical"
    with open_dict(config):
        config.reward.reward_kwargs = {"method": "lcpo_exact"}
    with pytest.raises(ConfigError, match="compares with HBPO's ceilings, which reward method lcpo_exact has not"):
        check_config(config)


def test_a_data_set_without_budgets_is_refused_before_the_run(config: DictConfig) -> None:
    config.algorithm.adv_estimator = "budget_rl_hierarchical"
    with pytest.raises(ConfigError, match="no column extra_info.budget"):
        check_row(row_of(index=3), config)


def test_hapo_needs_the_entropies_that_a_bypass_leaves_out(config: DictConfig) -> None:
    config.algorithm.rollout_correction.bypass_mode = True
    with pytest.raises(ConfigError, match="bypass_mode"):
        check_config(config)


def test_hapo_and_distillation_cannot_be_combined(config: DictConfig) -> None:
    config.distillation.enabled = True
    with pytest.raises(ConfigError, match="distillation"):
        check_config(config)


def test_sessions_of_several_outputs_are_refused() -> None:
    check_keys(["a_0_0", "a_1_0"])
    with pytest.raises(BudgetRLError, match="several outputs"):
        check_keys(["a_0_0", "a_0_1"])
