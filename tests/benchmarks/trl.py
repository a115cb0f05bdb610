"""One RL step (generate, score, learn, sync) against TRL's GRPOTrainer on the same work:  python -m tests.benchmarks.trl

Same machine, model folder, prompts, caps, temperature, group size, loss (GRPO, token mean, no KL), one update a step and
number of threads; whole runs of both sides take turns. The warm-up steps of every run are left out. Sampling is random, so the
sides do not generate equally many tokens: both seconds per step and seconds per 1000 generated tokens are shown, and the latter
is judged. TRL runs twice: with its defaults (activations checkpointed, 8 rollouts a forward pass), which is what its users run
and what the targets are set against, and tuned for this machine (nothing checkpointed, the forward pass that suits it best),
shown beside. Exit status 0 when every target is met, 1 when one is missed, 2 when a side cannot run.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from launch.config import load_settings
from rl.errors import BudgetRLError
from tests.benchmarks.our_side import ROOT, BenchmarkError, StepCost, Workload, measure_ours, run_logged, train

WARM_UP = 2
"""First steps of a run that are not counted: they pay for caches, threads and the allocator."""
ROUNDS = 2
RUN_DEADLINE_S = 3600.0
TRL_PYTHON = ROOT / ".venv-trl" / "bin" / "python"
SIZES = {"tiny": (8, 8, 192, 64), "smollm2": (4, 8, 96, 16)}
"""Prompts per step, rollouts per prompt, generated tokens at most, rollouts of one of TRL's forward passes."""
DEFAULT_STEPS = {"tiny": 12, "smollm2": 4}
TARGETS = {("tiny", "float32"): 2.0, ("smollm2", "float32"): 1.5, ("smollm2", "bfloat16"): 3.0}
"""How many times faster than TRL's defaults in float32 our step has to be, by model and our dtype."""


JUDGED_BY = "trl-float32"
TRL_DEFAULT_BATCH = 8
"""per_device_train_batch_size of TRL's own defaults."""


@dataclass(frozen=True, order=True)
class Variant:
    """A side and its arithmetic."""

    side: str
    dtype: str
    tuned: bool = False
    """TRL only: activations kept and the best micro-batch, instead of its defaults."""

    @property
    def name(self) -> str:
        return f"{self.side}-{self.dtype}{'-tuned' if self.tuned else ''}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the comparison; returns the exit status."""
    options = _parse(argv)
    try:
        _check_environment()
        keep_to_cores(options.threads)
        results = [compare(model, options) for model in (["tiny", "smollm2"] if options.model == "both" else [options.model])]
    except BudgetRLError as error:
        print(f"bench-trl: {error}", file=sys.stderr)
        return 2
    return 0 if all(result["met"] for result in results) else 1


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.trl", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", choices=("tiny", "smollm2", "both"), default="both")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "both"), default="both",
                        help="our arithmetic for smollm2; `both` leaves bfloat16 out where the CPU only emulates it")
    parser.add_argument("--steps", type=int, help=f"steps of one run, {WARM_UP} of them warm-up (default: {DEFAULT_STEPS})")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="how often the sides take turns")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--trl-batch", type=int, help="rollouts of one of TRL's forward passes, to find what suits it best")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep the outputs of all runs here")
    options = parser.parse_args(argv)
    if options.steps is not None and options.steps <= WARM_UP:
        parser.error(f"--steps must be above {WARM_UP}, the number of warm-up steps")
    if options.threads < 1 or options.rounds < 1:
        parser.error("--threads and --rounds must be at least 1")
    return options


def _check_environment() -> None:
    if not TRL_PYTHON.exists():
        raise BenchmarkError("there is no .venv-trl, TRL's own environment", fix="bash .ci/install trl (make bench-trl does it)")


def keep_to_cores(threads: int) -> None:
    """Pin this process, and with it everything it starts, to as many cores as either side has threads."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < threads:
        raise BenchmarkError(f"{threads} threads were asked for, {len(cores)} cores may be used", fix=f"--threads {len(cores)}")
    os.sched_setaffinity(0, cores[:threads])


def compare(model: str, options: argparse.Namespace) -> dict[str, Any]:
    """All runs of one model, their table and JSON line; returns what the line holds."""
    steps = options.steps or DEFAULT_STEPS[model]
    with tempfile.TemporaryDirectory(prefix="budget-rl-bench-") as scratch:
        root = (options.keep.expanduser().resolve() if options.keep else Path(scratch)) / model
        work, engines = make_workload(model, options.threads, options.trl_batch, root)
        prompts = root / "prompts.jsonl"
        write_prompts(work, steps, prompts)
        costs: dict[Variant, list[StepCost]] = {}
        for number in range(options.rounds):
            for variant in choose_variants(model, options.dtype):
                print(f"{model} {number + 1}/{options.rounds}: {variant.name}, {steps} steps", flush=True)
                folder = fresh_folder(root / f"{number}-{variant.name}")
                run = measure_ours if variant.side == "ours" else measure_trl
                ours = variant.side == "ours"
                extra: dict[str, Any] = {"engines": engines} if ours else {"prompts": prompts, "tuned": variant.tuned}
                measured = run(work, dtype=variant.dtype, steps=steps, scratch=folder, deadline_s=RUN_DEADLINE_S, **extra)
                costs.setdefault(variant, []).extend(measured[WARM_UP:])
    result = summarise(work, costs)
    show(work, result)
    print(json.dumps(result))
    return result


def choose_variants(model: str, dtype: str) -> list[Variant]:
    """Sides in the order in which they take turns; we are judged by TRL's defaults in float32, the others are shown beside."""
    if model == "tiny":
        return [Variant("ours", "float32"), Variant("trl", "float32"), Variant("trl", "float32", tuned=True)]
    fast = has_fast_bfloat16(Path("/proc/cpuinfo").read_text(encoding="utf-8"))
    if dtype == "bfloat16" and not fast:
        raise BenchmarkError("this CPU only emulates bfloat16 (no avx512_bf16, no amx_bf16)", fix="--dtype float32")
    ours = [d for d in ("float32", "bfloat16") if dtype in (d, "both") and (d == "float32" or fast)]
    return [*(Variant("ours", d) for d in ours), *(Variant("trl", "float32", tuned=tuned) for tuned in (False, True)),
            *([Variant("trl", "bfloat16")] if fast else [])]


def has_fast_bfloat16(cpuinfo: str) -> bool:
    """Whether the processor multiplies bfloat16 natively."""
    flags = next((line.split() for line in cpuinfo.splitlines() if line.startswith("flags")), [])
    return not {"avx512_bf16", "amx_bf16"}.isdisjoint(flags)


# -- the work ----------------------------------------------------------------------------------------------------------------


def make_workload(model: str, threads: int, trl_batch: int | None, scratch: Path) -> tuple[Workload, int]:
    """The work of both sides and the number of engines that ours uses for it; makes the warm-started model if need be."""
    from rl.models import local_folder
    from rl.prompts import load_tokenizer

    config = ROOT / "configs" / ("quickstart.yaml" if model == "tiny" else "smollm2.yaml")
    settings = load_settings(config)
    folder = warm_started_folder(config, scratch) if settings.warm_start else local_folder(settings.model)
    tokenizer = load_tokenizer(settings.model.model_copy(update={"path": str(folder)}))
    opening = settings.rollout.free_template
    prefix = len(tokenizer.encode(opening, add_special_tokens=False)) if opening else 0
    prompts, samples, cap, batch = SIZES[model]
    batch = trl_batch or batch
    if (prompts * samples) % batch:
        raise BenchmarkError(f"--trl-batch {batch} does not divide the {prompts * samples} rollouts of a step of {model}")
    work = Workload(
        name=model, config=config, model=folder, prompts_per_step=prompts, samples_per_prompt=samples, cap=cap, prefix=prefix,
        lr=settings.learner.lr, weight_decay=settings.learner.weight_decay, trl_batch=batch, threads=threads,
    )
    return work, settings.rollout.workers


def warm_started_folder(config: Path, scratch: Path) -> Path:
    """The cached warm start of the quickstart; one short run makes it where there is none yet."""
    from rl.sft import cached_folder

    folder = cached_folder(load_settings(config))
    if not (folder / "config.json").is_file():
        print("tiny: making the warm start first", flush=True)
        output = fresh_folder(scratch / "warm-start")
        short = ["max_steps=1", "eval.before=false", "eval.after=false", "tracking.mlflow=off", "resume=never"]
        train(config, [*short, f'output.dir="{output / "run"}"'], log=output / "run.log", deadline_s=RUN_DEADLINE_S)
    return folder


def write_prompts(work: Workload, steps: int, out: Path) -> None:
    """The prompts of all steps in our order: ids as our engine gets them, prefix included, and the text that spells them."""
    from rl.data import load_problems
    from rl.prompts import PromptEncoder, PromptStream, load_tokenizer

    settings = load_settings(work.config)
    tokenizer = load_tokenizer(settings.model.model_copy(update={"path": str(work.model)}))
    prompts, _ = PromptEncoder(tokenizer, settings.data).encode_all(load_problems(settings.data).train)
    taken, _ = PromptStream(prompts, settings.seed).take(0, steps * work.prompts_per_step)
    opening = settings.rollout.free_template
    prefix = tokenizer.encode(opening, add_special_tokens=False) if opening else []
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("w", encoding="utf-8") as file:
        for prompt in taken:
            ids = [*prompt.token_ids, *prefix]
            row = {"prompt": tokenizer.decode(ids, skip_special_tokens=False), "ids": ids, "answer": prompt.answer}
            file.write(json.dumps(row) + "\n")


def measure_trl(
    work: Workload, *, dtype: str, steps: int, scratch: Path, prompts: Path, tuned: bool, deadline_s: float
) -> list[StepCost]:
    """Train ``steps`` steps with TRL and return the cost of each."""
    out = scratch / "steps.jsonl"
    values = {
        "model": work.model, "prompts": prompts, "out": out, "dtype": dtype, "threads": work.threads, "steps": steps,
        "samples": work.samples_per_prompt, "rollouts": work.rollouts, "batch": work.trl_batch if tuned else TRL_DEFAULT_BATCH,
        "checkpointing": int(not tuned), "cap": work.cap, "seed": 0, "lr": work.lr, "weight-decay": work.weight_decay,
    }
    # -P keeps the script's folder off the import path: this file would stand in for the package trl.
    command = [str(TRL_PYTHON), "-P", str(Path(__file__).with_name("trl_side.py"))]
    command += [part for name, value in values.items() for part in (f"--{name}", str(value))]
    environment = os.environ | {"OMP_NUM_THREADS": str(work.threads), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    run_logged(command, log=scratch / "trl.log", deadline_s=deadline_s, environment=environment)
    lines = out.read_text(encoding="utf-8").splitlines()
    if len(lines) != steps:
        raise BenchmarkError(f"TRL reported {len(lines)} steps, {steps} were asked for; its output is {scratch / 'trl.log'}")
    return [StepCost(**json.loads(line)) for line in lines]


def fresh_folder(path: Path) -> Path:
    """An empty folder that did not exist before; an earlier benchmark's is not written over."""
    if path.exists():
        raise BenchmarkError(f"{path} is there already", fix="give --keep an empty folder")
    path.mkdir(parents=True)
    return path


# -- the result --------------------------------------------------------------------------------------------------------------


def summarise(work: Workload, costs: dict[Variant, list[StepCost]]) -> dict[str, Any]:
    """Medians of every variant, and how many times faster ours is than each of TRL's."""
    medians = {v.name: median_cost(steps) for v, steps in costs.items()}
    ratios, met = [], True
    for variant in costs:
        if variant.side != "ours":
            continue
        ours = medians[variant.name]
        target = TARGETS[work.name, variant.dtype]
        for other in (v.name for v in costs if v.side == "trl"):
            trl = medians[other]
            speedup = trl["s_per_1000_tokens"] / ours["s_per_1000_tokens"]
            judged = other == JUDGED_BY
            met = met and (not judged or speedup >= target)
            ratios.append({
                "ours": variant.dtype, "trl": other, "per_step": trl["step_s"] / ours["step_s"], "per_token": speedup,
                "target": target if judged else None,
            })
    return {
        "benchmark": "trl", "model": work.name, "rollouts": work.rollouts, "cap": work.cap, "threads": work.threads,
        "trl_batch": work.trl_batch, "variants": medians, "ratios": ratios, "met": met,
    }


def median_cost(steps: Sequence[StepCost]) -> dict[str, Any]:
    """Medians over steps, each figure by itself; the log-prob gap is the largest."""
    names = ("step_s", "generate_s", "score_s", "learn_s", "sync_s", "tokens", "accuracy")
    medians: dict[str, Any] = {name: statistics.median(getattr(step, name) for step in steps) for name in names}
    paddings = [step.padding for step in steps if step.padding is not None]
    gaps = [step.mismatch for step in steps if step.mismatch is not None]
    return medians | {
        "s_per_1000_tokens": statistics.median(step.per_1000_tokens for step in steps), "steps": len(steps),
        "padding": statistics.median(paddings) if paddings else None, "mismatch": max(gaps) if gaps else None,
    }


def show(work: Workload, result: dict[str, Any]) -> None:
    """The table and a line for every ratio."""
    title = f"{work.name}: {work.rollouts} rollouts of <= {work.cap} tokens, {work.threads} threads, medians of warm steps"
    columns = ("side", "steps", "step s", "generate", "score", "learn", "sync", "tokens", "s/1000 tok", "padding", "gap", "acc")
    table = Table(*columns, title=title, title_justify="left")
    for name, m in result["variants"].items():
        times = [f"{m[key]:.2f}" for key in ("step_s", "generate_s", "score_s", "learn_s", "sync_s")]
        size = (f"{m['tokens']:.0f}", f"{m['s_per_1000_tokens']:.3f}")
        optional = (format_or_dash(m["padding"], ".1%"), format_or_dash(m["mismatch"], ".1e"))
        table.add_row(name, str(m["steps"]), *times, *size, *optional, f"{m['accuracy']:.2f}")
    Console(width=None if sys.stdout.isatty() else 130).print(table)
    for r in result["ratios"]:
        outcome = "" if r["target"] is None else "met" if r["per_token"] >= r["target"] else "MISSED"
        verdict = "shown beside" if r["target"] is None else f"target {r['target']}x: {outcome}"
        print(f"  ours {r['ours']} is {r['per_token']:.2f}x as fast as {r['trl']} on equal tokens "
              f"({r['per_step']:.2f}x step for step); {verdict}")
    if not has_bfloat16(result) and work.name == "smollm2":
        print("  bfloat16 was not run (this CPU only emulates it, or --dtype float32)")


def format_or_dash(value: float | None, style: str) -> str:
    """The value as text, or a dash where a side does not report it."""
    return "-" if value is None else format(value, style)


def has_bfloat16(result: dict[str, Any]) -> bool:
    """Whether our side ran in bfloat16."""
    return any(r["ours"] == "bfloat16" for r in result["ratios"])


if __name__ == "__main__":
    sys.exit(main())
