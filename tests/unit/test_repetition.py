"""When an answer goes round in circles."""

from __future__ import annotations

import random

import pytest
import torch

from reward.repetition import is_repetitive, repeated_share


def _text(length: int, *, seed: int = 0) -> list[int]:
    """Tokens of which no 16 come twice."""
    return random.Random(seed).choices(range(50_000), k=length)


def test_the_share_counts_the_ngrams_that_came_before() -> None:
    # 1 2, 2 1, 1 2, 2 3, 3 1, 1 2: six pairs, four distinct
    assert repeated_share([1, 2, 1, 2, 3, 1, 2], n=2) == pytest.approx(2 / 6)
    assert repeated_share([1, 2, 3, 4], n=1) == 0.0


@pytest.mark.parametrize("period", [1, 7, 40, 300])
def test_a_loop_of_any_period_is_found_once_it_fills_a_quarter(period: int) -> None:
    text, loop = _text(3000), _text(period, seed=1)
    rounds = (loop * 4000)[: 1500 + period]
    assert is_repetitive(text + rounds)
    assert repeated_share(text + rounds) == pytest.approx(1500 / (4500 + period), abs=0.01)
    assert not is_repetitive(text + rounds[: 500 + period])


def test_an_answer_that_restates_its_phrases_is_not_repetitive() -> None:
    phrase = _text(12, seed=2)
    answer = [token for i in range(50) for token in phrase + _text(12, seed=3 + i)]
    assert repeated_share(answer) == 0.0
    assert is_repetitive(answer, n=4, share=0.25)


def test_a_share_that_is_just_reached_is_enough() -> None:
    answer = [1, 2, 3, 1]  # one of four tokens came before
    assert is_repetitive(answer, n=1, share=0.25)
    assert not is_repetitive(answer, n=1, share=0.26)


@pytest.mark.parametrize("answer", [[], [1], [1] * 15])
def test_an_answer_shorter_than_one_ngram_is_not_repetitive(answer: list[int]) -> None:
    assert not is_repetitive(answer)


def test_a_tensor_counts_like_the_numbers_it_holds() -> None:
    assert repeated_share(torch.tensor([5] * 20), n=4) == pytest.approx(16 / 17)  # pyright: ignore[reportArgumentType]


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="n must be at least 1"):
        is_repetitive([1, 2], n=0)
    for share in (0.0, 1.5):
        with pytest.raises(ValueError, match="share must be in"):
            is_repetitive([1, 2], share=share)
