"""Does a run learn, and does it stay learnt?  python -m tests.benchmarks.learning [--seeds 3 --steps 300] [a.b=c ...]

Trains one run per seed with `budget-rl train`, each in its own folder, so that the same command continues where it was stopped;
evaluates before and after on held-out problems prompted without a budget, and judges four criteria. Exit status 0 when all
are met, 1 when one is missed, 2 when something cannot run.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from launch.config import find_config
from rl.bootstrap import Interval, aligned, common_problems, difference, paired_bootstrap, ratio
from rl.errors import BudgetRLError
from rl.run_folder import read_lines, replace_text
from tests.benchmarks.our_side import ROOT, BenchmarkError, train

WINDOW = 30
FIRST_STEPS = 10
"""Training steps whose mean stands for the start of training accuracy: one step alone is off by 4 points and more."""
MIN_GAIN, MAX_TOKENS, MAX_SEED_LOSS, MAX_WINDOW_LOSS = 0.05, 0.75, 0.02, 0.10
SECONDS_PER_STEP = 60.0
"""Deadline of a run: so much per step, and an hour for the warm start and the evaluations."""
METHODS: dict[str, tuple[str, ...]] = {
    "hbpo": (),
    "grpo": (
        "rollout.budgets=[free]", "reward.method=correct", "advantage.estimator=group_normalised", "advantage.centre=none",
        "advantage.intra_scale=none",
    ),
}
"""What a method changes in the configuration; `hbpo` is the configuration as it is."""


@dataclass(frozen=True)
class SeedResult:
    """One finished run. Accuracies are shares, lengths tokens; windows are relative to the start (shares, negative is a fall)."""

    seed: int
    before: dict[str, dict[str, float]]
    """Prompt id -> accuracy and tokens, prompted without a budget."""
    after: dict[str, dict[str, float]]
    train_start: float
    window: float
    """Worst window of `train/accuracy`, against the mean of the first steps."""
    window_step: int
    free_window: float | None
    """Worst window of the free members' accuracy, against the held-out accuracy before; None where a group has none."""
    free_window_step: int | None


def main(argv: Sequence[str] | None = None) -> int:
    """Run or read the runs, print the table and the JSON line; returns the exit status."""
    options = _parse(argv)
    try:
        root = options.out.expanduser().resolve()
        remember(root, options)
        if not options.report_only:
            for seed in range(options.seeds):
                run_seed(root, seed, options)
        report = summarise([read_seed(root, seed, options.steps) for seed in range(options.seeds)])
    except BudgetRLError as error:
        print(f"bench-learning: {error}", file=sys.stderr)
        return 2
    report = {"benchmark": "learning", "method": options.method, "steps": options.steps, "overrides": options.overrides, **report}
    show(report)
    print(json.dumps(report))
    return 0 if all(criterion["met"] for criterion in report["criteria"]) else 1


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.learning", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "quickstart.yaml")
    parser.add_argument("--method", choices=sorted(METHODS), default="hbpo")
    parser.add_argument("--out", type=Path, help="folder of the runs (default: ~/budget-rl/bench-learning/METHOD)")
    parser.add_argument("--report-only", action="store_true", help="read finished runs, train nothing")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c")
    options = parser.parse_intermixed_args(argv)
    if options.seeds < 1 or options.steps < 1:
        parser.error("--seeds and --steps must be at least 1")
    options.out = options.out or Path("~/budget-rl/bench-learning") / options.method
    return options


# -- running -----------------------------------------------------------------------------------------------------------------


def remember(root: Path, options: argparse.Namespace) -> None:
    """Note what the folder's runs are; BenchmarkError when it holds runs made otherwise (more steps or seeds are fine)."""
    made = {"config": str(find_config(options.config)), "method": options.method, "overrides": sorted(options.overrides)}
    note = root / "benchmark.json"
    if note.exists():
        found = json.loads(note.read_text(encoding="utf-8"))
        if found != made:
            changed = ", ".join(f"{key}: {found.get(key)} -> {made[key]}" for key in made if found.get(key) != made[key])
            raise BenchmarkError(f"{root} holds runs made otherwise ({changed})", fix="give another --out")
        return
    if options.report_only:
        fix = "leave out --report-only, or name their folder with --out"
        raise BenchmarkError(f"{root} holds no runs of this benchmark", fix=fix)
    root.mkdir(parents=True, exist_ok=True)
    replace_text(note, json.dumps(made, indent=2) + "\n")


def run_seed(root: Path, seed: int, options: argparse.Namespace) -> None:
    """Train one seed to the end, from its newest checkpoint if there is one; nothing if it is finished."""
    folder = run_folder(root, seed)
    if evaluation_file(folder, options.steps).exists():
        print(f"seed {seed}: finished before, in {folder}", flush=True)
        return
    print(f"seed {seed}: {options.steps} steps, {folder}", flush=True)
    # Settings of the benchmark come last: what it compares must not be overridden by accident.
    overrides = [
        *METHODS[options.method], *options.overrides, f'output.dir="{folder}"', f"seed={seed}", f"max_steps={options.steps}",
        "resume=auto", "eval.before=true", "eval.after=true", "eval.problems=256", "eval.samples=4", "tracking.mlflow=off",
    ]
    deadline_s = 3600 + SECONDS_PER_STEP * options.steps
    train(find_config(options.config), overrides, log=root / f"seed-{seed}.log", deadline_s=deadline_s)


def run_folder(root: Path, seed: int) -> Path:
    """Where the run of a seed lies."""
    return root / f"seed-{seed}"


def evaluation_file(folder: Path, step: int) -> Path:
    """Per-problem results at a step, as `budget-rl train` writes them."""
    return folder / f"eval-{step}.json"


# -- reading -----------------------------------------------------------------------------------------------------------------


def read_seed(root: Path, seed: int, steps: int) -> SeedResult:
    """The results of a finished run; BenchmarkError when it is not finished."""
    folder = run_folder(root, seed)
    before, after = (read_evaluation(folder, step) for step in (0, steps))
    rows = [row for row in read_lines(folder / "metrics.jsonl") if "train/accuracy" in row and row["step"] <= steps]
    if len(rows) != steps:
        raise BenchmarkError(
            f"{folder}/metrics.jsonl has {len(rows)} steps, {steps} were expected", fix="run it without --report-only"
        )
    accuracy = [row["train/accuracy"] for row in rows]
    start = float(np.mean(accuracy[:FIRST_STEPS]))
    worst, first = worst_window(accuracy, WINDOW)
    free = [row["budget/free/accuracy"] for row in rows if row.get("budget/free/accuracy") is not None]
    held_out = float(np.mean([figures["accuracy"] for figures in before.values()]))
    worst_free, first_free = worst_window(free, WINDOW) if free else (None, None)
    return SeedResult(
        seed, before, after, train_start=start, window=worst - start, window_step=first + 1,
        free_window=None if worst_free is None else worst_free - held_out,
        free_window_step=None if first_free is None else first_free + 1,
    )


def read_evaluation(folder: Path, step: int) -> dict[str, dict[str, float]]:
    """Results of the prompts without a budget at a step."""
    path = evaluation_file(folder, step)
    if not path.exists():
        raise BenchmarkError(f"there is no {path}: the run has not got that far", fix="run it without --report-only")
    return json.loads(path.read_text(encoding="utf-8"))["results"]["free"]


def worst_window(values: Sequence[float], width: int) -> tuple[float, int]:
    """Smallest mean of ``width`` successive values (all of them if there are fewer) and the index of its first value.

    Raises ValueError for no values or a width below 1.
    """
    if not len(values) or width < 1:
        raise ValueError(f"{len(values)} values have no window of {width}")
    width = min(width, len(values))
    total = np.concatenate([[0.0], np.cumsum(np.asarray(values, dtype=np.float64))])
    mean = (total[width:] - total[:-width]) / width
    start = int(mean.argmin())
    return float(mean[start]), start


# -- judging -----------------------------------------------------------------------------------------------------------------


def summarise(seeds: Sequence[SeedResult]) -> dict[str, Any]:
    """Means, intervals, figures of every seed and the verdicts."""
    problems = common_problems([evaluation for s in seeds for evaluation in (s.before, s.after)])
    before, after = [s.before for s in seeds], [s.after for s in seeds]
    accuracy = [aligned(results, "accuracy", problems) for results in (before, after)]
    tokens = [aligned(results, "tokens", problems) for results in (before, after)]
    gain = paired_bootstrap(accuracy[0], accuracy[1], difference)
    shortened = paired_bootstrap(tokens[0], tokens[1], ratio)
    each = [
        {
            "seed": s.seed, "accuracy": [float(a[i].mean()) for a in accuracy], "tokens": [float(t[i].mean()) for t in tokens],
            "train_start": s.train_start, "window": s.window, "window_step": s.window_step, "free_window": s.free_window,
            "free_window_step": s.free_window_step,
        }
        for i, s in enumerate(seeds)
    ]
    return {
        "problems": len(problems), "accuracy": [float(a.mean()) for a in accuracy], "tokens": [float(t.mean()) for t in tokens],
        "gain": asdict(gain), "token_ratio": asdict(shortened), "seeds": each, "criteria": judge(gain, shortened, each),
    }


def judge(gain: Interval, shortened: Interval, seeds: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The four criteria, each with what was found."""
    losses = [s["accuracy"][1] - s["accuracy"][0] for s in seeds]
    windows = [w for s in seeds for w in (s["window"], s["free_window"]) if w is not None]
    return [
        {
            "criterion": f"mean accuracy >= start + {100 * MIN_GAIN:.0f} points, interval above 0",
            "found": f"{_points(gain.estimate)} [{_points(gain.low)}, {_points(gain.high)}]",
            "met": gain.estimate >= MIN_GAIN and gain.low > 0,
        },
        {
            "criterion": f"mean tokens <= {MAX_TOKENS:.0%} of the start",
            "found": f"{shortened.estimate:.1%} [{shortened.low:.1%}, {shortened.high:.1%}]",
            "met": shortened.estimate <= MAX_TOKENS,
        },
        {
            "criterion": f"no seed below start - {100 * MAX_SEED_LOSS:.0f} points",
            "found": f"worst {_points(min(losses))}",
            "met": min(losses) >= -MAX_SEED_LOSS,
        },
        {
            "criterion": f"no {WINDOW}-step window below start - {100 * MAX_WINDOW_LOSS:.0f} points (all members; free members)",
            "found": f"worst {_points(min(windows))}",
            "met": min(windows) >= -MAX_WINDOW_LOSS,
        },
    ]


def show(report: dict[str, Any]) -> None:
    """The table of seeds and the verdicts."""
    title = (
        f"{report['method']}, {report['steps']} steps, {report['problems']} held-out problems without a budget; "
        f"windows of {WINDOW} steps against the start"
    )
    columns = ("seed", "accuracy", "points", "tokens", "of start", "worst window", "free members")
    table = Table(*columns, title=title, title_justify="left")
    for row in [*report["seeds"], {"seed": "mean", "accuracy": report["accuracy"], "tokens": report["tokens"]}]:
        (a0, a1), (t0, t1) = row["accuracy"], row["tokens"]
        windows = [_window(row.get(name), row.get(f"{name}_step")) for name in ("window", "free_window")]
        means = (f"{a0:.3f} -> {a1:.3f}", _points(a1 - a0), f"{t0:.1f} -> {t1:.1f}", f"{t1 / t0:.0%}")
        table.add_row(str(row["seed"]), *means, *windows)
    Console(width=None if sys.stdout.isatty() else 130).print(table)
    for criterion in report["criteria"]:
        print(f"  {'met   ' if criterion['met'] else 'MISSED'}  {criterion['criterion']}: {criterion['found']}")


def _points(share: float) -> str:
    return f"{100 * share:+.1f}"


def _window(value: float | None, step: int | None) -> str:
    return "" if value is None else f"{_points(value)} from step {step}"


if __name__ == "__main__":
    sys.exit(main())
