"""HAPO's loss through verl's own `ppo_loss`, on data in the form in which verl's engines hand it to a loss."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from hydra.errors import InstantiationException
from omegaconf import DictConfig, open_dict
from tensordict import TensorDict
from verl.trainer.ppo.core_algos import get_policy_loss_fn
from verl.utils import tensordict_utils
from verl.utils.config import omega_conf_to_dataclass
from verl.workers.utils.losses import ppo_loss

from rl.errors import ConfigError
from rl.losses import Heterogeneous, policy_loss
from rl.objective_settings import HeterogeneousSettings
from rl.verl_checks import check_config
from rl.verl_columns import SIGNAL, MissingColumnError, columns
from rl.verl_loss import batch_signal, with_signal

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
