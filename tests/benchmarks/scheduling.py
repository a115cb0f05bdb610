"""Longest first or in the order of arrival?  python -m tests.benchmarks.scheduling [--model DIR] [--rounds 9] [--slots 16]

One real engine generates 4 times as many responses as it decodes at once, half of them with a budget of 32 tokens and half with
one of 160; the end of sequence is ignored, so lengths are the budgets. Every round draws a random order of arrival and runs it as
it is and longest first, by turns; both generate the same tokens, which is checked. Exit status 0 when longest first takes less
time in the median, 1 when it does not.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import rollout.engine
from rl.schedule import Order, submission_order
from rl.settings import RolloutSettings
from rl.types import Lease
from rollout.sampling import sampling_params
from tests.benchmarks.layout import warm_start
from tests.benchmarks.our_side import BenchmarkError
from tests.builders import make_lease, make_prompt

ORDERS: tuple[Order, Order] = ("arrival", "longest_first")
PROMPT_TOKENS = 24
REQUESTS_PER_SLOT = 4


def main(argv: Sequence[str] | None = None) -> int:
    """Measure both orders; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.scheduling", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, help="local model folder (default: the quickstart's cached warm start)")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--budgets", type=int, nargs="+", default=[32, 160], help="tokens; requests take turns")
    options = parser.parse_args(argv)
    settings = RolloutSettings(max_length=max(options.budgets), max_concurrent=options.slots, kv_cache_gb=0.5)
    rollout.engine.sampling_params = _to_the_end  # pyright: ignore[reportPrivateImportUsage]
    folder = options.model or warm_start()
    engine = rollout.engine.Engine(folder, settings, dtype="float32", max_prompt_length=PROMPT_TOKENS, seed=0)
    leases = draw_leases(REQUESTS_PER_SLOT * options.slots, options.budgets)
    makespan(engine, leases)  # the first run allocates
    seconds: dict[Order, list[float]] = {order: [] for order in ORDERS}
    steps: dict[Order, list[int]] = {order: [] for order in ORDERS}
    for number in range(options.rounds):
        arrived = random.Random(number).sample(leases, len(leases))
        found = []
        for order in ORDERS if number % 2 else ORDERS[::-1]:
            took, engine_steps, tokens = makespan(engine, submission_order(arrived, order))
            seconds[order].append(took)
            steps[order].append(engine_steps)
            found.append(tokens)
        if found[0] != found[1]:
            raise BenchmarkError(f"round {number}: the two orders did not generate the same tokens")
    return report(options, leases, seconds, steps)


def _to_the_end(lease: Lease, **arguments: Any) -> Any:
    params = sampling_params(lease, **{**arguments, "stop_ids": ()})
    params.ignore_eos = True
    return params


def draw_leases(count: int, budgets: Sequence[int]) -> list[Lease]:
    """Leases with prompts of their own, which take the budgets in turn as their exact length."""
    rng = random.Random(0)
    leases = []
    for i in range(count):
        prompt = make_prompt(i, token_ids=[rng.randrange(4, 60) for _ in range(PROMPT_TOKENS)])
        tokens = budgets[i % len(budgets)]
        leases.append(replace(make_lease(prompt=prompt, group=i, budget=tokens), max_new_tokens=tokens, seed=i))
    return leases


def makespan(engine: rollout.engine.Engine, leases: Sequence[Lease]) -> tuple[float, int, dict[str, tuple[int, ...]]]:
    """Seconds and engine steps until the last response is there, and the tokens by ticket."""
    began = time.perf_counter()
    engine.submit(leases)
    steps, tokens = 0, {}
    while len(tokens) < len(leases):
        progress = engine.advance(1.0)
        steps += progress.stats.steps
        tokens |= {r.lease.ticket: r.response_ids for r in progress.rollouts}
    took = time.perf_counter() - began
    if wrong := [lease.ticket for lease in leases if len(tokens[lease.ticket]) != lease.max_new_tokens]:
        raise BenchmarkError(f"{len(wrong)} responses are not as long as their budget, first {wrong[0]}")
    return took, steps, tokens


def report(
    options: argparse.Namespace, leases: Sequence[Lease], seconds: dict[Order, list[float]], steps: dict[Order, list[int]]
) -> int:
    """Print the table and one line of JSON; returns the exit status."""
    ratios = [arrival / longest for arrival, longest in zip(seconds["arrival"], seconds["longest_first"], strict=True)]
    total = sum(lease.max_new_tokens for lease in leases)
    title = f"{len(leases)} responses of {options.budgets} tokens, {options.slots} at once, {options.rounds} rounds"
    table = Table("order", "seconds (median)", "engine steps (median)", "tokens/s", title=title)
    for order in ORDERS:
        median = statistics.median(seconds[order])
        table.add_row(order, f"{median:.3f}", f"{statistics.median(steps[order]):.0f}", f"{total / median:.0f}")
    Console(width=None if sys.stdout.isatty() else 100).print(table)
    ratio = statistics.median(ratios)
    in_steps = statistics.median(a / b for a, b in zip(steps["arrival"], steps["longest_first"], strict=True))
    print(f"arrival / longest first: seconds {ratio:.3f} ({min(ratios):.3f} to {max(ratios):.3f}), engine steps {in_steps:.3f}")
    row = {
        "benchmark": "scheduling", "model": str(options.model or "quickstart"), "slots": options.slots, "requests": len(leases),
        "budgets": options.budgets, "seconds": seconds, "steps": steps, "ratio_median": ratio,
        "steps_ratio_median": in_steps,
    }  # fmt: skip
    print(json.dumps(row))
    return int(ratio <= 1.0)


if __name__ == "__main__":
    sys.exit(main())
