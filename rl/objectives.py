"""What a micro-batch is optimised for: the clipped surrogate, a distillation, pairs, or plain likelihood.

Each function returns a sum over the micro-batch, which the learner divides by the global count of the mini-batch, and adds
its figures to ``totals`` (see `rl.learner.Learner.update`).
"""

from __future__ import annotations

from typing import Any

import torch

from rl.alignment import kl_weight, token_reward
from rl.batch import MicroBatch
from rl.correction import Correction, ImportanceWeight, importance_weight
from rl.heterogeneous import entropy_statistics, signal
from rl.losses import Heterogeneous, policy_loss
from rl.objective_settings import HeterogeneousSettings
from rl.policy import Scores
from rl.preference import preference_loss
from rl.replay import Distillation, OldScores, Preference, rollout_rows
from rl.settings import LossSettings
from rl.types import EntropyStatistics

TVD_BINS = (0.01, 0.1)
"""Bounds of the metric that shows which tokens a distillation's loss comes from: teachers that agree, differ, disagree."""


def likelihood_objective(micro: MicroBatch, scores: Scores, totals: dict[str, Any]) -> torch.Tensor:
    """Negative log-likelihood of the tokens with loss."""
    loss = -(scores.raw * micro.mask_T).sum()
    add(totals, "sum/loss", float(loss.detach()))
    return loss


def policy_objective(
    micro: MicroBatch,
    old: OldScores,
    scores: Scores,
    totals: dict[str, Any],
    *,
    settings: LossSettings,
    correction: Correction,
    statistics: EntropyStatistics | None,
) -> torch.Tensor:
    """The clipped surrogate; with `loss.heterogeneous` HAPO's, from ``statistics`` or from those of this micro-batch."""
    replayed = correction.mode == "replay"
    new_T, old_T = (scores.shaped, old.shaped) if replayed else (scores.raw, old.raw)
    weight: ImportanceWeight | None = None
    if correction.mode == "truncated":
        weight = importance_weight(old.raw, micro.sampled_logp_T, micro.row_T, micro.index_B.numel(), correction)
        add(totals, "sum/correction_weight", float((weight.weight_T * micro.mask_T).sum()))
    result = policy_loss(
        new_T,
        old_T,
        micro.advantage_T,
        micro.mask_T,
        clip_low=settings.clip_low,
        clip_high=settings.clip_high,
        dual_clip=settings.dual_clip,
        weight_T=None if weight is None else weight.weight_T,
        heterogeneous=None
        if settings.heterogeneous is None
        else heterogeneous_terms(settings.heterogeneous, micro, old, scores, statistics, totals),
    )
    add(totals, "sum/loss", float(result.loss.detach()))
    add(totals, "sum/clipped", float(result.clipped_T.sum()))
    add(totals, "sum/dual_clipped", float(result.dual_clipped))
    add(totals, "sum/approx_kl", float(result.kl))
    totals.setdefault("rollout_N5", []).append(rollout_rows(micro, result.clipped_T, weight))
    return result.loss


def heterogeneous_terms(
    settings: HeterogeneousSettings,
    micro: MicroBatch,
    old: OldScores,
    scores: Scores,
    statistics: EntropyStatistics | None,
    totals: dict[str, Any],
) -> Heterogeneous:
    """HAPO's signal of each token and what it does to the loss; 0 where a micro-batch has no token to take statistics from."""
    entropy_T = scores.entropy.detach() if settings.entropy == "current" else old.entropy
    if settings.scope == "microbatch" and bool(micro.mask_T.any()):
        statistics = entropy_statistics(entropy_T[micro.mask_T], rho=settings.rho)
    if statistics is None:
        signal_T = torch.zeros_like(entropy_T)
    else:
        # entropies of another policy than the statistics' may lie outside their extremes
        signal_T = signal(entropy_T.nan_to_num(), statistics, literal=settings.literal).clamp(-1.0, 1.0)
    masked_T = signal_T[micro.mask_T]
    add(totals, "sum/signal", float(masked_T.sum()))
    add(totals, "sum/signal_size", float(masked_T.abs().sum()))
    return Heterogeneous(
        signal_T=signal_T,
        clip_kappa=settings.clip_kappa if settings.clip else None,
        advantage_kappa=settings.redistribute_kappa if settings.redistribute else None,
        zone=settings.zone,
    )


def distillation_objective(
    micro: MicroBatch,
    old: OldScores,
    scores: Scores,
    totals: dict[str, Any],
    *,
    task: Distillation,
    settings: LossSettings,
) -> torch.Tensor:
    """``sum_t w_t beta_t KL_t`` over the vocabulary or its buckets, or (scalar) the clipped surrogate of ``w_t R_t``."""
    guide = micro.guidance
    assert guide.weight_T is not None
    alpha_T = guide.alpha_T if scores.alpha is None else scores.alpha
    assert alpha_T is not None
    selected_T = guide.weight_T > 0
    # 0 where nobody asked the teacher and in padding rows: an infinite beta times a weight of 0 would be NaN, gradient included
    alpha_T = torch.where(selected_T, alpha_T, 1.0)
    beta_T = kl_weight(alpha_T, beta0=task.beta0, beta_max=task.beta_max)
    if scores.divergence is None:
        assert guide.teacher_logp_T is not None
        reward_T = token_reward(scores.raw, guide.teacher_logp_T, alpha_T, beta0=task.beta0, beta_max=task.beta_max)
        loss = policy_loss(
            scores.raw,
            old.raw,
            guide.weight_T * reward_T,
            selected_T,
            clip_low=settings.clip_low,
            clip_high=settings.clip_high,
            dual_clip=settings.dual_clip,
        ).loss
        kl_T = scores.raw.detach() - guide.teacher_logp_T  # its mean over tokens of the student estimates the KL
        mass_T = guide.weight_T * beta_T * kl_T.abs()
    else:
        kl_T = scores.divergence.detach()
        # selecting before the product keeps a padding row's NaN out of the gradient
        loss_T = guide.weight_T * beta_T * torch.where(selected_T, scores.divergence, 0.0)
        loss, mass_T = loss_T.sum(), loss_T.detach()
    _count_distillation(totals, task, loss, kl_T, alpha_T, mass_T, selected_T)
    return loss


def _count_distillation(
    totals: dict[str, Any],
    task: Distillation,
    loss: torch.Tensor,
    kl_T: torch.Tensor,
    alpha_T: torch.Tensor,
    mass_T: torch.Tensor,
    selected_T: torch.Tensor,
) -> None:
    tvd_T = ((alpha_T - task.eps) / task.r if task.r > 0 else torch.zeros_like(alpha_T))[selected_T]
    mass_T = mass_T[selected_T]
    add(totals, "sum/distil_loss", float(loss.detach()))
    add(totals, "sum/distil_tokens", float(selected_T.sum()))
    add(totals, "sum/distil_kl", float(kl_T[selected_T].sum()))
    add(totals, "sum/distil_alpha", float(alpha_T[selected_T].sum()))
    add(totals, "sum/distil_tvd", float(tvd_T.sum()))
    for name, inside_T in (
        ("agree", tvd_T < TVD_BINS[0]),
        ("differ", (tvd_T >= TVD_BINS[0]) & (tvd_T < TVD_BINS[1])),
        ("disagree", tvd_T >= TVD_BINS[1]),
    ):
        add(totals, f"sum/distil_mass_{name}", float(mass_T[inside_T].sum()))


def preference_objective(micro: MicroBatch, scores: Scores, totals: dict[str, Any], *, task: Preference) -> torch.Tensor:
    """The sum of the pairs' losses; a row that only keeps ranks in step gives 0."""
    if bool((micro.pair_B < 0).all()):
        return (scores.raw * micro.mask_T).sum()
    result = preference_loss(
        scores.raw,
        micro.mask_T,
        micro.row_T,
        micro.pair_B,
        micro.side_B,
        reference_T=micro.guidance.reference_T,
        credit_T=micro.guidance.credit_T,
        form=task.form,
        beta=task.beta,
        margin=task.margin,
        treg_alpha=task.treg_alpha,
    )
    add(totals, "sum/loss", float(result.loss.detach()))
    for name in ("pairs", "accuracy", "margin", "chosen_reward", "rejected_reward", "regulariser"):
        add(totals, f"sum/pair_{name}", float(getattr(result, name)))
    return result.loss


def add(totals: dict[str, Any], name: str, value: float) -> None:
    """Add to a running sum."""
    totals[name] = totals.get(name, 0.0) + value
