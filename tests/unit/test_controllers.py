"""What moves with training: running means, targets by difficulty, the weight of a token, caps in stages."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from reward.controllers import adlp_update, ema, laser_targets


def test_a_running_mean_has_its_worked_value() -> None:
    assert ema(1500, 1125) == pytest.approx(1462.5)
    assert ema(1500, 1125, decay=0.0) == 1125


def _targets(low: list[int], medium: list[int], high: list[int], **options: Any) -> tuple[int, int, int]:
    band = torch.tensor([0] * len(low) + [1] * len(medium) + [2] * len(high), dtype=torch.int64)
    return laser_targets(torch.tensor(low + medium + high), band, **options)


def test_an_easy_band_needs_a_fifth_of_its_responses_a_medium_one_half_and_a_hard_one_all() -> None:
    lengths = [4000, 5000, 6000, 7000, 8000, 9000, 10000, 11000, 12000, 13000]
    # all within 13312; half (8000) within 8192; a fifth (5000) within 5120
    assert _targets(lengths, lengths, lengths) == (13312, 8192, 5120)


def test_a_share_that_is_exactly_enough_is_enough() -> None:
    lengths = [5] * 3 + [50] * 12  # 3 of 15 is a fifth, though 3 / 15 * 5 is a matter of rounding
    assert _targets([50], [5, 50], lengths, grid=[5, 10, 50]) == (50, 5, 5)
    assert _targets([50], [5, 50, 50], lengths + [50], grid=[5, 10, 50]) == (50, 50, 50)


def test_the_longest_target_serves_where_none_is_long_enough_or_nothing_was_measured() -> None:
    assert _targets([20000], [], [20000] * 4 + [16384], grid=range(4096, 16385, 1024)) == (16384, 16384, 16384)
    assert _targets([], [], []) == (16384, 16384, 16384)


def test_other_multipliers_ask_for_other_shares() -> None:
    lengths = list(range(1, 11))
    assert _targets(lengths, lengths, lengths, grid=lengths, multipliers=[10, 5, 1]) == (1, 2, 10)


@pytest.mark.parametrize(
    ("weight", "accuracy", "after"),
    [(1e-3, 0.72, 1.1e-3), (1e-3, 0.62, 1e-3), (1e-3, 0.0, 3.8e-4), (1e-4, 0.0, 0.0), (0.0, 1.0, 3.8e-4)],
)
def test_a_token_weighs_more_while_accuracy_is_above_its_target_and_never_less_than_nothing(
    weight: float, accuracy: float, after: float
) -> None:
    assert adlp_update(weight, accuracy) == pytest.approx(after, abs=1e-12)


def test_the_controllers_rate_and_target_can_be_chosen() -> None:
    assert adlp_update(0.5, 0.5, rate=2.0, target=0.25) == 1.0


LENGTHS, BANDS = torch.tensor([1, 2]), torch.tensor([0, 2])


@pytest.mark.parametrize(
    ("words", "call"),
    [
        ("decay must be in", lambda: ema(1.0, 1.0, decay=1.0)),
        ("multipliers must be three", lambda: laser_targets(LENGTHS, BANDS, multipliers=[1, 2])),
        ("multipliers must be three", lambda: laser_targets(LENGTHS, BANDS, multipliers=[0, 2, 5])),
        ("grid must hold", lambda: laser_targets(LENGTHS, BANDS, grid=[])),
        ("grid must hold", lambda: laser_targets(LENGTHS, BANDS, grid=[3, 2])),
        ("grid must hold", lambda: laser_targets(LENGTHS, BANDS, grid=[0, 2])),
        ("band_N must hold 0", lambda: laser_targets(LENGTHS, BANDS + 1)),
        ("band_N has shape", lambda: laser_targets(LENGTHS, BANDS[:1])),
        ("length_N must be finite", lambda: laser_targets(torch.tensor([float("nan"), 1]), BANDS)),
        ("accuracy must be in", lambda: adlp_update(0.1, 1.1)),
        ("weight must be at least 0", lambda: adlp_update(-0.1, 0.5)),
    ],
)
def test_bad_arguments_are_named(words: str, call: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match=words):
        call()
