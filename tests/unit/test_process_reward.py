"""Advantages from rewards of single tokens, by hand."""

from __future__ import annotations

import pytest
import torch

from rl.process_reward import reward_to_go

GROUP = torch.tensor([5, 5, 9])


def test_each_token_gains_the_normalised_rewards_from_it_on() -> None:
    # The group's token rewards are 0, 1, 2: mean 1, sample std 1.
    first, second, third = reward_to_go([(None, 0.0, None, 1.0), (2.0, None), None], GROUP, std_floor=0.0)
    assert first is not None and second is not None
    assert first.tolist() == [-1.0, -1.0, 0.0, 0.0]
    assert second.tolist() == [1.0, 0.0]
    assert third is None and first.dtype == torch.float32


def test_equal_or_single_rewards_say_nothing() -> None:
    equal = reward_to_go([(1.0, 1.0), (1.0,), (7.0, None)], GROUP)
    assert [None if part is None else part.tolist() for part in equal] == [[0.0, 0.0], [0.0], [0.0, 0.0]]
    assert reward_to_go([(None, None), None, None], GROUP) == [None, None, None]


def test_lengths_that_differ_are_refused() -> None:
    with pytest.raises(ValueError, match="2 rollouts have token rewards, but there are 3 group ids"):
        reward_to_go([None, None], GROUP)
