"""Losses on pairs of answers, one better than the other: DPO and SimPO, each with T-REG's token rewards; pure.

Legend as in rl/types.py: ``_T`` one value per response token, ``_B`` one per answer (a row). A token belongs to the answer
``row_T``, an answer to the pair ``pair_B``, on the side ``side_B``: +1 chosen, -1 rejected.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch.nn.functional import logsigmoid

PreferenceForm = Literal["dpo", "simpo"]


@dataclass(frozen=True)
class PreferenceLoss:
    """Sums over the pairs, as 0-d tensors; divide by the mini-batch's number of pairs on all ranks for means."""

    loss: torch.Tensor
    """The whole loss, the only one with a gradient."""
    pairs: torch.Tensor
    """Pairs summed over."""
    accuracy: torch.Tensor
    """Pairs whose chosen answer has the higher reward."""
    margin: torch.Tensor
    """Reward of the chosen less that of the rejected answer."""
    chosen_reward: torch.Tensor
    """s of the chosen answers; nats times beta."""
    rejected_reward: torch.Tensor
    """s of the rejected ones."""
    regulariser: torch.Tensor
    """T-REG's part of the loss: ``alpha w (L_reg(y_w) + L_reg(y_l))``."""


def preference_loss(
    logp_T: torch.Tensor,
    mask_T: torch.Tensor,
    row_T: torch.Tensor,
    pair_B: torch.Tensor,
    side_B: torch.Tensor,
    *,
    reference_T: torch.Tensor | None = None,
    credit_T: torch.Tensor | None = None,
    form: PreferenceForm = "dpo",
    beta: float = 0.1,
    margin: float = 0.0,
    treg_alpha: float = 0.0,
) -> PreferenceLoss:
    """Preference loss of P pairs, summed, on the log-probs of the tokens of both answers y_w and y_l.

    dpo: ``s(y) = sum_t beta (logp_t - reference_t)``, ``L = -log sigmoid(s_w - s_l)``.
    simpo: ``s(y) = beta / |y| sum_t logp_t``, ``L = -log sigmoid(s_w - s_l - margin)``; a reference is not used.
    T-REG adds ``treg_alpha w (L_reg(y_w) + L_reg(y_l))`` with ``L_reg(y) = -sum_t beta credit_t logp_t`` (simpo: over |y|) and
    ``w = sigmoid(s_l - s_w + margin)``, detached. A token then weighs ``1 + treg_alpha credit_t`` times its share of the loss in
    y_w and ``1 - treg_alpha credit_t`` times in y_l: ``dL / dlogp_t = -beta w (1 + treg_alpha credit_t)`` and
    ``beta w (1 - treg_alpha credit_t)``.

    Reverse DPO is the same with ``-side_B``.

    Shapes: logp_T, reference_T (nats), credit_T (T-REG's token reward in [-1/2, 1/2], 0 where there is none) floating (T); mask_T
    bool (T); row_T integer (T), 0-based; pair_B integer (B), any ids, below 0 for a row of no pair, whose tokens do not
    count; side_B (B), +1 or -1. Values outside the mask are never used, NaN included; |y| counts the tokens inside.

    Raises:
        ValueError: shapes that differ, a pair without exactly one chosen and one rejected row, an unknown form, dpo without a
            reference or with a margin, treg_alpha without credits, simpo with an answer of no tokens.
        TypeError: a mask that is not bool.

    Source: DPO (arXiv 2305.18290, equation 7), SimPO (arXiv 2405.14734, equation 6), T-REG (arXiv 2412.02685).
    """
    _check(logp_T, mask_T, row_T, reference_T=reference_T, credit_T=credit_T)
    if form not in ("dpo", "simpo"):
        raise ValueError(f"form must be dpo or simpo, got {form!r}")
    if form == "dpo" and (reference_T is None or margin != 0):
        raise ValueError("dpo compares with a reference and has no margin: give reference_T and margin=0, or form='simpo'")
    if treg_alpha and credit_T is None:
        raise ValueError(f"treg_alpha={treg_alpha} weighs credit_T, and there is none")
    chosen_P, rejected_P = _rows_of_pairs(pair_B, side_B)
    rows = pair_B.numel()

    # selecting before adding up keeps garbage in unmasked positions out of the gradient; 0 * NaN after it would not
    kept_T = torch.where(mask_T, logp_T, 0.0)
    scale_B = torch.full((rows,), beta, dtype=logp_T.dtype, device=logp_T.device)
    if form == "dpo":
        assert reference_T is not None
        ratio_T = kept_T - torch.where(mask_T, reference_T.detach(), 0.0)
        score_B = scale_B * _sum_rows(ratio_T, row_T, rows)
    else:
        length_B = _sum_rows(mask_T.to(logp_T.dtype), row_T, rows)
        if bool((length_B[torch.cat([chosen_P, rejected_P])] == 0).any()):
            raise ValueError("simpo divides by the length of an answer, and one of them has no token that carries loss")
        scale_B = scale_B / length_B.clamp(min=1)
        score_B = scale_B * _sum_rows(kept_T, row_T, rows)

    margin_P = score_B[chosen_P] - score_B[rejected_P]
    preference = -logsigmoid(margin_P - margin).sum()  # never overflows, and unlike softplus is not cut off at 20
    regulariser = torch.zeros_like(preference)
    if treg_alpha:
        assert credit_T is not None
        weighted_T = torch.where(mask_T, credit_T.detach(), 0.0) * kept_T
        push_B = -scale_B * _sum_rows(weighted_T, row_T, rows)
        weight_P = torch.sigmoid(margin - margin_P).detach()
        regulariser = treg_alpha * (weight_P * (push_B[chosen_P] + push_B[rejected_P])).sum()
    seen_P = margin_P.detach()
    return PreferenceLoss(
        loss=preference + regulariser,
        pairs=torch.tensor(chosen_P.numel(), device=logp_T.device),
        accuracy=(seen_P > 0).sum(),
        margin=seen_P.sum(),
        chosen_reward=score_B[chosen_P].detach().sum(),
        rejected_reward=score_B[rejected_P].detach().sum(),
        regulariser=regulariser.detach(),
    )


def _sum_rows(value_T: torch.Tensor, row_T: torch.Tensor, rows: int) -> torch.Tensor:
    return torch.zeros(rows, dtype=value_T.dtype, device=value_T.device).index_add(0, row_T, value_T)


def _rows_of_pairs(pair_B: torch.Tensor, side_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The chosen and the rejected row of every pair, in the order of the pairs' ids."""
    if pair_B.shape != side_B.shape or pair_B.ndim != 1:
        raise ValueError(f"pair_B {tuple(pair_B.shape)} and side_B {tuple(side_B.shape)} must be vectors over the same rows")
    row_B = torch.arange(pair_B.numel(), device=pair_B.device)
    belongs_B = pair_B >= 0
    chosen, rejected = row_B[belongs_B & (side_B == 1)], row_B[belongs_B & (side_B == -1)]
    chosen, rejected = chosen[pair_B[chosen].argsort()], rejected[pair_B[rejected].argsort()]
    ids = pair_B[chosen]
    complete = chosen.numel() + rejected.numel() == int(belongs_B.sum()) and torch.equal(ids, pair_B[rejected])
    if not complete or bool((ids.diff() == 0).any()):
        raise ValueError(f"each pair needs a row of side 1 and one of side -1; pairs {pair_B.tolist()}, sides {side_B.tolist()}")
    return chosen, rejected


def _check(logp_T: torch.Tensor, mask_T: torch.Tensor, row_T: torch.Tensor, **values: torch.Tensor | None) -> None:
    for name, value in {"mask_T": mask_T, "row_T": row_T, **values}.items():
        if value is not None and value.shape != logp_T.shape:
            raise ValueError(f"{name} has shape {tuple(value.shape)}, the log-probs have {tuple(logp_T.shape)}")
    if mask_T.dtype != torch.bool:
        raise TypeError(f"mask_T must be bool, got {mask_T.dtype}")
