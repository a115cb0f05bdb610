"""A tiny model on disk, a process group of one, learners in this process, and a Ray cluster for what needs several."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from rl.guidance import HeadSources
from rl.learner import Learner
from rl.process_group import join_process_group
from rl.settings import LearnerSettings, LossSettings
from tests.parity.plain import write_tiny


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Hugging Face folder of a two-layer model with tied head."""
    return write_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def _process_group() -> Iterator[None]:
    """torch.distributed over gloo with this process alone, as the worker's first rank sets it up."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    rendezvous = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in rendezvous.items():
            patch.setenv(name, value)
        join_process_group(deadline_s=60)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    torch.distributed.destroy_process_group()


@pytest.fixture
def make_learner(tiny_folder: Path, _process_group: None, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Learner]:
    """``make_learner(lr=1e-3, loss=LossSettings(...))``: a DeepSpeed learner on the tiny model; keywords are LearnerSettings."""
    monkeypatch.setenv("LOCAL_RANK", "0")  # only here: a Ray cluster started meanwhile would hand it to all workers

    def make(
        *, loss: LossSettings | None = None, folder: Path = tiny_folder, dtype: str = "float32", heads: HeadSources | None = None,
        **settings: Any,
    ) -> Learner:
        chosen = LearnerSettings(**{"lr": 1e-3, "tokens_per_microbatch": 256, **settings})
        return Learner(folder, chosen, loss or LossSettings(), dtype=dtype, heads=heads)

    return make
