"""Which tokens a distillation looks at, and how much each counts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from rl.heterogeneous import entropy_statistics
from rl.replay import Distillation, OldScores
from rl.sstoken import keep_highest, scores
from rl.types import TrainBatch


def distillation_weights(
    selected_T: torch.Tensor, owner_T: torch.Tensor, scale_N: torch.Tensor, *, length_norm: bool = True
) -> torch.Tensor:
    """Weight of each token in a sum that becomes a mean over rollouts.

    ``w_t = scale_i / n_i`` for a selected token of rollout i with n_i selected ones, ``scale_i`` without ``length_norm``; else 0.
    With ``scale_i`` = divisor of the loss / rollouts of the mini-batch over all ranks, the sum over tokens over that divisor
    is the mean over rollouts.

    Shapes: selected_T bool (T); owner_T int64 (T), each token's rollout; scale_N (N). Returns float32 (T).
    Source: AlignDistil (arXiv 2503.02832), its published code's `reward_len_norm`.
    """
    scale_T = scale_N.float()[owner_T]
    if length_norm:
        count_N = torch.zeros_like(scale_N, dtype=torch.float32).index_add_(0, owner_T, selected_T.float())
        scale_T = scale_T / count_N.clamp(min=1.0)[owner_T]
    return torch.where(selected_T, scale_T, 0.0)


def weighted(
    batch: TrainBatch,
    old: OldScores | None,
    divisors: Sequence[int],
    task: Distillation,
    *,
    gather: Callable[[torch.Tensor], torch.Tensor],
) -> TrainBatch:
    """The batch with the final weight of every token in the distillation term.

    Candidates are tokens with loss that the guidance gives a weight above 0; of these the task keeps those that the sampling
    policy was least sure of, or ssToken's. ``old``: the policy at the sampling weights, needed where it decides; ``divisors``:
    what the loss of each mini-batch is divided by; ``gather``: puts the ranks' vectors together, called by all or by none.
    """
    owner_T = torch.repeat_interleave(torch.arange(batch.rollouts), batch.start_N.diff())
    assert batch.guidance.weight_T is not None
    selected_T = (batch.guidance.weight_T > 0) & batch.loss_mask_T
    if task.entropy_share is not None and old is not None:
        selected_T &= _least_sure(old.entropy.cpu(), selected_T, task.entropy_share, gather, old.entropy.device)
    # A rank without a candidate has nothing to choose from, and neither reference nor attention to choose by.
    if task.sstoken is not None and old is not None and bool(selected_T.any()):
        gamma, share = task.sstoken
        place_T = selected_T.nonzero().squeeze(1)
        assert batch.guidance.reference_T is not None
        gain_T = (old.raw.cpu() - batch.guidance.reference_T)[place_T]
        attention_T = None if old.attention is None else old.attention.cpu()[place_T]
        score_T = scores(gain_T, attention_T, owner_T[place_T], batch.rollouts, gamma=gamma)
        selected_T[place_T] = keep_highest(score_T, owner_T[place_T], batch.rollouts, share=share)
    scale = [divisor / max(rollouts, 1) for divisor, rollouts in zip(divisors, task.rollouts, strict=True)]
    scale_N = torch.tensor(scale)[batch.minibatch_N]
    weight_T = distillation_weights(selected_T, owner_T, scale_N, length_norm=task.length_norm)
    return replace(batch, guidance=replace(batch.guidance, weight_T=weight_T))


def _least_sure(
    entropy_T: torch.Tensor,
    candidate_T: torch.Tensor,
    share: float,
    gather: Callable[[torch.Tensor], torch.Tensor],
    device: torch.device,
) -> torch.Tensor:
    """Candidates in the upper ``share`` of all ranks' candidates by entropy; bool (T)."""
    everything_T = gather(entropy_T[candidate_T].to(device)).nan_to_num()
    if share >= 1 or not everything_T.numel():
        return candidate_T
    pivot = entropy_statistics(everything_T, rho=1 - share).pivot
    return candidate_T & (entropy_T.double().clamp(min=1e-8).log() >= pivot)
