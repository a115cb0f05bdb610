"""Options of the reward manager, and the reward of a single answer by them."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from pydantic import Field

from reward.answers import Answers
from reward.budget import overlong
from reward.methods import METHODS
from reward.options import check_options
from rl.errors import ConfigError
from rl.reward_settings import BUDGETED, OPTIONS, RewardSettings
from rl.sections import Positive, Section
from rl.verl_options import REWARD_KEY, REWARD_MANAGER, check_names, plain, validated

BY_VERL = "compute_score"
ALONE = ("correct", "classic", "cosine", "hbpo", "dapo", "lcpo_exact", "lcpo_max", "laser", "triangle", "budgetthinker")
"""Methods that need no other answer, no history and no start policy: verl rewards an answer before its group is complete."""
_CONSTANTS = tuple(sorted({name for method in ALONE for name in OPTIONS[method]}))
_SHARED = ("method", *_CONSTANTS, "overlong_buffer", "correct_from", "grade_deadline_s", "processes")
"""What is passed on to RewardSettings; its own text says what each means."""


class ManagerSettings(Section):
    """`reward.reward_kwargs` of the reward manager `budget_rl`, beside the constants of its method."""

    reward: RewardSettings
    max_length: Positive
    """L_max in tokens; unless set, verl's `data.max_response_length`."""
    grader: Literal["math", "numeric", "choice", "exact", "format", "compute_score"] = "math"
    """Who says what is correct: one of our graders, or `compute_score`: verl's function for the data source, or your own."""
    grader_options: dict[str, Any] = Field(default_factory=dict)
    """As data.grader_options."""
    extract: Literal["after_think", "boxed", "last_line", "whole"] = "after_think"
    """Where the answer stands, for our graders; as data.extract."""
    budget: str = "budget"
    """Name of the budget in `extra_info`, or of a column of the data set."""
    group: str = "group"
    """Name in `extra_info` of what answers to compare have in common; without it they are those of one row."""

    @property
    def options_json(self) -> str:
        return json.dumps(self.grader_options)

    @property
    def needs_budget(self) -> bool:
        """Whether every answer must have a budget."""
        return self.reward.method in BUDGETED


def manager_settings(config: Any) -> ManagerSettings:
    """The options of a verl configuration. Raises ConfigError for those that cannot be used."""
    options = plain(config.reward.get("reward_kwargs"), REWARD_KEY)
    own = [name for name in ManagerSettings.model_fields if name != "reward"]
    check_names(options, (*_SHARED, *own), REWARD_KEY, f"the reward manager {REWARD_MANAGER} reads")
    method = options.get("method")
    if method not in ALONE:
        what = "reads one answer at a time" if method in OPTIONS else "does not know"
        raise ConfigError(
            f"{REWARD_KEY}.method={method!r}: the reward manager {REWARD_MANAGER} {what}"
            + (", and this method compares answers or remembers earlier ones" if method in OPTIONS else ""),
            fix=f"set +{REWARD_KEY}.method to one of {', '.join(ALONE)}, or train with budget-rl train, which has them all",
        )
    reward = validated(RewardSettings, {name: options[name] for name in _SHARED if name in options}, REWARD_KEY)
    chosen = {name: options[name] for name in own if name in options}
    chosen.setdefault("max_length", config.actor_rollout_ref.rollout.response_length)
    settings = validated(ManagerSettings, chosen | {"reward": reward}, REWARD_KEY)
    _check_grader(settings, config)
    return settings


def _check_grader(settings: ManagerSettings, config: Any) -> None:
    custom = config.reward.get("custom_reward_function") or {}
    if custom.get("path") and settings.grader != BY_VERL:
        raise ConfigError(
            f"reward.custom_reward_function is set, but {REWARD_KEY}.grader={settings.grader} decides what is correct",
            fix=f"set +{REWARD_KEY}.grader={BY_VERL}, or leave the function out",
        )
    if settings.grader == BY_VERL and settings.grader_options:
        raise ConfigError(f"{REWARD_KEY}.grader={BY_VERL} reads no grader_options", fix="leave them out")
    if settings.grader != BY_VERL:
        try:
            check_options(settings.grader, settings.grader_options)
        except ValueError as error:
            raise ConfigError(str(error).replace("data.", f"{REWARD_KEY}."), fix="docs/graders.md lists them") from error


def reward_parts(settings: ManagerSettings, *, correct: bool, malformed: bool, length: int, budget: float) -> dict[str, float]:
    """The named parts of an answer's reward, whose sum it is: the method's, and ``overlong`` where there is a buffer.

    length and budget in tokens, budget inf without one. Raises ConfigError where the method needs a budget.
    """
    reward = settings.reward
    if settings.needs_budget and math.isinf(budget):
        raise ConfigError(
            f"{REWARD_KEY}.method={reward.method} needs a budget for every answer, and this row has none",
            fix=f"add a number of tokens to the data set as extra_info.{settings.budget}",
        )
    answer = _OneAnswer([], torch.zeros(1, dtype=torch.int64), settings.max_length, said=(correct, malformed, length, budget))
    parts = {name: float(part_N) for name, part_N in METHODS[reward.method](answer, reward).items()}
    if reward.overlong_buffer or reward.method == "dapo":
        length_N = torch.tensor([float(length)], dtype=torch.float64)
        parts["overlong"] = float(overlong(length_N, max_length=settings.max_length, buffer=reward.overlong_buffer))
    return parts


@dataclass(frozen=True)
class _OneAnswer(Answers):
    """The columns of a single answer, for methods that read no others."""

    said: tuple[bool, bool, int, float] = (False, False, 0, math.inf)
    """Whether it is correct, whether malformed, its length, its budget."""

    @cached_property
    def correct_N(self) -> torch.Tensor:
        return torch.tensor([self.said[0]])

    @cached_property
    def malformed_N(self) -> torch.Tensor:
        return torch.tensor([self.said[1]])

    @cached_property
    def length_N(self) -> torch.Tensor:
        return torch.tensor([self.said[2]], dtype=torch.float64)

    @cached_property
    def budget_N(self) -> torch.Tensor:
        return torch.tensor([self.said[3]], dtype=torch.float64)


