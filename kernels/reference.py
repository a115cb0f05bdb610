"""The obvious torch form of the log-probability kernels: whole matrices, torch's own gradients, float64 kept."""

from __future__ import annotations

import torch

from kernels.shaping import LogitShaping


def from_logits(
    logits_TV: torch.Tensor, target_T: torch.Tensor, shaping: LogitShaping, *, return_raw: bool, inplace_backward: bool = False
) -> tuple[torch.Tensor, ...]:
    """See `kernels.logprob_entropy`; torch's own gradient never overwrites the logits, so ``inplace_backward`` saves nothing."""
    logits_TV = _at_least_float32(logits_TV)
    shaped = _values(shaping.apply_(logits_TV.clone()), target_T)
    return (*shaped, *_values(logits_TV, target_T)) if return_raw else shaped


def from_hidden(
    hidden_TH: torch.Tensor,
    weight_VH: torch.Tensor,
    target_T: torch.Tensor,
    shaping: LogitShaping,
    *,
    return_raw: bool,
    head_bias_V: torch.Tensor | None,
    softcap: float | None,
) -> tuple[torch.Tensor, ...]:
    """See `kernels.linear_logprob_entropy`."""
    logits_TV = _at_least_float32(hidden_TH) @ _at_least_float32(weight_VH).T
    if head_bias_V is not None:
        logits_TV = logits_TV + head_bias_V.to(logits_TV.dtype)
    if softcap is not None:
        logits_TV = softcap * torch.tanh(logits_TV / softcap)
    return from_logits(logits_TV, target_T, shaping, return_raw=return_raw)


def _values(logits_TV: torch.Tensor, target_T: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    logp_TV = torch.log_softmax(logits_TV, dim=-1)
    # p ln p -> 0 as p -> 0; the replaced ln p keeps 0 * inf out of the value and out of its gradient
    finite_TV = torch.where(torch.isneginf(logp_TV), 0.0, logp_TV)
    entropy_T = -(logp_TV.exp() * finite_TV).sum(dim=-1)
    return logp_TV.gather(-1, target_T[:, None]).squeeze(-1), entropy_T


def _at_least_float32(value: torch.Tensor) -> torch.Tensor:
    return value if value.dtype == torch.float64 else value.float()
