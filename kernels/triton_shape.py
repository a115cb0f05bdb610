"""Triton kernel that shapes sampling logits in place: entropy of the raw row, temperature from it, sparse bias, one launch.

A row's program reads the row for its entropy and again, from the cache if it fits, to write it: bytes are one read and one write
of the logits where the cache holds a row, two reads and one write where it does not.
"""

# Triton's decorator turns the functions below into launchers that pyright cannot follow.
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
# pyright: reportIndexIssue=false, reportOperatorIssue=false, reportAttributeAccessIssue=false
from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.shaping import LogitShaping, TemperatureRule
from kernels.triton_logprob import FLOOR, Arguments, absorb, add_bias, tile_of


@triton.jit
def _shape(logits, stride, base, ids, bias, rule, vocabulary,
           RULE: tl.constexpr, IDS: tl.constexpr, TILE: tl.constexpr):
    here = tl.program_id(0) + tl.zeros((1,), tl.int64)
    temperature = tl.load(base + here)
    if RULE:
        numbers = rule + here * RULE
        pivot, above, below, tau = tl.load(numbers), tl.load(numbers + 1), tl.load(numbers + 2), tl.load(numbers + 3)
        low, high, floor = tl.load(numbers + 4), tl.load(numbers + 5), tl.load(numbers + 6)
        top, total, weighted = tl.full((1,), FLOOR, tl.float32), tl.zeros((1,), tl.float32), tl.zeros((1,), tl.float32)
        for start in range(0, vocabulary, TILE):
            columns = start + tl.arange(0, TILE)
            place = logits + here[:, None] * stride + columns[None, :]
            z = tl.load(place, mask=(columns < vocabulary)[None, :], other=-float("inf")).to(tl.float32)
            top, total, weighted = absorb(z, top, total, weighted)
        entropy = tl.log(total) - weighted / total
        distance = tl.log(tl.maximum(entropy, floor)) - pivot
        signal = distance * tl.where(distance > 0, above, below)
        temperature = temperature * (1.0 + tau * tl.minimum(tl.maximum(signal, low), high))
    shift = tl.load(bias + here) if IDS > 0 else tl.zeros((1,), tl.float32)
    inverse = 1.0 / temperature
    for start in range(0, vocabulary, TILE):
        columns = start + tl.arange(0, TILE)
        place, inside = logits + here[:, None] * stride + columns[None, :], (columns < vocabulary)[None, :]
        z = tl.load(place, mask=inside, other=0.0).to(tl.float32)
        if IDS > 0:
            z = add_bias(z, columns, ids, shift, IDS)
        tl.store(place, (z * inverse[:, None]).to(logits.dtype.element_ty), mask=inside)


def shape_logits_(logits_BV: torch.Tensor, shaping: LogitShaping, rule: TemperatureRule | None) -> torch.Tensor:
    """See `kernels.shape_logits_`; rows may be strided, columns may not."""
    if rule is not None and not isinstance(rule, TemperatureRule):
        raise TypeError(f"temperature_rule must be a TemperatureRule for backend='triton', got {type(rule).__name__}")
    if logits_BV.stride(-1) != 1:
        raise ValueError(f"logits_BV must have contiguous rows for backend='triton', got strides {logits_BV.stride()}")
    rows, vocabulary = logits_BV.shape
    arguments = Arguments(shaping, logits_BV)
    columns = None if rule is None else rule.columns(rows, logits_BV.device)
    if rows:
        _shape[(rows,)](
            logits_BV, logits_BV.stride(0), *arguments.pointers, columns, vocabulary,
            RULE=0 if columns is None else columns.shape[1], IDS=arguments.count, TILE=tile_of(vocabulary),
        )  # fmt: skip
    return logits_BV
