"""HAPO against DAPO, and AlignDistil against DPO alone, on the quickstart's model.

python -m tests.benchmarks.token_level hapo [--seeds 3 --rollouts 12800] [--arms dapo,hapo] [a.b=c ...]
python -m tests.benchmarks.token_level aligndistil [a.b=c ...]

`hapo`: every arm is a recipe, trained with each seed until it has sampled so many rollouts, those that dynamic sampling
discarded included. The table has held-out accuracy and tokens before and after, entropy at the end, and the difference to the
first arm with a 95 % interval over seeds and problems. `aligndistil`: the recipe's three runs, and DPO alone on as many response
tokens as these three have learnt from; the table compares the four models, and says how contrastive reward and KL move
(Spearman's rank correlation with the step). Each run has a folder of its own: the same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from scipy.stats import spearmanr

from rl.bootstrap import Interval, aligned, common_problems, difference, paired_bootstrap, ratio
from rl.errors import BudgetRLError
from rl.run_folder import read_lines
from tests.benchmarks.our_side import ROOT, BenchmarkError, train

RECIPES = ROOT / "configs" / "recipes"
SETTINGS = ("tracking.mlflow=off", "eval.problems=256", "eval.samples=4", "resume=auto")
DEADLINE_S = 7200.0
LAST_STEPS = 10
"""Steps at the end of a run whose mean entropy is shown."""
Problems = dict[str, dict[str, float]]


def main(argv: Sequence[str] | None = None) -> int:
    """Run what was asked for, print the table and a JSON line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.token_level")
    parser.add_argument("what", choices=("hapo", "aligndistil"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rollouts", type=int, default=12800)
    parser.add_argument("--arms", default="dapo,hapo", help="recipes; the first is what the others are compared with")
    parser.add_argument("--out", type=Path, default=Path("~/budget-rl/bench-token-level"))
    parser.add_argument("overrides", nargs="*", metavar="a.b=c")
    options = parser.parse_intermixed_args(argv)
    root = options.out.expanduser().resolve() / options.what
    try:
        report = compare_arms(root, options) if options.what == "hapo" else compare_teachers(root, options.overrides)
    except BudgetRLError as error:
        print(f"token-level: {error}", file=sys.stderr)
        return 2
    print(json.dumps(report))
    return 0


# -- HAPO ----------------------------------------------------------------------------------------------------------------


def compare_arms(root: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Train and compare the arms."""
    arms = options.arms.split(",")
    for seed in range(options.seeds):  # seed by seed, so that a benchmark cut short has compared something
        for arm in arms:
            folder = root / f"{arm}-{seed}"
            if _last_evaluation(folder) > 0:
                continue
            print(f"{arm}, seed {seed}: {folder}", flush=True)
            own = [f'output.dir="{folder}"', f"seed={seed}", f"max_rollouts={options.rollouts}", "max_steps=100000"]
            log = root / f"{arm}-{seed}.log"
            train(RECIPES / f"{arm}.yaml", [*SETTINGS, *options.overrides, *own], log=log, deadline_s=DEADLINE_S)
    folders = {arm: [root / f"{arm}-{seed}" for seed in range(options.seeds)] for arm in arms}
    before = [_problems(folder, 0) for folder in folders[arms[0]]]
    after = {arm: [_problems(folder, _last_evaluation(folder)) for folder in folders[arm]] for arm in arms}
    problems = common_problems([*before, *(result for results in after.values() for result in results)])
    title = f"{options.rollouts} rollouts, {options.seeds} seeds, {len(problems)} held-out problems without a budget"
    compared = ("points against the first", "tokens against the first")
    columns = ("recipe", "accuracy", "tokens", "entropy", "steps", "rollouts", *compared)
    table = Table(*columns, title=title, title_justify="left")
    rows: dict[str, Any] = {}
    start = {name: float(aligned(before, name, problems).mean()) for name in ("accuracy", "tokens")}
    table.add_row("(start)", f"{start['accuracy']:.3f}", f"{start['tokens']:.1f}", "", "0", "0", "", "")
    for arm in arms:
        row = _arm_row(folders[arm], after[arm], after[arms[0]], problems)
        rows[arm] = row
        table.add_row(
            arm, _of_seeds(row["accuracy"], ".3f"), _of_seeds(row["tokens"], ".1f"), _of_seeds(row["entropy"], ".3f"),
            _of_seeds(row["steps"], ".0f"), _of_seeds(row["rollouts"], ".0f"),
            "" if arm == arms[0] else _points(row["gain"]), "" if arm == arms[0] else _share(row["token_ratio"]),
        )
    Console(width=None if sys.stdout.isatty() else 150).print(table)
    plain = {arm: {k: v if isinstance(v, list) else vars(v) for k, v in row.items()} for arm, row in rows.items()}
    return {"benchmark": "hapo", "start": start, "arms": plain}


def _arm_row(
    folders: Sequence[Path], own: Sequence[Problems], first: Sequence[Problems], problems: Sequence[str]
) -> dict[str, Any]:
    accuracy, tokens = (aligned(own, name, problems) for name in ("accuracy", "tokens"))
    trained = [[line for line in read_lines(folder / "metrics.jsonl") if "train/accuracy" in line] for folder in folders]
    return {
        "accuracy": accuracy.mean(axis=1).tolist(),
        "tokens": tokens.mean(axis=1).tolist(),
        "entropy": [float(np.mean([line["policy/entropy"] for line in lines[-LAST_STEPS:]])) for lines in trained],
        "steps": [float(len(lines)) for lines in trained],
        "rollouts": [float(lines[-1]["rollouts/total"]) for lines in trained],
        "gain": paired_bootstrap(aligned(first, "accuracy", problems), accuracy, difference),
        "token_ratio": paired_bootstrap(aligned(first, "tokens", problems), tokens, ratio),
    }


# -- AlignDistil -----------------------------------------------------------------------------------------------------------


def compare_teachers(root: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """Train AlignDistil and DPO alone on as many tokens, and compare."""
    folder = root / "aligndistil"
    parts = {"dpo": folder.with_name("aligndistil-dpo"), "reverse": folder.with_name("aligndistil-reverse"), "student": folder}
    if _last_evaluation(folder) <= 0:
        own = [*SETTINGS, *overrides, f'output.dir="{folder}"']
        train(RECIPES / "aligndistil.yaml", own, log=root / "aligndistil.log", deadline_s=DEADLINE_S)
    tokens = {name: float(_steps(part)[-1]["tokens/total"]) for name, part in parts.items()}
    per_step = tokens["dpo"] / len(_steps(parts["dpo"]))
    alone = root / "dpo-alone"
    if _last_evaluation(alone) <= 0:
        steps = round(sum(tokens.values()) / per_step)
        own = [*SETTINGS, *overrides, f'output.dir="{alone}"', f"preference.steps={steps}", "eval.before=false"]
        own += ["stage=preference", "distil=null"]  # the same preference settings, and nothing after them
        train(RECIPES / "aligndistil.yaml", own, log=root / "dpo-alone.log", deadline_s=DEADLINE_S)
    start = _problems(folder, 0)
    rows = {
        "start": (start, 0.0),
        "DPO, the teacher's": (_problems(parts["dpo"], _last_evaluation(parts["dpo"])), tokens["dpo"]),
        "DPO alone, equal tokens": (_problems(alone, _last_evaluation(alone)), float(_steps(alone)[-1]["tokens/total"])),
        "AlignDistil": (_problems(folder, _last_evaluation(folder)), sum(tokens.values())),
    }
    problems = common_problems([found for found, _ in rows.values()])
    columns = ("model", "accuracy", "tokens", "response tokens learnt from", "points against DPO alone")
    table = Table(*columns, title=f"{len(problems)} held-out problems without a budget", title_justify="left")
    report: dict[str, Any] = {"benchmark": "aligndistil", "models": {}}
    reference = aligned([rows["DPO alone, equal tokens"][0]], "accuracy", problems)
    for name, (found, spent) in rows.items():
        accuracy, length = (aligned([found], figure, problems) for figure in ("accuracy", "tokens"))
        gain = paired_bootstrap(reference, accuracy, difference)
        table.add_row(name, f"{accuracy.mean():.3f}", f"{length.mean():.1f}", f"{spent:,.0f}", _points(gain))
        report["models"][name] = {"accuracy": float(accuracy.mean()), "tokens": float(length.mean()), "spent": spent}
    Console(width=None if sys.stdout.isatty() else 150).print(table)
    lines = _steps(folder)
    for figure in ("distil/contrastive_reward", "distil/contrastive_reward_per_token", "distil/kl"):
        values = [line[figure] for line in lines]
        rank = float(spearmanr(range(len(values)), values).statistic)
        print(f"{figure}: {values[0]:.4f} -> {np.mean(values[-LAST_STEPS:]):.4f} over {len(values)} steps, Spearman {rank:+.2f}")
        report[figure] = {"first": values[0], "last": float(np.mean(values[-LAST_STEPS:])), "spearman": rank}
    return report


# -- reading -----------------------------------------------------------------------------------------------------------------


def _steps(folder: Path) -> list[dict[str, Any]]:
    return [line for line in read_lines(folder / "metrics.jsonl") if "time/step" in line]


def _last_evaluation(folder: Path) -> int:
    """The step of the newest evaluation of a finished run; -1 where it has none after step 0."""
    steps = [int(path.stem.removeprefix("eval-")) for path in folder.glob("eval-*.json")]
    finished = any((folder / "checkpoints").glob("step-*"))
    return max(steps, default=-1) if finished else -1


def _problems(folder: Path, step: int) -> Problems:
    path = folder / f"eval-{step}.json"
    if not path.exists():
        raise BenchmarkError(f"there is no {path}: the run has not got that far", fix="give the same command again")
    return json.loads(path.read_text(encoding="utf-8"))["results"]["free"]


def _of_seeds(values: Sequence[float], style: str) -> str:
    mean = format(float(np.mean(values)), style)
    return mean if len(values) == 1 else f"{mean} ({', '.join(format(value, style) for value in values)})"


def _points(gain: Interval) -> str:
    return f"{100 * gain.estimate:+.1f} [{100 * gain.low:+.1f}, {100 * gain.high:+.1f}]"


def _share(found: Interval) -> str:
    return f"{found.estimate:.0%} [{found.low:.0%}, {found.high:.0%}]"


if __name__ == "__main__":
    sys.exit(main())
