"""What the sampling of the next step depends on beside weights and prompts; part of every checkpoint."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch

from rl.heterogeneous import entropy_statistics
from rl.manifest import CheckpointError
from rl.memory import PromptMemory
from rl.reward_state import RewardState
from rl.rollout_settings import ReflexSettings, RolloutSettings
from rl.types import AdaptiveTemperature, EntropyStatistics, Reflex, Shaping

log = logging.getLogger("budget_rl")

T = TypeVar("T")
STATE_NAME = "state.json"
"""File of a checkpoint: the held-out figures for an export's card, and what the next step's sampling depends on."""


@dataclass
class SamplingState:
    """Entropy statistics of the step before (HAPO) and lengths of correct answers per prompt."""

    statistics: EntropyStatistics | None = None
    """None before the first step, which is therefore sampled at the base temperature."""
    memory: PromptMemory = field(default_factory=PromptMemory)

    def shaping(self, settings: RolloutSettings) -> Shaping:
        """How the next step's tokens are drawn."""
        adaptive = None
        if settings.adaptive is not None and self.statistics is not None:
            adaptive = AdaptiveTemperature(self.statistics, settings.adaptive.form, settings.adaptive.tau)
        return Shaping(settings.temperature, adaptive, reflex_of(settings.reflex))

    def learn(self, settings: RolloutSettings, entropies: Sequence[torch.Tensor]) -> dict[str, float]:
        """Take in the entropies of a step's sampled tokens, one float32 vector per rank; returns what to report of them."""
        if settings.adaptive is None or not sum(part.numel() for part in entropies):
            return {}
        entropy_T = torch.cat(list(entropies))
        if not bool(torch.isfinite(entropy_T).all()):
            log.warning("the policy's entropies are not all finite; the next step keeps the statistics it had")
            return {}
        self.statistics = entropy_statistics(entropy_T, rho=settings.adaptive.rho)
        found = self.statistics
        return {
            "entropy/pivot": found.pivot,
            "entropy/spread": found.spread,
            "entropy/high": found.high,
            "entropy/low": found.low,
            "entropy/deviation": found.deviation,
        }

    def to_json(self) -> dict[str, Any]:
        """Plain values for the checkpoint's state.json."""
        return {
            "entropy_statistics": None if self.statistics is None else asdict(self.statistics),
            "prompt_memory": self.memory.to_json(),
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> SamplingState:
        """The inverse of :meth:`to_json`; what an older checkpoint did not know is empty."""
        statistics = content.get("entropy_statistics")
        return cls(
            None if statistics is None else EntropyStatistics(**statistics),
            PromptMemory.from_json(content.get("prompt_memory", {})),
        )


def reflex_of(settings: ReflexSettings | None) -> Reflex | None:
    """The schedule of the settings, without its words: these belong to the engine."""
    if settings is None:
        return None
    return Reflex(**{name: getattr(settings, name) for name in Reflex.__dataclass_fields__})


def evaluation_shaping(settings: RolloutSettings, state: SamplingState, *, temperature: float, shaped: bool) -> Shaping:
    """How evaluations draw: at their own base temperature, and plainly unless ``shaped``."""
    chosen = state.shaping(settings) if shaped else Shaping()
    return Shaping(temperature, chosen.adaptive, chosen.reflex)


def read_sampling(checkpoint: Path) -> SamplingState:
    """What the sampling after a (verified) checkpoint depends on, nothing where it says nothing.

    Raises CheckpointError when its file cannot be read.
    """
    return read_state(checkpoint, "sampling", SamplingState.from_json)


def read_rewards(checkpoint: Path) -> RewardState:
    """What the rewards after a (verified) checkpoint depend on; as :func:`read_sampling`."""
    return read_state(checkpoint, "rewards", RewardState.from_json)


def read_state(checkpoint: Path, section: str, decode: Callable[[Mapping[str, Any]], T]) -> T:
    """One section of a checkpoint's state.json, empty where an older checkpoint has none.

    Raises CheckpointError when the file cannot be read.
    """
    path = checkpoint / STATE_NAME
    try:
        content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        return decode(content.get(section, {}))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}", fix="use another checkpoint") from error
