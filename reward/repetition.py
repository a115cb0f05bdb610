"""Whether an answer goes round in circles, by the n-grams it repeats."""

from __future__ import annotations

from collections.abc import Sequence

NGRAM = 16
"""Tokens; long enough that ordinary phrases and restated formulas hardly ever repeat by chance."""
SHARE = 0.25
"""Of the n-grams; an answer that spends its last quarter in a loop reaches it."""


def repeated_share(token_ids: Sequence[int], *, n: int = NGRAM) -> float:
    """The share of an answer's n-grams that occurred earlier in it: ``1 - distinct / all``; 0 when it is shorter than one.

    token_ids: one answer. Raises ValueError for n below 1.
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    ids = tuple(map(int, token_ids))  # a tensor's elements would all differ
    total = len(ids) - n + 1
    if total < 1:
        return 0.0
    return 1.0 - len(set(zip(*(ids[i:] for i in range(n)), strict=False))) / total


def is_repetitive(token_ids: Sequence[int], *, n: int = NGRAM, share: float = SHARE) -> bool:
    """Whether at least ``share`` of an answer's n-grams occurred earlier in it; an exploring answer is one that is not.

    A loop counts whatever its period, from its second round on: s tokens of text followed by k in a loop of period q share about
    ``(k - q) / (s + k)``. The measure and its constants are ours; LASER-DE's code stops at a few near repeats of one 4-gram,
    which most long derivations have.

    token_ids: one answer. Raises ValueError for n below 1 or a share outside (0, 1].
    """
    if not 0.0 < share <= 1.0:
        raise ValueError(f"share must be in (0, 1], got {share}")
    return repeated_share(token_ids, n=n) >= share
