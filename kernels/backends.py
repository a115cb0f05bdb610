"""Which implementation of a kernel runs: a table from backend name to function, and one way to look it up."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

import torch

Kernel = TypeVar("Kernel", bound=Callable[..., object])

BACKENDS = ("reference", "eager", "triton")
"""Every backend name of the interface, built or not."""


class NotAvailable(RuntimeError):
    """The requested implementation does not exist here; the message names those that do."""


def fastest(like: torch.Tensor) -> str:
    """What ``"auto"`` means for tensors like this one: ``triton`` on a GPU, ``eager`` elsewhere."""
    return "triton" if like.is_cuda else "eager"


def pick(table: Mapping[str, Kernel], backend: str, *, auto: str) -> Kernel:
    """Return the function of ``backend``; ``"auto"`` means ``auto``.

    Raises NotAvailable for a backend of the interface that this kernel lacks and ValueError for an unknown name.
    """
    name = auto if backend == "auto" else backend
    if name in table:
        return table[name]
    have = ", ".join(sorted(table))
    if name in BACKENDS:
        raise NotAvailable(f"backend {name!r} is not available for this kernel; use one of: auto, {have}")
    raise ValueError(f"backend {name!r} is unknown; use one of: auto, {have}")
