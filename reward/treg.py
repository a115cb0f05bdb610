"""T-REG's token rewards: which tokens of an answer a better version of it would have had, by one frozen model and two prompts.

The prompts are rl/contrast.py's; here is the arithmetic, pure and on any device.
"""

from __future__ import annotations

import torch

LARGEST_CREDIT = 0.5


def token_reward(better_logp_T: torch.Tensor, worse_logp_T: torch.Tensor) -> torch.Tensor:
    """The token reward ``r_t = sigmoid(logp_t(better) - logp_t(worse)) - 1/2``, in [-1/2, 1/2].

    The log-probs are those of the same response under the prompt that asks for a better answer and the one that asks for a worse.
    A token that neither allows (-inf twice) gets 0, one that a single prompt allows +1/2 or -1/2.

    Shapes: both floating (T), nats. Returns (T), detached, float32, or float64 where both are. Raises ValueError for shapes that
    differ and for a value that is no log-prob: NaN or +inf. Source: T-REG (arXiv 2412.02685), self-generated token rewards.
    """
    if better_logp_T.shape != worse_logp_T.shape:
        raise ValueError(f"better_logp_T has shape {tuple(better_logp_T.shape)} and worse_logp_T {tuple(worse_logp_T.shape)}")
    double = better_logp_T.dtype == worse_logp_T.dtype == torch.float64
    better_T, worse_T = (x.detach().to(torch.float64 if double else torch.float32) for x in (better_logp_T, worse_logp_T))
    if bool((better_T.isnan() | worse_T.isnan() | better_T.isposinf() | worse_T.isposinf()).any()):
        raise ValueError("a log-prob is NaN or +inf: the model that scores the answers is broken")
    neither_T = better_T.isneginf() & worse_T.isneginf()
    difference_T = torch.where(neither_T, 0.0, better_T - worse_T)
    return 0.5 * torch.tanh(difference_T / 2)  # sigmoid(x) - 1/2, without the cancellation near 0


def reshape_advantage(advantage_T: torch.Tensor, credit_T: torch.Tensor, *, weight: float) -> torch.Tensor:
    """Advantages whose size follows the token rewards: ``A_t + weight |A_t| r_t``.

    The sign never changes, and 0 stays 0, so that a group without a winner teaches nothing still. At ``A = +-1`` this is the
    token weight of T-REG's regularised loss.

    Shapes: both floating (T). Returns (T) in the dtype of advantage_T. Raises ValueError for shapes that differ, a weight outside
    (0, 2), and a credit that is NaN or outside [-1/2, 1/2]. Source: T-REG (arXiv 2412.02685) carried over to policy gradients.
    """
    if advantage_T.shape != credit_T.shape:
        raise ValueError(f"advantage_T has shape {tuple(advantage_T.shape)} and credit_T {tuple(credit_T.shape)}")
    if not 0 < weight < 2:
        raise ValueError(f"weight must lie between 0 and 2, got {weight}: from 2 on a token reward could turn an advantage round")
    if not bool((credit_T.abs() <= LARGEST_CREDIT).all()):  # said so that a NaN is refused too
        raise ValueError("credit_T must lie in [-1/2, 1/2], as token_reward gives it")
    return advantage_T * (1 + weight * advantage_T.sign() * credit_T.to(advantage_T.dtype))
