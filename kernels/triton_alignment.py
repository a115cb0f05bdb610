"""Triton kernels for AlignDistil: teacher, extrapolation weight and KL of a row in one launch, the student's gradient in another.

A row's program streams over the vocabulary three times: for the three normalisers (and ``A = sum e^s (s - d)``,
``B = sum e^s (d - r)``, which give the KL once alpha is known), for the total variation, and for the teacher's normaliser. Bytes:
eight reads of a row of logits; the gradient reads the three rows once and writes one.
"""

# Triton's decorator turns the functions below into launchers that pyright cannot follow.
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
# pyright: reportIndexIssue=false, reportOperatorIssue=false, reportAttributeAccessIssue=false
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from kernels.triton_logprob import FLOOR, ZERO, tile_of

Head = tuple[torch.Tensor, torch.Tensor]
CHUNK_BYTES = 128 * 2**20
"""Size of one model's logits of a chunk of tokens (forward) or of a block of the vocabulary (backward), from hidden states."""


@triton.jit
def _tile(logits, place, inside):
    return tl.maximum(tl.load(logits + place, mask=inside, other=-float("inf")).to(tl.float32), FLOOR)


@triton.jit
def _forward(student, dpo, reverse, out, tokens, vocabulary, r, eps, TILE: tl.constexpr):
    here = tl.program_id(0) + tl.zeros((1,), tl.int64)
    s_top, d_top, r_top = tl.full((1,), FLOOR, tl.float32), tl.full((1,), FLOOR, tl.float32), tl.full((1,), FLOOR, tl.float32)
    s_sum, d_sum, r_sum = tl.zeros((1,), tl.float32), tl.zeros((1,), tl.float32), tl.zeros((1,), tl.float32)
    for start in range(0, vocabulary, TILE):
        columns = start + tl.arange(0, TILE)
        place, inside = here[:, None] * vocabulary + columns[None, :], (columns < vocabulary)[None, :]
        s, d, q = _tile(student, place, inside), _tile(dpo, place, inside), _tile(reverse, place, inside)
        top = tl.maximum(s_top, tl.max(s, axis=1))
        s_sum = s_sum * tl.exp(s_top - top) + tl.sum(tl.exp(s - top[:, None]), axis=1)
        s_top = top
        top = tl.maximum(d_top, tl.max(d, axis=1))
        d_sum = d_sum * tl.exp(d_top - top) + tl.sum(tl.exp(d - top[:, None]), axis=1)
        d_top = top
        top = tl.maximum(r_top, tl.max(q, axis=1))
        r_sum = r_sum * tl.exp(r_top - top) + tl.sum(tl.exp(q - top[:, None]), axis=1)
        r_top = top
    s_z, d_z, r_z = s_top + tl.log(s_sum), d_top + tl.log(d_sum), r_top + tl.log(r_sum)
    distance, near, far = tl.zeros((1,), tl.float32), tl.zeros((1,), tl.float32), tl.zeros((1,), tl.float32)
    for start in range(0, vocabulary, TILE):
        columns = start + tl.arange(0, TILE)
        place, inside = here[:, None] * vocabulary + columns[None, :], (columns < vocabulary)[None, :]
        s = tl.maximum(_tile(student, place, inside) - s_z[:, None], ZERO)
        d = tl.maximum(_tile(dpo, place, inside) - d_z[:, None], ZERO)
        q = tl.maximum(_tile(reverse, place, inside) - r_z[:, None], ZERO)
        distance += tl.sum(tl.where(inside, tl.abs(tl.exp(d) - tl.exp(q)), 0.0), axis=1)
        p = tl.where(inside, tl.exp(s), 0.0)
        near += tl.sum(p * (s - d), axis=1)
        far += tl.sum(p * (d - q), axis=1)
    alpha = r * 0.5 * distance + eps
    t_top, t_sum = tl.full((1,), FLOOR, tl.float32), tl.zeros((1,), tl.float32)
    for start in range(0, vocabulary, TILE):
        columns = start + tl.arange(0, TILE)
        place, inside = here[:, None] * vocabulary + columns[None, :], (columns < vocabulary)[None, :]
        d = tl.maximum(_tile(dpo, place, inside) - d_z[:, None], ZERO)
        q = tl.maximum(_tile(reverse, place, inside) - r_z[:, None], ZERO)
        u = tl.where(inside, d + alpha[:, None] * (d - q), FLOOR)
        top = tl.maximum(t_top, tl.max(u, axis=1))
        t_sum = t_sum * tl.exp(t_top - top) + tl.sum(tl.exp(u - top[:, None]), axis=1)
        t_top = top
    t_z = t_top + tl.log(t_sum)
    tl.store(out + here, near - alpha * far + t_z)
    tl.store(out + tokens + here, alpha)
    tl.store(out + 2 * tokens + here, s_z)
    tl.store(out + 3 * tokens + here, d_z)
    tl.store(out + 4 * tokens + here, r_z)
    tl.store(out + 5 * tokens + here, t_z)


@triton.jit
def _backward(student, dpo, reverse, saved, grad, out, tokens, vocabulary, TILE: tl.constexpr):
    here = tl.program_id(0) + tl.zeros((1,), tl.int64)
    columns = tl.program_id(1) * TILE + tl.arange(0, TILE)
    place, inside = here[:, None] * vocabulary + columns[None, :], (columns < vocabulary)[None, :]
    s = tl.maximum(_tile(student, place, inside) - tl.load(saved + 2 * tokens + here)[:, None], ZERO)
    d = tl.maximum(_tile(dpo, place, inside) - tl.load(saved + 3 * tokens + here)[:, None], ZERO)
    q = tl.maximum(_tile(reverse, place, inside) - tl.load(saved + 4 * tokens + here)[:, None], ZERO)
    alpha, teacher_z = tl.load(saved + tokens + here), tl.load(saved + 5 * tokens + here)
    teacher = tl.maximum(d + alpha[:, None] * (d - q) - teacher_z[:, None], ZERO)
    slope = tl.exp(s) * (s - teacher - tl.load(saved + here)[:, None]) * tl.load(grad + here)[:, None]
    tl.store(out + place, slope.to(out.dtype.element_ty), mask=inside)


def _run_forward(logits: list[torch.Tensor], r: float, eps: float) -> torch.Tensor:
    """KL, alpha and the four normalisers of all rows, float32 (6, T)."""
    tokens, vocabulary = logits[0].shape
    out = logits[0].new_empty((6, tokens), dtype=torch.float32)
    if tokens:
        _forward[(tokens,)](*logits, out, tokens, vocabulary, r, eps, TILE=tile_of(vocabulary), num_warps=8)
    return out


def _run_backward(logits: list[torch.Tensor], saved: torch.Tensor, grad_T: torch.Tensor, out_TV: torch.Tensor) -> torch.Tensor:
    """The gradient of some columns, written to ``out_TV``, which may be the student's logits themselves."""
    tokens, vocabulary = logits[0].shape
    tile = tile_of(vocabulary)
    if tokens:
        grid = (tokens, triton.cdiv(vocabulary, tile))
        _backward[grid](*logits, saved, grad_T, out_TV, tokens, vocabulary, TILE=tile, num_warps=8)
    return out_TV


def from_logits(
    student_TV: torch.Tensor, dpo_TV: torch.Tensor, reverse_TV: torch.Tensor, r: float, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `kernels.alignment_kl`."""
    result: Any = _FromLogits.apply(student_TV, dpo_TV, reverse_TV, r, eps)
    return result


def from_hidden(student: Head, dpo: Head, reverse: Head, r: float, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """See `kernels.linear_alignment_kl`: logits by library products, a part at a time."""
    result: Any = _FromHidden.apply(*student, *dpo, *reverse, r, eps)
    return result


class _FromLogits(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
        logits = [z.contiguous() for z in arguments[:3]]
        out = _run_forward(logits, *arguments[3:])
        ctx.save_for_backward(*logits, out)
        kl_T, alpha_T = out[0].clone(), out[1].clone()
        ctx.mark_non_differentiable(alpha_T)
        return kl_T, alpha_T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_T: torch.Tensor, _alpha: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # pyright: ignore
        *logits, saved = ctx.saved_tensors
        out_TV = torch.empty_like(logits[0])
        return (_run_backward(logits, saved, grad_T.float().contiguous(), out_TV), *[None] * 4)


class _FromHidden(torch.autograd.Function):
    """Forward: a chunk of tokens with the whole vocabulary, which the teacher's normaliser needs. Backward: all tokens with a
    block of the vocabulary, for which the saved normalisers are enough, so that the head's gradient is written once."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
        heads, constants = [x.contiguous() for x in arguments[:6]], arguments[6:]
        tokens, vocabulary = heads[0].shape[0], heads[1].shape[0]
        rows = max(1, CHUNK_BYTES // (heads[0].element_size() * vocabulary))
        out = heads[0].new_empty((6, tokens), dtype=torch.float32)
        scratch = _scratch(heads, min(rows, tokens) * vocabulary)
        for start in range(0, tokens, rows):
            part = slice(start, min(start + rows, tokens))
            out[:, part] = _run_forward(_products(heads, part, slice(0, vocabulary), scratch), *constants)
        ctx.save_for_backward(*heads, out)
        kl_T, alpha_T = out[0].clone(), out[1].clone()
        ctx.mark_non_differentiable(alpha_T)
        return kl_T, alpha_T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_T: torch.Tensor, _alpha: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # pyright: ignore
        *heads, saved = ctx.saved_tensors
        hidden_TH, weight_VH = heads[:2]
        tokens, vocabulary = hidden_TH.shape[0], weight_VH.shape[0]
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        grad_T = grad_T.float().contiguous()
        grad_TH = torch.zeros_like(hidden_TH, dtype=torch.float32) if need_hidden else None
        grad_VH = torch.zeros_like(weight_VH) if need_weight else None
        # Whole multiples of 128: rows that begin off a 16-byte boundary would make the library products slow.
        width = min(vocabulary, max(128, CHUNK_BYTES // max(1, tokens * hidden_TH.element_size()) // 128 * 128))
        scratch = _scratch(heads, tokens * width)
        for start in range(0, vocabulary if tokens else 0, width):
            block = slice(start, min(start + width, vocabulary))
            logits = _products(heads, slice(0, tokens), block, scratch)
            # A program reads its tile before it writes it, and no other program touches it.
            grad_TV = _run_backward(logits, saved, grad_T, logits[0])
            if grad_TH is not None:
                grad_TH += grad_TV @ weight_VH[block]
            if grad_VH is not None:
                torch.mm(grad_TV.T, hidden_TH, out=grad_VH[block])
        return (None if grad_TH is None else grad_TH.to(hidden_TH.dtype), grad_VH, *[None] * 6)


def _scratch(heads: list[torch.Tensor], count: int) -> list[torch.Tensor]:
    """One buffer for the logits of each model, used again for every part."""
    return [heads[i].new_empty(count) for i in (0, 2, 4)]


def _products(heads: list[torch.Tensor], part: slice, block: slice, scratch: list[torch.Tensor]) -> list[torch.Tensor]:
    """The three models' logits of some tokens and columns."""
    shape = part.stop - part.start, block.stop - block.start
    out = [x[: shape[0] * shape[1]].view(shape) for x in scratch]
    for i, z in enumerate(out):
        torch.mm(heads[2 * i][part], heads[2 * i + 1][block].T, out=z)
    return out
