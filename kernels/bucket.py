"""Reverse KL to a teacher known at a few token ids, the rest of the vocabulary as one bucket; and the likeliest ids of a row."""

from __future__ import annotations

from collections.abc import Callable

import torch

from kernels import eager_bucket
from kernels.backends import pick
from kernels.checks import INTEGERS, check_matrix, check_vector
from kernels.shaping import LOG_ZERO


def linear_bucket_kl(
    hidden_TH: torch.Tensor,
    weight_VH: torch.Tensor,
    id_TK: torch.Tensor,
    teacher_logp_TK: torch.Tensor,
    tail_T: torch.Tensor,
    *,
    backend: str = "auto",
) -> torch.Tensor:
    """Reverse KL (nats) of the student to the teacher over K ids and one bucket of all other ids.

    ``pi = softmax(W h)``, ``tau = sum of pi over the ids not in S``,
    ``KL_S = sum_{v in S} pi_v (ln pi_v - ln pi*_v) + tau (ln tau - ln tau*)``

    It is a lower bound of the full KL and equals it where S is the whole vocabulary; without the bucket it could be negative.
    ln tau is a log-sum-exp over the complement: one minus a sum would round it away. The gradient in logit v is
    ``pi_v (ln(P / P*) of the bucket of v - KL_S)``.

    Shapes: hidden_TH (T, H) and weight_VH (V, H) of one floating point dtype; id_TK (T, K) integer, distinct in each row;
    teacher_logp_TK (T, K) and tail_T (T), nats, -inf allowed and counted as -10000. Returns kl_T, float32 (float64 for float64);
    differentiable in hidden and weight. Raises ValueError or TypeError naming the argument; value ranges are checked on CPU only.
    Source: AlignDistil (arXiv 2503.02832) over a coarser partition; the bucket is ours.
    """
    _check_head(hidden_TH, weight_VH)
    tokens, vocabulary = hidden_TH.shape[0], weight_VH.shape[0]
    if id_TK.dim() != 2 or id_TK.shape[0] != tokens or id_TK.shape[1] == 0:
        raise ValueError(f"id_TK must have shape ({tokens}, K), got {tuple(id_TK.shape)}")
    if id_TK.dtype not in INTEGERS:
        raise TypeError(f"id_TK must be integer, got {id_TK.dtype}")
    if teacher_logp_TK.shape != id_TK.shape:
        raise ValueError(f"teacher_logp_TK has shape {tuple(teacher_logp_TK.shape)}, id_TK {tuple(id_TK.shape)}; they must agree")
    check_vector("tail_T", tail_T, length=tokens, like=hidden_TH)
    _check_ids(id_TK, vocabulary)
    log_teacher = [value.detach().to(eager_bucket.compute_dtype(hidden_TH)) for value in (teacher_logp_TK, tail_T)]
    kernel = pick(_KERNELS, backend, hidden_TH, ("triton_bucket", "from_hidden"))
    return kernel(hidden_TH, weight_VH, id_TK.long(), *(value.clamp(min=LOG_ZERO) for value in log_teacher))


def top_ids(hidden_TH: torch.Tensor, weight_VH: torch.Tensor, k: int) -> torch.Tensor:
    """The k likeliest token ids of each row under ``softmax(W h)``, likeliest first: int32 (T, k), without holding T x V.

    Shapes: hidden_TH (T, H) and weight_VH (V, H) of one floating point dtype. Raises ValueError for k outside [1, V].
    """
    _check_head(hidden_TH, weight_VH)
    if not 1 <= k <= weight_VH.shape[0]:
        raise ValueError(f"k must lie in [1, {weight_VH.shape[0]}], the vocabulary, got {k}")
    return eager_bucket.top_ids(hidden_TH.detach(), weight_VH.detach(), k)


def _check_head(hidden_TH: torch.Tensor, weight_VH: torch.Tensor) -> None:
    check_matrix("hidden_TH", hidden_TH)
    check_matrix("weight_VH", weight_VH)
    if weight_VH.shape[1] != hidden_TH.shape[1]:
        raise ValueError(f"weight_VH has {weight_VH.shape[1]} columns, hidden_TH has {hidden_TH.shape[1]}; they must agree")
    if weight_VH.dtype != hidden_TH.dtype:
        raise TypeError(f"weight_VH is {weight_VH.dtype}, hidden_TH is {hidden_TH.dtype}; cast one to the other")
    if weight_VH.device != hidden_TH.device:
        raise ValueError(f"weight_VH is on {weight_VH.device}, hidden_TH on {hidden_TH.device}; move one")


def _check_ids(id_TK: torch.Tensor, vocabulary: int) -> None:
    if id_TK.device.type != "cpu" or id_TK.numel() == 0:
        return
    sorted_TK = id_TK.long().sort(dim=1).values
    low, high = int(sorted_TK[:, 0].min()), int(sorted_TK[:, -1].max())
    if low < 0 or high >= vocabulary:
        raise ValueError(f"id_TK holds {low if low < 0 else high}, outside the vocabulary [0, {vocabulary})")
    twice = sorted_TK.diff(dim=1).eq(0).any(dim=1)
    if bool(twice.any()):
        raise ValueError(f"id_TK must be distinct in each row; row {int(twice.nonzero()[0])} has an id twice")


def _reference(
    hidden_TH: torch.Tensor, weight_VH: torch.Tensor, id_TK: torch.Tensor, teacher_logp_TK: torch.Tensor, tail_T: torch.Tensor
) -> torch.Tensor:
    dtype = eager_bucket.compute_dtype(hidden_TH)
    logp_TV = torch.log_softmax(hidden_TH.to(dtype) @ weight_VH.to(dtype).T, dim=-1)
    logp_TK = logp_TV.gather(1, id_TK)
    # A vocabulary that S covers has no complement: an entry of LOG_ZERO keeps the sum, and its gradient, free of NaN.
    others_TV = torch.cat([logp_TV.scatter(1, id_TK, -torch.inf), logp_TV.new_full((logp_TV.shape[0], 1), LOG_ZERO)], dim=1)
    logp = torch.cat([logp_TK, torch.logsumexp(others_TV, dim=1, keepdim=True)], dim=1).clamp(min=LOG_ZERO)
    return (logp.exp() * (logp - torch.cat([teacher_logp_TK, tail_T[:, None]], dim=1))).sum(dim=1)


_KERNELS: dict[str, Callable[..., torch.Tensor]] = {"reference": _reference, "eager": eager_bucket.from_hidden}
