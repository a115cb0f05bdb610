"""Triton kernels over given logits: log-probability and entropy in one pass, their gradient in one more.

A row's program walks over the vocabulary once and keeps, for the raw and the shaped distribution, the running maximum m,
``s = sum 2^(y - m)`` and ``u = sum (y - m) 2^(y - m)`` of the logits in units of ln 2, ``y = z log2(e) / tau``: a power of two is
one instruction. Then ``log2 Z = m + log2 s`` (kept as two numbers, one would round large logits), ``H = (log2 s - u / s) ln 2``.
Bytes: one read of the logits forward, one read and one write backward.
"""

# Triton's decorator turns the functions below into launchers that pyright cannot follow.
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
# pyright: reportIndexIssue=false, reportOperatorIssue=false, reportAttributeAccessIssue=false
from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from kernels.shaping import LOG_ZERO, LogitShaping

Values = tuple[torch.Tensor, ...]

FLOOR: tl.constexpr = tl.constexpr(-3.0e38)
"""Stands for minus infinity in running maxima, where infinity minus infinity would give NaN."""
ZERO: tl.constexpr = tl.constexpr(LOG_ZERO)
LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN_2: tl.constexpr = tl.constexpr(0.6931471805599453)


@triton.jit
def absorb(z, scale, top, total, weighted):
    """Take a tile of logits (R, C) into the running sums (R) of one distribution; ``scale`` (R) turns z into y."""
    new_top = tl.maximum(top, tl.max(z, axis=1) * scale)
    # The maximum is rounded, the distances to it are not: with fma they are the same numbers wherever they are computed.
    shifted = tl.maximum(tl.fma(z, scale[:, None], -new_top[:, None]), ZERO)
    e = tl.exp2(shifted)
    drop = top - new_top
    shrink = tl.exp2(drop)
    weighted = (weighted + drop * total) * shrink + tl.sum(e * shifted, axis=1)
    return new_top, total * shrink + tl.sum(e, axis=1), weighted


@triton.jit
def add_bias(z, columns, first, ids, bias, COUNT: tl.constexpr, WIDTH: tl.constexpr):
    """Add bias (R) to the columns of the tile, ``first`` to ``first + WIDTH``, that are among ``ids``; most tiles have none."""
    for k in tl.static_range(COUNT):
        one = tl.load(ids + k)
        if (one >= first) & (one < first + WIDTH):
            z += tl.where(columns[None, :] == one, bias[:, None], 0.0)
    return z


@triton.jit
def _finish(out, tokens, here, hit, scale, top, total, weighted):
    """Write log-prob, entropy, m and log2 s of a row."""
    log_sum = tl.log2(total)
    tl.store(out + here, (tl.fma(hit, scale, -top) - log_sum) * LN_2)
    tl.store(out + tokens + here, (log_sum - weighted / total) * LN_2)
    tl.store(out + 2 * tokens + here, top)
    tl.store(out + 3 * tokens + here, log_sum)


@triton.jit
def _forward(logits, stride, target, temperature, ids, bias, out, tokens, vocabulary,
             SHAPED: tl.constexpr, RAW: tl.constexpr, IDS: tl.constexpr, TILE: tl.constexpr):
    here = tl.program_id(0) + tl.zeros((1,), tl.int64)
    wanted = tl.load(target + here)
    plain = tl.full((1,), LOG2_E, tl.float32)
    scale = plain * (1.0 / tl.load(temperature + here)) if SHAPED else plain
    shift = tl.load(bias + here) if IDS > 0 else tl.zeros((1,), tl.float32)
    top, total, weighted = tl.full((1,), FLOOR, tl.float32), tl.zeros((1,), tl.float32), tl.zeros((1,), tl.float32)
    raw_top, raw_total, raw_weighted = tl.full((1,), FLOOR, tl.float32), tl.zeros((1,), tl.float32), tl.zeros((1,), tl.float32)
    for start in range(0, vocabulary, TILE):
        columns = start + tl.arange(0, TILE)
        inside = columns < vocabulary
        z = tl.load(logits + here[:, None] * stride + columns[None, :], mask=inside[None, :], other=-float("inf")).to(tl.float32)
        if RAW:
            raw_top, raw_total, raw_weighted = absorb(z, plain, raw_top, raw_total, raw_weighted)
        if IDS > 0:
            z = add_bias(z, columns, start, ids, shift, IDS, TILE)
        top, total, weighted = absorb(z, scale, top, total, weighted)
    raw_hit = tl.load(logits + here * stride + wanted).to(tl.float32)
    hit = raw_hit
    for k in tl.static_range(IDS):
        hit += tl.where(wanted == tl.load(ids + k), shift, 0.0)
    _finish(out, tokens, here, hit, scale, top, total, weighted)
    if RAW:
        _finish(out + 4 * tokens, tokens, here, raw_hit, plain, raw_top, raw_total, raw_weighted)


@triton.jit
def slope(z, scale, at, top, log_sum, entropy, grad_logp, grad_entropy):
    """Gradient of a tile of logits, over tau: ``g 1[target] - p (g + e (ln p + H))``."""
    logp = tl.maximum(tl.fma(z, scale[:, None], -top[:, None]) - log_sum[:, None], ZERO)
    p = tl.exp2(logp)
    spread = grad_entropy[:, None] * (logp * LN_2 + entropy[:, None])
    return tl.where(at, grad_logp[:, None], 0.0) - p * (grad_logp[:, None] + spread)


@triton.jit
def _backward(logits, stride, target, temperature, ids, bias, saved, grads, out, out_stride, tokens, vocabulary,
              SHAPED: tl.constexpr, RAW: tl.constexpr, IDS: tl.constexpr, TILE: tl.constexpr):
    here = tl.program_id(0) + tl.zeros((1,), tl.int64)
    start = tl.program_id(1) * TILE
    columns = start + tl.arange(0, TILE)
    inside = columns < vocabulary
    z = tl.load(logits + here[:, None] * stride + columns[None, :], mask=inside[None, :], other=-float("inf")).to(tl.float32)
    at = columns[None, :] == tl.load(target + here)[:, None]
    plain = tl.full((1,), LOG2_E, tl.float32)
    inverse = 1.0 / tl.load(temperature + here) if SHAPED else tl.full((1,), 1.0, tl.float32)
    y = z
    if IDS > 0:
        y = add_bias(y, columns, start, ids, tl.load(bias + here), IDS, TILE)
    grad = slope(y, plain * inverse, at, tl.load(saved + 2 * tokens + here), tl.load(saved + 3 * tokens + here),
                 tl.load(saved + tokens + here), tl.load(grads + here), tl.load(grads + tokens + here)) * inverse[:, None]
    if RAW:
        grad += slope(z, plain, at, tl.load(saved + 6 * tokens + here), tl.load(saved + 7 * tokens + here),
                      tl.load(saved + 5 * tokens + here),
                      tl.load(grads + 2 * tokens + here), tl.load(grads + 3 * tokens + here))
    place = out + here[:, None] * out_stride + columns[None, :]
    tl.store(place, grad.to(out.dtype.element_ty), mask=inside[None, :])


def from_logits(
    logits_TV: torch.Tensor, target_T: torch.Tensor, shaping: LogitShaping, *, return_raw: bool, inplace_backward: bool = False
) -> Values:
    """See `kernels.logprob_entropy`."""
    values: Any = _FromLogits.apply(logits_TV, target_T, shaping, return_raw and not shaping.is_identity, inplace_backward)
    return values * 2 if return_raw and len(values) == 2 else tuple(values)


@functools.cache
@torch.inference_mode(False)  # a tensor made in that mode could not be saved for a backward pass later
def _unused(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """What stands for the pointers of a shaping that are switched off, made once."""
    return torch.zeros(1, device=device), torch.zeros(1, dtype=torch.int64, device=device)


class Arguments:
    """A shaping as kernel arguments: every pointer is valid, and what is not used is switched off."""

    def __init__(self, shaping: LogitShaping, like: torch.Tensor) -> None:
        number, integer = _unused(like.device)
        temperature_T, ids, bias_T = shaping.temperature_T, shaping.bias_ids, shaping.bias_T
        self.shaped = temperature_T is not None
        self.count = 0 if ids is None or bias_T is None else ids.numel()
        self.temperature_T = number if temperature_T is None else temperature_T.float().contiguous()
        self.ids = integer if ids is None else ids.contiguous()
        self.bias_T = number if bias_T is None else bias_T.float().contiguous()

    @property
    def pointers(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.temperature_T, self.ids, self.bias_T


def tile_of(vocabulary: int, *, most: int = 4096) -> int:
    """Columns of one tile: a power of two, enough for the vocabulary or as many as registers bear."""
    return min(most, triton.next_power_of_2(max(vocabulary, 16)))


class _FromLogits(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits_TV: torch.Tensor, target_T: torch.Tensor, shaping: LogitShaping, raw: bool, inplace: bool
    ) -> Values:
        ctx.set_materialize_grads(False)
        logits_TV = logits_TV.contiguous()
        tokens, vocabulary = logits_TV.shape
        arguments = Arguments(shaping, logits_TV)
        out = logits_TV.new_empty((8 if raw else 4, tokens), dtype=torch.float32)
        options = {"SHAPED": arguments.shaped, "RAW": raw, "IDS": arguments.count, "TILE": tile_of(vocabulary)}
        if tokens:
            _forward[(tokens,)](logits_TV, logits_TV.stride(0), target_T, *arguments.pointers, out, tokens, vocabulary, **options)
        ctx.save_for_backward(logits_TV, target_T, out)
        ctx.arguments, ctx.options, ctx.inplace = arguments, options, inplace
        return (out[0], out[1], out[4], out[5]) if raw else (out[0], out[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:  # pyright: ignore
        logits_TV, target_T, saved = ctx.saved_tensors
        tokens, vocabulary = logits_TV.shape
        if all(grad is None for grad in grads):
            return (None,) * 5
        upstream = stack_gradients(grads, saved[0])
        # A program reads its tile before it writes it, and no other program touches it.
        out_TV = logits_TV if ctx.inplace else torch.empty_like(logits_TV)
        tile = ctx.options["TILE"]
        if tokens:
            _backward[(tokens, triton.cdiv(vocabulary, tile))](
                logits_TV, logits_TV.stride(0), target_T, *ctx.arguments.pointers, saved, upstream, out_TV, out_TV.stride(0),
                tokens, vocabulary, **ctx.options,
            )  # fmt: skip
        return out_TV, None, None, None, None


def stack_gradients(grads: tuple[torch.Tensor | None, ...], like_T: torch.Tensor) -> torch.Tensor:
    """Upstream gradients as one matrix, zeros for those not asked for."""
    return torch.stack([torch.zeros_like(like_T) if grad is None else grad.to(like_T.dtype) for grad in grads])
