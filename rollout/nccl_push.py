"""Learner side of the NCCL weight push: vLLM's own trainer engine, driven over Ray actors.

Not run on the machine it was written on (it has no GPU): see docs/gpu-checklist.md.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from typing import Any

import torch
from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource
from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

from rl.waiting import wait_for


class LearnerSource(WeightSource):
    """The learner's weights as vLLM's trainer engine wants them; iterating is a collective of all ranks under ZeRO-3."""

    def __init__(self, metadata: list[ParamMeta], weights: Callable[[], Iterator[tuple[str, torch.Tensor]]]) -> None:
        self._metadata, self._weights = metadata, weights

    def metadata(self) -> list[ParamMeta]:
        return self._metadata

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        return self._weights()


class EngineClient:
    """vLLM's control calls fanned out to all rollout actors, each wait with a deadline.

    Engines take consecutive NCCL ranks after the sender's rank 0, ``tensor_parallel`` of them each.
    """

    def __init__(self, engines: list[Any], *, ranks_per_engine: int, seconds: float) -> None:
        self._engines, self._ranks, self._seconds = engines, ranks_per_engine, seconds
        self.version = 0

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        refs = [
            engine.call.remote("init_weight_transfer_engine", {"init_info": init_info | {"rank_offset": 1 + i * self._ranks}})
            for i, engine in enumerate(self._engines)
        ]
        wait_for(refs, seconds=self._seconds, what="engines join the NCCL group")

    def start_weight_update(self) -> None:
        wait_for([e.call.remote("start_weight_update") for e in self._engines], seconds=self._seconds, what="engines open a push")

    def update_weights(self, update_info: Any) -> None:
        refs = [engine.receive.remote(update_info) for engine in self._engines]
        wait_for(refs, seconds=self._seconds, what=f"engines receive weights v{self.version}")

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        refs = [engine.commit.remote(self.version) for engine in self._engines]
        wait_for(refs, seconds=self._seconds, what=f"engines commit weights v{self.version}")


def open_push(learner: Any, engines: list[Any], *, rank: int, ranks_per_engine: int, address: str, seconds: float) -> Any:
    """Rendezvous with the engines (rank 0) or prepare to take part in gathering (other ranks); returns vLLM's trainer engine."""
    with socket.socket() as probe:
        probe.bind((address, 0))
        port = probe.getsockname()[1]
    metadata = [ParamMeta(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in learner.named_weights()]
    info = NCCLTrainerInitInfo(
        rank=rank, master_address=address, master_port=port, world_size=1 + ranks_per_engine * len(engines)
    )
    client = EngineClient(engines, ranks_per_engine=ranks_per_engine, seconds=seconds)
    source = LearnerSource(metadata, lambda: learner.named_weights(device=learner.device))
    return WeightTransferTrainerFactory.trainer_init(info, client=client, source=source)
