"""HAPO's entropy statistics, signal and adaptive temperature: worked values, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch

from rl.heterogeneous import entropy_statistics, signal
from rl.types import AdaptiveTemperature, EntropyStatistics
from rollout.temperature import adaptive_temperature, rule_of

ENTROPIES = torch.tensor([0.002, 0.35, 1.9, 0.04, 0.9, 0.0001, 2.0, 0.5, 0.6, 0.0, 2.3, 0.15, 0.01, 0.7, 0.02])
SIGNED = [
    -0.333559, -0.051567, 0.796375, -0.169995, 0.0, -0.497124, 0.851043, -0.032093,
    -0.022138, -1.0, 1.0, -0.097828, -0.245686, -0.013722, -0.207840,
]  # fmt: skip
PROBES = [0.0, 1e-4, 0.04, 0.35, 0.9, 1.9, 2.3, 3.0]


def test_the_statistics_of_fifteen_entropies_have_their_worked_values() -> None:
    found = entropy_statistics(ENTROPIES)
    assert found.pivot == pytest.approx(math.log(0.9), abs=1e-6)
    assert (found.spread, found.high, found.low) == pytest.approx((5.812970, 0.161410, -3.150768), abs=1e-5)
    assert found.deviation == pytest.approx(4.919633, abs=1e-5)
    assert found.tokens == 15


def test_the_signal_is_signed_and_the_literal_one_never_negative() -> None:
    stats = entropy_statistics(ENTROPIES)
    assert signal(ENTROPIES, stats).tolist() == pytest.approx(SIGNED, abs=1e-5)
    assert signal(ENTROPIES, stats, literal=True).tolist() == pytest.approx([abs(x) for x in SIGNED], abs=1e-5)


@pytest.mark.parametrize(
    ("form", "tau", "expected"),
    [
        ("signed", 0.05, [0.962572, 0.975144, 0.991500, 0.997422, 1, 1.039819, 1.05, 1.05]),
        ("literal", 0.05, [1.037428, 1.024856, 1.008500, 1.002578, 1, 1.039819, 1.05, 1.05]),
        ("signed", 0.1, [0.925144, 0.950288, 0.983000, 0.994843, 1, 1.079637, 1.1, 1.1]),
        ("zscore", 0.1, [0.721318, 0.814926, 0.936712, 0.980802, 1, 1.015188, 1.019072, 1.024473]),
    ],
)
def test_the_temperature_of_each_form_has_its_worked_values(form: str, tau: float, expected: list[float]) -> None:
    stats = entropy_statistics(ENTROPIES)
    assert [adaptive_temperature(h, stats, tau=tau, form=form) for h in PROBES] == pytest.approx(expected, abs=2e-6)  # pyright: ignore
    warm = adaptive_temperature(torch.tensor(PROBES), stats, base=0.7, tau=tau, form=form)  # pyright: ignore
    assert isinstance(warm, torch.Tensor) and warm.dtype == torch.float32
    assert warm.tolist() == pytest.approx([0.7 * x for x in expected], abs=2e-6)


def test_the_first_step_has_no_statistics_and_is_sampled_at_the_base_temperature() -> None:
    assert adaptive_temperature(1.3, None, base=0.8) == 0.8
    assert adaptive_temperature(torch.tensor([0.1, 2.0]), None, base=0.8).tolist() == pytest.approx([0.8, 0.8])  # pyright: ignore
    assert rule_of(None) is None


def test_equal_entropies_leave_the_temperature_alone() -> None:
    stats = entropy_statistics(torch.full((7,), 0.5))
    assert (stats.spread, stats.high, stats.low) == (0.0, 0.0, 0.0)
    for form in ("signed", "literal", "zscore"):
        assert adaptive_temperature(2.0, stats, form=form) == 1.0
    assert signal(torch.tensor([0.1, 0.5, 2.0]), stats).tolist() == [0.0, 0.0, 0.0]


def test_the_quantile_rounds_its_index_half_to_even() -> None:
    # rho 0.5 of 4 values: index round(1.5) = 2; of 2 values: round(0.5) = 0.
    assert entropy_statistics(torch.tensor([1.0, 2.0, 3.0, 4.0]), rho=0.5).pivot == pytest.approx(math.log(3.0))
    assert entropy_statistics(torch.tensor([1.0, 2.0]), rho=0.5).pivot == pytest.approx(0.0)


def test_a_temperature_stays_positive_whatever_the_statistics() -> None:
    narrow = EntropyStatistics(pivot=0.0, spread=1e-3, high=1.0, low=-1.0, deviation=1e-3, tokens=9)
    assert adaptive_temperature(1e-9, narrow, tau=0.5, form="zscore") == pytest.approx(0.1)
    assert adaptive_temperature(50.0, narrow, tau=0.5, form="zscore") == pytest.approx(10.0)
    assert rule_of(AdaptiveTemperature(narrow, "zscore", 0.5)) == rule_of(AdaptiveTemperature(narrow, "zscore", 0.5))


def test_what_makes_no_sense_is_refused() -> None:
    stats = entropy_statistics(ENTROPIES)
    refused = (torch.zeros(0), torch.tensor([0.1, math.nan]), torch.tensor([-0.5, 0.2]), torch.zeros(2, 2), torch.tensor([1, 2]))
    for bad in refused:
        with pytest.raises(ValueError, match="entropy_T"):
            entropy_statistics(bad)
    with pytest.raises(ValueError, match="rho"):
        entropy_statistics(ENTROPIES, rho=1.0)
    with pytest.raises(ValueError, match="signed, literal or zscore"):
        adaptive_temperature(1.0, stats, form="cubic")  # pyright: ignore
    with pytest.raises(ValueError, match="above 0"):
        adaptive_temperature(1.0, stats, base=0.0)
