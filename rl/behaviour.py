"""The one definition of "raw logits -> the distribution that was sampled from"."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

import kernels
from kernels import TemperatureRule
from rl.types import Rollout, Shaping
from rollout.reflex import reflex_bias
from rollout.temperature import rule_of


@dataclass(frozen=True)
class Vocabulary:
    """The ids a reflection bias is about: the words it lifts and the token after which it is off."""

    words: tuple[int, ...]
    end: int


@dataclass(frozen=True)
class Behaviour:
    """How the tokens of one batch were drawn, beside what each token carries (base temperature and bias)."""

    rule: TemperatureRule | None = None
    """Temperature by entropy, from the statistics the engines had; None: the base temperature."""
    bias_ids: tuple[int, ...] = ()
    """Ids that the bias is added to."""

    @property
    def is_plain(self) -> bool:
        """Whether only a base temperature may shape a token."""
        return self.rule is None and not self.bias_ids


def behaviour_of(shapings: Sequence[Shaping], vocabulary: Vocabulary | None) -> Behaviour:
    """What a batch's shapings have in common. Raises ValueError when they differ in their temperature rule."""
    rules = {rule_of(shaping.adaptive) for shaping in shapings}
    if len(rules) > 1:
        raise ValueError("a batch mixes rollouts of different entropy statistics, which one replay cannot serve")
    biased = any(shaping.reflex is not None for shaping in shapings)
    if biased and vocabulary is None:
        raise ValueError("a rollout has a reflection bias, but nobody says which words it lifts")
    return Behaviour(rules.pop() if rules else None, vocabulary.words if biased and vocabulary else ())


def replayed_bias(rollout: Rollout, vocabulary: Vocabulary | None) -> torch.Tensor:
    """The bias on reflection words at each *generated* token, from the token ids alone; float32 (generated), nats.

    ``bias_t = schedule(t)`` with t the generated tokens before it, 0 once ``</think>`` is among them.
    """
    generated = rollout.response_ids[rollout.prefill_length :]
    reflex = rollout.lease.shaping.reflex
    if reflex is None or not generated:
        return torch.zeros(len(generated))
    if vocabulary is None:
        raise ValueError(f"rollout {rollout.lease.ticket} has a reflection bias, but nobody says which token ends it")
    ids = torch.tensor(generated)
    ended = (ids == vocabulary.end).long().cumsum(0)
    return reflex_bias(torch.arange(len(generated)), (ended - (ids == vocabulary.end).long()) > 0, reflex)


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
