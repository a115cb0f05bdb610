"""The bucketed reverse KL a few tokens at a time; the gradient in the logits is written down, logits are made anew for it.

Upstream gradient k of KL_t gives ``dL/dz_v = k pi_v (g - KL)`` with g = ``ln(P / P*)`` of the bucket that v belongs to.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from kernels.eager import CHUNK_BYTES, compute_dtype
from kernels.shaping import LOG_ZERO

GPU_FACTOR = 4
"""A GPU wants larger matrix products than a cache holds."""


def from_hidden(
    hidden_TH: torch.Tensor, weight_VH: torch.Tensor, id_TK: torch.Tensor, teacher_logp_TK: torch.Tensor, tail_T: torch.Tensor
) -> torch.Tensor:
    """See `kernels.linear_bucket_kl`."""
    result: Any = _FromHidden.apply(hidden_TH, weight_VH, id_TK, teacher_logp_TK, tail_T)
    return result


def top_ids(hidden_TH: torch.Tensor, weight_VH: torch.Tensor, k: int) -> torch.Tensor:
    """See `kernels.top_ids`."""
    id_TK = torch.empty((hidden_TH.shape[0], k), dtype=torch.int32, device=hidden_TH.device)
    for part in _chunks(hidden_TH, weight_VH.shape[0]):
        id_TK[part] = (hidden_TH[part] @ weight_VH.T).topk(k, dim=-1).indices.int()
    return id_TK


class _FromHidden(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TH: torch.Tensor,
        weight_VH: torch.Tensor,
        id_TK: torch.Tensor,
        teacher_logp_TK: torch.Tensor,
        tail_T: torch.Tensor,
    ) -> torch.Tensor:
        kl_T = hidden_TH.new_empty(hidden_TH.shape[0], dtype=compute_dtype(hidden_TH))
        slope_T = torch.empty_like(kl_T)
        for part in _chunks(hidden_TH, weight_VH.shape[0]):
            logp_TV, id_PK = _log_softmax(hidden_TH[part], weight_VH), id_TK[part]
            logp_PK = logp_TV.gather(1, id_PK).clamp_(min=LOG_ZERO)
            # -inf where S is the whole vocabulary, and e^LOG_ZERO is 0
            rest_P = torch.logsumexp(logp_TV.scatter_(1, id_PK, -torch.inf), dim=1).clamp_(min=LOG_ZERO)
            slope_T[part] = rest_P - tail_T[part]
            inside_P = (logp_PK.exp() * (logp_PK - teacher_logp_TK[part])).sum(dim=1)
            kl_T[part] = inside_P + rest_P.exp() * slope_T[part]
        ctx.save_for_backward(hidden_TH, weight_VH, id_TK, teacher_logp_TK, slope_T, kl_T)
        return kl_T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_T: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # pyright: ignore
        hidden_TH, weight_VH, id_TK, teacher_logp_TK, slope_T, kl_T = ctx.saved_tensors
        grad_TH = torch.empty_like(hidden_TH) if ctx.needs_input_grad[0] else None
        grad_VH = torch.zeros_like(weight_VH, dtype=compute_dtype(weight_VH)) if ctx.needs_input_grad[1] else None
        for part in _chunks(hidden_TH, weight_VH.shape[0]):
            logp_TV, id_PK = _log_softmax(hidden_TH[part], weight_VH), id_TK[part]
            logp_PK = logp_TV.gather(1, id_PK).clamp_(min=LOG_ZERO)
            inside_PK = logp_PK.exp() * (logp_PK - teacher_logp_TK[part] - kl_T[part, None])
            grad_PV = logp_TV.exp_().mul_((slope_T[part] - kl_T[part])[:, None])
            grad_PV = grad_PV.scatter_(1, id_PK, inside_PK).mul_(grad_T[part, None]).to(weight_VH.dtype)
            if grad_TH is not None:
                torch.mm(grad_PV, weight_VH, out=grad_TH[part])
            if grad_VH is not None:
                grad_VH += grad_PV.T @ hidden_TH[part]
        return (grad_TH, None if grad_VH is None else grad_VH.to(weight_VH.dtype), None, None, None)


def _log_softmax(hidden_PH: torch.Tensor, weight_VH: torch.Tensor) -> torch.Tensor:
    logits_PV = (hidden_PH @ weight_VH.T).to(compute_dtype(hidden_PH))
    return torch.log_softmax(logits_PV, dim=-1, out=logits_PV)


def _chunks(hidden_TH: torch.Tensor, vocabulary: int) -> Iterator[slice]:
    # Up to three matrices of a chunk are alive at once: log-probs, a product in the inputs' dtype, what log-sum-exp makes.
    budget = CHUNK_BYTES * (GPU_FACTOR if hidden_TH.is_cuda else 1)
    rows = max(1, budget // (12 * max(1, vocabulary)))
    for start in range(0, hidden_TH.shape[0], rows):
        yield slice(start, min(start + rows, hidden_TH.shape[0]))
