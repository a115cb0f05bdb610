"""What an update is told beside its batch, the scores it compares with, and what it counts per rollout."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from rl.batch import MicroBatch
from rl.behaviour import Behaviour
from rl.correction import Correction, ImportanceWeight
from rl.guidance import TeacherMode
from rl.policy import PLAIN, Scores
from rl.types import TrainBatch


@dataclass(frozen=True)
class Distillation:
    """AlignDistil's term (arXiv 2503.02832): reverse KL to the composed teacher, ``beta_t = beta0 / alpha_t`` inside the sum."""

    mode: TeacherMode
    r: float = 30.0
    eps: float = 1e-3
    beta0: float = 0.1
    beta_max: float | None = None
    """Cap on beta_t; None: none."""
    weight: float = 1.0
    """Of the term, beside the policy's."""
    length_norm: bool = True
    """Whether each rollout's sum is divided by its number of selected tokens."""
    rollouts: tuple[int, ...] = ()
    """Of each mini-batch, over all ranks: those with a token to distil; the loss is a mean over them."""
    vocabulary: int = 0
    """Ids of the tokenizer; heads are cut to so many rows before any softmax."""
    entropy_share: float | None = None
    """Only the share of tokens that the sampling policy was least sure of; None: all."""
    sstoken: tuple[float, float] | None = None
    """(gamma, share kept) of ssToken's selection, from `Guidance.reference_T`; None: off."""

    @property
    def selects_by_policy(self) -> bool:
        """Whether the policy's scores at the sampling weights decide which tokens are distilled."""
        return self.entropy_share is not None or self.sstoken is not None


@dataclass(frozen=True)
class Preference:
    """The loss on pairs; see `rl.preference.preference_loss`."""

    form: Literal["dpo", "simpo"] = "dpo"
    beta: float = 0.1
    margin: float = 0.0
    treg_alpha: float = 0.0


@dataclass(frozen=True)
class Task:
    """What an update is to optimise, beside its batch."""

    objective: Literal["policy", "likelihood", "preference", "distillation"] = "policy"
    """Clipped surrogate (with a distillation beside it where one is set), supervised, pairs, or distillation alone."""
    correction: Correction = Correction()
    behaviour: Behaviour = PLAIN
    """How the tokens were drawn."""
    entropies: bool = False
    """Return the entropies of the sampled tokens: the statistics of the next step's temperature."""
    distillation: Distillation | None = None
    preference: Preference = Preference()


POLICY = Task()
"""The plain policy update: nothing shaped, nothing corrected."""


@dataclass(frozen=True)
class OldScores:
    """Scores at the sampling weights, detached; float32 (T) over a batch or (R) over a micro-batch."""

    raw: torch.Tensor
    shaped: torch.Tensor
    temperature: torch.Tensor | None
    entropy: torch.Tensor
    """Nats, at temperature 1, unshaped."""
    attention: torch.Tensor | None = None
    """Attention mass on the prompt at the last layer, where it was measured."""

    @classmethod
    def of(cls, scores: Scores) -> OldScores:
        """Of one forward pass."""
        return cls(scores.raw.detach(), scores.shaped.detach(), scores.temperature, scores.entropy.detach())

    @classmethod
    def gathered(cls, found: list[tuple[torch.Tensor, OldScores]], tokens: int, device: torch.device) -> OldScores:
        """Of micro-batches, each with the places of its tokens in the batch; 0, temperature 1, elsewhere."""
        raw, shaped, entropy = (torch.zeros(tokens, device=device) for _ in range(3))
        heated = any(part.temperature is not None for _, part in found)
        temperature = torch.ones(tokens, device=device) if heated else None
        for place_T, part in found:
            raw[place_T], shaped[place_T], entropy[place_T] = part.raw, part.shaped, part.entropy
            if temperature is not None and part.temperature is not None:
                temperature[place_T] = part.temperature
        masses = [(place_T, part.attention) for place_T, part in found if part.attention is not None]
        attention = torch.zeros(tokens, device=device) if masses else None
        for place_T, mass_T in masses:
            attention[place_T] = mass_T  # pyright: ignore[reportOptionalSubscript]
        return cls(raw, shaped, temperature, entropy, attention)

    def at(self, place_T: torch.Tensor) -> OldScores:
        """The scores at some places."""
        temperature = None if self.temperature is None else self.temperature[place_T]
        return OldScores(self.raw[place_T], self.shaped[place_T], temperature, self.entropy[place_T])


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
