"""Shared tensor kernels: log-probability and entropy, logit shaping, advantages, alignment KL.

Needs torch, and triton where a GPU is used; nothing else of this project. Every kernel has one contract and three backends:
``reference`` is the obvious form (float64 in gives float64 out), ``eager`` blocked torch, ``triton`` what runs on a GPU.
``backend="auto"`` is ``triton`` for tensors on a GPU and ``eager`` for others.
"""

from __future__ import annotations

from kernels.alignment import alignment_kl, linear_alignment_kl
from kernels.backends import NotAvailable
from kernels.bucket import linear_bucket_kl, top_ids
from kernels.grouping import (
    centred_advantage,
    group_normalised_advantage,
    hierarchical_advantage,
    token_level_group_average_advantage,
)
from kernels.logprob import linear_logprob_entropy, logprob_entropy
from kernels.shaping import TemperatureRule, shape_logits_

# transformers looks for a hub package of this name and would use it if the version were 0.10 or more; keep it far below.
__version__ = "0.0.0"

__all__ = [
    "NotAvailable",
    "TemperatureRule",
    "alignment_kl",
    "centred_advantage",
    "group_normalised_advantage",
    "hierarchical_advantage",
    "linear_alignment_kl",
    "linear_bucket_kl",
    "linear_logprob_entropy",
    "logprob_entropy",
    "shape_logits_",
    "token_level_group_average_advantage",
    "top_ids",
]
