"""Options of the verl plug-in: read from verl's own configuration, checked by the sections that a budget-rl run uses."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from typing import Any, TypeVar

from omegaconf import DictConfig, OmegaConf
from pydantic import BaseModel, ValidationError

from rl.errors import ConfigError
from rl.objective_settings import AdvantageSettings, HeterogeneousSettings

ADVANTAGE_KEY = "algorithm.budget_rl"
HETEROGENEOUS_KEY = "actor_rollout_ref.actor.policy_loss.heterogeneous"
REWARD_KEY = "reward.reward_kwargs"

HIERARCHICAL, TOKEN_AVERAGE = "budget_rl_hierarchical", "budget_rl_token_average"
"""`algorithm.adv_estimator`: HBPO's, and HAPO's part B."""
LOSS = "budget_rl_hapo"
"""`actor_rollout_ref.actor.policy_loss.loss_mode`."""
REWARD_MANAGER = "budget_rl"
"""`reward.reward_manager.name`."""

ESTIMATORS: Mapping[str, str] = {HIERARCHICAL: "hierarchical", TOKEN_AVERAGE: "token_level_average"}
"""Registered name -> name in rl.advantage.ADVANTAGES."""
_READS = {HIERARCHICAL: ("intra_coef", "intra_scale", "centre", "std_floor"), TOKEN_AVERAGE: ("guard", "centre")}
_HETEROGENEOUS = ("clip", "clip_kappa", "redistribute", "redistribute_kappa", "zone", "literal", "rho")
S = TypeVar("S", bound=BaseModel)


def advantage_settings(algorithm: Any, estimator: str) -> AdvantageSettings:
    """The options under `algorithm.budget_rl` for a registered estimator; defaults are the paper's form. Raises ConfigError."""
    options = plain(algorithm.get("budget_rl") if algorithm is not None else None, ADVANTAGE_KEY)
    check_names(options, _READS[estimator], ADVANTAGE_KEY, f"{estimator} reads")
    return validated(AdvantageSettings, options | {"estimator": ESTIMATORS[estimator]}, ADVANTAGE_KEY)


def heterogeneous_settings(policy_loss: Any) -> HeterogeneousSettings:
    """The options under `actor.policy_loss.heterogeneous`; defaults are those of `loss.heterogeneous`. Raises ConfigError."""
    options = plain(policy_loss.get("heterogeneous"), HETEROGENEOUS_KEY)
    # Entropy and scope are not offered: the trainer measures the sampling weights, once for the whole batch.
    check_names(options, _HETEROGENEOUS, HETEROGENEOUS_KEY, f"{LOSS} reads")
    return validated(HeterogeneousSettings, options, HETEROGENEOUS_KEY)


def plain(options: Any, key: str) -> dict[str, Any]:
    """A section of verl's configuration as a dict; empty where it is absent. Raises ConfigError for anything but a section."""
    found = OmegaConf.to_container(options, resolve=True) if isinstance(options, DictConfig) else options
    if found is None:
        return {}
    if not isinstance(found, Mapping):
        raise ConfigError(f"{key} is {found!r}, which is no section", fix=f"set single keys: +{key}.NAME=VALUE")
    return {str(name): value for name, value in found.items()}


def check_names(options: Mapping[str, Any], known: Collection[str], key: str, who: str) -> None:
    """Raise ConfigError for a name that is not known, with the nearest one."""
    for name in options:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise ConfigError(f"unknown option {key}.{name}{hint}", fix=f"{who} {', '.join(known)}")


def validated(section: type[S], options: Mapping[str, Any], key: str) -> S:
    """The options as a checked section. Raises ConfigError naming each that cannot be used."""
    try:
        return section.model_validate(dict(options))
    except ValidationError as error:
        found = (
            f"{'.'.join((key, *map(str, problem['loc'])))}: {problem['msg'].removeprefix('Value error, ')}"
            for problem in error.errors(include_url=False)
        )
        raise ConfigError("\n".join(found), fix="docs/verl-plugin.md lists the options") from error
