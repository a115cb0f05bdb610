"""A real engine actor, as tests ask it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rl.batch import pack_rollouts, pad_rows
from rl.behaviour import behaviour_of
from rl.settings import RolloutSettings
from rl.types import Lease, Rollout, WeightVersion
from rl.waiting import wait_for
from rollout.progress import EngineStats
from rollout.weights import WeightBundle, bundle_weights
from tests.processor_world import tiny_vocabulary

DEADLINE_S = 180.0
MAX_GAP = 1e-3
"""Largest difference of a sampled token's log-prob between a float32 engine and the learner that rounding explains."""
MAX_PROMPT = 320
VOCABULARY = tiny_vocabulary()


@dataclass
class Served:
    """An engine actor and the number of the next push."""

    actor: Any
    following: int = 1

    def push(self, bundle: WeightBundle) -> WeightVersion:
        return wait_for([self.actor.set_weights.remote(bundle)], seconds=DEADLINE_S, what="engine takes weights")[0]

    def push_weights(self, weights: dict[str, torch.Tensor]) -> WeightVersion:
        version = self.push(bundle_weights(weights.items(), self.following))
        self.following += 1
        return version

    def generate(self, leases: Sequence[Lease]) -> list[Rollout]:
        return wait_for([self.actor.generate.remote(list(leases))], seconds=DEADLINE_S, what="engine generates")[0]

    def followed(self, leases: Sequence[Lease]) -> tuple[list[Rollout], list[EngineStats]]:
        """The rollouts in the order of the leases, and the engine's figures on the way."""
        wait_for([self.actor.submit.remote(list(leases))], seconds=DEADLINE_S, what="engine takes leases")
        done: dict[str, Rollout] = {}
        stats: list[EngineStats] = []
        while len(done) < len(leases):
            (progress,) = wait_for([self.actor.advance.remote(5.0)], seconds=DEADLINE_S, what="engine generates")
            done |= {rollout.lease.ticket: rollout for rollout in progress.rollouts}
            stats.append(progress.stats)
        return [done[lease.ticket] for lease in leases], stats

    def version(self) -> int:
        return wait_for([self.actor.ping.remote()], seconds=DEADLINE_S, what="engine answers")[0]


def start_engine(folder: Path, settings: RolloutSettings) -> Served:
    """An engine in an actor of its own, with one thread."""
    import ray

    from rollout.actor import RolloutActor

    options = ray.remote(RolloutActor).options(num_cpus=0.5, runtime_env={"env_vars": {"OMP_NUM_THREADS": "1"}})
    actor = options.remote(settings, dtype="float32", max_prompt_length=MAX_PROMPT, seed=0, trust_remote_code=False)
    wait_for([actor.start.remote(str(folder))], seconds=DEADLINE_S, what="engine loads the model")
    return Served(actor)


def largest_gap(policy: Any, rollouts: Sequence[Rollout]) -> float:
    """Largest |engine - replay| over every sampled token, replayed a shaping at a time."""
    gaps = []
    for shaping in dict.fromkeys(r.lease.shaping for r in rollouts):
        chosen = [r for r in rollouts if r.lease.shaping == shaping]
        zeros = torch.zeros(len(chosen))
        micro = pad_rows(pack_rollouts(chosen, zeros, zeros.long(), vocabulary=VOCABULARY), range(len(chosen)))
        with torch.no_grad():
            scores = policy(
                micro.token_BS, micro.position_T, micro.target_T, micro.temperature_T, micro.bias_T,
                behaviour_of([shaping], VOCABULARY),
            )  # fmt: skip
        known = ~micro.sampled_logp_T.isnan()
        assert int(known.sum()) == sum(len(r.logp_T) - len(r.forced) for r in chosen)
        gaps.append(float((scores.shaped - micro.sampled_logp_T)[known].abs().max()))
    return max(gaps)
