"""A bias on reflection words over an answer: CyclicReflex (arXiv 2506.11077), with TIP and silver as baselines."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from rl.errors import ConfigError
from rl.types import Reflex
from rollout.markers import END_THINK

SILVER_CYCLE = 64
"""Tokens after which the silver schedule repeats."""
COLUMNS = 7
"""Numbers of a reflex: kind, amplitude, period, shift, rate, first, last."""
SCHEDULES = ("wave", "constant", "silver")


def triangular_wave(
    t: torch.Tensor | Sequence[float] | float, *, amplitude: float, period: float, shift: float = 0.0
) -> torch.Tensor | float:
    """CyclicReflex's wave: from 0 up to the amplitude, down to minus the amplitude and back, once a period.

    ``t' = t + shift period``; ``delta(t) = amplitude |4 ((t' - period / 4) mod period) / period - 2| - amplitude``

    t: tokens generated before this one, a number or a tensor or list of any shape; returns nats, a float for a number, else
    float32. period may be fractional; shift is a share of it. Raises ValueError for a period of 0 or less.
    Source: CyclicReflex (arXiv 2506.11077), the form of paper and published code.
    """
    if not period > 0:
        raise ValueError(f"period must be above 0 tokens, got {period}")
    place = t if isinstance(t, torch.Tensor) else torch.tensor(t, dtype=torch.float64)
    wave = _wave(place.double(), amplitude, period, shift)
    return wave.float() if isinstance(t, torch.Tensor) or not isinstance(t, (int, float)) else float(wave)


def silver_steps(t: torch.Tensor, *, rate: float | torch.Tensor = 1.5) -> torch.Tensor:
    """The silver step-size schedule as a bias: ``rate^(v - 2)``, v the number of times 2 divides ``(t mod 64) + 1``.

    Shapes: t integer, any shape; returns float64. Source: baseline of CyclicReflex's first published code.
    """
    place = torch.remainder(t.long(), SILVER_CYCLE) + 1
    lowest_bit = place & -place
    return torch.as_tensor(rate, dtype=torch.float64, device=t.device) ** (lowest_bit.double().log2() - 2)


def reflex_bias(t: torch.Tensor, closed: torch.Tensor, reflex: Reflex) -> torch.Tensor:
    """What is added to the reflection words' logits at each token, in nats: the schedule at t, 0 outside it and once closed.

    Shapes: t (T) integer, tokens generated before; closed (T) bool, whether ``</think>`` is among them. Returns float32 (T).
    """
    columns = torch.tensor(reflex_columns(reflex), dtype=torch.float64, device=t.device)
    return bias_by_columns(t, closed, columns.expand(t.numel(), -1))


def reflex_columns(reflex: Reflex | None) -> tuple[float, ...]:
    """The numbers of a reflex for :func:`bias_by_columns`, all 0 for none. Raises ValueError like :func:`check_reflex`."""
    if reflex is None:
        return (0.0,) * COLUMNS
    check_reflex(reflex)
    kind = 1.0 + SCHEDULES.index(reflex.schedule)
    last = math.inf if reflex.last is None else float(reflex.last)
    return (kind, reflex.amplitude, reflex.period, reflex.shift, reflex.rate, float(reflex.first), last)


def bias_by_columns(t: torch.Tensor, closed: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """:func:`reflex_bias` where every row has a schedule of its own; on any device, without waiting for it.

    Shapes: t (B) integer; closed (B) bool; columns (B, 7) float64, rows of :func:`reflex_columns`. Returns float32 (B), nats.
    """
    kind, amplitude, period, shift, rate, first, last = columns.unbind(dim=1)
    period = torch.where(kind == 1, period, 1.0)  # a row without a wave has period 0
    bias = torch.where(kind == 1, _wave(t.double(), amplitude, period, shift), amplitude)
    bias = torch.where(kind == 3, silver_steps(t, rate=rate), bias)
    on = (kind > 0) & (t >= first) & (t < last) & ~closed
    return torch.where(on, bias, 0.0).float()


def _wave(t: torch.Tensor, amplitude: Any, period: Any, shift: Any) -> torch.Tensor:
    """The wave with parameters that are numbers or tensors of t's shape, in float64."""
    return amplitude * (4 * torch.remainder(t + shift * period - period / 4, period) / period - 2).abs() - amplitude


def reflection_ids(tokenizer: Any, words: Sequence[str], *, leading_space: bool = False) -> tuple[int, ...]:
    """Ids of the reflection words in the vocabulary, distinct and increasing.

    Each word is looked up as a key of the vocabulary, not spelt in pieces. ``leading_space`` adds the form with a space in
    front of every word that has one.

    Raises ConfigError naming the words that are missing, or that the vocabulary maps to its unknown token.
    """
    vocabulary = tokenizer.get_vocab()
    unknown = tokenizer.unk_token_id

    def find(key: str) -> int | None:
        found = vocabulary.get(key)
        return None if found is None or found == unknown else int(found)

    ids = {word: find(word) for word in words}
    missing = [word for word, found in ids.items() if found is None]
    if missing:
        have = [word for word in words if word not in missing]
        raise ConfigError(
            f"the vocabulary of this model has no single token for the reflection words {', '.join(map(repr, missing))}",
            fix=f"set rollout.reflex.words to words it has, such as {have}"
            if have
            else "set rollout.reflex.words to words it has",
        )
    found_ids = {found for found in ids.values() if found is not None}
    if leading_space:
        # Byte-level vocabularies write the space as U+0120, SentencePiece ones as U+2581.
        spaced = [find(mark + word) for word in words for mark in ("\u0120", "\u2581", " ")]
        spaced_ids = {found for found in spaced if found is not None}
        if not spaced_ids:
            raise ConfigError(
                "the vocabulary of this model has none of the reflection words with a space in front",
                fix="set rollout.reflex.leading_space=false",
            )
        found_ids |= spaced_ids
    return tuple(sorted(found_ids))


def end_id(tokenizer: Any, end: str = END_THINK) -> int:
    """Id of the token that ends the thinking.

    Raises ConfigError where the vocabulary has none: the bias would then never stop.
    """
    found = tokenizer.get_vocab().get(end)
    if found is None or found == tokenizer.unk_token_id:
        raise ConfigError(
            f"the vocabulary of this model has no token {end!r}, so a reflection bias would run on into the answer",
            fix="set rollout.reflex.end to the token that ends this model's thinking, or leave rollout.reflex out",
        )
    return int(found)


def check_reflex(reflex: Reflex) -> None:
    """Raise ValueError for a parameter out of its range: period and rate above 0, all finite, shift in [0, 1], first < last."""
    numbers = {"amplitude": reflex.amplitude, "period": reflex.period, "shift": reflex.shift, "rate": reflex.rate}
    for name, value in numbers.items():
        if not math.isfinite(value):
            raise ValueError(f"{name} must be finite, got {value}")
    if reflex.schedule not in SCHEDULES:
        raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}, got {reflex.schedule!r}")
    if not abs(reflex.amplitude) <= 100:
        raise ValueError(f"amplitude must lie in [-100, 100] nats, got {reflex.amplitude}")
    if not reflex.period > 0:
        raise ValueError(f"period must be above 0 tokens, got {reflex.period}")
    if not 0 <= reflex.shift <= 1:
        raise ValueError(f"shift must lie in [0, 1], a share of the period, got {reflex.shift}")
    if not 0 < reflex.rate <= 10:
        raise ValueError(f"rate must lie in (0, 10], got {reflex.rate}")
    if reflex.first < 0 or (reflex.last is not None and reflex.last <= reflex.first):
        raise ValueError(f"first={reflex.first} and last={reflex.last} must satisfy 0 <= first < last")
