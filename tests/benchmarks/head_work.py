"""The work of the head benchmark and how it is measured; torch only, because TRL's side runs it in TRL's own environment."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def make_inputs(tokens: int, width: int, vocabulary: int) -> dict[str, torch.Tensor]:
    """Random hidden states, head, targets and upstream gradients, the same in every process."""
    generator = torch.Generator().manual_seed(0)
    return {
        "hidden": torch.randn(tokens, width, generator=generator),
        "weight": torch.randn(vocabulary, width, generator=generator) * 0.05,
        "target": torch.randint(vocabulary, (tokens,), generator=generator),
        "g": torch.randn(tokens, generator=generator),
        "e": torch.randn(tokens, generator=generator) * 0.01,
    }


def measure_head(call: Callable[..., Any], inputs: dict[str, torch.Tensor]) -> tuple[float, float, list[torch.Tensor]]:
    """Seconds of forward and backward, MB of peak memory beyond results, and the results."""
    h, w = inputs["hidden"].requires_grad_(), inputs["weight"].requires_grad_()
    h.grad = w.grad = None
    before = _reset_peak()
    began = time.perf_counter()
    logp, entropy = call(h, w, inputs["target"])
    (logp * inputs["g"] + entropy * inputs["e"]).sum().backward()
    seconds = time.perf_counter() - began
    assert h.grad is not None and w.grad is not None
    results = [logp.detach(), entropy.detach(), h.grad, w.grad]
    extra = _peak() - before - sum(x.numel() * x.element_size() for x in results) / 2**20
    return seconds, max(extra, 0.0), [x.clone() for x in results]


def _reset_peak() -> float:
    """Forget the process's peak of resident memory; returns what is resident now, MB."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _peak() -> float:
    return _status("VmHWM")


def _status(name: str) -> float:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) / 1024
