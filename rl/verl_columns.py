"""Columns for functions that verl calls with fixed arguments: set around verl's own call, read inside it.

verl 0.9.1 gives a registered advantage estimator rewards, mask and uid, and a registered policy loss log-probs, advantages and
mask. What else they need is put here by whoever calls verl (`rl.verl_trainer`, `rl.verl_loss.with_signal`); a column that nobody
put there is refused by name, never guessed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from types import MappingProxyType

import torch

from rl.errors import BudgetRLError

BUDGET, CEILING, GROUP, SIGNAL = "budget", "ceiling", "group", "budget_rl_signal"
Column = torch.Tensor | list[str]

_NONE: Mapping[str, Column] = MappingProxyType({})
# A context variable, not a global: advantages and losses may be computed in several threads of one process.
_CURRENT: ContextVar[Mapping[str, Column]] = ContextVar("budget_rl_columns", default=_NONE)


class MissingColumnError(BudgetRLError):
    """A registered function was called without a column that it needs."""


@contextmanager
def columns(**values: Column) -> Iterator[None]:
    """Within the block the registered functions find these columns, and none that were set outside.

    ``budget`` (N) in tokens, inf without one; ``ceiling`` (N) in reward units, NaN without one; ``group`` (N) labels: equal for
    answers that are compared; ``budget_rl_signal`` (N, T) in [-1, 1]. Rows in the order of the batch.
    """
    token = _CURRENT.set(MappingProxyType(values))
    try:
        yield
    finally:
        _CURRENT.reset(token)


def column(name: str, *, rows: int, asked_by: str, fix: str) -> torch.Tensor:
    """A tensor column of ``rows`` rows. Raises MissingColumnError where it was not set, ValueError where it has other rows."""
    found = _CURRENT.get().get(name)
    if found is None:
        raise MissingColumnError(f"{asked_by} needs the column {name!r}, which verl does not pass on", fix=fix)
    if not isinstance(found, torch.Tensor) or found.shape[0] != rows:
        raise ValueError(f"the column {name!r} has {len(found)} rows, the batch has {rows}")
    return found


def labels(name: str, *, rows: int) -> list[str] | None:
    """A column of texts, None where it was not set. Raises ValueError where it has other rows."""
    found = _CURRENT.get().get(name)
    if found is not None and (isinstance(found, torch.Tensor) or len(found) != rows):
        raise ValueError(f"the column {name!r} has {len(found)} rows, the batch has {rows}")
    return found
