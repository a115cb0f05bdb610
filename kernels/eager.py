"""The chunked torch form of the log-probability kernel over given logits: a few tokens at a time.

With p = softmax(y), H = - sum p ln p, upstream gradients g (of ln p[target]) and e (of H):
``dL/dy_v = g (1[v = target] - p_v) - e p_v (ln p_v + H)``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from kernels.shaping import LOG_ZERO, LogitShaping

CHUNK_BYTES = 64 * 2**20
"""Size of one chunk of float32 logits: stays near the last-level cache."""

Values = tuple[torch.Tensor, ...]
Scratch = torch.Tensor


@dataclass(frozen=True)
class _Plan:
    """What both passes need to know beside tensors that may carry a gradient."""

    target_T: torch.Tensor
    shaping: LogitShaping
    return_raw: bool
    chunk_tokens: int
    inplace: bool = False
    """The gradient is written over the logits."""

    def parts(self) -> Iterator[slice]:
        tokens = self.target_T.numel()
        for start in range(0, tokens, self.chunk_tokens):
            yield slice(start, min(start + self.chunk_tokens, tokens))

    def scratch(self, like: torch.Tensor, *, vocabulary: int) -> Scratch:
        """Two chunks of logits, shared by all chunks of a pass: allocating anew costs more than the softmax (page faults)."""
        rows = min(self.chunk_tokens, self.target_T.numel())
        return like.new_empty(2, rows, vocabulary, dtype=compute_dtype(like))


def from_logits(
    logits_TV: torch.Tensor,
    target_T: torch.Tensor,
    shaping: LogitShaping,
    *,
    return_raw: bool,
    inplace_backward: bool = False,
    chunk_tokens: int | None = None,
) -> Values:
    """See `kernels.logprob_entropy`."""
    plan = _plan(target_T, shaping, return_raw, chunk_tokens, inplace_backward, vocabulary=logits_TV.shape[1])
    return _finish(_FromLogits.apply(logits_TV, plan), return_raw)


def _plan(
    target_T: torch.Tensor,
    shaping: LogitShaping,
    return_raw: bool,
    chunk_tokens: int | None,
    inplace: bool,
    *,
    vocabulary: int,
) -> _Plan:
    if chunk_tokens is None:
        chunk_tokens = max(1, CHUNK_BYTES // (4 * max(1, vocabulary)))
    # without shaping the raw values are the shaped ones: computing them twice would double the work
    return _Plan(target_T, shaping, return_raw and not shaping.is_identity, chunk_tokens, inplace)


def _finish(values: Any, return_raw: bool) -> Values:
    values = tuple(value.float() for value in values)
    return values * 2 if return_raw and len(values) == 2 else values


class _FromLogits(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_TV: torch.Tensor, plan: _Plan) -> Values:
        ctx.set_materialize_grads(False)
        values = _empty_values(logits_TV, plan)
        scratch = plan.scratch(logits_TV, vocabulary=logits_TV.shape[1])
        for part in plan.parts():
            z_TV, spare_TV = scratch[:, : part.stop - part.start]
            _fill(values, z_TV.copy_(logits_TV[part]), spare_TV, part, plan)
        ctx.plan = plan
        ctx.save_for_backward(logits_TV, *values[1::2])
        return values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, None]:  # pyright: ignore
        if all(grad is None for grad in grads):
            return None, None
        logits_TV, *entropies = ctx.saved_tensors
        grad_TV = logits_TV if ctx.plan.inplace else torch.empty_like(logits_TV)
        scratch = ctx.plan.scratch(logits_TV, vocabulary=logits_TV.shape[1])
        for part in ctx.plan.parts():
            z_TV, spare_TV = scratch[:, : part.stop - part.start]
            grad_TV[part] = _logit_gradient(z_TV.copy_(logits_TV[part]), spare_TV, part, ctx.plan, grads, entropies)
        return grad_TV, None


def _fill(values: Values, z_TV: torch.Tensor, spare_TV: torch.Tensor, part: slice, plan: _Plan) -> None:
    """Write the values of one chunk; ``z_TV`` (raw logits) and ``spare_TV`` are overwritten."""
    target_T = plan.target_T[part]
    if plan.return_raw:
        values[2][part], values[3][part] = _chunk_values(z_TV.clone(), spare_TV, target_T)
    values[0][part], values[1][part] = _chunk_values(plan.shaping.rows(part).apply_(z_TV), spare_TV, target_T)


def _chunk_values(y_TV: torch.Tensor, spare_TV: torch.Tensor, target_T: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    logp_TV = torch.log_softmax(y_TV, dim=-1, out=spare_TV)
    logp_T = logp_TV.gather(-1, target_T[:, None]).squeeze(-1)
    p_TV = torch.exp(logp_TV, out=y_TV)
    return logp_T, p_TV.mul_(logp_TV.clamp_(min=LOG_ZERO)).sum(dim=-1).neg_()


def _logit_gradient(
    z_TV: torch.Tensor,
    spare_TV: torch.Tensor,
    part: slice,
    plan: _Plan,
    grads: tuple[torch.Tensor | None, ...],
    entropies: list[torch.Tensor],
) -> torch.Tensor:
    """Gradient with respect to the raw logits of one chunk; ``z_TV`` (these logits) and ``spare_TV`` are overwritten."""
    g = [None if grad is None else grad[part] for grad in grads]
    target_T = plan.target_T[part]
    raw_TV = None
    if plan.return_raw and (g[2] is not None or g[3] is not None):
        raw_TV = _softmax_gradient(z_TV.clone(), torch.empty_like(z_TV), target_T, g[2], g[3], entropies[1][part])
    if g[0] is None and g[1] is None and raw_TV is not None:
        return raw_TV
    shaping = plan.shaping.rows(part)
    grad_TV = _softmax_gradient(shaping.apply_(z_TV), spare_TV, target_T, g[0], g[1], entropies[0][part])
    if shaping.temperature_T is not None:
        grad_TV.div_(shaping.temperature_T.to(grad_TV.dtype)[:, None])
    return grad_TV if raw_TV is None else grad_TV.add_(raw_TV)


def _softmax_gradient(
    y_TV: torch.Tensor,
    spare_TV: torch.Tensor,
    target_T: torch.Tensor,
    grad_logp_T: torch.Tensor | None,
    grad_entropy_T: torch.Tensor | None,
    entropy_T: torch.Tensor,
) -> torch.Tensor:
    if grad_entropy_T is None:
        assert grad_logp_T is not None
        grad_TV = torch.softmax(y_TV, dim=-1, out=spare_TV).mul_(-grad_logp_T[:, None])
    else:
        logp_TV = torch.log_softmax(y_TV, dim=-1, out=spare_TV).clamp_(min=LOG_ZERO)
        p_TV = torch.exp(logp_TV, out=y_TV)
        grad_TV = logp_TV.add_(entropy_T[:, None]).mul_(-grad_entropy_T[:, None])
        if grad_logp_T is not None:
            grad_TV.sub_(grad_logp_T[:, None])
        grad_TV.mul_(p_TV)
    if grad_logp_T is not None:
        grad_TV.scatter_add_(1, target_T[:, None], grad_logp_T[:, None])
    return grad_TV


def _empty_values(source: torch.Tensor, plan: _Plan) -> Values:
    count = 4 if plan.return_raw else 2
    return tuple(source.new_empty(plan.target_T.numel(), dtype=compute_dtype(source)) for _ in range(count))


def compute_dtype(value: torch.Tensor) -> torch.dtype:
    """float64 for float64 inputs, else float32."""
    return torch.float64 if value.dtype == torch.float64 else torch.float32
