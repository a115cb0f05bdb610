"""Whose rewards are compared."""

from __future__ import annotations

import pytest

from rl.comparison import advantage_groups
from tests.builders import NO_THINK, make_budget, make_effort

LOW, HIGH = make_effort(0.5), make_effort(2.0)


def test_members_of_one_prompt_are_compared_whatever_their_budget_in_tokens() -> None:
    budgets = [make_budget(32), make_budget(64), make_budget(), NO_THINK, make_budget(32), make_budget(32)]
    assert advantage_groups([3, 3, 3, 3, 7, 7], budgets) == [0, 0, 0, 0, 1, 1]


def test_members_of_different_efforts_are_not_compared() -> None:
    assert advantage_groups([0, 0, 0, 0, 1, 1], [LOW, LOW, HIGH, HIGH, HIGH, LOW]) == [0, 0, 1, 1, 2, 3]
    assert advantage_groups([0, 1, 0], [LOW, LOW, LOW]) == [0, 1, 0]


def test_a_budget_per_rollout_is_needed() -> None:
    with pytest.raises(ValueError, match="shorter"):
        advantage_groups([0, 0], [LOW])
