"""Who generates what, and in which order: pure functions over leases."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from rl.types import Lease

Order = Literal["longest_first", "arrival"]


def group_of(ticket: str) -> str:
    """The group a ticket belongs to: all before its last dot."""
    return ticket.rpartition(".")[0] or ticket


def expected_length(lease: Lease) -> int:
    """Tokens a response is expected to take: its budget, at most its cap; without a budget half the cap."""
    return lease.max_new_tokens // 2 if lease.budget.is_free else min(lease.budget.tokens, lease.max_new_tokens)


def submission_order(leases: Sequence[Lease], order: Order) -> list[Lease]:
    """The order in which an engine gets its leases; it starts them in this order as places become free.

    `longest_first`: by falling expected length, so that no long response starts when the others are done and decodes alone.
    Leases of the same expected length keep their order: siblings stay adjacent and share the prefix cache. `arrival`: as given.
    """
    return list(leases) if order == "arrival" else sorted(leases, key=expected_length, reverse=True)


def deal(leases: Sequence[Lease], load: Mapping[int, int]) -> dict[int, list[Lease]]:
    """Leases by engine. A group goes to one engine (shared prefix), the next group to the engine with the least to do.

    ``load``: tokens each living engine is expected to generate already.
    """
    groups: dict[str, list[Lease]] = {}
    for lease in leases:
        groups.setdefault(group_of(lease.ticket), []).append(lease)
    expected = dict(load)
    shares: dict[int, list[Lease]] = {engine: [] for engine in load}
    for group in groups.values():
        engine = min(expected, key=lambda e: (expected[e], e))
        expected[engine] += sum(expected_length(lease) for lease in group)
        shares[engine] += group
    return {engine: share for engine, share in shares.items() if share}
