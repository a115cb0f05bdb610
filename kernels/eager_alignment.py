"""AlignDistil's KL a few tokens at a time; the gradient in the student is written down, the teacher is composed once a chunk.

Upstream gradient k of KL_t gives ``dL/dz_v = k pi_v (ln pi_v - ln pi*_v - KL)``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from kernels.eager import CHUNK_BYTES, compute_dtype
from kernels.shaping import LOG_ZERO

Head = tuple[torch.Tensor, torch.Tensor]


def from_logits(
    student_TV: torch.Tensor, dpo_TV: torch.Tensor, reverse_TV: torch.Tensor, r: float, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `kernels.alignment_kl`."""
    result: Any = _FromLogits.apply(student_TV, dpo_TV, reverse_TV, r, eps)
    return result


def from_hidden(student: Head, dpo: Head, reverse: Head, r: float, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """See `kernels.linear_alignment_kl`."""
    result: Any = _FromHidden.apply(*student, *dpo, *reverse, r, eps)
    return result


class _FromLogits(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, student_TV: torch.Tensor, dpo_TV: torch.Tensor, reverse_TV: torch.Tensor, r: float, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        kl_T, alpha_T = _outputs(student_TV)
        for part in _chunks(student_TV.shape[0], student_TV.shape[1]):
            log_s, log_teacher, alpha_T[part] = _compose(student_TV[part], dpo_TV[part], reverse_TV[part], r, eps)
            kl_T[part] = (log_s.exp() * (log_s - log_teacher)).sum(dim=-1)
        ctx.save_for_backward(student_TV, dpo_TV, reverse_TV, kl_T)
        ctx.constants = r, eps
        ctx.mark_non_differentiable(alpha_T)
        return kl_T, alpha_T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_T: torch.Tensor, _alpha: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # pyright: ignore
        student_TV, dpo_TV, reverse_TV, kl_T = ctx.saved_tensors
        grad_TV = torch.empty_like(student_TV)
        for part in _chunks(student_TV.shape[0], student_TV.shape[1]):
            log_s, log_teacher, _ = _compose(student_TV[part], dpo_TV[part], reverse_TV[part], *ctx.constants)
            grad_TV[part] = _gradient(log_s, log_teacher, kl_T[part], grad_T[part])
        return grad_TV, None, None, None, None


class _FromHidden(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
        heads, (r, eps) = arguments[:6], arguments[6:]
        kl_T, alpha_T = _outputs(heads[0])
        for part in _chunks(heads[0].shape[0], heads[1].shape[0]):
            student, dpo, reverse = _logits(heads, part)
            log_s, log_teacher, alpha_T[part] = _compose(student, dpo, reverse, r, eps)
            kl_T[part] = (log_s.exp() * (log_s - log_teacher)).sum(dim=-1)
        ctx.save_for_backward(*heads, kl_T)
        ctx.constants = r, eps
        ctx.mark_non_differentiable(alpha_T)
        return kl_T, alpha_T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_T: torch.Tensor, _alpha: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # pyright: ignore
        *heads, kl_T = ctx.saved_tensors
        hidden_TH, weight_VH = heads[:2]
        grad_TH = torch.empty_like(hidden_TH) if ctx.needs_input_grad[0] else None
        grad_VH = torch.zeros_like(weight_VH, dtype=compute_dtype(weight_VH)) if ctx.needs_input_grad[1] else None
        for part in _chunks(hidden_TH.shape[0], weight_VH.shape[0]):
            student, dpo, reverse = _logits(heads, part)
            log_s, log_teacher, _ = _compose(student, dpo, reverse, *ctx.constants)
            grad_TV = _gradient(log_s, log_teacher, kl_T[part], grad_T[part]).to(weight_VH.dtype)
            if grad_TH is not None:
                torch.mm(grad_TV, weight_VH, out=grad_TH[part])
            if grad_VH is not None:
                grad_VH += grad_TV.T @ hidden_TH[part]
        return (grad_TH, None if grad_VH is None else grad_VH.to(weight_VH.dtype), *[None] * 6)


def _compose(
    student_TV: torch.Tensor, dpo_TV: torch.Tensor, reverse_TV: torch.Tensor, r: float, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """ln pi_s and ln pi* of a chunk, and alpha."""
    log_s, log_d, log_r = (_log_softmax_(z.to(compute_dtype(student_TV), copy=True)) for z in (student_TV, dpo_TV, reverse_TV))
    alpha_T = log_d.exp().sub_(log_r.exp()).abs_().sum(dim=-1).mul_(0.5 * r).add_(eps)
    log_teacher = _log_softmax_(log_r.neg_().add_(log_d).mul_(alpha_T[:, None]).add_(log_d))
    return log_s, log_teacher, alpha_T


def _log_softmax_(value_TV: torch.Tensor) -> torch.Tensor:
    return torch.log_softmax(value_TV, dim=-1, out=value_TV).clamp_(min=LOG_ZERO)


def _gradient(log_s: torch.Tensor, log_teacher: torch.Tensor, kl_T: torch.Tensor, grad_T: torch.Tensor) -> torch.Tensor:
    """Overwrites both matrices."""
    difference = log_teacher.neg_().add_(log_s).sub_(kl_T[:, None])
    return log_s.exp_().mul_(difference).mul_(grad_T[:, None])


def _logits(heads: Any, part: slice) -> list[torch.Tensor]:
    """The three chunks of logits."""
    return [heads[i][part] @ heads[i + 1].T for i in (0, 2, 4)]


def _outputs(like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    dtype = compute_dtype(like)
    return like.new_empty(like.shape[0], dtype=dtype), like.new_empty(like.shape[0], dtype=dtype)


def _chunks(tokens: int, vocabulary: int) -> Iterator[slice]:
    # Four matrices of a chunk are alive at once.
    rows = max(1, CHUNK_BYTES // (16 * max(1, vocabulary)))
    for start in range(0, tokens, rows):
        yield slice(start, min(start + rows, tokens))
