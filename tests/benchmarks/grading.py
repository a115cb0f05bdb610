"""Verdicts per second, against what one would write instead.  python -m tests.benchmarks.grading [--batches 20] [--rounds 3]

Math answers are graded in batches of 64, eight answers to each gold answer, half of them wrong; every round has new numbers.
Ours is a warm GraderPool of two children. Beside it stands math-verify with its default time-outs: called in this process (which
needs its main thread), in a multiprocessing pool that is made for each batch and thus always whole, and in one that is kept and
never replaces a worker that hangs. All ways take turns. Exit status 0 when ours gives 2000 verdicts per second on plain numbers.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import random
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import math_verify
from rich.console import Console
from rich.table import Table

from reward.pool import GraderPool, GradeTask

TARGET_PER_S = 2000
BATCH = 64
GROUP = 8
PROCESSES = 2
DEADLINE_S = 10.0

Pair = tuple[str, str]
"""Answer and gold answer."""
Way = Callable[[Sequence[Pair]], list[bool]]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure all ways; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.grading", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--batches", type=int, default=20, help="batches of 64 per way and round")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args(argv)
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    with GraderPool(PROCESSES, DEADLINE_S, preload=("math",)) as pool, multiprocessing.Pool(PROCESSES) as kept:
        pool.wait_ready()
        ways: Mapping[str, Way] = {
            "GraderPool": lambda pairs: graded(pool, pairs),
            "math-verify in process": lambda pairs: [verified(pair) for pair in pairs],
            "math-verify, pool per batch": verified_in_new_pool,
            "math-verify, kept pool": lambda pairs: kept.map(verified, pairs),
        }
        children = pool.pids
        results = {name: measure(ways, make, options) for name, make in ANSWERS.items()}
        if pool.pids != children:
            raise RuntimeError("children were replaced during the measurement; the machine is too loaded")
    for name, rates in results.items():
        table = Table("way", "verdicts/s", "ours is", title=f"{name}, {PROCESSES} processes, batches of {BATCH}")
        for way, rate in rates.items():
            table.add_row(way, f"{rate:.0f}", f"{rates['GraderPool'] / rate:.2f}x")
        Console(width=None if sys.stdout.isatty() else 100).print(table)
    print(json.dumps({"benchmark": "grading", "unit": "verdicts/s", "median_of": options.rounds, "results": results}))
    return int(results["plain numbers"]["GraderPool"] < TARGET_PER_S)


def measure(ways: Mapping[str, Way], make: Callable[[random.Random], Pair], options: argparse.Namespace) -> dict[str, float]:
    """Median rate of each way in verdicts per second; raises RuntimeError when two ways disagree on a verdict."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(options.rounds + 1):
        batches = [batch(random.Random(f"{turn}/{b}"), make) for b in range(options.batches)]
        found = {}
        for name, way in ways.items():
            began = time.perf_counter()
            found[name] = [way(pairs) for pairs in batches]
            if turn:  # the first round warms up
                seconds[name].append(time.perf_counter() - began)
        for name, verdicts in found.items():
            if verdicts != found["GraderPool"]:
                raise RuntimeError(f"{name} and GraderPool disagree on a verdict")
    return {name: options.batches * BATCH / statistics.median(times) for name, times in seconds.items()}


def batch(draws: random.Random, make: Callable[[random.Random], Pair]) -> list[Pair]:
    """Groups of answers that share a gold; every other answer is wrong."""
    pairs = []
    for _ in range(BATCH // GROUP):
        gold, right = make(draws)
        wrong = [make(draws)[1] for _ in range(GROUP // 2)]
        pairs += [(answer, gold) for answer in (*[right] * (GROUP // 2), *wrong)]
    return pairs


def plain_number(draws: random.Random) -> Pair:
    """An integer, a decimal or a fraction, and another way to write it."""
    n, d = draws.randrange(2, 100_000), draws.randrange(2, 50)
    return draws.choice(
        [(str(n), f"{n:,}"), (str(n), str(n)), (f"{n / 4}", f"\\frac{{{n}}}{{4}}"), (f"\\frac{{{n}}}{{{d}}}", f"{n}/{d}")]
    )


def mixed(draws: random.Random) -> Pair:
    """Three plain numbers to one short expression."""
    if draws.randrange(4):
        return plain_number(draws)
    n, k = draws.randrange(2, 1000), draws.randrange(2, 20)
    return draws.choice(
        [(f"{n}x + {k}", f"{k} + {n}x"), (f"({n}, {k})", f"({n},{k})"), (f"{n}\\sqrt{{{k}}}", f"\\sqrt{{{k}}}\\cdot {n}")]
    )


ANSWERS: Mapping[str, Callable[[random.Random], Pair]] = MappingProxyType({"plain numbers": plain_number, "mixed": mixed})


def graded(pool: GraderPool, pairs: Sequence[Pair]) -> list[bool]:
    return [verdict.is_correct for verdict in pool.grade([GradeTask("math", answer, (gold,)) for answer, gold in pairs])]


def verified(pair: Pair) -> bool:
    answer, gold = pair
    return bool(math_verify.verify(math_verify.parse(f"${gold}$"), math_verify.parse(f"${answer}$")))


def verified_in_new_pool(pairs: Sequence[Pair]) -> list[bool]:
    with multiprocessing.Pool(PROCESSES) as pool:
        return pool.map(verified, pairs)


if __name__ == "__main__":
    sys.exit(main())
