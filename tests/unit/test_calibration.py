"""From measured points to the effort that spends or scores a wanted share."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reward.calibration import EFFORTS, Calibration, isotonic

MEASURED = Calibration(EFFORTS, tokens=(400, 550, 700, 850, 1000, 1000), accuracy=(0.4, 0.5, 0.6, 0.58, 0.77, 0.8))


def test_tokens_are_relative_to_the_largest_effort() -> None:
    assert MEASURED.relative_tokens() == pytest.approx((0.4, 0.55, 0.7, 0.85, 1, 1))


def test_an_accuracy_that_falls_by_noise_is_levelled() -> None:
    assert MEASURED.relative_accuracy() == pytest.approx((0.5, 0.625, 0.7375, 0.7375, 0.9625, 1))


@pytest.mark.parametrize(
    ("share", "effort"), [(0.4, 0.5), (0.475, 0.625), (0.55, 0.75), (0.7, 1), (0.775, 1.25), (0.91, 1.7), (1, 2)]
)
def test_an_effort_for_tokens_lies_on_the_line_between_the_points_and_is_the_smallest(share: float, effort: float) -> None:
    assert MEASURED.effort_for_tokens(share) == pytest.approx(effort)


@pytest.mark.parametrize(("share", "effort"), [(0.5, 0.5), (0.7375, 1), (0.85, 1.75), (0.98125, 2.5), (1, 3)])
def test_an_effort_for_accuracy_skips_the_level_stretch(share: float, effort: float) -> None:
    assert MEASURED.effort_for_accuracy(share) == pytest.approx(effort)


@pytest.mark.parametrize("share", [0.39, 1.01, math.nan])
def test_a_share_that_was_never_measured_is_refused_with_what_was(share: float) -> None:
    with pytest.raises(ValueError, match=r"share must be in \[0.400, 1\], what efforts from 0.5 to 3.0 were measured to give"):
        MEASURED.effort_for_tokens(share)


def test_a_calibration_survives_json() -> None:
    assert Calibration.from_json(MEASURED.to_json()) == MEASURED


def test_the_model_card_shows_every_point() -> None:
    lines = MEASURED.markdown().splitlines()
    assert lines[0] == "| effort | tokens | share of the tokens | accuracy | share of the accuracy |"
    assert lines[2] == "| 0.5 | 400 | 40.0% | 40.0% | 50.0% |"
    assert lines[5] == "| 1.5 | 850 | 85.0% | 58.0% | 73.8% |"
    assert len(lines) == 2 + len(EFFORTS)
    assert len({line.count("|") for line in lines}) == 1


def test_a_model_that_is_always_wrong_still_has_a_table_but_no_effort_for_accuracy() -> None:
    hopeless = Calibration((1.0, 2.0), (10, 20), (0.0, 0.0))
    assert "| 1 | 10 | 50.0% | 0.0% | 0.0% |" in hopeless.markdown()
    with pytest.raises(ValueError, match="accuracy is 0 at every effort"):
        hopeless.effort_for_accuracy(1.0)


@pytest.mark.parametrize(
    ("words", "points"),
    [
        ("one of each per measured point", ((1.0,), (10.0,), (0.5,))),
        ("2 efforts, 1 tokens and 2 accuracies", ((1.0, 2.0), (10.0,), (0.5, 0.6))),
        ("must be finite", ((1.0, 2.0), (10.0, math.nan), (0.5, 0.6))),
        ("efforts must be above 0 and rise", ((2.0, 1.0), (10.0, 20.0), (0.5, 0.6))),
        ("efforts must be above 0 and rise", ((0.0, 1.0), (10.0, 20.0), (0.5, 0.6))),
        ("tokens must be above 0", ((1.0, 2.0), (0.0, 20.0), (0.5, 0.6))),
        ("accuracy must be in", ((1.0, 2.0), (10.0, 20.0), (50.0, 60.0))),
    ],
)
def test_points_that_cannot_have_been_measured_are_refused(words: str, points: tuple[Any, Any, Any]) -> None:
    with pytest.raises(ValueError, match=words):
        Calibration(*points)


@pytest.mark.parametrize(
    ("words", "content"),
    [
        ("a calibration is a JSON object", []),
        ("a calibration is a JSON object", {"efforts": [1, 2], "tokens": [1, 2]}),
        ("tokens must be a list of numbers", {"efforts": [1, 2], "tokens": ["1", 2], "accuracy": [0, 1]}),
        ("accuracy must be a list of numbers", {"efforts": [1, 2], "tokens": [1, 2], "accuracy": True}),
        ("efforts must be above 0 and rise", {"efforts": [2, 1], "tokens": [1, 2], "accuracy": [0, 1]}),
    ],
)
def test_json_that_is_no_calibration_is_refused(words: str, content: object) -> None:
    with pytest.raises(ValueError, match=words):
        Calibration.from_json(json.dumps(content))


@given(values=st.lists(st.floats(0, 1000), min_size=1, max_size=8))
def test_the_isotonic_fit_equals_its_definition_by_means_of_stretches(values: list[float]) -> None:
    def mean(first: int, last: int) -> float:
        return math.fsum(values[first : last + 1]) / (last - first + 1)

    n = len(values)
    expected = [max(min(mean(j, k) for k in range(i, n)) for j in range(i + 1)) for i in range(n)]
    assert isotonic(values) == pytest.approx(expected, abs=1e-9)


@given(
    points=st.lists(st.tuples(st.floats(1, 1e5), st.floats(0.01, 1)), min_size=2, max_size=6),
    part=st.floats(0, 1),
)
def test_the_effort_found_spends_the_share_asked_for(points: list[tuple[float, float]], part: float) -> None:
    tokens, accuracy = zip(*points, strict=True)
    measured = Calibration(EFFORTS[: len(points)], tokens, accuracy)
    for reached, invert in (
        (measured.relative_tokens(), measured.effort_for_tokens),
        (measured.relative_accuracy(), measured.effort_for_accuracy),
    ):
        share = min(1.0, reached[0] + part * (1.0 - reached[0]))
        effort = invert(share)
        after = next(i for i, e in enumerate(measured.efforts) if e >= effort)
        before = max(0, after - 1)
        width = measured.efforts[after] - measured.efforts[before]
        weight = (effort - measured.efforts[before]) / width if width else 1.0
        assert (1 - weight) * reached[before] + weight * reached[after] == pytest.approx(share, abs=1e-9)
        assert invert(min(1.0, share + 0.01)) >= effort
