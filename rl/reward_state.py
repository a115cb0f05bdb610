"""What rewards remember from step to step: lengths per prompt, the start policy, controllers; part of every checkpoint."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from reward.controllers import adlp_update, ema
from rl.memory import PromptMemory
from rl.reward_settings import RewardSettings
from rl.types import Group, Scored


@dataclass(frozen=True)
class Reference:
    """The start policy on one prompt, without a budget."""

    length: float
    """Mean response length in tokens."""
    accuracy: float
    """Share of CORRECT answers."""


@dataclass
class RewardState:
    """Everything that a step's rewards depend on beside its own answers."""

    memory: PromptMemory = field(default_factory=PromptMemory)
    """Lengths of correct answers (history_min)."""
    averages: dict[str, float] = field(default_factory=dict)
    """Prompt id -> running mean length in tokens (aec with average=ema)."""
    reference: dict[str, Reference] = field(default_factory=dict)
    """Prompt id -> the start policy (o1_pruner, adaptthink, aec with average=frozen)."""
    length_weight: float | None = None
    """Weight of a token (adlp); None before the first step."""
    targets: tuple[int, int, int] | None = None
    """Target lengths in tokens for groups of low, medium and high pass rate (laser_d, laser_de); None before the monitor ran."""

    def observe(self, groups: Sequence[Group], settings: RewardSettings) -> None:
        """Take in a finished step, once; what its policies left out leaves no trace."""
        if settings.method == "history_min":
            self.memory.observe(groups)
        if settings.method == "aec" and settings.option("average") == "ema":
            self._average(groups, settings.option("decay"))
        if settings.method == "adlp":
            scored = [m for group in groups for m in group.members if m.reward is not None]
            if scored:
                accuracy = sum(m.verdict.is_correct for m in scored) / len(scored)
                weight = self.weight_of_a_token(settings)
                self.length_weight = adlp_update(
                    weight, accuracy, rate=settings.option("rate"), target=settings.option("accuracy")
                )

    def weight_of_a_token(self, settings: RewardSettings) -> float:
        """adlp: the weight at the next step."""
        return float(settings.option("start")) if self.length_weight is None else self.length_weight

    def refer(self, groups: Iterable[Group]) -> None:
        """Take in answers of the start policy."""
        for group in groups:
            scored = [m for m in group.members if m.verdict.is_scored]
            if scored:
                self.reference[group.prompt.id] = Reference(
                    mean_length(scored), sum(m.verdict.is_correct for m in scored) / len(scored)
                )

    def refer_to_mean(self, prompts: Iterable[str]) -> None:
        """Let the start policy count as its mean over all measured prompts on these; ValueError where none was measured."""
        known = list(self.reference.values())
        if not known:
            raise ValueError("the start policy was measured on no prompt at all")
        mean = Reference(sum(r.length for r in known) / len(known), sum(r.accuracy for r in known) / len(known))
        self.reference |= dict.fromkeys(prompts, mean)

    def figures(self, settings: RewardSettings) -> dict[str, float]:
        """What to report of it with every step."""
        found: dict[str, float] = {}
        if settings.method == "adlp":
            found["reward/length_weight"] = self.weight_of_a_token(settings)
        if self.targets is not None:
            found |= {f"reward/target_{band}": float(n) for band, n in zip(("low", "medium", "high"), self.targets, strict=True)}
        return found

    def _average(self, groups: Sequence[Group], decay: float) -> None:
        for group in groups:
            scored = [m for m in group.members if m.reward is not None]
            if scored:
                seen, now = self.averages.get(group.prompt.id), mean_length(scored)
                self.averages[group.prompt.id] = now if seen is None else ema(seen, now, decay=decay)

    def to_json(self) -> dict[str, Any]:
        """Plain values for the checkpoint's state.json."""
        return {
            "memory": self.memory.to_json(),
            "averages": dict(sorted(self.averages.items())),
            "reference": {prompt: list(asdict(found).values()) for prompt, found in sorted(self.reference.items())},
            "length_weight": self.length_weight,
            "targets": None if self.targets is None else list(self.targets),
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> RewardState:
        """The inverse of :meth:`to_json`; what an older checkpoint did not know is empty. Raises ValueError or TypeError."""
        targets = content.get("targets")
        if targets is not None and (len(targets) != 3 or not all(type(n) is int and n > 0 for n in targets)):
            raise ValueError(f"the reward targets are {targets!r}, not three lengths")
        weight = content.get("length_weight")
        return cls(
            memory=PromptMemory.from_json(content.get("memory", {})),
            averages={str(prompt): float(n) for prompt, n in content.get("averages", {}).items()},
            reference={str(prompt): Reference(*map(float, found)) for prompt, found in content.get("reference", {}).items()},
            length_weight=None if weight is None else float(weight),
            targets=None if targets is None else (targets[0], targets[1], targets[2]),
        )


def mean_length(members: Sequence[Scored]) -> float:
    """Mean response length in tokens, prefill and end of sequence included; members: at least one."""
    return sum(m.rollout.length for m in members) / len(members)
