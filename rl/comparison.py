"""Whom a rollout's reward is compared with."""

from __future__ import annotations

from collections.abc import Sequence

from rl.types import Budget


def advantage_groups(groups: Sequence[int], budgets: Sequence[Budget]) -> list[int]:
    """One id per rollout, equal for those whose rewards are compared: siblings, and of these only such as share an effort.

    groups: each rollout's prompt group. What is rewarded under one effort is not under another, so that a mean over both would
    compare requests instead of answers (AEC, arXiv 2510.27042); budgets in tokens do not divide a group. Ids count from 0 in the
    order of first appearance. Raises ValueError when the lengths differ.
    """
    ids: dict[tuple[int, float | None], int] = {}
    keys = [(group, budget.effort) for group, budget in zip(groups, budgets, strict=True)]
    return [ids.setdefault(key, len(ids)) for key in keys]
