"""Runs the product as its users do, `budget-rl train` in a process of its own, and reads what a step cost from metrics.jsonl."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from rl.errors import BudgetRLError
from rl.run_folder import read_lines

ROOT = Path(__file__).resolve().parents[2]
STOP_S = 90.0
"""Budget-rl ends within 30 s of SIGINT; this is what a busy machine gets before the process group is killed."""
TAIL_LINES = 25


class BenchmarkError(BudgetRLError):
    """A benchmark cannot be run or read."""


@dataclass(frozen=True)
class Workload:
    """The work that both sides do in every step; every field but the micro-batch is the same for both."""

    name: str
    config: Path
    model: Path
    """Local model folder."""
    prompts_per_step: int
    samples_per_prompt: int
    cap: int
    """Most tokens generated per rollout."""
    prefix: int
    """Tokens that open a response and are not generated."""
    lr: float
    weight_decay: float
    trl_batch: int
    """Rollouts of one forward pass on TRL's side, which takes a fixed number of rows rather than of tokens."""
    threads: int

    @property
    def rollouts(self) -> int:
        return self.prompts_per_step * self.samples_per_prompt


@dataclass(frozen=True)
class StepCost:
    """What one step took. Times in seconds of wall clock."""

    step_s: float
    generate_s: float
    score_s: float
    learn_s: float
    sync_s: float
    tokens: float
    """Tokens generated, prefix not counted, end of sequence counted."""
    accuracy: float
    padding: float | None = None
    mismatch: float | None = None
    """Largest engine-learner log-prob gap of the step, nats."""

    @property
    def per_1000_tokens(self) -> float:
        return 1000 * self.step_s / self.tokens


def overrides_for(work: Workload, *, dtype: str, steps: int, output: Path, engines: int) -> list[str]:
    """GRPO without budgets on the workload: one update per step, no KL, no evaluation, no tracking."""
    values: dict[str, Any] = {
        "model.path": f'"{work.model}"', "model.dtype": dtype, "warm_start": "null",
        "rollout.budgets": "[free]", "rollout.samples_per_prompt": work.samples_per_prompt,
        "rollout.max_length": work.cap + work.prefix, "rollout.temperature": 1.0,
        "rollout.threads_per_worker": max(1, work.threads // engines),
        "reward.method": "correct", "advantage.estimator": "group_normalised", "advantage.centre": "none",
        "advantage.intra_scale": "none", "loss.kl_coef": 0.0,
        "learner.minibatches": 1, "learner.epochs": 1, "learner.threads_per_rank": work.threads,
        "prompts_per_step": work.prompts_per_step, "max_steps": steps,
        "eval.before": "false", "eval.after": "false", "tracking.mlflow": "off",
        "output.dir": f'"{output}"', "output.checkpoint_every": 0, "output.samples_per_step": 0, "resume": "never",
        "allow_idle": "true",
    }
    return [f"{key}={value}" for key, value in values.items()]


def measure_ours(work: Workload, *, dtype: str, steps: int, scratch: Path, engines: int, deadline_s: float) -> list[StepCost]:
    """Train ``steps`` steps and return the cost of each; BenchmarkError with the end of the output when the run fails."""
    output = scratch / "ours"
    train(work.config, overrides_for(work, dtype=dtype, steps=steps, output=output, engines=engines),
          log=scratch / "ours.log", deadline_s=deadline_s)
    rows = [row for row in read_lines(output / "metrics.jsonl") if "time/step" in row]
    if len(rows) != steps:
        raise BenchmarkError(f"{output} has {len(rows)} steps, {steps} were asked for")
    before = [0.0, *(row["tokens/total"] for row in rows)]
    return [step_cost(row, total_before, work) for row, total_before in zip(rows, before, strict=False)]


def step_cost(row: Mapping[str, Any], total_before: float, work: Workload) -> StepCost:
    """One line of metrics.jsonl as a cost; its token count includes the prefix, the cost's does not."""
    return StepCost(
        step_s=row["time/step"], generate_s=row["time/generate"], score_s=row["time/score"], learn_s=row["time/learn"],
        sync_s=row["time/sync"], tokens=row["tokens/total"] - total_before - work.rollouts * work.prefix,
        accuracy=row["train/accuracy"], padding=row["learn/padding"], mismatch=row["mismatch/max"],
    )


def train(config: Path, overrides: Sequence[str], *, log: Path, deadline_s: float) -> None:
    """`budget-rl train CONFIG a.b=c ...` on a Ray cluster of its own; output goes to ``log``."""
    command = [sys.executable, "-m", "launch", "train", str(config), *overrides]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    run_logged(command, log=log, deadline_s=deadline_s, environment=environment)


def run_logged(command: Sequence[str], *, log: Path, deadline_s: float, environment: Mapping[str, str]) -> None:
    """Run to the end; a process that fails or overruns is stopped and reported with the last lines it wrote.

    It has a process group of its own, so that everything it started can be ended with it; Ctrl-C and SIGTERM here end it first.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output, _terminable():
        process = subprocess.Popen(
            command, cwd=ROOT, env=dict(environment), stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(timeout=deadline_s)
        except subprocess.TimeoutExpired:
            _stop(process)
            raise BenchmarkError(f"{_shown(command)} was not done after {deadline_s:.0f} s; its end:\n{tail(log)}") from None
        except BaseException:
            _stop(process)
            raise
    if code:
        raise BenchmarkError(f"{_shown(command)} ended with status {code}:\n{tail(log)}", fix=f"the whole output is in {log}")


def tail(log: Path) -> str:
    """The last lines of a log file, indented."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-TAIL_LINES:]
    return "\n".join(f"    {line}" for line in lines)


@contextmanager
def _terminable() -> Iterator[None]:
    """Let SIGTERM unwind like Ctrl-C: by default it would end this process at once and leave the child running."""
    previous = signal.signal(signal.SIGTERM, _exit_on_signal)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _exit_on_signal(number: int, _frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGINT)
    try:
        process.wait(timeout=STOP_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(timeout=STOP_S)


def _shown(command: Sequence[str]) -> str:
    return " ".join(Path(command[0]).name if i == 0 else part for i, part in enumerate(command[:5]))
