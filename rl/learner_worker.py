"""The learner as a verl worker group: Ray actors, one DeepSpeed rank each; DataProto at this boundary only."""

from __future__ import annotations

import json
import os
import random
import socket
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
from tensordict import TensorDict
from verl import DataProto
from verl.single_controller.base import Worker
from verl.single_controller.base.decorator import Dispatch as _Dispatch
from verl.single_controller.base.decorator import register
from verl.single_controller.ray import RayWorkerGroup
from verl.utils.seqlen_balancing import get_seqlen_balanced_partitions

from rl.batch import units_of
from rl.guidance import Guidance, HeadSources
from rl.settings import LearnerSettings, LossSettings
from rl.types import TrainBatch, WeightVersion
from rl.waiting import wait_for
from rollout.weights import WeightBundle, bundle_weights

Dispatch: Any = _Dispatch  # its members are registered at run time, which a type checker cannot see
RENDEZVOUS_S = 120.0
"""A task that only names an address; the time is for a process to start on a busy node."""
TOKEN_COLUMNS = ("token_T", "loss_mask_T", "advantage_T", "sampled_logp_T", "bias_T")
GUIDANCE = "guidance/"
"""In front of the names of a batch's guidance columns."""
ROLLOUT_COLUMNS = ("prompt_length_N", "prefill_length_N", "temperature_N", "minibatch_N", "index_N")


def to_data_proto(batch: TrainBatch, ranks: int) -> DataProto:
    """Lay a batch out as verl's DataProto, rows dealt so that every rank gets a similar number of tokens of each mini-batch.

    Rows are padded to the longest; rows that only fill up a rank have length 0 and are dropped by :func:`from_data_proto`.
    """
    lengths = batch.start_N.diff().tolist()
    per_rank: list[list[int]] = [[] for _ in range(ranks)]
    for m in sorted(set(batch.minibatch_N.tolist())):
        units = units_of(batch, [i for i, owner in enumerate(batch.minibatch_N.tolist()) if owner == m])
        shares: Any
        if len(units) < ranks:
            shares = [[j] for j in range(len(units))] + [[] for _ in range(ranks - len(units))]
        else:
            tokens = [sum(lengths[i] for i in unit) for unit in units]
            shares = get_seqlen_balanced_partitions(tokens, ranks, equal_size=False)
        for rank, share in enumerate(shares):
            per_rank[rank] += [i for j in share for i in units[j]]
    rows = max(len(share) for share in per_rank)
    width = max(lengths)
    columns: dict[str, torch.Tensor] = {"length_N": torch.zeros(ranks * rows, dtype=torch.int64)}
    tokens_of = {name: getattr(batch, name) for name in TOKEN_COLUMNS}
    tokens_of |= {GUIDANCE + name: column for name, column in batch.guidance.columns().items()}
    rollouts_of = {name: getattr(batch, name) for name in ROLLOUT_COLUMNS}
    rollouts_of |= {} if batch.pair_N is None else {"pair_N": batch.pair_N}
    for name, column in tokens_of.items():
        columns[name] = torch.zeros((ranks * rows, width, *column.shape[1:]), dtype=column.dtype)
    for name, column in rollouts_of.items():
        columns[name] = torch.zeros(ranks * rows, dtype=column.dtype)
    for rank, share in enumerate(per_rank):
        for k, i in enumerate(share):
            row, start = rank * rows + k, int(batch.start_N[i])
            columns["length_N"][row] = lengths[i]
            for name, column in tokens_of.items():
                columns[name][row, : lengths[i]] = column[start : start + lengths[i]]
            for name, column in rollouts_of.items():
                columns[name][row] = column[i]
    return DataProto(batch=TensorDict(columns, batch_size=[ranks * rows]))


def from_data_proto(data: DataProto) -> TrainBatch:
    """The ragged batch of one rank's rows; the inverse of :func:`to_data_proto` up to the order of rollouts."""
    columns = data.batch
    length_N = columns["length_N"]
    keep = length_N > 0
    valid = torch.arange(columns["token_T"].shape[1])[None, :] < length_N[:, None]
    start_N = torch.cat([torch.zeros(1, dtype=torch.int64), length_N[keep].cumsum(0)])
    tokens = {name: columns[name][valid] for name in TOKEN_COLUMNS}
    rollouts = {name: columns[name][keep] for name in ROLLOUT_COLUMNS}
    names = [str(name) for name in list(columns.keys())]
    guided = {name.removeprefix(GUIDANCE): columns[name][valid] for name in names if name.startswith(GUIDANCE)}
    pairs = columns["pair_N"][keep] if "pair_N" in names else None
    return TrainBatch(start_N=start_N, **tokens, **rollouts, pair_N=pairs, guidance=Guidance(**guided))


def gathered(named: Iterable[tuple[str, torch.Tensor]], *, keep: bool) -> list[tuple[str, torch.Tensor]] | None:
    """All weights, or None on a rank that does not ``keep`` them: it takes part to the end, but holds one tensor at a time."""
    if keep:
        return list(named)
    for _ in named:
        pass
    return None


def save_random_state(folder: Path, rank: int) -> None:
    """Write the state of every generator of this process: torch's as tensors, Python's and NumPy's as JSON (no pickle)."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    states = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    save_file(states, folder / f"learner-{rank}.safetensors")
    kind, keys, *rest = np.random.get_state(legacy=True)
    plain = {"python": random.getstate(), "numpy": [kind, np.asarray(keys).tolist(), *rest]}
    (folder / f"learner-{rank}.json").write_text(json.dumps(plain) + "\n", encoding="utf-8")


def load_random_state(folder: Path, rank: int) -> None:
    """Restore what :func:`save_random_state` wrote.

    A generator stays as it is where the checkpoint is older than its record, or was made without a GPU.
    """
    from safetensors.torch import load_file

    states = load_file(folder / f"learner-{rank}.safetensors")
    torch.set_rng_state(states["torch"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
    path = folder / f"learner-{rank}.json"
    if not path.exists():
        return
    plain = json.loads(path.read_text(encoding="utf-8"))
    version, internal, gauss = plain["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, *rest = plain["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))


def _rendezvous() -> tuple[str, str]:
    """Address of this node and a free port on it."""
    address = ray.util.get_node_ip_address().strip("[]")
    with socket.socket() as probe:
        probe.bind((address, 0))
        return address, str(probe.getsockname()[1])


class LearnerGroup(RayWorkerGroup):
    """verl's worker group, but the task that finds the rendezvous address asks for no CPU: a rank's place may be half a one."""

    def _get_master_addr_port(self, pg: Any, bundle_index: int = 0, master_port_range: Any = None) -> None:
        place = PlacementGroupSchedulingStrategy(placement_group=pg, placement_group_bundle_index=bundle_index)
        ref = ray.remote(_rendezvous).options(num_cpus=0, scheduling_strategy=place).remote()
        (answer,) = wait_for([ref], seconds=RENDEZVOUS_S, what="the first learner rank's node names its address")
        self._master_addr, self._master_port = answer


class LearnerWorker(Worker):
    """One learner rank inside a Ray actor. Every method is non-blocking on the driver, which waits with a deadline."""

    def __init__(
        self,
        settings: LearnerSettings,
        loss: LossSettings,
        *,
        dtype: str,
        trust_remote_code: bool,
        seed: int,
        heads: HeadSources | None = None,
    ) -> None:
        super().__init__()
        self.heads = heads
        threads = settings.threads_per_rank or max(1, (os.cpu_count() or 1) // settings.ranks)
        torch.set_num_threads(threads)
        self.settings, self.loss_settings = settings, loss
        self.dtype, self.trust_remote_code, self.seed = dtype, trust_remote_code, seed
        self.learner: Any = None
        self.transfer: Any = None

    @register(dispatch_mode=Dispatch.ONE_TO_ALL, blocking=False)
    def start(self, folder: str) -> int:
        """Join the process group and load the model; returns the number of parameters."""
        from rl.learner import Learner
        from rl.process_group import join_process_group

        torch.manual_seed(self.seed + self.rank)
        random.seed(self.seed + self.rank)
        np.random.seed(self.seed + self.rank)
        if not torch.distributed.is_initialized():
            join_process_group(deadline_s=self.settings.deadline_s)
        self.learner = Learner(
            Path(folder),
            self.settings,
            self.loss_settings,
            dtype=self.dtype,
            trust_remote_code=self.trust_remote_code,
            heads=self.heads,
        )
        return sum(getattr(p, "ds_numel", p.numel()) for p in self.learner.lm.parameters())

    @register(dispatch_mode=Dispatch.DP_COMPUTE_METRIC, blocking=False)
    def update(self, data: DataProto) -> dict[str, Any]:
        """Optimise on this rank's rows; the rest of the arguments travel in ``data.meta_info``."""
        return self.learner.update(from_data_proto(data), **data.meta_info["update"])

    @register(dispatch_mode=Dispatch.DP_COMPUTE_METRIC, blocking=False)
    def score(self, data: DataProto) -> tuple[torch.Tensor, torch.Tensor]:
        """See `rl.learner.Learner.score`, of this rank's rows."""
        return self.learner.score(from_data_proto(data))

    @register(dispatch_mode=Dispatch.DP_COMPUTE_METRIC, blocking=False)
    def top_ids(self, data: DataProto) -> tuple[torch.Tensor, torch.Tensor]:
        """See `rl.learner.Learner.top_ids`, of this rank's rows."""
        return self.learner.top_ids(from_data_proto(data), **data.meta_info["top_ids"])

    @register(dispatch_mode=Dispatch.ONE_TO_ALL, blocking=False)
    def collect_weights(self, number: int) -> WeightBundle | None:
        """All weights as one checksummed bundle (rank 0; the others take part in gathering and return None)."""
        weights = gathered(self.learner.named_weights(), keep=self.rank == 0)
        return None if weights is None else bundle_weights(weights, number)

    @register(dispatch_mode=Dispatch.ONE_TO_ALL, blocking=False)
    def push_by_nccl(self, number: int, engines: list[Any], ranks_per_engine: int) -> None:
        """Send all weights from GPU to GPU as version ``number``; the first call makes the NCCL group."""
        if self.transfer is None:
            from rollout.nccl_push import open_push

            address = ray.util.get_node_ip_address().strip("[]")
            self.transfer = open_push(
                self.learner,
                engines,
                rank=self.rank,
                ranks_per_engine=ranks_per_engine,
                address=address,
                seconds=self.settings.deadline_s,
            )
        self.transfer.client.version = number
        self.transfer.send_weights()

    @register(dispatch_mode=Dispatch.ONE_TO_ALL, blocking=False)
    def save(self, folder: str) -> WeightVersion | None:
        """Write this rank's optimiser and random-number state, and (rank 0) the model as a Hugging Face folder."""
        root = Path(folder)
        self.learner.save(root / "learner")
        save_random_state(root / "rng", self.rank)
        return self._save_model(root / "model")

    @register(dispatch_mode=Dispatch.ONE_TO_ALL, blocking=False)
    def save_model(self, folder: str) -> WeightVersion | None:
        """Write the model alone as a Hugging Face folder (rank 0; returns its checksum there)."""
        return self._save_model(Path(folder))

    def _save_model(self, folder: Path) -> WeightVersion | None:
        weights = gathered(self.learner.named_weights(), keep=self.rank == 0)
        if weights is None:
            return None
        tied = {alias for aliases in self.learner.tied_names.values() for alias in aliases}
        state = {name: tensor for name, tensor in weights if name not in tied}
        self.learner.lm.save_pretrained(folder, state_dict=state, safe_serialization=True)
        return bundle_weights(weights, 0).version

    @register(dispatch_mode=Dispatch.ONE_TO_ALL, blocking=False)
    def load(self, folder: str) -> None:
        """Restore the state written by :meth:`save` (checksums were verified by the driver)."""
        root = Path(folder)
        self.learner.load(root / "learner")
        load_random_state(root / "rng", self.rank)
