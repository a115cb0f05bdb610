"""Everything that touches Ray's life cycle: connecting, placing the actors, taking them down."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rl.errors import BudgetRLError
from rl.settings import Settings
from rl.waiting import StopFlag, wait_for

log = logging.getLogger("budget_rl")

SHUTDOWN_S = 5.0
"""How long actors get to end by themselves before they are killed."""


def connect() -> dict[str, float]:
    """Join the cluster that RAY_ADDRESS names (as in a submitted job), else start one in this machine; returns its resources.

    A cluster we start listens on loopback only and has no dashboard; Ray turns token authentication on for it.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # The driver computes nothing; unnamed, DeepSpeed would look for an accelerator and say on the console what it found.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import ray

    options: dict[str, Any] = {"log_to_driver": False, "configure_logging": False, "namespace": "budget-rl"}
    if os.environ.get("RAY_ADDRESS"):
        ray.init(address="auto", **options)
    else:
        ray.init(address="local", include_dashboard=False, _node_ip_address="127.0.0.1", **options)
    return dict(ray.cluster_resources())


def disconnect() -> None:
    """Leave the cluster; one that :func:`connect` started ends with all its processes."""
    import ray

    ray.shutdown()


@dataclass
class Workforce:
    """The actors of a run. ``start`` makes them, ``close`` takes every one of them down."""

    settings: Settings
    engines: list[Any] = field(default_factory=list)
    scorers: list[Any] = field(default_factory=list)
    learners: Any = None
    _groups: list[Any] = field(default_factory=list)

    def start_learners(self, folder: Path, *, stop: StopFlag | None = None) -> int:
        """Start the DeepSpeed ranks on a model folder; returns the number of parameters."""
        refs = self.launch_learners(folder)
        return wait_for(refs, seconds=self.settings.learner.deadline_s, what="learner ranks load the model", stop=stop)[0]

    def launch_learners(self, folder: Path) -> list[Any]:
        """Create the learner worker group and begin loading; returns the refs to wait for."""
        self.learners, pool = make_learners(self.settings)
        self._groups.append(pool)
        return self.learners.start(str(folder))

    def launch_engines(self, folder: Path) -> list[Any]:
        """Create the rollout actors and begin loading; returns the refs to wait for."""
        import ray

        from rollout.actor import RolloutActor

        settings = self.settings
        threads = settings.rollout.threads_per_worker or max(1, (os.cpu_count() or 1) // settings.rollout.workers)
        environment = {"OMP_NUM_THREADS": str(threads), "RAY_USAGE_STATS_ENABLED": "0"}
        for index in range(settings.rollout.workers):
            options = ray.remote(RolloutActor).options(
                num_cpus=settings.rollout.cpus_per_worker,
                num_gpus=settings.rollout.gpus_per_worker,
                runtime_env={"env_vars": environment},
                name=f"rollout-{index}-{os.getpid()}",
            )
            self.engines.append(
                options.remote(
                    settings.rollout,
                    dtype=settings.model.dtype,
                    max_prompt_length=settings.data.max_prompt_length,
                    seed=settings.seed,
                    trust_remote_code=settings.model.trust_remote_code,
                )
            )
        return [engine.start.remote(str(folder)) for engine in self.engines]

    def launch_scorers(self, special_tokens: Sequence[str]) -> list[Any]:
        """Create the reward actors; returns the refs to wait for."""
        import ray

        from reward.actor import RewardActor

        settings = self.settings
        for index in range(settings.reward.workers):
            options = ray.remote(RewardActor).options(
                num_cpus=settings.reward.cpus_per_worker, name=f"reward-{index}-{os.getpid()}"
            )
            self.scorers.append(
                options.remote(settings.reward, settings.data, settings.rollout.max_length, tuple(special_tokens))
            )
        return [scorer.ready.remote() for scorer in self.scorers]

    def close(self) -> None:
        """Kill every actor and give their places back; reward actors first get a moment to end their grader processes."""
        import ray

        if not ray.is_initialized():
            return
        if self.scorers:
            ray.wait([s.close.remote() for s in self.scorers], num_returns=len(self.scorers), timeout=SHUTDOWN_S)
        workers = list(self.learners.workers) if self.learners is not None else []
        for actor in [*self.engines, *self.scorers, *workers]:
            ray.kill(actor)
        for pool in self._groups:
            for group in pool.pgs or []:
                ray.util.remove_placement_group(group)
        self.engines, self.scorers, self.learners, self._groups = [], [], None, []

    def close_learners(self) -> None:
        """Kill the learner ranks only (between the warm start and the run)."""
        import ray

        for actor in self.learners.workers:
            ray.kill(actor)
        for pool in self._groups:
            for group in pool.pgs or []:
                ray.util.remove_placement_group(group)
        self.learners, self._groups = None, []


def make_learners(settings: Settings) -> tuple[Any, Any]:
    """A verl RayWorkerGroup of ``learner.ranks`` DeepSpeed ranks, and the resource pool that holds its places."""
    import ray
    from verl.single_controller.ray import RayClassWithInitArgs, RayResourcePool

    from rl.learner_worker import LearnerGroup, LearnerWorker

    learner = settings.learner
    on_gpu = learner.gpus_per_rank > 0
    # verl reserves `max_colocate_count` CPUs per rank and 1/that of its GPU; a fraction is fine on CPU.
    pool = RayResourcePool(
        process_on_nodes=ranks_by_node(learner.ranks, learner.cpus_per_rank, learner.gpus_per_rank),
        use_gpu=on_gpu,
        max_colocate_count=1 if on_gpu else learner.cpus_per_rank,  # pyright: ignore[reportArgumentType]
    )
    threads = learner.threads_per_rank or max(1, (os.cpu_count() or 1) // learner.ranks)
    remote = RayClassWithInitArgs(
        ray.remote(LearnerWorker),
        learner,
        settings.loss,
        dtype=settings.model.dtype,
        trust_remote_code=settings.model.trust_remote_code,
        seed=settings.seed,
    )
    remote.update_options({"num_cpus": 1 if on_gpu else learner.cpus_per_rank})
    group = LearnerGroup(
        resource_pool=pool,
        ray_cls_with_init=remote,
        bin_pack=False,
        device_name="cuda" if on_gpu else "cpu",
        use_gpu=on_gpu,
        worker_env={"OMP_NUM_THREADS": str(threads), "DS_ACCELERATOR": "cuda" if on_gpu else "cpu"},
    )
    return group, pool


def ranks_by_node(ranks: int, cpus: float, gpus: float) -> list[int]:
    """How many ranks each node takes: all on one if it fits, else spread evenly over the fewest nodes that hold them."""
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    fits = sorted((int(min(n.get("CPU", 0) / cpus, n.get("GPU", 0) / gpus if gpus else 1e9)) for n in nodes), reverse=True)
    for count in range(1, len(fits) + 1):
        if ranks % count == 0 and all(ranks // count <= room for room in fits[:count]):
            return [ranks // count] * count
    raise BudgetRLError(
        f"{ranks} learner ranks of {cpus:g} CPUs and {gpus:g} GPUs do not fit on the nodes of this cluster ({len(nodes)} nodes)",
        fix="lower learner.ranks, learner.cpus_per_rank or learner.gpus_per_rank",
    )


def live_actor_classes() -> list[str]:
    """Class names of all actors alive in the cluster, sorted; what a test reads to see that every part is real."""
    from ray.util.state import list_actors

    return sorted(str(vars(actor)["class_name"]) for actor in list_actors(filters=[("state", "=", "ALIVE")], limit=1000))
