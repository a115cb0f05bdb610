"""AlignDistil: a teacher extrapolated from two frozen models, what a student loses against it, and the rewards of single tokens.

Training takes the KL from hidden states (`kernels.linear_alignment_kl`, `kernels.linear_bucket_kl`) and weighs it by
:func:`kl_weight`; the forms here are the definitions, for logits that are at hand.
"""

from __future__ import annotations

import torch

from kernels.shaping import LOG_ZERO


def compose_teacher(
    dpo_logits_TV: torch.Tensor, reverse_logits_TV: torch.Tensor, *, r: float, eps: float = 1e-3
) -> tuple[torch.Tensor, torch.Tensor]:
    """The composed teacher's log-probs and the weight of its extrapolation: the less the two models agree, the further it goes.

    ``TVD_t = 1/2 sum_v |pi_d - pi_r|``, ``alpha_t = r TVD_t + eps``,
    ``ln pi*_t = log_softmax((1 + alpha_t) ln pi_d - alpha_t ln pi_r)``

    ``r=0`` and ``eps=a`` give the constant extrapolation a.

    Shapes: two (T, V) matrices of logits, of models with one tokenizer and cut to its size; -inf is a token that cannot occur.
    Returns (log_pi_star_TV in nats, alpha_T), float32 (float64 for float64), without a gradient; differences are taken in that
    dtype, and log-probs below -10000 count as that. Raises ValueError for shapes that differ, r below 0 or eps not above 0.
    Source: AlignDistil (arXiv 2503.02832), contrastive reward with token-adaptive extrapolation. The published code sums without
    the 1/2: its ``beta2`` is r / 2.
    """
    if dpo_logits_TV.shape != reverse_logits_TV.shape or dpo_logits_TV.ndim != 2:
        raise ValueError(
            f"dpo_logits_TV has shape {tuple(dpo_logits_TV.shape)}, reverse_logits_TV {tuple(reverse_logits_TV.shape)}; "
            "they must be matrices of one shape: cut both to the tokenizer's size"
        )
    if not (r >= 0 and eps > 0):
        raise ValueError(f"r must be 0 or more and eps above 0 (beta_t divides by alpha_t), got r={r}, eps={eps}")
    with torch.no_grad():
        log_d, log_r = _log_softmax(dpo_logits_TV), _log_softmax(reverse_logits_TV)
        alpha_T = r * 0.5 * (log_d.exp() - log_r.exp()).abs().sum(dim=-1) + eps
        return _log_softmax(log_d + alpha_T[:, None] * (log_d - log_r)), alpha_T


def alignment_loss(
    student_logits_TV: torch.Tensor,
    log_pi_star_TV: torch.Tensor,
    alpha_T: torch.Tensor,
    mask_T: torch.Tensor,
    *,
    beta0: float = 0.1,
    beta_max: float | None = None,
) -> torch.Tensor:
    """What one response loses against its teacher: the mean over its tokens of the weighed reverse KL.

    ``L = sum_t m_t beta_t KL_t / sum_t m_t``, ``KL_t = sum_v pi_s (ln pi_s - ln pi*)``, beta_t by :func:`kl_weight`; the gradient
    in the logits of token t is ``m_t beta_t pi_s (ln pi_s - ln pi* - KL_t) / sum_t m_t``.

    Shapes: student_logits_TV (T, V), the rows that predict response tokens 1 to the last (end of sequence included);
    log_pi_star_TV (T, V) and alpha_T (T) of :func:`compose_teacher`; mask_T (T) bool or weights. Returns a scalar in nats,
    float32 (float64 for float64 logits), 0 where the mask is empty; differentiable in the student alone. Raises ValueError for
    shapes that differ. Source: AlignDistil (arXiv 2503.02832), the form of its published code: beta_t inside the sum, full
    vocabulary.
    """
    tokens = student_logits_TV.shape[0]
    if student_logits_TV.shape != log_pi_star_TV.shape or alpha_T.shape != (tokens,) or mask_T.shape != (tokens,):
        raise ValueError(
            f"shapes disagree: student_logits_TV {tuple(student_logits_TV.shape)}, log_pi_star_TV {tuple(log_pi_star_TV.shape)}, "
            f"alpha_T {tuple(alpha_T.shape)}, mask_T {tuple(mask_T.shape)}"
        )
    log_s = _log_softmax(student_logits_TV)
    kl_T = (log_s.exp() * (log_s - log_pi_star_TV.detach().to(log_s.dtype).clamp(min=LOG_ZERO))).sum(dim=-1)
    weight_T = mask_T.to(log_s.dtype) * kl_weight(alpha_T, beta0=beta0, beta_max=beta_max).to(log_s.dtype)
    total = mask_T.to(log_s.dtype).sum()
    return (weight_T * kl_T).sum() / torch.where(total > 0, total, torch.ones_like(total))


def kl_weight(alpha_T: torch.Tensor, *, beta0: float = 0.1, beta_max: float | None = None) -> torch.Tensor:
    """Weight of a token's KL: ``beta_t = beta_0 / alpha_t``, at most ``beta_max``.

    Where the two models agree alpha is eps, so beta_t is as large as beta_0 / eps (100 at the defaults): such tokens hold the
    student to the DPO model and can make up most of the loss. Shapes: alpha_T (T) above 0; returns (T) of its dtype, detached.
    Source: AlignDistil (arXiv 2503.02832); the bound is ours and off by default.
    """
    weight_T = beta0 / alpha_T.detach()
    return weight_T if beta_max is None else weight_T.clamp(max=beta_max)


def token_reward(
    logp_T: torch.Tensor,
    teacher_logp_T: torch.Tensor,
    alpha_T: torch.Tensor,
    *,
    beta0: float = 0.1,
    beta_max: float | None = None,
) -> torch.Tensor:
    """Reward of sampled tokens whose score-function gradient, without any discounted future, is the loss's full-vocabulary one.

    ``R_t = beta_t (ln pi*(y_t) - ln pi_s(y_t))``; its mean under the student is ``-beta_t KL_t``. It equals
    ``beta_0 (ln pi_d - ln pi_r) - beta_t (ln pi_s - ln pi_d) - beta_t ln Z_t``: the last term hangs on the state alone, so it is
    a baseline at discount 0 and changes the objective at any other.

    Shapes: three (T), log-probs in nats of the tokens that were sampled; of tokens that an older policy sampled, the gradient
    needs the token ratio. Returns (T), detached; log-probs below -10000 count as that. Source: AlignDistil (arXiv 2503.02832),
    theorem 1 read for one state.
    """
    logp_T, teacher_logp_T = (value.detach().clamp(min=LOG_ZERO) for value in (logp_T, teacher_logp_T))
    return kl_weight(alpha_T, beta0=beta0, beta_max=beta_max) * (teacher_logp_T - logp_T)


def contrastive_reward(dpo_logp_T: torch.Tensor, reverse_logp_T: torch.Tensor, *, beta0: float = 0.1) -> torch.Tensor:
    """How much better than worse a token is: ``r_t = beta_0 (ln pi_d(y_t) - ln pi_r(y_t))``.

    Shapes: two (T), nats; returns (T), detached; log-probs below -10000 count as that. Source: AlignDistil (arXiv 2503.02832),
    the contrastive DPO reward.
    """
    dpo_logp_T, reverse_logp_T = (value.detach().clamp(min=LOG_ZERO) for value in (dpo_logp_T, reverse_logp_T))
    return beta0 * (dpo_logp_T - reverse_logp_T)


def _log_softmax(logits_TV: torch.Tensor) -> torch.Tensor:
    logits_TV = logits_TV if logits_TV.dtype == torch.float64 else logits_TV.float()
    return torch.log_softmax(logits_TV, dim=-1).clamp(min=LOG_ZERO)
