"""Starts the product as a user does, in processes of its own, and finds every process that belongs to a run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[2]
MARK = "BUDGET_RL_TEST_RUN"
"""Environment variable that every descendant of a run inherits, so that orphans are found too."""
POLL_S = 0.05
RUN_DEADLINE_S = 1200.0
EXIT_DEADLINE_S = 30.0

COMMON = (
    # Two threads that wait for each other slow down tenfold as soon as anything else runs on a small machine.
    "learner.threads_per_rank=1", "rollout.threads_per_worker=1",
    # A shorter task, for a shorter warm start; it may still be too weak to get something right in every step.
    "data.task.max_terms=3", "data.size=256", "data.held_out=32", "prompts_per_step=4", "eval.samples=1", "allow_idle=true",
)  # fmt: skip
"""Overrides of configs/quickstart.yaml for every run here."""
SMALL = (
    *COMMON, "warm_start=null", "rollout.workers=1", "rollout.samples_per_prompt=8", "eval.problems=8", "eval.before=false",
    "eval.after=false",
)  # fmt: skip
"""Overrides of configs/quickstart.yaml for runs on a model that is already warm."""


def until(condition: Callable[[], Any], what: str, *, seconds: float) -> Any:
    """The first true value of ``condition``; fails naming ``what`` after ``seconds``."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        value = condition()
        if value:
            return value
        time.sleep(POLL_S)
    raise AssertionError(f"waited {seconds:.0f} s for {what}")


@dataclass
class Launched:
    """A command in a session of its own; its output goes to a file."""

    arguments: Sequence[str]
    environment: Mapping[str, str]
    log: Path
    mark: str = field(default_factory=lambda: uuid.uuid4().hex)
    process: subprocess.Popen[bytes] = field(init=False)
    seen: set[psutil.Process] = field(default_factory=set)
    """Every process that was ever found to belong to the command, with its start time: a reused number is another process."""

    def __post_init__(self) -> None:
        with self.log.open("ab") as output:
            self.process = subprocess.Popen(
                self.arguments, cwd=ROOT, env={**self.environment, MARK: self.mark}, stdin=subprocess.DEVNULL, stdout=output,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    @property
    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def wait(self, seconds: float = RUN_DEADLINE_S) -> int:
        """The exit status; a run that does not end in time fails the test, with its output."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{self.arguments} still runs after {seconds:.0f} s:\n{self.text[-4000:]}") from None

    def running(self, what: str, condition: Callable[[], Any], *, seconds: float = RUN_DEADLINE_S) -> Any:
        """Wait for ``condition``; fails with the output as soon as the command has ended before."""

        def look() -> Any:
            ended = self.process.poll() is not None  # looked at first: what is true at the end counts
            value = condition()
            assert value or not ended, f"ended with {self.process.returncode} before {what}:\n{self.text[-4000:]}"
            return value

        return until(look, what, seconds=seconds)

    def send(self, number: signal.Signals) -> None:
        """Send the signal to the command alone, as `kill` does."""
        self.processes()  # noted now, for afterwards they may be orphans
        self.process.send_signal(number)

    def send_group(self, number: signal.Signals) -> None:
        """Send it as a terminal does at Ctrl-C: to the whole foreground process group."""
        self.processes()
        os.killpg(self.process.pid, number)

    def processes(self) -> list[psutil.Process]:
        """Every live process that inherited the mark or descends from one that did, now or at an earlier call.

        Ray workers lose the mark (their title is written over it) and, when their parent dies, their descent.
        """
        for process in psutil.process_iter():
            if self.mark == _mark_of(process):
                self.seen |= {process, *_descendants(process)}
        return [process for process in self.seen if _is_alive(process)]

    def titles(self) -> list[str]:
        """What each of them calls itself; Ray workers are ``ray::Class.method``."""
        return sorted(filter(None, map(_title, self.processes())))

    def end(self) -> None:
        """Kill whatever is left; for the end of a test, passed or failed."""
        for process in self.processes():
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue  # it ended by itself meanwhile
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(EXIT_DEADLINE_S)


@dataclass
class Workplace:
    """A home folder and cache of its own, and the commands run there."""

    folder: Path
    launched: list[Launched] = field(default_factory=list)

    @property
    def home(self) -> Path:
        return self.folder / "home"

    @property
    def cache(self) -> Path:
        return self.folder / "cache"

    def environment(self) -> dict[str, str]:
        self.home.mkdir(exist_ok=True)
        kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        return kept | {
            "HOME": str(self.home), "BUDGET_RL_CACHE": str(self.cache), "RAY_USAGE_STATS_ENABLED": "0",
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONUNBUFFERED": "1",
        }  # fmt: skip

    def start(self, *arguments: str, extra: Mapping[str, str] | None = None) -> Launched:
        """Start a command there."""
        log = self.folder / f"command-{len(self.launched)}.log"
        launched = Launched(arguments, self.environment() | dict(extra or {}), log)
        self.launched.append(launched)
        return launched

    def budget_rl(self, *arguments: str) -> Launched:
        """Start ``budget-rl ARGUMENTS`` there."""
        return self.start(sys.executable, "-m", "launch", *arguments)

    def train(self, output: Path, *overrides: str, config: str = "configs/quickstart.yaml") -> Launched:
        """Start ``budget-rl train`` into the folder ``output``."""
        return self.budget_rl("train", config, *overrides, f"output.dir={output}")

    def end(self) -> None:
        for launched in self.launched:
            launched.end()


def records(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a line file; empty while there is none."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]]


def step_records(run: Path) -> list[dict[str, Any]]:
    """The training steps in metrics.jsonl (evaluation reports left out)."""
    return [record for record in records(run / "metrics.jsonl") if "train/accuracy" in record]


def without_times(record: Mapping[str, Any]) -> dict[str, Any]:
    """A metrics line without what a clock measured and how the engines went about it."""
    return {name: value for name, value in record.items() if not name.startswith(("time/", "rate/", "engine/"))}


def mlflow_run(run: Path) -> Any:
    """The MLflow run that a run folder belongs to, from the local store beside it."""
    from mlflow.tracking import MlflowClient

    known = json.loads((run / "mlflow-run.json").read_text())
    return MlflowClient(tracking_uri=known["store"]).get_run(known["run_id"])


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _descendants(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def _mark_of(process: psutil.Process) -> str | None:
    try:
        return process.environ().get(MARK)
    except (psutil.NoSuchProcess, psutil.AccessDenied):  # a zombie has no environment either
        return None


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return ""
