"""Tokens per second of a real engine with all shaping on against the same engine without:  python -m tests.benchmarks.shaping

SmolLM2-135M (`budget-rl fetch smollm2` first), 32 requests at once, every answer of the same length. Two engines in processes
of their own, turn about in one run; the figure is the median over the pairs of turns. Target: 0.95 on a CPU, 0.97 on a GPU.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from rl.rollout_settings import AdaptiveSettings, ReflexSettings, RolloutSettings
from rl.types import AdaptiveTemperature, EntropyStatistics, Lease, Reflex, Shaping
from rl.waiting import wait_for
from tests.builders import make_lease, make_prompt

MODEL = Path("~/.cache/budget-rl/models/smollm2").expanduser()
REQUESTS, TOKENS, PROMPT = 32, 64, 48
DEADLINE_S = 600.0
PLAIN = RolloutSettings(max_length=128, max_concurrent=REQUESTS, kv_cache_gb=0.5, budgets=["free"])
WORDS = ReflexSettings(end="<|im_end|>")  # SmolLM2 knows the five words but has no </think>
SHAPED = PLAIN.model_copy(update={"adaptive": AdaptiveSettings(), "reflex": WORDS})
STATISTICS = EntropyStatistics(pivot=0.5, spread=2.0, high=0.8, low=-5.0, deviation=1.5, tokens=1000)
SHAPING = Shaping(1.0, AdaptiveTemperature(STATISTICS), Reflex(amplitude=3.0, period=40.0))


class TimedEngine:
    """An engine whose answers do not end before their cap, and the time they took."""

    def __init__(self, settings: RolloutSettings, dtype: str) -> None:
        import rollout.engine

        made = rollout.engine.sampling_params

        def endless(lease: Lease, **options: Any) -> Any:
            params = made(lease, **options)
            params.ignore_eos, params.stop_token_ids = True, []
            return params

        rollout.engine.sampling_params = endless
        self.engine = rollout.engine.Engine(MODEL, settings, dtype=dtype, max_prompt_length=64, seed=0)
        self.engine.stop_ids = []

    def seconds(self, leases: list[Lease]) -> float:
        """Time to answer all; raises AssertionError when an answer ended early."""
        began = time.perf_counter()
        rollouts = self.engine.generate(leases)
        took = time.perf_counter() - began
        assert all(len(r.logp_T) == TOKENS for r in rollouts)
        return took


def leases(shaping: Shaping, turn: int) -> list[Lease]:
    """The requests of a turn, the same for both engines; another turn has other prompts, so that no cache helps."""
    return [
        replace(
            make_lease(prompt=make_prompt(i, token_ids=_prompt(turn * 7919 + i * 131)), group=i),
            shaping=shaping, max_new_tokens=TOKENS, seed=turn * 1000 + i,
        )
        for i in range(REQUESTS)
    ]  # fmt: skip


def _prompt(start: int) -> list[int]:
    return [1000 + (start + 17 * place) % 30_000 for place in range(PROMPT)]


def main(argv: list[str] | None = None) -> int:
    """Print both speeds and their ratio; status 1 below the target."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=8)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    chosen = parser.parse_args(argv)
    if not MODEL.is_dir():
        print(f"{MODEL} is missing: run `budget-rl fetch smollm2` first", file=sys.stderr)
        return 2
    import ray
    import torch

    gpu = torch.cuda.is_available()
    ray.init(num_cpus=2, num_gpus=int(gpu), include_dashboard=False, log_to_driver=False)
    threads = {"OMP_NUM_THREADS": str(os.cpu_count() or 1)}
    options = ray.remote(TimedEngine).options(num_cpus=0.5, num_gpus=0.4 if gpu else 0, runtime_env={"env_vars": threads})
    # Both share the GPU; on a CPU the fraction means nothing.
    both = [settings.model_copy(update={"gpu_memory_fraction": 0.3}) for settings in (PLAIN, SHAPED)]
    engines = [options.remote(settings, chosen.dtype) for settings in both]

    def turn(which: int, number: int) -> float:
        work = leases(SHAPING if which else Shaping(), number)
        return wait_for([engines[which].seconds.remote(work)], seconds=DEADLINE_S, what="an engine answers")[0]

    for which in (0, 1):
        turn(which, 0)  # warm
    ratios, speeds = [], ([], [])
    for number in range(1, chosen.turns + 1):
        order = (0, 1) if number % 2 else (1, 0)
        took = {which: turn(which, number) for which in order}
        ratios.append(took[0] / took[1])
        for which in (0, 1):
            speeds[which].append(REQUESTS * TOKENS / took[which])
        shown = f"plain {speeds[0][-1]:.0f} tokens/s, shaped {speeds[1][-1]:.0f}, ratio {ratios[-1]:.3f}"
        print(f"turn {number}: {shown}", flush=True)
    plain, shaped = (statistics.median(values) for values in speeds)
    ratio, target = statistics.median(ratios), 0.97 if gpu else 0.95
    print(f"{'GPU' if gpu else 'CPU'} {chosen.dtype}, {REQUESTS} requests of {TOKENS} tokens: plain {plain:.0f} tokens/s, "
          f"shaped {shaped:.0f}, ratio {ratio:.3f} (target {target})")  # fmt: skip
    ray.shutdown()
    return int(ratio < target)


if __name__ == "__main__":
    sys.exit(main())
