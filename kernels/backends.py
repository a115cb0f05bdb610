"""Which implementation of a kernel runs: one rule for ``"auto"``, one look-up, and Triton imported only where it is used."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Collection, Mapping
from types import ModuleType
from typing import Any

import torch

BACKENDS = ("reference", "eager", "triton")
"""Every backend name of the interface, built or not."""


class NotAvailable(RuntimeError):
    """The requested implementation does not exist here; the message names those that do."""


def pick_backend(backend: str, like: torch.Tensor, available: Collection[str]) -> str:
    """The name of the backend to run; ``"auto"`` is ``triton`` for tensors on a GPU and ``eager`` for others.

    Raises NotAvailable for a backend of the interface that this kernel lacks and ValueError for an unknown name.
    """
    name = ("triton" if like.is_cuda else "eager") if backend == "auto" else backend
    if name in available:
        return name
    have = ", ".join(sorted(available))
    if name in BACKENDS:
        raise NotAvailable(f"backend {name!r} is not available for this kernel; use one of: auto, {have}")
    raise ValueError(f"backend {name!r} is unknown; use one of: auto, {have}")


def pick(
    table: Mapping[str, Callable[..., Any]], backend: str, like: torch.Tensor, triton: tuple[str, str]
) -> Callable[..., Any]:
    """The function of ``backend``: from the table, or ``triton`` as (module of this package, function)."""
    name = pick_backend(backend, like, (*table, "triton"))
    return table[name] if name in table else getattr(load_triton(triton[0], like), triton[1])


def load_triton(module: str, like: torch.Tensor) -> ModuleType:
    """A module of Triton kernels of this package; NotAvailable when Triton is missing or could not run on ``like``."""
    if not like.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise NotAvailable(
            f"backend 'triton' needs tensors on a GPU, these are on {like.device}; use backend='eager' there "
            "(TRITON_INTERPRET=1 in the environment runs it slowly on CPU, for tests)"
        )
    try:
        return importlib.import_module(f"kernels.{module}")
    except ImportError as error:
        raise NotAvailable(f"backend 'triton' needs the package triton ({error}); install it or use backend='eager'") from error
