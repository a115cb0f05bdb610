"""What an update is told beside its batch, the scores it compares with, and what it counts per rollout."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from rl.batch import MicroBatch
from rl.behaviour import Behaviour
from rl.correction import Correction, ImportanceWeight
from rl.policy import PLAIN, Scores
from rl.types import TrainBatch


@dataclass(frozen=True)
class Task:
    """What an update is to optimise, beside its batch."""

    objective: Literal["policy", "likelihood"] = "policy"
    """Clipped surrogate, or supervised."""
    correction: Correction = Correction()
    behaviour: Behaviour = PLAIN
    """How the tokens were drawn."""
    entropies: bool = False
    """Return the entropies of the sampled tokens: the statistics of the next step's temperature."""


POLICY = Task()
"""The plain policy update: nothing shaped, nothing corrected."""


@dataclass(frozen=True)
class OldScores:
    """Scores at the sampling weights, detached; float32 (T) over a batch or (R) over a micro-batch."""

    raw: torch.Tensor
    shaped: torch.Tensor
    temperature: torch.Tensor | None

    @classmethod
    def of(cls, scores: Scores) -> OldScores:
        """Of one forward pass."""
        return cls(scores.raw.detach(), scores.shaped.detach(), scores.temperature)

    @classmethod
    def gathered(cls, found: list[tuple[torch.Tensor, OldScores]], tokens: int, device: torch.device) -> OldScores:
        """Of micro-batches, each with the places of its tokens in the batch; 0, temperature 1, elsewhere."""
        raw, shaped = torch.zeros(tokens, device=device), torch.zeros(tokens, device=device)
        heated = any(part.temperature is not None for _, part in found)
        temperature = torch.ones(tokens, device=device) if heated else None
        for place_T, part in found:
            raw[place_T], shaped[place_T] = part.raw, part.shaped
            if temperature is not None and part.temperature is not None:
                temperature[place_T] = part.temperature
        return cls(raw, shaped, temperature)

    def at(self, place_T: torch.Tensor) -> OldScores:
        """The scores at some places."""
        temperature = None if self.temperature is None else self.temperature[place_T]
        return OldScores(self.raw[place_T], self.shaped[place_T], temperature)


def select_old(batch: TrainBatch, index: list[int], old: OldScores) -> OldScores:
    """The old scores of the given rollouts, laid out like `rl.batch.select_rollouts` of them."""
    positions = [torch.arange(int(batch.start_N[i]), int(batch.start_N[i + 1])) for i in index]
    position_T = torch.cat(positions) if positions else torch.zeros(0, dtype=torch.int64)
    return old.at(position_T.to(old.raw.device))


def rollout_rows(micro: MicroBatch, clipped_T: torch.Tensor, weight: ImportanceWeight | None) -> torch.Tensor:
    """Per rollout of a micro-batch: index, loss tokens, tokens with an active clip, tokens at the cap, 1 if rejected; float32."""
    rows = micro.index_B.numel()

    def count(marked_T: torch.Tensor) -> torch.Tensor:
        marked = (marked_T & micro.mask_T).float()
        return torch.zeros(rows, device=marked.device).index_add(0, micro.row_T, marked)

    none_B = torch.zeros(rows, device=micro.row_T.device)
    capped_B, rejected_B = (none_B, none_B) if weight is None else (count(weight.capped_T), weight.rejected_B.float())
    columns = (micro.index_B.float(), count(micro.mask_T), count(clipped_T), capped_B, rejected_B)
    return torch.stack(columns, dim=1)[micro.index_B >= 0].cpu()
