"""Log-probability and entropy straight from hidden states in plain torch: one block of the vocabulary at a time.

Forward, for every block of the vocabulary: logits ``y``, then the running maximum ``m``, ``s = sum e^(y - m)`` and
``u = sum (y - m) e^(y - m)``, so that ``ln Z = m + ln s`` and ``H = ln s - u / s``. Backward recomputes the block: with
``p = e^(y - ln Z)`` and upstream gradients g (of ln p[target]) and e (of H),
``dL/dy_v = g 1[v = target] - p_v (g + e (ln p_v + H))``.
Blocks of the vocabulary rather than of tokens, because the gradient of the head is then written once instead of added up once a
block; what is added up, the gradient of the hidden states, is far smaller.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from kernels.eager import Values, compute_dtype
from kernels.shaping import LOG_ZERO, LogitShaping

BLOCK_BYTES = 16 * 2**20
"""Size of a block of float32 logits: near the last-level cache, long enough for fast matrix products."""

KEEP_BYTES = 128 * 2**20
"""Most raw logits kept from the forward for the backward pass, which computes the rest again."""

KEEP_PER_TOKEN = 26 * 1024
"""Most logits kept of one token: of a large vocabulary only a part, so that memory stays far below that of holding them all."""

MAX_TOKENS = 4096
"""Tokens taken at once: more would make blocks of the vocabulary too narrow for fast matrix products."""


@dataclass(frozen=True)
class _Plan:
    """What both passes need to know beside tensors that may carry a gradient."""

    target_T: torch.Tensor
    shaping: LogitShaping
    both: bool
    """Raw values are wanted beside shaped ones that differ from them."""
    softcap: float | None
    max_tokens: int
    block_bytes: int
    keep_bytes: int = 0

    def chunks(self) -> Iterator[slice]:
        tokens = self.target_T.numel()
        for start in range(0, tokens, self.max_tokens):
            yield slice(start, min(start + self.max_tokens, tokens))

    def block(self, tokens: int, vocabulary: int) -> int:
        return min(vocabulary, max(1, self.block_bytes // (4 * max(tokens, 1))))

    def kept(self, vocabulary: int) -> int:
        """Vocabulary entries, from the first on, whose logits the forward pass keeps: whole blocks, of a single chunk."""
        tokens = self.target_T.numel()
        if not 0 < tokens <= self.max_tokens:
            return 0
        width = self.block(tokens, vocabulary)
        return min(self.keep_bytes // (4 * tokens), KEEP_PER_TOKEN, vocabulary) // width * width


def from_hidden(
    hidden_TH: torch.Tensor,
    weight_VH: torch.Tensor,
    target_T: torch.Tensor,
    shaping: LogitShaping,
    *,
    return_raw: bool,
    head_bias_V: torch.Tensor | None,
    softcap: float | None,
    max_tokens: int = MAX_TOKENS,
    block_bytes: int = BLOCK_BYTES,
) -> Values:
    """See `kernels.linear_logprob_entropy`; ``max_tokens`` and ``block_bytes`` bound a block, not the result."""
    # without shaping the raw values are the shaped ones: computing them twice would double the work
    both = return_raw and not shaping.is_identity
    learns = torch.is_grad_enabled() and (hidden_TH.requires_grad or weight_VH.requires_grad)
    plan = _Plan(target_T, shaping, both, softcap, max_tokens, block_bytes, KEEP_BYTES if learns else 0)
    values: Any = _FromHidden.apply(hidden_TH, weight_VH, head_bias_V, plan)
    values = tuple(value.float() for value in values)
    return values * 2 if return_raw and not plan.both else values


class _Sums:
    """Running maximum, sum and weighted sum of one distribution over the blocks of the vocabulary."""

    def __init__(self, like_T: torch.Tensor) -> None:
        self.top_T = torch.full_like(like_T, torch.finfo(like_T.dtype).min)
        self.sum_T = torch.zeros_like(like_T)
        self.weighted_T = torch.zeros_like(like_T)
        self.target_T = torch.zeros_like(like_T)

    def absorb(self, y_TV: torch.Tensor, spare_TV: torch.Tensor, hit: _Hits) -> None:
        """Take in one block of logits, which is overwritten."""
        self.target_T[hit.row] = y_TV[hit.row, hit.column]
        top_T = torch.maximum(self.top_T, y_TV.amax(dim=-1))
        y_TV.sub_(top_T[:, None]).clamp_(min=LOG_ZERO)
        e_TV = torch.exp(y_TV, out=spare_TV)
        drop_T = self.top_T - top_T
        scale_T = drop_T.exp()
        self.weighted_T = (self.weighted_T + drop_T * self.sum_T) * scale_T + y_TV.mul_(e_TV).sum(dim=-1)
        self.sum_T = self.sum_T * scale_T + e_TV.sum(dim=-1)
        self.top_T = top_T

    def finish(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Log-prob of the target, entropy, maximum m and ln s; ``ln Z = m + ln s`` in one number would round large logits."""
        log_sum_T = self.sum_T.log()
        return (self.target_T - self.top_T) - log_sum_T, log_sum_T - self.weighted_T / self.sum_T, self.top_T, log_sum_T


@dataclass(frozen=True)
class _Hits:
    """The tokens whose target lies in the current block, and its column there."""

    row: torch.Tensor
    column: torch.Tensor

    @classmethod
    def of(cls, target_T: torch.Tensor, block: slice) -> _Hits:
        row = ((target_T >= block.start) & (target_T < block.stop)).nonzero().squeeze(-1)
        return cls(row, target_T[row] - block.start)


class _Blocks:
    """The logits of some tokens, one block of the vocabulary after the other, in buffers that all blocks share."""

    def __init__(
        self,
        hidden_TH: torch.Tensor,
        weight_VH: torch.Tensor,
        bias_V: torch.Tensor | None,
        plan: _Plan,
        part: slice,
        kept: torch.Tensor | None = None,
    ) -> None:
        self.kept = kept
        self.hidden_TH, self.weight_VH, self.bias_V, self.plan = hidden_TH[part], weight_VH, bias_V, plan
        self.shaping, self.target_T = plan.shaping.rows(part), plan.target_T[part]
        self.tokens, self.vocabulary = self.hidden_TH.shape[0], weight_VH.shape[0]
        self.width = plan.block(self.tokens, self.vocabulary)
        # Allocating anew for every block would cost more than the softmax (page faults).
        buffers = 4 if plan.both else 2
        self.buffers = hidden_TH.new_empty((buffers, self.tokens * self.width), dtype=compute_dtype(hidden_TH))
        narrow = hidden_TH.dtype != self.buffers.dtype
        self.narrow = hidden_TH.new_empty(self.tokens * self.width) if narrow else None

    def __iter__(self) -> Iterator[tuple[slice, _Hits, list[torch.Tensor]]]:
        """Block, targets in it, and the buffers cut to it; the first holds the raw logits."""
        for start in range(0, self.vocabulary, self.width):
            block = slice(start, min(start + self.width, self.vocabulary))
            views = [buffer[: self.tokens * (block.stop - start)].view(self.tokens, -1) for buffer in self.buffers]
            if self.kept is not None and block.stop * self.tokens <= self.kept.numel():
                views[0].copy_(self._kept(block))
            else:
                self._head(views[0], block)
            yield block, _Hits.of(self.target_T, block), views

    def keep(self, z_TV: torch.Tensor, block: slice, kept: torch.Tensor) -> None:
        """Copy the raw logits of a block into ``kept`` if it is one of those."""
        if block.stop * self.tokens <= kept.numel():
            kept[block.start * self.tokens : block.stop * self.tokens].view(z_TV.shape).copy_(z_TV)

    def _kept(self, block: slice) -> torch.Tensor:
        assert self.kept is not None
        return self.kept[block.start * self.tokens : block.stop * self.tokens].view(self.tokens, -1)

    def _head(self, z_TV: torch.Tensor, block: slice) -> None:
        if self.narrow is None:
            torch.mm(self.hidden_TH, self.weight_VH[block].T, out=z_TV)
        else:
            narrow_TV = self.narrow[: z_TV.numel()].view(z_TV.shape)
            z_TV.copy_(torch.mm(self.hidden_TH, self.weight_VH[block].T, out=narrow_TV))
        if self.bias_V is not None:
            z_TV.add_(self.bias_V[block])
        if self.plan.softcap is not None:
            z_TV.div_(self.plan.softcap).tanh_().mul_(self.plan.softcap)

    def to_product(self, grad_TV: torch.Tensor) -> torch.Tensor:
        """The block in the dtype of the matrix products."""
        return grad_TV if self.narrow is None else self.narrow[: grad_TV.numel()].view(grad_TV.shape).copy_(grad_TV)


class _FromHidden(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_TH: torch.Tensor, weight_VH: torch.Tensor, bias_V: torch.Tensor | None, plan: _Plan) -> Values:
        ctx.set_materialize_grads(False)
        dtype = compute_dtype(hidden_TH)
        count = 2 if plan.both else 1
        found = [hidden_TH.new_empty(plan.target_T.numel(), dtype=dtype) for _ in range(4 * count)]
        kept = hidden_TH.new_empty(plan.kept(weight_VH.shape[0]) * plan.target_T.numel(), dtype=dtype)
        # the backward pass runs outside autocast; the products it recomputes must be those made here
        with torch.autocast(hidden_TH.device.type, enabled=False):
            for part in plan.chunks():
                blocks = _Blocks(hidden_TH, weight_VH, bias_V, plan, part)
                sums = [_Sums(found[0][part]) for _ in range(count)]
                for block, hit, views in blocks:
                    blocks.keep(views[0], block, kept)
                    if plan.both:
                        sums[1].absorb(views[2].copy_(views[0]), views[1], hit)
                    sums[0].absorb(blocks.shaping.apply_(views[0], block), views[1], hit)
                for index, one in enumerate(sums):
                    for value, whole in zip(one.finish(), found[4 * index :], strict=False):
                        whole[part] = value
        ctx.plan = plan
        ctx.kept = kept
        ctx.save_for_backward(hidden_TH, weight_VH, bias_V, *(found[i] for i in range(4 * count) if i % 4))
        return tuple(found[i] for i in range(4 * count) if i % 4 < 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:  # pyright: ignore
        if all(grad is None for grad in grads):
            return None, None, None, None
        hidden_TH, weight_VH, bias_V, *saved = ctx.saved_tensors
        out = _Gradients(hidden_TH, weight_VH, bias_V, ctx)
        for part in ctx.plan.chunks():
            blocks = _Blocks(hidden_TH, weight_VH, bias_V, ctx.plan, part, ctx.kept)
            wanted = [_Wanted.of(i, grads, saved, part) for i in range(len(grads) // 2)]
            out.add(blocks, part, wanted)
        return out.result()


@dataclass(frozen=True)
class _Wanted:
    """Upstream gradients of one distribution and what its forward pass left."""

    logp_T: torch.Tensor | None
    entropy_grad_T: torch.Tensor | None
    entropy_T: torch.Tensor
    top_T: torch.Tensor
    log_sum_T: torch.Tensor

    @classmethod
    def of(cls, index: int, grads: tuple[torch.Tensor | None, ...], saved: list[torch.Tensor], part: slice) -> _Wanted | None:
        g, e = (None if grad is None else grad[part] for grad in grads[2 * index : 2 * index + 2])
        return None if g is None and e is None else cls(g, e, *(value[part] for value in saved[3 * index : 3 * index + 3]))

    def gradient_(self, y_TV: torch.Tensor, spare_TV: torch.Tensor, hit: _Hits) -> torch.Tensor:
        """``-dL/dy = p (g + e (ln p + H)) - g 1[target]``, over ``y_TV``; g is left out when e is 0."""
        y_TV.sub_(self.top_T[:, None]).sub_(self.log_sum_T[:, None])
        if self.entropy_grad_T is None:
            y_TV.exp_()
            y_TV[hit.row, hit.column] -= 1.0
            return y_TV
        p_TV = torch.exp(y_TV.clamp_(min=LOG_ZERO), out=spare_TV)
        y_TV.add_(self.entropy_T[:, None]).mul_(self.entropy_grad_T[:, None])
        if self.logp_T is not None:
            y_TV.add_(self.logp_T[:, None])
        y_TV.mul_(p_TV)
        if self.logp_T is not None:
            y_TV[hit.row, hit.column] -= self.logp_T[hit.row]
        return y_TV

    def row_scale(self, temperature_T: torch.Tensor | None) -> torch.Tensor | None:
        """What a row of :meth:`gradient_` is still to be multiplied by; None is 1."""
        scale_T = self.logp_T if self.entropy_grad_T is None else None
        if temperature_T is None:
            return scale_T
        inverse_T = temperature_T.to(self.top_T.dtype).reciprocal()
        return inverse_T if scale_T is None else scale_T * inverse_T


class _Gradients:
    """The gradients of hidden states, head and head bias, added up block by block."""

    def __init__(self, hidden_TH: torch.Tensor, weight_VH: torch.Tensor, bias_V: torch.Tensor | None, ctx: Any) -> None:
        need_hidden, need_weight, need_bias, _ = ctx.needs_input_grad
        self.hidden_TH, self.weight_VH, self.bias_V = hidden_TH, weight_VH, bias_V
        dtype = compute_dtype(weight_VH)
        # One chunk of tokens: every block of the head's gradient is a single product, which the dtype of the head can hold.
        self.single = hidden_TH.shape[0] <= ctx.plan.max_tokens
        self.grad_TH = torch.empty_like(hidden_TH) if need_hidden else None
        make = torch.empty_like if self.single and hidden_TH.shape[0] else torch.zeros_like
        self.grad_VH = make(weight_VH, dtype=weight_VH.dtype if self.single else dtype) if need_weight else None
        self.grad_V = torch.zeros_like(bias_V, dtype=dtype) if need_bias and bias_V is not None else None

    def add(self, blocks: _Blocks, part: slice, wanted: list[_Wanted | None]) -> None:
        """One chunk of tokens."""
        temperature_T = blocks.shaping.temperature_T
        only = [w for w in wanted if w is not None]
        # Row factors go into the small side of the products, except where two distributions with different ones are added.
        merged = len(only) == 2
        scale_T = None if merged else only[0].row_scale(temperature_T if wanted[0] is only[0] else None)
        factor_T = -torch.ones_like(blocks.buffers[0, : blocks.tokens]) if scale_T is None else -scale_T
        hidden_TH = (blocks.hidden_TH * factor_T[:, None]).to(blocks.hidden_TH.dtype)
        total_TH = None
        if self.grad_TH is not None:
            total_TH = hidden_TH.new_zeros(hidden_TH.shape, dtype=blocks.buffers.dtype)
        for block, hit, views in blocks:
            slope_TV = None
            if blocks.plan.softcap is not None:
                slope_TV = (views[0] / blocks.plan.softcap).square_().neg_().add_(1.0)
            if merged:
                raw = _scaled_(only[1].gradient_(views[2].copy_(views[0]), views[1], hit), only[1].row_scale(None))
                shaped = only[0].gradient_(blocks.shaping.apply_(views[0], block), views[1], hit)
                grad_TV = _scaled_(shaped, only[0].row_scale(temperature_T)).add_(raw)
            else:
                y_TV = blocks.shaping.apply_(views[0], block) if wanted[0] is only[0] else views[0]
                grad_TV = only[0].gradient_(y_TV, views[1], hit)
            if slope_TV is not None:
                grad_TV.mul_(slope_TV)
            if self.grad_V is not None:
                self.grad_V[block] += grad_TV.T @ factor_T
            product_TV = blocks.to_product(grad_TV)
            if total_TH is not None:
                _add_product_(total_TH, product_TV, self.weight_VH[block])
            if self.grad_VH is not None:
                self._add_weight(block, product_TV, hidden_TH)
        if self.grad_TH is not None and total_TH is not None:
            self.grad_TH[part] = total_TH.mul_(factor_T[:, None]).to(self.grad_TH.dtype)

    def _add_weight(self, block: slice, grad_TV: torch.Tensor, hidden_TH: torch.Tensor) -> None:
        assert self.grad_VH is not None
        if self.single:
            torch.mm(grad_TV.T, hidden_TH, out=self.grad_VH[block])
        else:
            _add_product_(self.grad_VH[block], grad_TV.T, hidden_TH)

    def result(self) -> tuple[torch.Tensor | None, ...]:
        """In the order of the forward arguments."""
        weight_VH = None if self.grad_VH is None else self.grad_VH.to(self.weight_VH.dtype)
        bias_V = None if self.grad_V is None or self.bias_V is None else self.grad_V.to(self.bias_V.dtype)
        return self.grad_TH, weight_VH, bias_V, None


def _scaled_(value_TX: torch.Tensor, scale_T: torch.Tensor | None) -> torch.Tensor:
    return value_TX if scale_T is None else value_TX.mul_(scale_T[:, None])


def _add_product_(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total.add_(left @ right)
