"""Configurations in checkpoints of earlier versions, in today's words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_HBPO = {"form": "piecewise", "beta": 4.0, "alpha": None}
"""What earlier versions wrote down for every method, as the defaults of HBPO."""


def upgraded(config: Mapping[str, Any]) -> dict[str, Any]:
    """The same settings as today's configuration would hold them.

    Before there were many methods, `reward` held HBPO's constants whatever the method, and `bad_format`, the reward of a
    MALFORMED answer; that is now the policy `penalise` of malformed answers with `reward.penalty`.
    """
    reward = config.get("reward")
    if not isinstance(reward, Mapping) or "bad_format" not in reward:
        return dict(config)
    kept = {name: value for name, value in reward.items() if name != "bad_format"}
    for name, default in _HBPO.items():
        if kept.get("method") != "hbpo" or kept.get(name) == default:
            kept.pop(name, None)
    if reward["bad_format"] != 0:
        kept |= {"policies": {"malformed": "penalise"}, "penalty": reward["bad_format"]}
    return {**config, "reward": kept}
