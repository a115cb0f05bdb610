"""The chunked torch form of the log-probability kernels: a few tokens at a time, logits recomputed in the backward pass.

With p = softmax(y), H = - sum p ln p, upstream gradients g (of ln p[target]) and e (of H):
``dL/dy_v = g (1[v = target] - p_v) - e p_v (ln p_v + H)``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from kernels.shaping import LogitShaping

CHUNK_BYTES = 64 * 2**20
"""Size of one chunk of float32 logits: stays near the last-level cache, yet long enough for fast matrix products."""

MIN_CHUNK_TOKENS = 16
"""Below this a matrix product reads the whole weight for too few tokens."""

LOG_ZERO = -1e4
"""Stands for ln 0: exp(-1e4) is 0 in float32 and float64, and unlike -inf it gives 0 when multiplied by 0."""

Values = tuple[torch.Tensor, ...]
Scratch = torch.Tensor


@dataclass(frozen=True)
class _Plan:
    """What both passes need to know beside tensors that may carry a gradient."""

    target_T: torch.Tensor
    shaping: LogitShaping
    return_raw: bool
    softcap: float | None
    chunk_tokens: int

    def parts(self) -> Iterator[slice]:
        tokens = self.target_T.numel()
        for start in range(0, tokens, self.chunk_tokens):
            yield slice(start, min(start + self.chunk_tokens, tokens))

    def scratch(self, like: torch.Tensor, *, vocabulary: int) -> Scratch:
        """Two chunks of logits, shared by all chunks of a pass: allocating anew costs more than the softmax (page faults)."""
        rows = min(self.chunk_tokens, self.target_T.numel())
        return like.new_empty(2, rows, vocabulary, dtype=_compute_dtype(like))


def from_logits(
    logits_TV: torch.Tensor,
    target_T: torch.Tensor,
    shaping: LogitShaping,
    *,
    return_raw: bool,
    chunk_tokens: int | None = None,
) -> Values:
    """See `kernels.logprob_entropy`."""
    plan = _plan(target_T, shaping, return_raw, None, chunk_tokens, vocabulary=logits_TV.shape[1])
    return _finish(_FromLogits.apply(logits_TV, plan), return_raw)


def from_hidden(
    hidden_TH: torch.Tensor,
    weight_VH: torch.Tensor,
    target_T: torch.Tensor,
    shaping: LogitShaping,
    *,
    return_raw: bool,
    head_bias_V: torch.Tensor | None,
    softcap: float | None,
    chunk_tokens: int | None = None,
) -> Values:
    """See `kernels.linear_logprob_entropy`."""
    plan = _plan(target_T, shaping, return_raw, softcap, chunk_tokens, vocabulary=weight_VH.shape[0])
    return _finish(_FromHidden.apply(hidden_TH, weight_VH, head_bias_V, plan), return_raw)


def _plan(
    target_T: torch.Tensor,
    shaping: LogitShaping,
    return_raw: bool,
    softcap: float | None,
    chunk_tokens: int | None,
    *,
    vocabulary: int,
) -> _Plan:
    if chunk_tokens is None:
        chunk_tokens = max(MIN_CHUNK_TOKENS, CHUNK_BYTES // (4 * max(1, vocabulary)))
    # without shaping the raw values are the shaped ones: computing them twice would double the work
    return _Plan(target_T, shaping, return_raw and not shaping.is_identity, softcap, chunk_tokens)


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
        grad_TV = torch.empty_like(logits_TV)
        scratch = ctx.plan.scratch(logits_TV, vocabulary=logits_TV.shape[1])
        for part in ctx.plan.parts():
            z_TV, spare_TV = scratch[:, : part.stop - part.start]
            grad_TV[part] = _logit_gradient(z_TV.copy_(logits_TV[part]), spare_TV, part, ctx.plan, grads, entropies)
        return grad_TV, None


class _FromHidden(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_TH: torch.Tensor, weight_VH: torch.Tensor, head_bias_V: torch.Tensor | None, plan: _Plan
    ) -> Values:
        ctx.set_materialize_grads(False)
        values = _empty_values(hidden_TH, plan)
        # the backward pass runs outside autocast; the products it recomputes must be those made here
        with torch.autocast(hidden_TH.device.type, enabled=False):
            scratch = plan.scratch(hidden_TH, vocabulary=weight_VH.shape[0])
            for part in plan.parts():
                z_TV, spare_TV = scratch[:, : part.stop - part.start]
                _head_(z_TV, hidden_TH[part], weight_VH, head_bias_V, plan.softcap)
                _fill(values, z_TV, spare_TV, part, plan)
        ctx.plan = plan
        ctx.save_for_backward(hidden_TH, weight_VH, head_bias_V, *values[1::2])
        return values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:  # pyright: ignore
        if all(grad is None for grad in grads):
            return None, None, None, None
        hidden_TH, weight_VH, head_bias_V, *entropies = ctx.saved_tensors
        need_hidden, need_weight, need_bias, _ = ctx.needs_input_grad
        grad_TH = torch.empty_like(hidden_TH) if need_hidden else None
        grad_VH = torch.zeros_like(weight_VH, dtype=_compute_dtype(weight_VH)) if need_weight else None
        grad_V = torch.zeros_like(head_bias_V, dtype=_compute_dtype(weight_VH)) if need_bias else None
        scratch = ctx.plan.scratch(hidden_TH, vocabulary=weight_VH.shape[0])
        for part in ctx.plan.parts():
            z_TV, spare_TV = scratch[:, : part.stop - part.start]
            _head_(z_TV, hidden_TH[part], weight_VH, head_bias_V, ctx.plan.softcap)
            slope_TV = None if ctx.plan.softcap is None else (z_TV / ctx.plan.softcap).square_().neg_().add_(1.0)
            grad_TV = _logit_gradient(z_TV, spare_TV, part, ctx.plan, grads, entropies)
            if slope_TV is not None:
                grad_TV.mul_(slope_TV)
            if grad_V is not None:
                grad_V += grad_TV.sum(dim=0)
            grad_TV = grad_TV.to(weight_VH.dtype)
            if grad_TH is not None:
                torch.mm(grad_TV, weight_VH, out=grad_TH[part])
            if grad_VH is not None:
                _accumulate_(grad_VH, grad_TV, hidden_TH[part])
        return (
            grad_TH,
            None if grad_VH is None else grad_VH.to(weight_VH.dtype),
            None if grad_V is None else grad_V.to(head_bias_V.dtype),
            None,
        )


def _head_(
    logits_TV: torch.Tensor,
    hidden_TH: torch.Tensor,
    weight_VH: torch.Tensor,
    head_bias_V: torch.Tensor | None,
    softcap: float | None,
) -> None:
    """Write the raw logits of one chunk."""
    if logits_TV.dtype == hidden_TH.dtype:
        torch.mm(hidden_TH, weight_VH.T, out=logits_TV)
    else:
        logits_TV.copy_(hidden_TH @ weight_VH.T)
    if head_bias_V is not None:
        logits_TV.add_(head_bias_V)
    if softcap is not None:
        logits_TV.div_(softcap).tanh_().mul_(softcap)


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


def _accumulate_(total_VH: torch.Tensor, grad_TV: torch.Tensor, hidden_TH: torch.Tensor) -> None:
    if total_VH.dtype == hidden_TH.dtype:
        total_VH.addmm_(grad_TV.T, hidden_TH)
    else:
        total_VH.add_(grad_TV.T @ hidden_TH)


def _empty_values(source: torch.Tensor, plan: _Plan) -> Values:
    count = 4 if plan.return_raw else 2
    return tuple(source.new_empty(plan.target_T.numel(), dtype=_compute_dtype(source)) for _ in range(count))


def _compute_dtype(value: torch.Tensor) -> torch.dtype:
    return torch.float64 if value.dtype == torch.float64 else torch.float32
