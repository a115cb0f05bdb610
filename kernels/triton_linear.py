"""Triton kernel for log-probability and entropy straight from hidden states: logits live in registers, never in memory.

Forward: a program owns some tokens and one split of the vocabulary, multiplies tile after tile and keeps the running sums of
`kernels.triton_logprob`; the splits' sums, O(T x splits) numbers, are merged by torch. FLOPs 2 T H V, bytes the operands'.
Backward: for one block of the vocabulary a kernel recomputes the logits and writes ``dL/dz`` (T x block) in the dtype of
the operands; two library products turn it into the gradients of hidden states and head. FLOPs 6 T H V, memory one block.
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

from kernels.shaping import LogitShaping
from kernels.triton_logprob import FLOOR, LN_2, LOG2_E, Arguments, Values, absorb, add_bias, slope, stack_gradients

BLOCK_BYTES = 256 * 2**20
"""Size of the block of logit gradients that the backward pass holds."""


@triton.jit
def _logits(hidden, weight, head_bias, rows, columns, tokens, vocabulary, width, softcap,
            BIASED: tl.constexpr, CAPPED: tl.constexpr, PRECISION: tl.constexpr, EVEN: tl.constexpr,
            ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr):
    """A tile of raw logits (ROWS, COLUMNS), -inf past the vocabulary."""
    # Rows and columns past the end read the last one, which is cheaper than a mask; the caller drops what comes of them.
    row, column = tl.minimum(rows, tokens - 1), tl.minimum(columns, vocabulary - 1)
    z = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, width, DEPTH):
        depth = start + tl.arange(0, DEPTH)
        left, right = hidden + row[:, None] * width + depth[None, :], weight + column[:, None] * width + depth[None, :]
        if EVEN:
            h, w = tl.load(left), tl.load(right)
        else:
            deep = (depth < width)[None, :]
            h, w = tl.load(left, mask=deep, other=0.0), tl.load(right, mask=deep, other=0.0)
        z += tl.dot(h, tl.trans(w), input_precision=PRECISION)
    if BIASED:
        z += tl.load(head_bias + columns, mask=columns < vocabulary, other=0.0).to(tl.float32)[None, :]
    if CAPPED:
        # tanh by exp of a number that is never positive: no overflow
        e = tl.exp(-2.0 * tl.abs(z) / softcap)
        z = tl.where(z < 0, -1.0, 1.0) * softcap * (1.0 - e) / (1.0 + e)
    return tl.where((columns < vocabulary)[None, :], z, -float("inf"))


@triton.jit
def _forward(hidden, weight, head_bias, target, temperature, ids, bias, out, tokens, vocabulary, width, softcap, per_split,
             BIASED: tl.constexpr, CAPPED: tl.constexpr, PRECISION: tl.constexpr, EVEN: tl.constexpr, SHAPED: tl.constexpr,
             RAW: tl.constexpr, IDS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr):
    split = tl.program_id(1)
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    alive = rows < tokens
    wanted = tl.load(target + rows, mask=alive, other=-1)
    plain = tl.full((ROWS,), LOG2_E, tl.float32)
    scale = plain * (1.0 / tl.load(temperature + rows, mask=alive, other=1.0)) if SHAPED else plain
    shift = tl.load(bias + rows, mask=alive, other=0.0) if IDS > 0 else tl.zeros((ROWS,), tl.float32)
    top, total, weighted = tl.full((ROWS,), FLOOR, tl.float32), tl.zeros((ROWS,), tl.float32), tl.zeros((ROWS,), tl.float32)
    raw_top, raw_total = tl.full((ROWS,), FLOOR, tl.float32), tl.zeros((ROWS,), tl.float32)
    raw_weighted, hit, raw_hit = tl.zeros((ROWS,), tl.float32), tl.zeros((ROWS,), tl.float32), tl.zeros((ROWS,), tl.float32)
    for start in range(split * per_split, min((split + 1) * per_split, vocabulary), COLUMNS):
        columns = start + tl.arange(0, COLUMNS).to(tl.int64)
        z = _logits(hidden, weight, head_bias, rows, columns, tokens, vocabulary, width, softcap,
                    BIASED, CAPPED, PRECISION, EVEN, ROWS, COLUMNS, DEPTH)
        at = columns[None, :] == wanted[:, None]
        if RAW:
            raw_hit += tl.sum(tl.where(at, z, 0.0), axis=1)
            raw_top, raw_total, raw_weighted = absorb(z, plain, raw_top, raw_total, raw_weighted)
        if IDS > 0:
            z = add_bias(z, columns, start, ids, shift, IDS, COLUMNS)
        hit += tl.sum(tl.where(at, z, 0.0), axis=1)
        top, total, weighted = absorb(z, scale, top, total, weighted)
    place = out + split * (8 if RAW else 4) * tokens + rows
    tl.store(place, top, mask=alive)
    tl.store(place + tokens, total, mask=alive)
    tl.store(place + 2 * tokens, weighted, mask=alive)
    tl.store(place + 3 * tokens, tl.fma(hit, scale, -top), mask=alive)
    if RAW:
        tl.store(place + 4 * tokens, raw_top, mask=alive)
        tl.store(place + 5 * tokens, raw_total, mask=alive)
        tl.store(place + 6 * tokens, raw_weighted, mask=alive)
        tl.store(place + 7 * tokens, tl.fma(raw_hit, plain, -raw_top), mask=alive)


@triton.jit
def _backward(hidden, weight, head_bias, target, temperature, ids, bias, saved, grads, out, first, out_width,
              tokens, vocabulary, width, softcap,
              BIASED: tl.constexpr, CAPPED: tl.constexpr, PRECISION: tl.constexpr, EVEN: tl.constexpr, SHAPED: tl.constexpr,
              RAW: tl.constexpr, IDS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    start = tl.program_id(1) * COLUMNS
    inner = start + tl.arange(0, COLUMNS).to(tl.int64)
    columns = first + inner
    alive = rows < tokens
    z = _logits(hidden, weight, head_bias, rows, columns, tokens, vocabulary, width, softcap,
                BIASED, CAPPED, PRECISION, EVEN, ROWS, COLUMNS, DEPTH)
    at = columns[None, :] == tl.load(target + rows, mask=alive, other=-1)[:, None]
    plain = tl.full((ROWS,), LOG2_E, tl.float32)
    inverse = 1.0 / tl.load(temperature + rows, mask=alive, other=1.0) if SHAPED else tl.full((ROWS,), 1.0, tl.float32)
    y = z
    if IDS > 0:
        y = add_bias(y, columns, first + start, ids, tl.load(bias + rows, mask=alive, other=0.0), IDS, COLUMNS)
    grad = slope(y, plain * inverse, at, tl.load(saved + tokens + rows, mask=alive, other=0.0),
                 tl.load(saved + 2 * tokens + rows, mask=alive, other=0.0), tl.load(saved + rows, mask=alive, other=0.0),
                 tl.load(grads + rows, mask=alive, other=0.0), tl.load(grads + tokens + rows, mask=alive, other=0.0))
    grad = grad * inverse[:, None]
    if RAW:
        grad += slope(z, plain, at, tl.load(saved + 4 * tokens + rows, mask=alive, other=0.0),
                      tl.load(saved + 5 * tokens + rows, mask=alive, other=0.0),
                      tl.load(saved + 3 * tokens + rows, mask=alive, other=0.0),
                      tl.load(grads + 2 * tokens + rows, mask=alive, other=0.0),
                      tl.load(grads + 3 * tokens + rows, mask=alive, other=0.0))
    if CAPPED:
        grad = tl.where((columns < vocabulary)[None, :], grad * (1.0 - (z / softcap) * (z / softcap)), 0.0)
    kept = alive[:, None] & ((inner < out_width) & (columns < vocabulary))[None, :]
    tl.store(out + rows[:, None] * out_width + inner[None, :], grad.to(out.dtype.element_ty), mask=kept)


def from_hidden(
    hidden_TH: torch.Tensor,
    weight_VH: torch.Tensor,
    target_T: torch.Tensor,
    shaping: LogitShaping,
    *,
    return_raw: bool,
    head_bias_V: torch.Tensor | None,
    softcap: float | None,
    block_bytes: int = BLOCK_BYTES,
) -> Values:
    """See `kernels.linear_logprob_entropy`."""
    raw = return_raw and not shaping.is_identity
    values: Any = _FromHidden.apply(hidden_TH, weight_VH, head_bias_V, target_T, shaping, raw, softcap, block_bytes)
    return values * 2 if return_raw and len(values) == 2 else tuple(values)


def _tiles(like: torch.Tensor, tokens: int, vocabulary: int, width: int) -> dict[str, int]:
    """Tile sizes: as large as tensor cores like them, no larger than the problem; the smallest that tl.dot takes is 16."""
    rows, columns, depth = (128, 256, 64) if like.dtype in (torch.bfloat16, torch.float16) else (128, 128, 32)
    fit = {"ROWS": (rows, tokens), "COLUMNS": (columns, vocabulary), "DEPTH": (depth, width)}
    tiles = {name: min(most, triton.next_power_of_2(max(size, 16))) for name, (most, size) in fit.items()}
    # A tile of 128 x 128 numbers or more and its softmax do not fit the registers of four warps.
    return tiles | {"num_warps": 8 if tiles["ROWS"] * tiles["COLUMNS"] >= 2**14 else 4}


class _FromHidden(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_TH: torch.Tensor, weight_VH: torch.Tensor, head_bias_V: torch.Tensor | None, target_T: torch.Tensor,
        shaping: LogitShaping, raw: bool, softcap: float | None, block_bytes: int,
    ) -> Values:  # fmt: skip
        ctx.set_materialize_grads(False)
        hidden_TH, weight_VH = hidden_TH.contiguous(), weight_VH.contiguous()
        (tokens, width), vocabulary = hidden_TH.shape, weight_VH.shape[0]
        arguments = Arguments(shaping, hidden_TH)
        options = _tiles(hidden_TH, tokens, vocabulary, width)
        options |= {
            # Of float32 only: three products of halves, as exact as the scalar units' and five times as fast.
            "PRECISION": "tf32x3", "BIASED": head_bias_V is not None, "CAPPED": softcap is not None,
            "EVEN": width % options["DEPTH"] == 0, "SHAPED": arguments.shaped, "RAW": raw, "IDS": arguments.count,
        }  # fmt: skip
        inputs = (hidden_TH, weight_VH, arguments.temperature_T if head_bias_V is None else head_bias_V, target_T,
                  *arguments.pointers)  # fmt: skip
        # Enough programs to fill the device even for few tokens; more splits than that only cost merging.
        blocks = triton.cdiv(tokens, options["ROWS"])
        splits = max(1, min(triton.cdiv(vocabulary, options["COLUMNS"]), triton.cdiv(512, max(blocks, 1))))
        per_split = triton.cdiv(triton.cdiv(vocabulary, options["COLUMNS"]), splits) * options["COLUMNS"]
        splits = triton.cdiv(vocabulary, per_split)
        out = hidden_TH.new_empty((splits, 8 if raw else 4, tokens), dtype=torch.float32)
        if tokens:
            _forward[(blocks, splits)](*inputs, out, tokens, vocabulary, width, softcap or 1.0, per_split, **options)
        found = [_merge(out[:, 4 * k : 4 * k + 4], target_T // per_split) for k in range(2 if raw else 1)]
        ctx.save_for_backward(*inputs, torch.stack([x for _, *kept in found for x in kept]))
        ctx.options, ctx.softcap, ctx.block_bytes, ctx.biased = options, softcap, block_bytes, head_bias_V is not None
        return tuple(x for logp, entropy, *_ in found for x in (logp, entropy))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:  # pyright: ignore
        if all(grad is None for grad in grads):
            return (None,) * 8
        *inputs, saved = ctx.saved_tensors
        hidden_TH, weight_VH, head_bias_V = inputs[:3]
        (tokens, width), vocabulary = hidden_TH.shape, weight_VH.shape[0]
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        upstream = stack_gradients(grads, saved[0])
        grad_TH = hidden_TH.new_zeros(hidden_TH.shape, dtype=torch.float32) if need_hidden else None
        grad_VH = torch.zeros_like(weight_VH) if need_weight else None
        grad_V = torch.zeros_like(head_bias_V, dtype=torch.float32) if need_bias and ctx.biased else None
        # Whole tiles: rows of the block that begin off a 16-byte boundary would make the library products slow.
        tile = ctx.options["COLUMNS"]
        block = max(tile, ctx.block_bytes // max(1, tokens * hidden_TH.element_size()) // tile * tile)
        scratch = hidden_TH.new_empty(tokens * min(block, vocabulary))
        for first in range(0, vocabulary if tokens else 0, block):
            size = min(block, vocabulary - first)
            grad_TV = scratch[: tokens * size].view(tokens, size)
            grid = triton.cdiv(tokens, ctx.options["ROWS"]), triton.cdiv(size, tile)
            _backward[grid](
                *inputs, saved, upstream, grad_TV, first, size, tokens, vocabulary, width, ctx.softcap or 1.0, **ctx.options
            )  # fmt: skip
            if grad_TH is not None:
                grad_TH += grad_TV @ weight_VH[first : first + size]
            if grad_VH is not None:
                torch.mm(grad_TV.T, hidden_TH, out=grad_VH[first : first + size])
            if grad_V is not None:
                grad_V[first : first + size] = grad_TV.sum(dim=0, dtype=torch.float32)
        return (
            None if grad_TH is None else grad_TH.to(hidden_TH.dtype), grad_VH,
            None if grad_V is None else grad_V.to(head_bias_V.dtype), None, None, None, None, None,
        )  # fmt: skip


def _merge(part_S4T: torch.Tensor, owner_T: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-prob, entropy, maximum and log2 of the sum, from the sums of all splits; ``owner_T`` is the split of the target."""
    top_ST, total_ST, weighted_ST, hit_ST = part_S4T.unbind(dim=1)
    top_T = top_ST.amax(dim=0)
    drop_ST = top_ST - top_T
    scale_ST = drop_ST.exp2()
    total_T = (total_ST * scale_ST).sum(dim=0)
    weighted_T = ((weighted_ST + drop_ST * total_ST) * scale_ST).sum(dim=0)
    log_sum_T = total_T.log2()
    hit_T = (hit_ST + drop_ST).gather(0, owner_T[None]).squeeze(0)
    return (hit_T - log_sum_T) * LN_2.value, (log_sum_T - weighted_T / total_T) * LN_2.value, top_T, log_sum_T
