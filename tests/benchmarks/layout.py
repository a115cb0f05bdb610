"""Length-sorted padded rows or short packs?  python -m tests.benchmarks.layout [--model DIR] [--rounds 3]

Forward and backward of one step's rollouts, laid out in both ways, with the same model and lengths; the ways take turns. A pack
is several rollouts in one row with positions that start anew, no cache and no mask, the only form that transformers 5.10 keeps
apart. Both ways must give the same log-probs. Exit status 0 when the shipped layout (rows) is the fastest, 1 when it is not.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from launch.config import load_settings
from rl.batch import plan_microbatches
from rl.policy import PolicyModel, load_policy
from tests.benchmarks.our_side import ROOT, BenchmarkError

Layout = list[list[list[int]]]
"""Micro-batches of rows of rollouts."""

PACK_TOKENS = (256, 512, 1024)
"""Row lengths of the packs that are tried."""
SAME = 1e-3
"""Largest difference of a log-prob between two layouts that rounding explains."""


def main(argv: Sequence[str] | None = None) -> int:
    """Measure all layouts; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.layout", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, help="local model folder (default: the quickstart's cached warm start)")
    parser.add_argument("--rollouts", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    settings = load_settings(ROOT / "configs" / "quickstart.yaml")
    budget = settings.learner.tokens_per_microbatch
    policy = load_policy(options.model or warm_start(), dtype="float32").train()
    tokens = draw_rollouts(options.rollouts, vocabulary=policy.lm.config.vocab_size)
    lengths = [len(ids) for ids in tokens]
    layouts: dict[str, Layout] = {"rows": [[[i] for i in rows] for rows in plan_microbatches(lengths, budget)]}
    for width in PACK_TOKENS:
        layouts[f"packs of {width}"] = pack(lengths, width, budget)
    expected = run(policy, tokens, layouts["rows"])
    seconds: dict[str, list[float]] = {name: [] for name in layouts}
    for _ in range(options.rounds):
        for name, layout in layouts.items():
            began = time.perf_counter()
            found = run(policy, tokens, layout)
            seconds[name].append(time.perf_counter() - began)
            worst = max(float((a - b).abs().max()) for a, b in zip(found, expected, strict=True))
            if worst > SAME:
                raise BenchmarkError(f"{name}: log-probs differ by {worst:.1e} from those of rows; rollouts see their neighbours")
    result = {name: {"seconds": statistics.median(seconds[name]), "padding": padding(lengths, layouts[name])} for name in layouts}
    title = f"{len(tokens)} rollouts, {sum(lengths)} tokens, forward + backward"
    table = Table("layout", "seconds", "against rows", "padding", title=title)
    for name, row in result.items():
        ratio = row["seconds"] / result["rows"]["seconds"]
        table.add_row(name, f"{row['seconds']:.3f}", f"{ratio:.2f}x", f"{row['padding']:.1%}")
    Console(width=None if sys.stdout.isatty() else 100).print(table)
    print(json.dumps({"benchmark": "layout", "model": str(options.model or "quickstart"), "layouts": result}))
    return int(min(result, key=lambda name: result[name]["seconds"]) != "rows")


def warm_start() -> Path:
    from rl.sft import cached_folder

    folder = cached_folder(load_settings(ROOT / "configs" / "quickstart.yaml"))
    if not (folder / "config.json").is_file():
        raise BenchmarkError("there is no warm-started model yet", fix="make quickstart ARGS=max_steps=1, or --model")
    return folder


def draw_rollouts(count: int, *, vocabulary: int) -> list[list[int]]:
    """Token ids of made-up rollouts, as long as the quickstart's: 80 tokens with their prompt, give or take 22."""
    generator = torch.Generator().manual_seed(0)
    lengths = (torch.randn(count, generator=generator) * 22 + 80).clamp(40, 160).long().tolist()
    return [torch.randint(vocabulary, (n,), generator=generator).tolist() for n in lengths]


def pack(lengths: Sequence[int], width: int, budget: int) -> Layout:
    """First fit of the longest first into rows of at most ``width`` tokens, then as many rows as the micro-batch takes."""
    rows: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fitting = (row for row in rows if sum(lengths[j] for j in row) + lengths[i] <= width)
        row = next(fitting, None)
        if row is None:
            rows.append([i])
        else:
            row.append(i)
    per = max(1, budget // width)
    return [rows[i : i + per] for i in range(0, len(rows), per)]


def padding(lengths: Sequence[int], layout: Layout) -> float:
    """Share of padded positions."""
    grid = sum(len(rows) * max(sum(lengths[i] for i in row) for row in rows) for rows in layout)
    return 1.0 - sum(lengths) / grid


def run(policy: PolicyModel, tokens: Sequence[Sequence[int]], layout: Layout) -> list[torch.Tensor]:
    """Forward and backward over all micro-batches; the log-probs of each rollout's tokens."""
    found: dict[int, torch.Tensor] = {}
    policy.zero_grad()
    for rows in layout:
        width = max(sum(len(tokens[i]) for i in row) for row in rows)
        token_BS, position_BS = torch.zeros((2, len(rows), width), dtype=torch.int64)
        where: list[tuple[int, int, int]] = []
        for b, row in enumerate(rows):
            start = 0
            for i in row:
                length = len(tokens[i])
                token_BS[b, start : start + length] = torch.tensor(tokens[i])
                position_BS[b, start : start + length] = torch.arange(length)
                where.append((i, b * width + start, length))
                start += length
        packed = any(len(row) > 1 for row in rows)
        at_T = torch.cat([torch.arange(start, start + length - 1) for _, start, length in where])
        options = {"position_ids": position_BS} if packed else {}
        hidden_BSH = policy.lm.base_model(input_ids=token_BS, use_cache=False, **options).last_hidden_state
        logp_T = policy.head(hidden_BSH.flatten(0, 1)[at_T], token_BS.flatten()[at_T + 1], None)[0]
        logp_T.sum().backward()
        parts = logp_T.detach().split([length - 1 for _, _, length in where])
        found |= {i: part for (i, _, _), part in zip(where, parts, strict=True)}
    return [found[i] for i in range(len(tokens))]


if __name__ == "__main__":
    sys.exit(main())
