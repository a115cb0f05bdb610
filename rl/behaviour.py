"""The one definition of "raw logits -> the distribution that was sampled from"."""

from __future__ import annotations

from collections.abc import Sequence

import torch

import kernels


def behaviour_logp(
    logits_TV: torch.Tensor,
    target_T: torch.Tensor,
    *,
    temperature_T: torch.Tensor | None = None,
    bias_ids: torch.Tensor | Sequence[int] | None = None,
    bias_T: torch.Tensor | None = None,
) -> torch.Tensor:
    """Log-probability (nats) of each token under the distribution it was sampled from.

    ``logp_t = ln softmax((z_t + bias_t 1[v in bias_ids]) / temperature_t)[target_t]``

    Shapes: logits_TV (T, V) raw logits, target_T (T) integer, temperature_T (T) above 0, bias_ids (K) distinct, bias_T (T).
    Returns float32 (T), differentiable in the logits. Errors as in `kernels.logprob_entropy`. The learner, which must not
    hold T x V, calls `kernels.linear_logprob_entropy` with the same arguments.
    """
    return kernels.logprob_entropy(logits_TV, target_T, temperature_T=temperature_T, bias_ids=bias_ids, bias_T=bias_T)[0]
