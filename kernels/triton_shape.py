"""Triton kernel that shapes sampling logits in place: entropy of the raw row, temperature from it, sparse bias, one launch.

A row's program reads the row for its entropy and again, backwards, to write it: what was read last is still in the cache. Bytes:
one read and one write of the logits where the cache holds the rows in flight, two reads and one write at most where it does not.
"""

# Triton's decorator turns the functions below into launchers that pyright cannot follow.
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
# pyright: reportIndexIssue=false, reportOperatorIssue=false, reportAttributeAccessIssue=false
from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.shaping import LogitShaping, TemperatureRule
from kernels.triton_logprob import FLOOR, LN_2, LOG2_E, Arguments, absorb, add_bias, tile_of

NO_RULE, ONE_RULE, RULES = 0, 1, 7
"""What a launch knows of the rule: nothing, seven numbers, or a matrix with seven numbers for each row."""


@triton.jit
def _shape(logits, stride, base, ids, bias, rules, pivot, above, below, tau, low, high, floor, vocabulary,
           RULE: tl.constexpr, IDS: tl.constexpr, TILE: tl.constexpr):
    here = tl.program_id(0) + tl.zeros((1,), tl.int64)
    temperature = tl.load(base + here)
    if RULE > 0:
        if RULE > 1:
            numbers = rules + here * RULE
            pivot, above, below, tau = tl.load(numbers), tl.load(numbers + 1), tl.load(numbers + 2), tl.load(numbers + 3)
            low, high, floor = tl.load(numbers + 4), tl.load(numbers + 5), tl.load(numbers + 6)
        top, total, weighted = tl.full((1,), FLOOR, tl.float32), tl.zeros((1,), tl.float32), tl.zeros((1,), tl.float32)
        scale = tl.full((1,), LOG2_E, tl.float32)
        for start in range(0, vocabulary, TILE):
            columns = start + tl.arange(0, TILE)
            place = logits + here[:, None] * stride + columns[None, :]
            z = tl.load(place, mask=(columns < vocabulary)[None, :], other=-float("inf")).to(tl.float32)
            top, total, weighted = absorb(z, scale, top, total, weighted)
        entropy = (tl.log2(total) - weighted / total) * LN_2
        distance = tl.log(tl.maximum(entropy, floor)) - pivot
        signal = distance * tl.where(distance > 0, above, below)
        temperature = temperature * (1.0 + tau * tl.minimum(tl.maximum(signal, low), high))
    shift = tl.load(bias + here) if IDS > 0 else tl.zeros((1,), tl.float32)
    inverse = 1.0 / temperature
    last = (vocabulary - 1) // TILE * TILE
    for done in range(0, vocabulary, TILE):
        start = last - done
        columns = start + tl.arange(0, TILE)
        place, inside = logits + here[:, None] * stride + columns[None, :], (columns < vocabulary)[None, :]
        z = tl.load(place, mask=inside, other=0.0).to(tl.float32)
        if IDS > 0:
            z = add_bias(z, columns, start, ids, shift, IDS, TILE)
        tl.store(place, (z * inverse[:, None]).to(logits.dtype.element_ty), mask=inside)


def shape_logits_(logits_BV: torch.Tensor, shaping: LogitShaping, rule: TemperatureRule | None) -> torch.Tensor:
    """See `kernels.shape_logits_`; rows may be strided, columns may not."""
    if rule is not None and not isinstance(rule, TemperatureRule):
        raise TypeError(f"temperature_rule must be a TemperatureRule for backend='triton', got {type(rule).__name__}")
    if logits_BV.stride(-1) != 1:
        raise ValueError(f"logits_BV must have contiguous rows for backend='triton', got strides {logits_BV.stride()}")
    rows, vocabulary = logits_BV.shape
    arguments = Arguments(shaping, logits_BV)
    numbers, kind, rules = [0.0] * RULES, NO_RULE, arguments.temperature_T
    if rule is not None and any(isinstance(value, torch.Tensor) for value in vars(rule).values()):
        kind, rules = RULES, rule.columns(rows, logits_BV.device)
    elif rule is not None:
        kind, numbers = ONE_RULE, [float(value) for value in vars(rule).values()]
    if rows:
        _shape[(rows,)](
            logits_BV, logits_BV.stride(0), *arguments.pointers, rules, *numbers, vocabulary, RULE=kind, IDS=arguments.count,
            TILE=tile_of(vocabulary, most=8192), num_warps=8,
        )  # fmt: skip
    return logits_BV
