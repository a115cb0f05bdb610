"""Weights on their way from learner to engines: one checksummed bundle, received through vLLM's weight-transfer API.

The CPU backend registered here (`object_store`) moves a bundle through Ray's object store into an inbox of the engine's own
process; vLLM then loads it with its layerwise reload, exactly as it does for its NCCL and IPC backends.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from rl.types import WeightVersion


class WeightError(RuntimeError):
    """A push that would leave an engine with wrong weights."""


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies in the buffer."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class WeightBundle:
    """All weights of one version in one uint8 buffer (zero-copy through the object store)."""

    version: WeightVersion
    entries: tuple[TensorEntry, ...]
    buffer: np.ndarray

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, tensor) pairs that share the buffer's memory.

        Of a read-only buffer each is a copy, made when it is asked for: an engine that loads by layers never holds two models.
        """
        for entry in self.entries:
            part = self.buffer[entry.start : entry.end]
            flat = torch.from_numpy(part) if part.flags.writeable else torch.tensor(part)
            yield entry.name, flat.view(getattr(torch, entry.dtype)).view(entry.shape)

    def verify(self) -> None:
        """Raise WeightError unless the bytes are those that were sent."""
        if (found := _checksum(self.entries, self.buffer)) != self.version.checksum:
            raise WeightError(
                f"weights v{self.version.number} arrived damaged: checksum {found[:12]} instead of {self.version.checksum[:12]}; "
                f"the engine keeps its old version"
            )


def _checksum(entries: Iterable[TensorEntry], buffer: np.ndarray) -> str:
    digest = hashlib.sha256()
    for entry in entries:
        digest.update(f"{entry.name}|{entry.dtype}|{entry.shape}\n".encode())
    digest.update(buffer.data)
    return digest.hexdigest()


def bundle_weights(named: Iterable[tuple[str, torch.Tensor]], number: int) -> WeightBundle:
    """Lay the tensors out in name order, 16-byte aligned, tied aliases sharing their bytes, and sign them with SHA-256."""
    items = sorted(named, key=lambda item: item[0])
    entries: list[TensorEntry] = []
    placed: dict[tuple[object, ...], tuple[int, int]] = {}
    chunks: list[tuple[int, torch.Tensor]] = []
    end = 0
    for name, tensor in items:
        flat = tensor.detach().contiguous()
        # The address alone does not make an alias: a slice or a transposed view starts at the same one.
        place = (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
        if place not in placed or tensor.numel() == 0:
            start = -(-end // 16) * 16
            end = start + flat.numel() * flat.element_size()
            placed[place] = (start, end)
            chunks.append((start, flat))
        lo, hi = placed[place]
        entries.append(TensorEntry(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), lo, hi))
    buffer = np.zeros(end, dtype=np.uint8)
    for start, flat in chunks:
        raw = flat.view(-1).view(torch.uint8).numpy()
        buffer[start : start + raw.size] = raw
    signed = tuple(entries)
    return WeightBundle(WeightVersion(number, _checksum(signed, buffer)), signed, buffer)


INBOX: dict[int, WeightBundle] = {}
"""Bundles handed to the engine of this process, by version; the transfer engine takes them out."""


def require_complete(pushed: Iterable[str], expected: frozenset[str]) -> None:
    """Raise WeightError unless every weight the engine loaded at start is in the push (the tied head included)."""
    missing = sorted(expected - set(pushed))
    if missing:
        raise WeightError(
            f"the push lacks {len(missing)} of {len(expected)} weights, first {missing[0]!r}: the engine would go on with old "
            f"values there; push every name of the checkpoint, tied heads under both names"
        )


def require_same_model(pushed: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Raise WeightError unless the push (name -> shape) covers the weights loaded at start, each in the same shape.

    Asked before the transfer: vLLM itself would stop half-way through the load, with layers of two versions.
    """
    require_complete(pushed, frozenset(expected))
    for name, shape in pushed.items():
        if name in expected and shape != expected[name]:
            raise WeightError(
                f"the push has {name!r} of shape {shape}, the engine has {expected[name]}: these are weights of another model; "
                f"start the engines on the folder that the learner was started on"
            )


def register_transfer() -> None:
    """Make `object_store` known to vLLM's weight-transfer factory (idempotent)."""
    from vllm.distributed.weight_transfer.base import WeightTransferEngine, WeightTransferInitInfo, WeightTransferUpdateInfo
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    if "object_store" in WeightTransferEngineFactory._registry:
        return

    @dataclass
    class InitInfo(WeightTransferInitInfo):
        """Nothing to agree on: the inbox is in this process."""

    @dataclass
    class UpdateInfo(WeightTransferUpdateInfo):
        """Which bundle of the inbox to load."""

        number: int

    class ObjectStoreTransfer(WeightTransferEngine[InitInfo, UpdateInfo]):
        """Loads a bundle from this process's inbox with vLLM's layerwise reload."""

        init_info_cls = InitInfo
        update_info_cls = UpdateInfo

        def init_transfer_engine(self, init_info: InitInfo) -> None:
            """No connection to make."""

        def start_weight_update(self) -> None:
            from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

            initialize_layerwise_reload(self.model)

        def update_weights(self, update_info: dict[str, Any]) -> None:
            # The base class synchronises an accelerator afterwards, which a CPU build of torch does not have.
            self.receive_weights(self.parse_update_info(update_info))

        def receive_weights(self, update_info: UpdateInfo) -> None:
            load: Any = self.model.load_weights
            load(INBOX.pop(update_info.number).tensors())

        def finish_weight_update(self) -> None:
            from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

            finalize_layerwise_reload(self.model, self.model_config)

        def shutdown(self) -> None:
            INBOX.clear()

    WeightTransferEngineFactory.register_engine("object_store", ObjectStoreTransfer)
