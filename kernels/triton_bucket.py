"""Triton kernels for the bucketed reverse KL: complement, ids and KL of a row in one launch, the logits' gradient in another.

Forward: library products make the logits of a chunk of tokens; a row's program takes the K logits out, puts minus infinity in
their place, and streams over the row once, which gives the log-sum-exp of the complement. Backward: a block of the vocabulary and
all tokens, so that the head's gradient is written once. Bytes: one read of the logits forward, one read and one write backward.
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

from kernels.triton_logprob import FLOOR, LN_2, LOG2_E, ZERO, tile_of

CHUNK_BYTES = 128 * 2**20
"""Size of the logits of a chunk of tokens (forward) or of a block of the vocabulary (backward)."""


@triton.jit
def _forward(logits, ids, teacher, tail, out, tokens, vocabulary, count, COUNT: tl.constexpr, TILE: tl.constexpr):
    here = tl.program_id(0) + tl.zeros((1,), tl.int64)
    k = tl.arange(0, COUNT)
    known = k < count
    row = here * vocabulary
    place = row + tl.load(ids + here * count + k, mask=known, other=0)
    picked = tl.load(logits + place, mask=known, other=-float("inf")).to(tl.float32)
    # The chunk of logits is ours: without these entries what is left of the row is the complement.
    tl.debug_barrier()
    tl.store(logits + place, tl.full((COUNT,), -float("inf"), tl.float32).to(logits.dtype.element_ty), mask=known)
    tl.debug_barrier()
    top, total = tl.full((1,), FLOOR, tl.float32), tl.zeros((1,), tl.float32)
    for start in range(0, vocabulary, TILE):
        columns = start + tl.arange(0, TILE)
        inside = (columns < vocabulary)[None, :]
        z = tl.load(logits + row[:, None] + columns[None, :], mask=inside, other=-float("inf")).to(tl.float32)
        new_top = tl.maximum(top, tl.max(z, axis=1) * LOG2_E)
        e = tl.exp2(tl.maximum(tl.fma(z, LOG2_E, -new_top[:, None]), ZERO))
        total = total * tl.exp2(top - new_top) + tl.sum(e, axis=1)
        top = new_top
    whole_top = tl.maximum(top, tl.max(picked, axis=0) * LOG2_E)
    kept = tl.maximum(tl.fma(picked, LOG2_E, -whole_top), ZERO)
    rest = total * tl.exp2(tl.maximum(top - whole_top, ZERO))
    log_sum = tl.log2(rest + tl.sum(tl.exp2(kept), axis=0))
    # A complement that is empty, or far below the ids, counts as ZERO like any other log-prob.
    rest = tl.maximum((tl.maximum(top - whole_top, ZERO) + tl.maximum(tl.log2(total), ZERO) - log_sum) * LN_2, ZERO)
    logp = tl.maximum((kept - log_sum) * LN_2, ZERO)
    gap = logp - tl.load(teacher + here * count + k, mask=known, other=0.0)
    slope = rest - tl.load(tail + here)
    tl.store(out + here, tl.sum(tl.where(known, tl.exp(logp) * gap, 0.0), axis=0) + tl.exp(rest) * slope)
    tl.store(out + tokens + here, slope)
    tl.store(out + 2 * tokens + here, whole_top)
    tl.store(out + 3 * tokens + here, log_sum)


@triton.jit
def _backward(logits, ids, teacher, saved, grad, first, tokens, vocabulary, count, COUNT: tl.constexpr, TILE: tl.constexpr):
    """Puts the gradient in the place of the logits of columns ``first`` and on; ``vocabulary`` is how many those are."""
    here = tl.program_id(0) + tl.zeros((1,), tl.int64)
    start = tl.program_id(1) * TILE
    columns = start + tl.arange(0, TILE)
    inside = (columns < vocabulary)[None, :]
    kl, slope = tl.load(saved + here), tl.load(saved + tokens + here)
    top, log_sum, factor = tl.load(saved + 2 * tokens + here), tl.load(saved + 3 * tokens + here), tl.load(grad + here)
    row = here * vocabulary
    k = tl.arange(0, COUNT)
    one = tl.load(ids + here * count + k, mask=k < count, other=-1) - first
    here_too = (one >= start) & (one < tl.minimum(start + TILE, vocabulary))
    picked = tl.load(logits + row + one, mask=here_too, other=0.0).to(tl.float32)
    z = tl.load(logits + row[:, None] + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    p = tl.exp2(tl.maximum(tl.fma(z, LOG2_E, -top[:, None]) - log_sum[:, None], ZERO))
    logp = tl.maximum((tl.fma(picked, LOG2_E, -top) - log_sum) * LN_2, ZERO)
    gap = logp - tl.load(teacher + here * count + k, mask=k < count, other=0.0) - kl
    # Another thread of this program may own the same entry: read all, then write all, then write the ids.
    tl.debug_barrier()
    others = p * ((slope - kl) * factor)[:, None]
    tl.store(logits + row[:, None] + columns[None, :], others.to(logits.dtype.element_ty), mask=inside)
    tl.debug_barrier()
    tl.store(logits + row + one, (tl.exp(logp) * gap * factor).to(logits.dtype.element_ty), mask=here_too)


def from_hidden(
    hidden_TH: torch.Tensor, weight_VH: torch.Tensor, id_TK: torch.Tensor, teacher_logp_TK: torch.Tensor, tail_T: torch.Tensor
) -> torch.Tensor:
    """See `kernels.linear_bucket_kl`."""
    result: Any = _FromHidden.apply(hidden_TH, weight_VH, id_TK, teacher_logp_TK, tail_T)
    return result


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
        hidden_TH, id_TK = hidden_TH.contiguous(), id_TK.contiguous()
        teacher_logp_TK, tail_T = teacher_logp_TK.float().contiguous(), tail_T.float().contiguous()
        tokens, vocabulary, count = hidden_TH.shape[0], weight_VH.shape[0], id_TK.shape[1]
        rows = max(1, CHUNK_BYTES // (hidden_TH.element_size() * vocabulary))
        scratch = hidden_TH.new_empty(min(rows, tokens) * vocabulary)
        out = hidden_TH.new_empty((4, tokens), dtype=torch.float32)
        options = {"COUNT": triton.next_power_of_2(count), "TILE": tile_of(vocabulary)}
        for start in range(0, tokens, rows):
            part = slice(start, min(start + rows, tokens))
            size = part.stop - part.start
            logits = torch.mm(hidden_TH[part], weight_VH.T, out=scratch[: size * vocabulary].view(size, vocabulary))
            found = out.new_empty((4, size))
            _forward[(size,)](logits, id_TK[part], teacher_logp_TK[part], tail_T[part], found, size, vocabulary, count, **options)
            out[:, part] = found
        ctx.save_for_backward(hidden_TH, weight_VH, id_TK, teacher_logp_TK, out)
        return out[0].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_T: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # pyright: ignore
        hidden_TH, weight_VH, id_TK, teacher_logp_TK, saved = ctx.saved_tensors
        tokens, vocabulary, count = hidden_TH.shape[0], weight_VH.shape[0], id_TK.shape[1]
        grad_T = grad_T.float().contiguous()
        grad_TH = torch.zeros_like(hidden_TH, dtype=torch.float32) if ctx.needs_input_grad[0] else None
        grad_VH = torch.zeros_like(weight_VH) if ctx.needs_input_grad[1] else None
        # Whole multiples of 128: rows that begin off a 16-byte boundary would make the library products slow.
        width = min(vocabulary, max(128, CHUNK_BYTES // max(1, tokens * hidden_TH.element_size()) // 128 * 128))
        scratch = hidden_TH.new_empty(tokens * width)
        for start in range(0, vocabulary if tokens else 0, width):
            size = min(width, vocabulary - start)
            block = slice(start, start + size)
            grad_TV = torch.mm(hidden_TH, weight_VH[block].T, out=scratch[: tokens * size].view(tokens, size))
            tile = tile_of(size)
            _backward[(tokens, triton.cdiv(size, tile))](
                grad_TV, id_TK, teacher_logp_TK, saved, grad_T, start, tokens, size, count,
                COUNT=triton.next_power_of_2(count), TILE=tile,
            )  # fmt: skip
            if grad_TH is not None:
                grad_TH += grad_TV @ weight_VH[block]
            if grad_VH is not None:
                torch.mm(grad_TV.T, hidden_TH, out=grad_VH[block])
        return (None if grad_TH is None else grad_TH.to(hidden_TH.dtype), grad_VH, None, None, None)
