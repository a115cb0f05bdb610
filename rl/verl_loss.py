"""HAPO's policy loss in the form in which verl calls one, and the signal column that it needs beside what verl hands it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from verl.trainer.ppo.core_algos import agg_loss
from verl.workers.config import PolicyLossConfig

from rl.heterogeneous import entropy_statistics, signal
from rl.losses import Heterogeneous, policy_loss
from rl.objective_settings import HeterogeneousSettings
from rl.types import EntropyStatistics
from rl.verl_columns import SIGNAL, column, columns
from rl.verl_options import LOSS, heterogeneous_settings

_FIX = "set trainer.v1.trainer_mode=budget_rl_sync, whose workers pass the column on (docs/verl-plugin.md)"
Lost = tuple[torch.Tensor, dict[str, Any]]
"""A loss, 0-d, and its metrics."""
LossFunction = Callable[..., Lost]


@dataclass
class HapoLossConfig(PolicyLossConfig):
    """verl's `actor.policy_loss` with a section of options; name it in `policy_loss._target_`."""

    heterogeneous: dict[str, Any] = field(default_factory=dict)
    """As `loss.heterogeneous` of a budget-rl run, without `entropy` and `scope`."""

    def __post_init__(self) -> None:
        heterogeneous_settings(self)


def hapo(
    old_log_prob: torch.Tensor,
    log_prob: torch.Tensor,
    advantages: torch.Tensor,
    response_mask: torch.Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: torch.Tensor | None = None,
) -> Lost:
    """The clipped surrogate with widths and advantages by the entropy at each token; see `rl.losses.policy_loss`.

    ``sum_t m_t w_t l_t``, where w is what verl's own `agg_loss` of ``loss_agg_mode`` gives the token: by default one over the
    mini-batch's tokens on all ranks. Widths: `actor.clip_ratio_low`, `clip_ratio_high`; dual clip: `clip_ratio_c` (HAPO's is 10).

    Shapes: all (B, T); response_mask 0 or 1. Needs the column ``budget_rl_signal`` (B, T). Returns the loss, 0-d, and metrics
    over this micro-batch. Options: `actor.policy_loss.heterogeneous`. Raises MissingColumnError, ConfigError.
    Source: HAPO (arXiv 2509.16591, parts C and D).
    """
    signal_BT = column(SIGNAL, rows=log_prob.shape[0], asked_by=LOSS, fix=_FIX)
    if signal_BT.shape != log_prob.shape:
        raise ValueError(f"the column {SIGNAL!r} has shape {tuple(signal_BT.shape)}, the log-probs {tuple(log_prob.shape)}")
    settings = heterogeneous_settings(config.policy_loss)
    mask_BT = response_mask.bool()
    weight_BT = _weights(mask_BT, loss_agg_mode, config.global_batch_info)
    if rollout_is_weights is not None:
        weight_BT = weight_BT * rollout_is_weights
    low = config.clip_ratio if config.clip_ratio_low is None else config.clip_ratio_low
    high = config.clip_ratio if config.clip_ratio_high is None else config.clip_ratio_high
    summed = policy_loss(
        log_prob.flatten(),
        old_log_prob.flatten(),
        advantages.flatten(),
        mask_BT.flatten(),
        clip_low=low,
        clip_high=high,
        dual_clip=config.clip_ratio_c,
        weight_T=weight_BT.flatten(),
        heterogeneous=heterogeneous(settings, signal_BT.flatten()),
    )
    tokens = float(summed.tokens.clamp(min=1))
    metrics = {
        "actor/pg_clipfrac": float((summed.clipped_T & mask_BT.flatten()).sum()) / tokens,
        "actor/pg_clipfrac_lower": float(summed.dual_clipped) / tokens,
        "actor/ppo_kl": float(summed.kl) / tokens,
        "actor/hapo_redistributed": float(summed.redistributed) / tokens,
    }
    return summed.loss, metrics


def _weights(mask_BT: torch.Tensor, loss_agg_mode: str, info: dict[str, Any]) -> torch.Tensor:
    """What each token's loss counts in verl's aggregate: its gradient, since every mode is linear in the loss. float32 (B, T)."""
    with torch.enable_grad():
        loss_BT = torch.zeros(mask_BT.shape, device=mask_BT.device, requires_grad=True)
        total = agg_loss(loss_mat=loss_BT, loss_mask=mask_BT, loss_agg_mode=loss_agg_mode, **info)
        return torch.autograd.grad(total, loss_BT)[0]


def heterogeneous(settings: HeterogeneousSettings, signal_T: torch.Tensor) -> Heterogeneous:
    """What `rl.losses.policy_loss` takes, from the options; signal_T (T)."""
    return Heterogeneous(
        signal_T,
        clip_kappa=settings.clip_kappa if settings.clip else None,
        advantage_kappa=settings.redistribute_kappa if settings.redistribute else None,
        zone=settings.zone,
    )


def batch_signal(
    entropy_BT: torch.Tensor, mask_BT: torch.Tensor, settings: HeterogeneousSettings
) -> tuple[torch.Tensor, EntropyStatistics]:
    """The signal of every token of a rollout batch and the statistics of all its masked tokens; 0 off the mask.

    Shapes: entropy_BT (B, T) in nats at the sampling weights; mask_BT (B, T), 0 or 1. Returns float32 (B, T).
    Raises ValueError where no token is masked in or an entropy is none. Source: HAPO (arXiv 2509.16591, equation 6).
    """
    mask_BT = mask_BT.bool()
    stats = entropy_statistics(entropy_BT[mask_BT].float(), rho=settings.rho)
    signal_BT = torch.zeros(entropy_BT.shape, dtype=torch.float32, device=entropy_BT.device)
    signal_BT[mask_BT] = signal(entropy_BT[mask_BT].float(), stats, literal=settings.literal)
    return signal_BT, stats


def with_signal(*, inner: LossFunction, model_output: Any, data: Any, dp_group: Any = None) -> Lost:
    """verl's own loss of a micro-batch, ``inner`` (`ppo_loss` with its config), called with the signal column within reach.

    ``data``: verl's TensorDict; ``budget_rl_signal`` and ``response_mask`` are nested (B, response length). A batch without the
    signal is handed on as it is: the registered loss then refuses it, and any other loss does not need it.
    """
    if SIGNAL not in data:
        return inner(model_output=model_output, data=data, dp_group=dp_group)
    # Padded beside the mask, as verl pads its own columns.
    signal_BT = data.select(SIGNAL, "response_mask").to_padded_tensor()[SIGNAL]
    with columns(**{SIGNAL: signal_BT}):
        return inner(model_output=model_output, data=data, dp_group=dp_group)
