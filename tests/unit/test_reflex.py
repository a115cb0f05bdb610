"""CyclicReflex's wave and its baselines: worked values, the ids it lifts, and where it is off."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rl.embedded import tiny_tokenizer
from rl.errors import ConfigError
from rl.types import Reflex
from rollout.reflex import end_id, reflection_ids, reflex_bias, silver_steps, triangular_wave

PLACES = [0, 1, 75, 149, 150, 225, 300, 333, 450, 600, 900, 1199, 8191]
WORDS = ("wait", "Wait", "but", "But", "Alternatively")


@pytest.mark.parametrize(
    ("amplitude", "period", "shift", "expected"),
    [
        (5, 1200, 0, [0, 0.016667, 1.25, 2.483333, 2.5, 3.75, 5, 4.45, 2.5, 0, -5, -0.016667, -3.483333]),
        (5, 600, 0, [0, 0.033333, 2.5, 4.966667, 5, 2.5, 0, -1.1, -5, 0, 0, -0.033333, -3.033333]),
        (3, 600, 0, [0, 0.02, 1.5, 2.98, 3, 1.5, 0, -0.66, -3, 0, 0, -0.02, -1.82]),
        (5, 900, 0, [0, 0.022222, 1.666667, 3.311111, 3.333333, 5, 3.333333, 2.6, 0, -3.333333, 0, 3.355556, 2.022222]),
        (3, 600, 0.25, [3, 2.98, 1.5, 0.02, 0, -1.5, -3, -2.34, 0, 3, -3, 2.98, -1.18]),
        (2, 7, 0, [0, 1.142857, -1.714286, 1.714286, 0.571429, 1.142857, -1.142857, -0.571429, 1.714286, -1.714286,
                   -0.571429, 1.714286, 1.142857]),
    ],
)  # fmt: skip
def test_the_wave_has_its_worked_values(amplitude: float, period: float, shift: float, expected: list[float]) -> None:
    options = {"amplitude": amplitude, "period": period, "shift": shift}
    assert [triangular_wave(t, **options) for t in PLACES] == pytest.approx(expected, abs=2e-6)
    as_tensor = triangular_wave(torch.tensor(PLACES), **options)
    assert isinstance(as_tensor, torch.Tensor) and as_tensor.dtype == torch.float32
    assert as_tensor.tolist() == pytest.approx(expected, abs=2e-6)


def test_the_wave_is_bounded_has_mean_zero_and_repeats() -> None:
    t = torch.arange(0, 4000, dtype=torch.float64)
    wave = triangular_wave(t, amplitude=2.5, period=16)
    assert isinstance(wave, torch.Tensor)
    assert float(wave.abs().max()) == pytest.approx(2.5)
    assert float(wave.mean()) == pytest.approx(0.0, abs=1e-6)
    assert torch.equal(wave[:16], wave[16:32])
    with pytest.raises(ValueError, match="period"):
        triangular_wave(1, amplitude=1, period=0)


def test_silver_steps_have_their_worked_values_and_cycle_after_64() -> None:
    expected = [0.444444, 0.666667, 0.444444, 1, 0.444444, 0.666667, 0.444444, 1.5, 0.444444]
    assert silver_steps(torch.arange(9)).tolist() == pytest.approx(expected, abs=1e-6)
    assert float(silver_steps(torch.tensor(63))) == pytest.approx(5.0625)
    assert torch.equal(silver_steps(torch.arange(64)), silver_steps(torch.arange(64, 128)))


def _bias(reflex: Reflex, places: list[int], *, closed: bool = False) -> list[float]:
    t = torch.tensor(places)
    return reflex_bias(t, torch.full_like(t, closed, dtype=torch.bool), reflex).tolist()


def test_a_bias_is_off_outside_its_interval_and_once_the_thinking_ended() -> None:
    wave = Reflex(amplitude=4.0, period=24.0)
    assert _bias(wave, [3, 6, 18]) == [2.0, 4.0, -4.0]
    assert _bias(wave, [3, 6, 18], closed=True) == [0.0, 0.0, 0.0]
    between = Reflex(amplitude=4.0, period=24.0, first=3, last=5)
    assert _bias(between, [2, 3, 5]) == [0.0, 2.0, 0.0]
    assert _bias(Reflex("constant", amplitude=-3.0), [0, 9]) == [-3.0, -3.0]
    assert _bias(Reflex("silver", amplitude=9.0, rate=1.5), [3, 7]) == [1.0, 1.5]


class _Vocabulary:
    """A tokenizer of which only the vocabulary is asked."""

    def __init__(self, *tokens: str, unknown: int | None = None) -> None:
        self._ids = {token: i for i, token in enumerate(tokens)}
        self.unk_token_id = unknown

    def get_vocab(self) -> dict[str, int]:
        return self._ids


def test_the_words_are_keys_of_the_vocabulary_bare_by_default() -> None:
    tokenizer: Any = _Vocabulary("x", "but", "\u0120but", "Wait", "\u0120Wait", "</think>")
    assert reflection_ids(tokenizer, ("Wait", "but", "but")) == (1, 3)
    assert reflection_ids(tokenizer, ("Wait", "but"), leading_space=True) == (1, 2, 3, 4)
    assert end_id(tokenizer) == 5
    ours = tiny_tokenizer()
    assert len(reflection_ids(ours, WORDS)) == 5
    assert len(reflection_ids(ours, WORDS, leading_space=True)) == 10


def test_a_missing_word_or_end_mark_is_an_error_that_names_it() -> None:
    with pytest.raises(ConfigError, match=r"'Alternatively'[\s\S]*\['wait'\]"):
        reflection_ids(_Vocabulary("wait"), ("wait", "Alternatively"))
    with pytest.raises(ConfigError, match="'but'"):
        reflection_ids(_Vocabulary("but", unknown=0), ("but",))  # the unknown token stands for everything
    with pytest.raises(ConfigError, match="space in front"):
        reflection_ids(_Vocabulary("but"), ("but",), leading_space=True)
    with pytest.raises(ConfigError, match="run on into the answer"):
        end_id(_Vocabulary("but"))
