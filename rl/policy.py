"""The policy as the learner sees it: a Hugging Face causal model whose head returns log-probs and entropies, never logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

import kernels
from kernels import linear_logprob_entropy
from rl.behaviour import Behaviour
from rl.errors import ConfigError

PLAIN = Behaviour()
"""Nothing but a base temperature shapes a token."""


class Scores(NamedTuple):
    """What the policy thinks of R response tokens, each float32 (R). A tuple, so that DeepSpeed's hooks see the tensors in it."""

    shaped: torch.Tensor
    """Log-prob under the distribution the token was sampled from."""
    raw: torch.Tensor
    """Log-prob at temperature 1, unshaped."""
    entropy: torch.Tensor
    """Entropy at temperature 1, unshaped, in nats."""
    temperature: torch.Tensor | None
    """Total temperature; None where it is 1."""
    divergence: torch.Tensor | None = None
    """Reverse KL to the teacher in nats, from an :class:`Alignment`; else None."""
    alpha: torch.Tensor | None = None
    """Weight of the teacher's extrapolation, where it is composed here."""
    top: torch.Tensor | None = None
    """int32 (R, k): the most probable ids, where they were asked for."""


class Alignment(NamedTuple):
    """A composed teacher at the same R tokens: either its probabilities of K ids, or what both models make it from."""

    vocabulary: int
    """Rows of the heads that the tokenizer knows; the rest is padding."""
    r: float
    eps: float
    id_TK: torch.Tensor | None
    teacher_logp_TK: torch.Tensor | None
    tail_T: torch.Tensor | None
    dpo: tuple[torch.Tensor, torch.Tensor] | None
    """Final hidden states (R, H) and head (V, H) of the DPO model."""
    reverse: tuple[torch.Tensor, torch.Tensor] | None


class LogProbHead(nn.Module):
    """Output head that goes from hidden states to log-probs without holding tokens x vocabulary.

    It owns the (shared) weight as a parameter of its own, so that DeepSpeed ZeRO-3 gathers it around this forward.
    """

    def __init__(self, output_embedding: Any, *, softcap: float | None) -> None:
        super().__init__()
        self.weight = output_embedding.weight
        self.bias = getattr(output_embedding, "bias", None)  # nn.Linear registers None when it has no bias
        self.softcap = softcap

    def forward(
        self,
        hidden_TH: torch.Tensor,
        target_T: torch.Tensor,
        temperature_T: torch.Tensor | None,
        bias_T: torch.Tensor | None = None,
        behaviour: Behaviour = PLAIN,
        alignment: Alignment | None = None,
        top: tuple[int, int] | None = None,
    ) -> Scores:
        """Log-probs and entropies of the targets, raw and under the distribution they were sampled from.

        ``temperature_T`` (None: 1) is multiplied by the behaviour's factor, from the entropy of these very hidden states.
        With an ``alignment`` also the KL of the raw distribution to the teacher; ``top`` = (k, vocabulary) asks for the most
        probable k ids below vocabulary.
        """
        scores = self._scores(hidden_TH, target_T, temperature_T, bias_T, behaviour)
        if top is not None or alignment is not None:
            self._refuse_all_but_plain()
        if top is not None:
            return scores._replace(top=kernels.top_ids(hidden_TH, self.weight[: top[1]], top[0]))
        if alignment is None:
            return scores
        divergence, alpha = self._divergence(hidden_TH, alignment)
        return scores._replace(divergence=divergence, alpha=alpha)

    def _refuse_all_but_plain(self) -> None:
        """The kernels that compare with a teacher take a matrix and nothing else: without its bias the student is another."""
        if self.bias is not None or self.softcap is not None:
            raise ConfigError(
                f"the output head of model.path has {'a bias' if self.bias is not None else 'a softcap'}, and "
                "distil.teacher.mode=hidden and topk take a plain head only",
                fix="use distil.teacher.mode=scalar, or another model",
            )

    def _divergence(self, hidden_TH: torch.Tensor, alignment: Alignment) -> tuple[torch.Tensor, torch.Tensor | None]:
        weight_VH = self.weight[: alignment.vocabulary]
        if alignment.dpo is not None and alignment.reverse is not None:
            return kernels.linear_alignment_kl(
                (hidden_TH, weight_VH), alignment.dpo, alignment.reverse, r=alignment.r, eps=alignment.eps
            )
        assert alignment.id_TK is not None and alignment.teacher_logp_TK is not None and alignment.tail_T is not None
        return kernels.linear_bucket_kl(hidden_TH, weight_VH, alignment.id_TK, alignment.teacher_logp_TK, alignment.tail_T), None

    def _scores(
        self,
        hidden_TH: torch.Tensor,
        target_T: torch.Tensor,
        temperature_T: torch.Tensor | None,
        bias_T: torch.Tensor | None,
        behaviour: Behaviour,
    ) -> Scores:
        options: dict[str, Any] = {"head_bias_V": self.bias, "softcap": self.softcap}
        if behaviour.rule is not None:
            with torch.no_grad():  # the temperature is data: no gradient flows through it
                entropy_T = linear_logprob_entropy(hidden_TH.detach(), self.weight, target_T, **options)[1]
                factor_T = behaviour.rule(entropy_T)
            temperature_T = factor_T if temperature_T is None else temperature_T * factor_T
        if bias_T is not None and behaviour.bias_ids:
            options |= {"bias_ids": behaviour.bias_ids, "bias_T": bias_T}
        elif temperature_T is None:
            logp_T, entropy_T = linear_logprob_entropy(hidden_TH, self.weight, target_T, **options)
            return Scores(logp_T, logp_T, entropy_T, None)
        logp_T, _, raw_logp_T, raw_entropy_T = linear_logprob_entropy(
            hidden_TH, self.weight, target_T, temperature_T=temperature_T, return_raw=True, **options
        )
        return Scores(logp_T, raw_logp_T, raw_entropy_T, temperature_T)


class PolicyModel(nn.Module):
    """Causal model plus :class:`LogProbHead`; `forward` scores the response tokens of right-padded rows."""

    def __init__(self, lm: Any) -> None:
        super().__init__()
        for name in ("logit_scale", "logits_scaling"):
            if (getattr(lm.config, name, None) or 1.0) != 1.0:
                raise ConfigError(
                    f"model {lm.config.model_type} scales its logits ({name}={getattr(lm.config, name)}), which the log-prob "
                    f"head does not do; use a model without {name}"
                )
        self.lm = lm
        self.head = LogProbHead(lm.get_output_embeddings(), softcap=getattr(lm.config, "final_logit_softcapping", None))

    def forward(
        self,
        token_BS: torch.Tensor,
        position_T: torch.Tensor,
        target_T: torch.Tensor,
        temperature_T: torch.Tensor | None = None,
        bias_T: torch.Tensor | None = None,
        behaviour: Behaviour = PLAIN,
        alignment: Alignment | None = None,
        top: tuple[int, int] | None = None,
    ) -> Scores:
        """See :meth:`LogProbHead.forward`; ``position_T`` indexes the flattened grid of ``token_BS`` (rows, width).

        No attention mask and no cache: with right padding causal attention suffices, and transformers 5.10 would take a mask or a
        cache as a reason to treat rows as packed.
        """
        hidden_BSH = self.lm.base_model(input_ids=token_BS, use_cache=False).last_hidden_state
        hidden_TH = hidden_BSH.flatten(0, 1)[position_T]
        return self.head(hidden_TH, target_T, temperature_T, bias_T, behaviour, alignment, top)


def load_policy(
    folder: Path, *, dtype: str, trust_remote_code: bool = False, gradient_checkpointing: bool = False
) -> PolicyModel:
    """Load a local Hugging Face folder in ``dtype`` (float32 or bfloat16)."""
    from transformers import AutoModelForCausalLM

    lm = AutoModelForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, dtype), trust_remote_code=trust_remote_code, use_safetensors=True
    )
    _disable_dropout(lm)
    if gradient_checkpointing:
        lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return PolicyModel(lm)


def _disable_dropout(lm: nn.Module) -> None:
    """Engines, references and old log-probs know no dropout; with it the learner's policy would be another at every pass."""
    for module in lm.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            setattr(module, "attention_dropout", 0.0)  # noqa: B010  (nn.Module declares no such attribute)
