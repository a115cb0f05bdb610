"""From raw logits to the logits that were sampled from: ``(z + bias * 1[v in bias_ids]) / temperature``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from kernels.backends import NotAvailable, pick
from kernels.checks import check_matrix, check_shaping


def ids_tensor(bias_ids: torch.Tensor | Sequence[int] | None, *, device: torch.device) -> torch.Tensor | None:
    """Return the biased token ids as an int64 tensor on ``device`` (None stays None)."""
    if bias_ids is None:
        return None
    if isinstance(bias_ids, torch.Tensor) and bias_ids.is_floating_point():
        raise TypeError(f"bias_ids must be a vector of integers, got {bias_ids.dtype}")
    return torch.as_tensor(bias_ids, dtype=torch.int64, device=device)


@dataclass(frozen=True)
class LogitShaping:
    """How the logits of each token are shaped; values are data (the sampler's settings), so no gradient flows into them."""

    temperature_T: torch.Tensor | None
    bias_ids: torch.Tensor | None
    bias_T: torch.Tensor | None

    @property
    def is_identity(self) -> bool:
        return self.temperature_T is None and self.bias_T is None

    def rows(self, part: slice) -> LogitShaping:
        """The shaping of a slice of the tokens."""
        temperature_T = None if self.temperature_T is None else self.temperature_T[part]
        bias_T = None if self.bias_T is None else self.bias_T[part]
        return LogitShaping(temperature_T, self.bias_ids, bias_T)

    def apply_(self, logits_TV: torch.Tensor) -> torch.Tensor:
        """Shape the logits in place and return them."""
        if self.bias_ids is not None and self.bias_T is not None:
            bias_TK = self.bias_T.to(logits_TV.dtype)[:, None].expand(-1, self.bias_ids.numel())
            logits_TV.index_add_(1, self.bias_ids, bias_TK)
        if self.temperature_T is not None:
            logits_TV.div_(self.temperature_T.to(logits_TV.dtype)[:, None])
        return logits_TV


def logit_shaping(
    temperature_T: torch.Tensor | None,
    bias_ids: torch.Tensor | Sequence[int] | None,
    bias_T: torch.Tensor | None,
    *,
    tokens: int,
    vocabulary: int,
    like: torch.Tensor,
) -> LogitShaping:
    """Check the three arguments against the logits' shape and device and bind them together."""
    ids = ids_tensor(bias_ids, device=like.device)
    check_shaping(temperature_T, ids, bias_T, rows=tokens, vocabulary=vocabulary, like=like)
    return LogitShaping(
        None if temperature_T is None else temperature_T.detach(),
        ids,
        None if bias_T is None else bias_T.detach(),
    )


def shape_logits_(
    logits_BV: torch.Tensor,
    *,
    temperature_rule: Callable[[torch.Tensor], torch.Tensor] | None = None,
    bias_ids: torch.Tensor | Sequence[int] | None = None,
    bias_B: torch.Tensor | None = None,
    base: float | torch.Tensor = 1.0,
    backend: str = "auto",
) -> torch.Tensor:
    """Turn raw logits into the logits to sample from, in place, and return them.

    ``z_bv <- (z_bv + bias_b * 1[v in bias_ids]) / base``

    Shapes: logits_BV (B, V) floating point; bias_ids (K) distinct ids; bias_B (B) in nats; base a number or (B), above 0.
    Raises ValueError or TypeError naming the argument; NotAvailable for a temperature_rule (entropy-dependent temperature
    is not built yet) or for a backend that is not built.
    """
    check_matrix("logits_BV", logits_BV)
    if temperature_rule is not None:
        raise NotAvailable("temperature_rule is not available yet; pass None and set the temperature with base")
    rows, vocabulary = logits_BV.shape
    base_B = base if isinstance(base, torch.Tensor) else torch.full((rows,), base, dtype=torch.float64, device=logits_BV.device)
    ids = ids_tensor(bias_ids, device=logits_BV.device)
    if not isinstance(base, torch.Tensor) and not base > 0:
        raise ValueError(f"base must be above 0, got {base}")
    check_shaping(base_B, ids, bias_B, rows=rows, vocabulary=vocabulary, like=logits_BV, names=("base", "bias_B"))
    return pick(_SHAPE_LOGITS, backend, auto="reference")(logits_BV, LogitShaping(base_B, ids, bias_B))


def _shape_reference(logits_BV: torch.Tensor, shaping: LogitShaping) -> torch.Tensor:
    return shaping.apply_(logits_BV)


_SHAPE_LOGITS: dict[str, Callable[[torch.Tensor, LogitShaping], torch.Tensor]] = {"reference": _shape_reference}
