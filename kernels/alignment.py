"""AlignDistil: a teacher extrapolated from two frozen models, and the reverse KL from the student to it, token by token."""

from __future__ import annotations

from collections.abc import Callable

import torch

from kernels import eager_alignment
from kernels.backends import pick
from kernels.checks import check_matrix
from kernels.shaping import LOG_ZERO


def alignment_kl(
    student_TV: torch.Tensor,
    dpo_TV: torch.Tensor,
    reverse_TV: torch.Tensor,
    *,
    r: float,
    eps: float = 1e-3,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Reverse KL (nats) of the student to the composed teacher and the extrapolation weight of each token.

    ``TVD_t = 1/2 sum_v |pi_d - pi_r|``, ``alpha_t = r TVD_t + eps``,
    ``ln pi*_t = log_softmax((1 + alpha_t) ln pi_d - alpha_t ln pi_r)``, ``KL_t = sum_v pi_s (ln pi_s - ln pi*)``

    Shapes: three (T, V) matrices of logits: the student's, the DPO model's and the reverse-DPO model's. Differences are taken in
    float32 (float64 for float64 with ``backend="reference"``); log-probs below -10000 count as that. Returns (kl_T, alpha_T);
    only kl_T has a gradient, and only in the student. Raises ValueError or TypeError naming the argument.
    Source: AlignDistil (arXiv 2503.02832), token-adaptive form; the loss weighs KL_t by beta_0 / alpha_t.
    """
    for name, value in (("student_TV", student_TV), ("dpo_TV", dpo_TV), ("reverse_TV", reverse_TV)):
        check_matrix(name, value)
        _same("student_TV", student_TV, name, value)
    _check_constants(r, eps)
    kernel = pick(_LOGITS, backend, student_TV, ("triton_alignment", "from_logits"))
    return kernel(student_TV, dpo_TV.detach(), reverse_TV.detach(), r, eps)


def linear_alignment_kl(
    student: tuple[torch.Tensor, torch.Tensor],
    dpo: tuple[torch.Tensor, torch.Tensor],
    reverse: tuple[torch.Tensor, torch.Tensor],
    *,
    r: float,
    eps: float = 1e-3,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """`alignment_kl` from hidden states and heads, ``logits = hidden_TH @ weight_VH.T``, never holding T x V in ``eager``.

    Shapes: each argument is (hidden_TH, weight_VH); H may differ between the models, T and V may not. Differentiable in both
    tensors of the student. Returns and raises like `alignment_kl`.
    """
    for name, (hidden_TH, weight_VH) in (("student", student), ("dpo", dpo), ("reverse", reverse)):
        check_matrix(f"{name} hidden_TH", hidden_TH)
        check_matrix(f"{name} weight_VH", weight_VH)
        if hidden_TH.shape[1] != weight_VH.shape[1]:
            raise ValueError(f"{name}: weight_VH has {weight_VH.shape[1]} columns, hidden_TH has {hidden_TH.shape[1]}")
        if hidden_TH.dtype != weight_VH.dtype:
            raise TypeError(f"{name}: weight_VH is {weight_VH.dtype}, hidden_TH is {hidden_TH.dtype}; cast one to the other")
        if hidden_TH.shape[0] != student[0].shape[0] or weight_VH.shape[0] != student[1].shape[0]:
            found, expected = (hidden_TH.shape[0], weight_VH.shape[0]), (student[0].shape[0], student[1].shape[0])
            raise ValueError(f"{name} has (tokens, vocabulary) {found}, student has {expected}; they must agree")
    _check_constants(r, eps)
    frozen = [(hidden_TH.detach(), weight_VH.detach()) for hidden_TH, weight_VH in (dpo, reverse)]
    kernel = pick(_HIDDEN, backend, student[0], ("triton_alignment", "from_hidden"))
    return kernel(student, *frozen, r, eps)


def _check_constants(r: float, eps: float) -> None:
    if not (r >= 0 and eps > 0):
        raise ValueError(f"r must be 0 or more and eps above 0 (beta_t divides by alpha_t), got r={r}, eps={eps}")


def _same(name: str, value: torch.Tensor, other_name: str, other: torch.Tensor) -> None:
    if value.shape != other.shape:
        raise ValueError(f"{other_name} has shape {tuple(other.shape)}, {name} has {tuple(value.shape)}; they must agree")
    if value.device != other.device:
        raise ValueError(f"{other_name} is on {other.device}, {name} on {value.device}; move one")


def _reference_logits(
    student_TV: torch.Tensor, dpo_TV: torch.Tensor, reverse_TV: torch.Tensor, r: float, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    log_s, log_d, log_r = (_log_softmax(z) for z in (student_TV, dpo_TV, reverse_TV))
    alpha_T = r * 0.5 * (log_d.exp() - log_r.exp()).abs().sum(dim=-1) + eps
    log_teacher_TV = _log_softmax(log_d + alpha_T[:, None] * (log_d - log_r))
    return (log_s.exp() * (log_s - log_teacher_TV)).sum(dim=-1), alpha_T


def _log_softmax(logits_TV: torch.Tensor) -> torch.Tensor:
    logits_TV = logits_TV if logits_TV.dtype == torch.float64 else logits_TV.float()
    return torch.log_softmax(logits_TV, dim=-1).clamp(min=LOG_ZERO)


def _reference_hidden(
    student: tuple[torch.Tensor, torch.Tensor],
    dpo: tuple[torch.Tensor, torch.Tensor],
    reverse: tuple[torch.Tensor, torch.Tensor],
    r: float,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    student_TV, dpo_TV, reverse_TV = (hidden_TH @ weight_VH.T for hidden_TH, weight_VH in (student, dpo, reverse))
    return _reference_logits(student_TV, dpo_TV, reverse_TV, r, eps)


_LOGITS: dict[str, Callable[..., tuple[torch.Tensor, torch.Tensor]]] = {
    "reference": _reference_logits,
    "eager": eager_alignment.from_logits,
}
_HIDDEN: dict[str, Callable[..., tuple[torch.Tensor, torch.Tensor]]] = {
    "reference": _reference_hidden,
    "eager": eager_alignment.from_hidden,
}
