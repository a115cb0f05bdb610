"""From raw logits to the logits that were sampled from: ``(z + bias * 1[v in bias_ids]) / temperature``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from kernels.backends import pick
from kernels.checks import check_matrix, check_shaping

LOG_ZERO = -1e4
"""Stands for ln 0: exp(-1e4) is 0 in float32 and float64, and unlike -inf it gives 0 when multiplied by 0."""

BLOCK_BYTES = 2**20
"""Logits that `eager` shapes at a time."""


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

    def apply_(self, logits_TV: torch.Tensor, block: slice | None = None) -> torch.Tensor:
        """Shape the logits (or the columns ``block`` of them) in place and return them."""
        if self.bias_ids is not None and self.bias_T is not None:
            ids = self.bias_ids
            if block is not None:
                ids = ids[(ids >= block.start) & (ids < block.stop)] - block.start
            logits_TV.index_add_(1, ids, self.bias_T.to(logits_TV.dtype)[:, None].expand(-1, ids.numel()))
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


@dataclass(frozen=True)
class TemperatureRule:
    """A temperature that depends on the entropy of the row, as plain numbers, so that one kernel can apply it.

    ``T = base (1 + tau clamp(slope (ln max(H, floor) - pivot), low, high))``, with ``above`` as slope where ln H is above the
    pivot and ``below`` elsewhere. HAPO's rule (arXiv 2509.16591, part A) is of this form, whichever sign and clamp are chosen.
    Every field is a number, or a float32 tensor (B) with one for each row: tau 0 leaves a row's temperature alone.
    """

    pivot: float | torch.Tensor
    above: float | torch.Tensor
    below: float | torch.Tensor
    tau: float | torch.Tensor
    low: float | torch.Tensor = -1.0
    high: float | torch.Tensor = 1.0
    floor: float | torch.Tensor = 1e-6

    def __call__(self, entropy_B: torch.Tensor) -> torch.Tensor:
        """The factor on the base temperature, (B)."""
        distance_B = torch.clamp(entropy_B, min=self.floor).log() - self.pivot
        slope_B = torch.where(distance_B > 0, self.above, self.below).to(distance_B.dtype)
        # Not clamp: its bounds must be both numbers or both tensors.
        scaled_B = torch.maximum(
            torch.minimum(slope_B * distance_B, self._like(self.high, distance_B)), self._like(self.low, distance_B)
        )
        return 1.0 + self.tau * scaled_B

    @staticmethod
    def _like(value: float | torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        return torch.as_tensor(value, dtype=like.dtype, device=like.device)

    def columns(self, rows: int, device: torch.device) -> torch.Tensor:
        """The fields in order as one float32 matrix (rows, 7)."""
        fields = (self.pivot, self.above, self.below, self.tau, self.low, self.high, self.floor)
        vectors = [torch.as_tensor(value, dtype=torch.float32, device=device).expand(rows) for value in fields]
        return torch.stack(vectors, dim=1)

    def rows(self, part: slice) -> TemperatureRule:
        """The rule of a slice of the rows."""
        return TemperatureRule(
            *(value[part] if isinstance(value, torch.Tensor) and value.ndim else value for value in vars(self).values())
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

    ``z_bv <- (z_bv + bias_b * 1[v in bias_ids]) / (base_b * rule(H_b))``, H_b the entropy (nats) of softmax of the raw row

    Shapes: logits_BV (B, V) floating point, -inf allowed; bias_ids (K) distinct ids; bias_B (B) in nats; base a number or (B),
    above 0; temperature_rule a function from entropies (B) to factors (B) above 0, None for 1; the ``triton`` backend wants a
    :class:`TemperatureRule`. Raises ValueError or TypeError naming the argument, NotAvailable for a backend that is not built.
    """
    check_matrix("logits_BV", logits_BV)
    rows, vocabulary = logits_BV.shape
    if not isinstance(base, torch.Tensor) and not base > 0:
        raise ValueError(f"base must be above 0, got {base}")
    base_B = base if isinstance(base, torch.Tensor) else torch.full((rows,), base, dtype=torch.float32, device=logits_BV.device)
    ids = ids_tensor(bias_ids, device=logits_BV.device)
    check_shaping(base_B, ids, bias_B, rows=rows, vocabulary=vocabulary, like=logits_BV, names=("base", "bias_B"))
    kernel = pick(_SHAPE_LOGITS, backend, logits_BV, ("triton_shape", "shape_logits_"))
    return kernel(logits_BV, LogitShaping(base_B, ids, bias_B), temperature_rule)


def _shape_reference(
    logits_BV: torch.Tensor, shaping: LogitShaping, rule: Callable[[torch.Tensor], torch.Tensor] | None
) -> torch.Tensor:
    temperature_B = shaping.temperature_T
    assert temperature_B is not None
    if rule is not None:
        logp_BV = torch.log_softmax(logits_BV if logits_BV.dtype == torch.float64 else logits_BV.float(), dim=-1)
        entropy_B = -(logp_BV.exp() * logp_BV.clamp(min=LOG_ZERO)).sum(dim=-1)
        temperature_B = temperature_B * rule(entropy_B)
    return LogitShaping(temperature_B, shaping.bias_ids, shaping.bias_T).apply_(logits_BV)


def _shape_eager(
    logits_BV: torch.Tensor, shaping: LogitShaping, rule: Callable[[torch.Tensor], torch.Tensor] | None
) -> torch.Tensor:
    """Blocks of rows that stay in the cache between the entropy and the writing, without a second copy of the logits."""
    if rule is not None and not isinstance(rule, TemperatureRule):
        return _shape_reference(logits_BV, shaping, rule)  # a function may hold values per row, so it wants all rows at once
    rows, vocabulary = logits_BV.shape
    step = max(1, BLOCK_BYTES // max(4 * vocabulary, 1))
    for start in range(0, rows, step):
        part = slice(start, start + step)
        block_BV, here = logits_BV[part], shaping.rows(part)
        temperature_B = here.temperature_T
        assert temperature_B is not None
        if rule is not None:
            temperature_B = temperature_B * rule.rows(part)(_entropy(block_BV))
        LogitShaping(temperature_B, here.bias_ids, here.bias_T).apply_(block_BV)
    return logits_BV


def _entropy(logits_BV: torch.Tensor) -> torch.Tensor:
    """``ln sum e^d - (sum d e^d) / (sum e^d)`` with d the distance to the row's largest logit; float32 (B), nats."""
    work_BV = logits_BV if logits_BV.dtype == torch.float64 else logits_BV.float()
    distance_BV = (work_BV - work_BV.amax(dim=-1, keepdim=True)).clamp_(min=LOG_ZERO)
    weight_BV = distance_BV.exp()
    total_B = weight_BV.sum(dim=-1)
    return total_B.log() - torch.linalg.vecdot(weight_BV, distance_BV) / total_B


_SHAPE_LOGITS: dict[str, Callable[..., torch.Tensor]] = {"reference": _shape_reference, "eager": _shape_eager}
