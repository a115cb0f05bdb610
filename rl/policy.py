"""The policy as the learner sees it: a Hugging Face causal model whose head returns log-probs and entropies, never logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from kernels import linear_logprob_entropy
from rl.errors import ConfigError


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
        self, hidden_TH: torch.Tensor, target_T: torch.Tensor, temperature_T: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """(shaped log-prob, shaped entropy, raw log-prob, raw entropy), each float32 (T), in nats."""
        options: dict[str, Any] = {"head_bias_V": self.bias, "softcap": self.softcap}
        if temperature_T is None:
            logp_T, entropy_T = linear_logprob_entropy(hidden_TH, self.weight, target_T, **options)
            return logp_T, entropy_T, logp_T, entropy_T
        logp_T, entropy_T, raw_logp_T, raw_entropy_T = linear_logprob_entropy(
            hidden_TH, self.weight, target_T, temperature_T=temperature_T, return_raw=True, **options
        )
        return logp_T, entropy_T, raw_logp_T, raw_entropy_T


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
        self, token_BS: torch.Tensor, position_T: torch.Tensor, target_T: torch.Tensor, temperature_T: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """See :meth:`LogProbHead.forward`; ``position_T`` indexes the flattened grid of ``token_BS`` (rows, width).

        No attention mask and no cache: with right padding causal attention suffices, and transformers 5.10 would take a mask or a
        cache as a reason to treat rows as packed.
        """
        hidden_BSH = self.lm.base_model(input_ids=token_BS, use_cache=False).last_hidden_state
        hidden_TH = hidden_BSH.flatten(0, 1)[position_T]
        return self.head(hidden_TH, target_T, temperature_T)


def load_policy(
    folder: Path, *, dtype: str, trust_remote_code: bool = False, gradient_checkpointing: bool = False
) -> PolicyModel:
    """Load a local Hugging Face folder in ``dtype`` (float32 or bfloat16)."""
    from transformers import AutoModelForCausalLM

    lm = AutoModelForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, dtype), trust_remote_code=trust_remote_code, use_safetensors=True
    )
    if gradient_checkpointing:
        lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return PolicyModel(lm)
