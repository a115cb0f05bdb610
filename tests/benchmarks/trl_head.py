"""TRL's log-prob and entropy functions on the head benchmark's work, with .venv-trl's python; prints one JSON line.

A script of its own: TRL lives in another environment. Run by tests/benchmarks/kernels.py as  trl_head.py T H V THREADS.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import torch
from trl.trainer.utils import selective_log_softmax_and_entropy


def trl(h: torch.Tensor, w: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return selective_log_softmax_and_entropy(h @ w.T, target)


def main() -> None:
    *shape, threads = map(int, sys.argv[1:])
    torch.set_num_threads(threads)
    # By its path: this folder on the import path would put trl.py, a benchmark, in the place of the package trl.
    spec = importlib.util.spec_from_file_location("head_work", Path(__file__).with_name("head_work.py"))
    assert spec is not None and spec.loader is not None
    work = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(work)
    inputs = work.make_inputs(*shape)
    work.measure_head(trl, inputs)  # the first call pays for threads and buffers
    seconds, extra, _ = work.measure_head(trl, inputs)
    print(json.dumps({"seconds": seconds, "extra_mb": extra}))


if __name__ == "__main__":
    main()
