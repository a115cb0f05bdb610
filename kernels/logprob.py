"""Log-probability of given tokens and entropy of their distributions, from logits or straight from hidden states."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from kernels import eager, eager_linear, reference
from kernels.backends import pick
from kernels.checks import check_matrix, check_target, check_vector
from kernels.shaping import logit_shaping

_LOGITS: dict[str, Callable[..., tuple[torch.Tensor, ...]]] = {
    "reference": reference.from_logits,
    "eager": eager.from_logits,
}
_HIDDEN: dict[str, Callable[..., tuple[torch.Tensor, ...]]] = {
    "reference": reference.from_hidden,
    "eager": eager_linear.from_hidden,
}


def logprob_entropy(
    logits_TV: torch.Tensor,
    target_T: torch.Tensor,
    *,
    temperature_T: torch.Tensor | None = None,
    bias_ids: torch.Tensor | Sequence[int] | None = None,
    bias_T: torch.Tensor | None = None,
    return_raw: bool = False,
    backend: str = "auto",
    inplace_backward: bool = False,
) -> tuple[torch.Tensor, ...]:
    """Log-probability of each target and entropy (nats) of each token's shaped distribution.

    ``y_tv = (z_tv + bias_t 1[v in bias_ids]) / temperature_t``, ``p_t = softmax(y_t)``,
    ``logp_t = ln p_t[target_t]``, ``H_t = - sum_v p_tv ln p_tv``

    Shapes: logits_TV (T, V) floating point, -inf allowed (a token that cannot occur); target_T (T) integer;
    temperature_T (T) above 0; bias_ids (K) distinct ids; bias_T (T). Returns (logp_T, entropy_T), and with ``return_raw`` also
    (raw_logp_T, raw_entropy_T) of softmax(z_t); float32 (float64 for float64 logits with ``backend="reference"``).
    Differentiable in the logits only: temperature and bias are data. ``inplace_backward`` lets the gradient overwrite the logits,
    which must then be used for nothing else, and for one backward pass only: it saves T x V.
    Raises ValueError or TypeError naming the argument, NotAvailable for a backend that is not built; value ranges are
    checked on CPU only.
    """
    check_matrix("logits_TV", logits_TV)
    tokens, vocabulary = logits_TV.shape
    check_target(target_T, tokens=tokens, vocabulary=vocabulary, like=logits_TV)
    shaping = logit_shaping(temperature_T, bias_ids, bias_T, tokens=tokens, vocabulary=vocabulary, like=logits_TV)
    kernel = pick(_LOGITS, backend, logits_TV, ("triton_logprob", "from_logits"))
    return kernel(logits_TV, target_T.long(), shaping, return_raw=return_raw, inplace_backward=inplace_backward)


def linear_logprob_entropy(
    hidden_TH: torch.Tensor,
    weight_VH: torch.Tensor,
    target_T: torch.Tensor,
    *,
    temperature_T: torch.Tensor | None = None,
    bias_ids: torch.Tensor | Sequence[int] | None = None,
    bias_T: torch.Tensor | None = None,
    return_raw: bool = False,
    backend: str = "auto",
    head_bias_V: torch.Tensor | None = None,
    softcap: float | None = None,
) -> tuple[torch.Tensor, ...]:
    """`logprob_entropy` of the logits of a language-model head, which ``eager`` never holds for all tokens at once.

    ``z_t = W h_t + head_bias``, with a softcap c then ``z_t <- c tanh(z_t / c)``; the rest as in `logprob_entropy`.

    Shapes: hidden_TH (T, H) and weight_VH (V, H) of one floating point dtype, head_bias_V (V), softcap above 0 or None.
    ``eager`` multiplies matrices in the inputs' dtype, takes the softmax in float32 and adds the weight gradient up in
    float32. Differentiable in hidden, weight and head bias, for all returned values. T = 0 is allowed.
    Returns and raises like `logprob_entropy`.
    """
    check_matrix("hidden_TH", hidden_TH)
    check_matrix("weight_VH", weight_VH)
    tokens, vocabulary = hidden_TH.shape[0], weight_VH.shape[0]
    if weight_VH.shape[1] != hidden_TH.shape[1]:
        raise ValueError(f"weight_VH has {weight_VH.shape[1]} columns, hidden_TH has {hidden_TH.shape[1]}; they must agree")
    if weight_VH.dtype != hidden_TH.dtype:
        raise TypeError(f"weight_VH is {weight_VH.dtype}, hidden_TH is {hidden_TH.dtype}; cast one to the other")
    if weight_VH.device != hidden_TH.device:
        raise ValueError(f"weight_VH is on {weight_VH.device}, hidden_TH on {hidden_TH.device}; move one")
    if head_bias_V is not None:
        check_vector("head_bias_V", head_bias_V, length=vocabulary, like=hidden_TH)
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be above 0 or None, got {softcap}")
    check_target(target_T, tokens=tokens, vocabulary=vocabulary, like=hidden_TH)
    shaping = logit_shaping(temperature_T, bias_ids, bias_T, tokens=tokens, vocabulary=vocabulary, like=hidden_TH)
    kernel = pick(_HIDDEN, backend, hidden_TH, ("triton_linear", "from_hidden"))
    return kernel(hidden_TH, weight_VH, target_T.long(), shaping, return_raw=return_raw, head_bias_V=head_bias_V, softcap=softcap)
