"""The policy loss, the KL penalty and the off-policy weight; all per token, summed by the caller's mask."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from rl.heterogeneous import clip_widths, redistribute

MAX_LOG_RATIO = 20.0
"""Log ratios are cut to +-20 before exp: e^20 = 5e8 is far past every clip yet squares in float32 without overflow, whereas
e^89 is inf and inf * 0 would put NaN into the gradient of a token that the clip had switched off anyway."""


@dataclass(frozen=True)
class Heterogeneous:
    """What HAPO's parts C and D take from the entropy at each token; see `rl.heterogeneous`."""

    signal_T: torch.Tensor
    """Floating point (T), from `rl.heterogeneous.signal`; only masked tokens' values are used."""
    clip_kappa: float | None = 1.0
    """Of `clip_widths`; None: the same widths for all tokens."""
    advantage_kappa: float | None = 1.0
    """Of `redistribute`; None: advantages as they are."""
    zone: Literal["base", "adapted"] = "base"
    """Of `redistribute`; without adapted widths the two are one."""


@dataclass(frozen=True)
class PolicyLoss:
    """Sums over the loss-carrying tokens, as 0-d tensors; divide by the mini-batch's global token count for means."""

    loss: torch.Tensor
    """Surrogate loss, the only one with a gradient."""
    tokens: torch.Tensor
    """Tokens with loss."""
    clipped_T: torch.Tensor
    """bool (T): tokens whose ratio clip is active (their gradient is 0)."""
    dual_clipped: torch.Tensor
    """Tokens whose dual clip is active (their gradient is 0)."""
    kl: torch.Tensor
    """old log-prob - new log-prob in nats: its mean estimates KL(old || new)."""
    ratio: torch.Tensor
    """New over old probability."""
    redistributed: torch.Tensor
    """Tokens whose advantage `heterogeneous` changed."""


def policy_loss(
    logp_T: torch.Tensor,
    old_logp_T: torch.Tensor,
    advantage_T: torch.Tensor,
    mask_T: torch.Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    dual_clip: float | None = 3.0,
    weight_T: torch.Tensor | None = None,
    heterogeneous: Heterogeneous | None = None,
) -> PolicyLoss:
    """PPO's clipped surrogate with separate clip widths and a dual clip, summed over masked tokens.

    ``r = exp(logp - old)``, ``l = max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high))``; for A < 0 also
    ``l <- min(l, -dual_clip A)``; result ``sum_t mask_t weight_t l_t``. With ``heterogeneous`` each token has its own widths
    (`clip_widths`) and the advantage ``A'`` (`redistribute`) in all of it.

    Shapes: all (T); mask_T bool; weight_T a detached factor per token (None: 1). Values outside the mask are never used,
    NaN included. For the token mean over a mini-batch spread over ranks and micro-batches divide by its global token count.
    Raises ValueError for shapes that differ, TypeError for a mask that is not bool, ValueError for a dual_clip of 1 or less.
    Source: PPO (Schulman et al. 2017, equation 7), clip-higher (DAPO, arXiv 2503.14476), dual clip (Ye et al.,
    arXiv 1912.09729), heterogeneous: HAPO (arXiv 2509.16591).
    """
    signal_T = None if heterogeneous is None else heterogeneous.signal_T
    _check_tokens(logp_T, old_logp_T=old_logp_T, advantage_T=advantage_T, mask_T=mask_T, weight_T=weight_T, signal_T=signal_T)
    if mask_T.dtype != torch.bool:
        raise TypeError(f"mask_T must be bool, got {mask_T.dtype}")
    if dual_clip is not None and not dual_clip > 1:
        raise ValueError(f"dual_clip must be above 1 or None, got {dual_clip}")
    # selecting before exp keeps garbage in unmasked positions out of the gradient; 0 * NaN after it would not
    log_ratio_T = torch.where(mask_T, logp_T - old_logp_T.detach(), 0.0)
    advantage_T = torch.where(mask_T, advantage_T.detach(), 0.0)
    ratio_T = log_ratio_T.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    used_T, clamped_T = advantage_T, ratio_T.clamp(1.0 - clip_low, 1.0 + clip_high)
    if heterogeneous is not None:
        used_T, clamped_T = _by_entropy(heterogeneous, advantage_T, ratio_T, mask_T, low=clip_low, high=clip_high)
    free_T, bound_T = -used_T * ratio_T, -used_T * clamped_T
    loss_T = torch.maximum(free_T, bound_T)
    clipped_T = bound_T > free_T
    dual_T = torch.zeros_like(mask_T)
    if dual_clip is not None:
        cap_T = -dual_clip * used_T
        dual_T = (used_T < 0) & (loss_T > cap_T)
        loss_T = torch.where(dual_T, cap_T, loss_T)
    if weight_T is not None:
        loss_T = loss_T * torch.where(mask_T, weight_T.detach(), 0.0)
    return PolicyLoss(
        loss=loss_T.sum(),
        tokens=mask_T.sum(),
        clipped_T=clipped_T,
        dual_clipped=dual_T.sum(),
        kl=-log_ratio_T.detach().sum(),
        ratio=torch.where(mask_T, ratio_T.detach(), 0.0).sum(),
        redistributed=(used_T != advantage_T).sum(),
    )


def _by_entropy(
    chosen: Heterogeneous, advantage_T: torch.Tensor, ratio_T: torch.Tensor, mask_T: torch.Tensor, *, low: float, high: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The advantage and the clipped ratio of each token, by the entropy at it."""
    signal_T = torch.where(mask_T, chosen.signal_T.detach(), 0.0).to(ratio_T.dtype)
    clip_kappa = chosen.clip_kappa or 0.0
    if chosen.advantage_kappa is not None:
        advantage_T = redistribute(
            advantage_T,
            signal_T,
            ratio_T,
            low=low,
            high=high,
            kappa=chosen.advantage_kappa,
            zone=chosen.zone,
            clip_kappa=clip_kappa,
        )
    if chosen.clip_kappa is None:
        return advantage_T, ratio_T.clamp(1.0 - low, 1.0 + high)
    low_T, high_T = clip_widths(signal_T, low=low, high=high, kappa=clip_kappa)
    return advantage_T, ratio_T.clamp(1.0 - low_T, 1.0 + high_T)


def kl_penalty(logp_T: torch.Tensor, ref_logp_T: torch.Tensor, form: str) -> torch.Tensor:
    """Per-token estimate of KL(policy || reference) from the sampled tokens' log-probs, in nats.

    With ``d = ref_logp - logp``: ``k1 = -d``, ``k2 = d^2 / 2``, ``k3 = e^d - d - 1``.

    As a loss on tokens drawn from the policy the three differ by more than variance. The gradient of k1 is
    ``grad logp``, zero in expectation whatever the reference: it is a metric (or a reward), useless as a loss. That of k2,
    ``-d grad logp``, is an unbiased gradient of KL(policy || reference). That of k3, ``(1 - e^d) grad logp``, is an unbiased
    gradient of KL(reference || policy): same minimum, milder where the policy left the reference, stronger where it
    lost what the reference does. e^d is cut at d = 20 (see MAX_LOG_RATIO); there value and gradient saturate.

    Shapes: both (T). Returns (T); the gradient reaches logp_T only. Raises ValueError for an unknown form or shapes that differ.
    Source: Schulman, "Approximating KL divergence" (2020); k3 as a loss: GRPO (Shao et al. 2024, equation 4).
    """
    _check_tokens(logp_T, ref_logp_T=ref_logp_T)
    difference_T = ref_logp_T.detach() - logp_T
    match form:
        case "k1":
            return -difference_T
        case "k2":
            return 0.5 * difference_T.square()
        case "k3":
            difference_T = difference_T.clamp(max=MAX_LOG_RATIO)
            return difference_T.exp() - difference_T - 1.0
        case _:
            raise ValueError(f"form must be k1, k2 or k3, got {form!r}")


def truncated_weight(old_logp_T: torch.Tensor, sampled_logp_T: torch.Tensor, *, cap: float = 2.0) -> torch.Tensor:
    """Importance weight from the engine's distribution to the learner's, cut from above and detached.

    ``w_t = min(cap, exp(old_logp_t - sampled_logp_t))``; 1 where the engine did not sample (sampled_logp NaN).

    Shapes: both (T), nats. Returns (T) without gradient. Raises ValueError for a cap of 0 or less or shapes that differ.
    Source: truncated importance sampling (Ionides 2008).
    """
    _check_tokens(old_logp_T, sampled_logp_T=sampled_logp_T)
    if not cap > 0:
        raise ValueError(f"cap must be above 0, got {cap}")
    difference_T = (old_logp_T - sampled_logp_T).detach()
    difference_T = torch.where(torch.isnan(sampled_logp_T), 0.0, difference_T)
    weight_T = difference_T.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp().clamp(max=cap)
    return torch.where(torch.isnan(sampled_logp_T), 1.0, weight_T)


def _check_tokens(logp_T: torch.Tensor, **values: torch.Tensor | None) -> None:
    for name, value in values.items():
        if value is not None and value.shape != logp_T.shape:
            raise ValueError(f"{name} has shape {tuple(value.shape)}, the log-probs have {tuple(logp_T.shape)}")
