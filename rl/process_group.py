"""The learner ranks' process group: how they meet, and what they put together without pickling anything."""

from __future__ import annotations

import os
import socket
from datetime import timedelta

import torch
import torch.distributed as dist


def join_process_group(*, deadline_s: float) -> None:
    """Initialise torch.distributed for DeepSpeed from RANK, WORLD_SIZE and an address: NCCL on GPU, gloo on CPU."""
    import deepspeed

    # Else DeepSpeed compiles a C++ all-reduce at the first start, a minute or an error where there is no compiler, for traffic
    # that gloo carries as well.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # An actor without GPUs sees none (rl/cluster.py), so this is what was assigned, not what the machine has.
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    timeout, rank, world_size = timedelta(seconds=deadline_s), int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    # As DeepSpeed itself binds it; with a single rank there is no peer.
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if backend == "nccl" and world_size > 1 else None
    store = _rendezvous_store(rank, world_size, timeout)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout, device_id=device)
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, timeout=timeout, verbose=False)


def _rendezvous_store(rank: int, world_size: int, timeout: timedelta) -> dist.TCPStore:
    """The store at LEARNER_RENDEZVOUS, else MASTER_ADDR and MASTER_PORT, served by rank 0 on that address alone.

    torch itself would listen on every address of the machine.
    """
    address = os.environ.get("LEARNER_RENDEZVOUS") or f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    host, _, port = address.rpartition(":")
    listening = socket.create_server((host, int(port))).detach() if rank == 0 else None
    return dist.TCPStore(host, int(port), world_size, is_master=rank == 0, timeout=timeout, master_listen_fd=listening)


def gathered_over_ranks(value_T: torch.Tensor) -> torch.Tensor:
    """The ranks' vectors (float32, of any lengths, on this rank's device) one after the other, the same on every rank.

    A collective: every rank must call it.
    """
    if dist.get_world_size() == 1:
        return value_T
    size = torch.tensor([value_T.numel()], device=value_T.device)
    sizes = [torch.zeros_like(size) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, size)
    longest = max(int(found) for found in sizes)
    padded_T = torch.zeros(longest, dtype=value_T.dtype, device=value_T.device)
    padded_T[: value_T.numel()] = value_T
    parts = [torch.zeros_like(padded_T) for _ in sizes]
    dist.all_gather(parts, padded_T)
    return torch.cat([part[: int(found)] for part, found in zip(parts, sizes, strict=True)])
