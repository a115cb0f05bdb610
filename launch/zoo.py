"""``budget-rl zoo``: trains the recipes of a plan one after the other, each in a process of its own, and draws them together."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

from launch.zoo_recipes import Recipe, ZooPlan, has_budgets, write_configs
from rl.console import Console
from rl.errors import BudgetRLError, ConfigError
from rl.redaction import redact
from rl.run_folder import RunFolder, read_lines, replace_text
from rl.waiting import StopFlag, StopRequested

if TYPE_CHECKING:
    from rl.zoo import Row, Status

POLL_S = 0.5
"""Longest time between two looks at the child and at the stop flag."""
HEARTBEAT_S = 30.0
"""Time between two lines about a running recipe."""
KILL_S = 10.0
"""Time for a child to end by itself after a second Ctrl-C."""
STOP_MARGIN_S = 60.0
"""On top of the longest update: time to write a checkpoint and end."""
INTERRUPTED = 130
PROGRAM = (sys.executable, "-m", "launch", "train")
_OWN_ERROR = "budget-rl: "


def run_zoo(plan: ZooPlan, *, program: Sequence[str] = PROGRAM) -> int:
    """Train what is not finished, write table, picture and tracking; returns 0, or 1 when a recipe failed.

    The state is on disk: the same plan again goes on where it was stopped. ``program`` CONFIG a.b=c trains one recipe. Raises
    ConfigError for a folder that holds another zoo or is in use, StopRequested after Ctrl-C.
    """
    try:
        plan.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{plan.output} cannot be made: {error.strerror}", fix="give another --output") from None
    with _locked(plan.output) as lock, StopFlag() as stop:
        write_configs(plan)
        console = Console(plan.output / "zoo.log")
        zoo = _Zoo(plan, console, stop, lock, tuple(program))
        try:
            return zoo.run()
        except (StopRequested, KeyboardInterrupt):
            zoo.report()
            console.say("stopped; the same command goes on from there")
            raise
        finally:
            console.close()


@dataclass
class _Zoo:
    """One run of the command."""

    plan: ZooPlan
    console: Console
    stop: StopFlag
    lock: IO[str]
    program: tuple[str, ...]

    def run(self) -> int:
        plan, say = self.plan, self.console.say
        say(f"zoo      {plan.output}")
        say(f"recipes  {', '.join(recipe.name for recipe in plan.recipes)}")
        say(f"each     {plan.allowance:,} response tokens, over by less than one step ({short(_step_tokens(plan))} at most)")
        for note in plan.notes:
            say(f"note     {note}")
        if any(self.status(recipe)["status"] != "finished" for recipe in plan.recipes):
            self.prepare()
        for recipe in plan.recipes:
            if self.status(recipe)["status"] == "finished":
                say(f"{recipe.name}: finished before")
                continue
            self.train(recipe)
            self.report()
        rows = self.report()
        self.track(rows)
        self.show(rows)
        return int(any(row.status == "failed" for row in rows))

    def prepare(self) -> None:
        """The model that all begin with, and a look at every recipe with its tokenizer, before the first run."""
        from rl.zoo_start import check_on_start, make_start

        plan = self.plan
        if plan.base.warm_start is not None:
            make_start(plan.base, plan.start_folder, self.console, self.stop, log=plan.output / "zoo.log")
        self.console.say(f"start    {plan.recipes[0].settings.model.path}")
        check_on_start({recipe.name: recipe.settings for recipe in plan.recipes})

    def train(self, recipe: Recipe) -> None:
        """One recipe to its end; its status goes to disk. Raises StopRequested when it, or this command, was interrupted."""
        plan, name = self.plan, recipe.name
        folder = RunFolder(plan.run_of(name))
        log = folder.path.with_suffix(".log")
        log.parent.mkdir(parents=True, exist_ok=True)
        began = log.stat().st_size if log.exists() else 0
        before = str(self.evaluates_start(recipe)).lower()
        self.console.say(f"{name}: training, output in {log}")
        try:
            code = run_child(
                (*self.program, str(plan.config_of(name)), f"eval.before={before}"),
                log=log,
                lock=self.lock,
                stop=self.stop,
                stop_deadline_s=recipe.settings.learner.deadline_s + STOP_MARGIN_S,
                beat=lambda: self.console.say(f"{name}: {progress_text(read_lines(folder.metrics), plan.allowance)}"),
                say=self.console.say,
            )
        finally:
            self.keep_start(recipe)
        if code == INTERRUPTED or self.stop.is_set:
            raise StopRequested(f"{name} was interrupted")
        error = "" if code == 0 else first_error(log, began, code)
        self.set_status(recipe, {"status": "failed" if code else "finished", "error": error})
        self.console.say(f"{name}: {f'failed: {error}' if code else progress_text(read_lines(folder.metrics), plan.allowance)}")

    # -- state on disk ---------------------------------------------------------------------------------------------------

    @property
    def start_evaluation(self) -> Path:
        """Held-out answers of the start; kept here because a recipe that begins anew moves its folder away."""
        return self.plan.output / "start-eval.json"

    def evaluates_start(self, recipe: Recipe) -> bool:
        """Whether this recipe's run is the one that evaluates the start: the first that decodes plainly, if any does."""
        return not self.start_evaluation.exists() and self._decodes_as_start(recipe)

    def keep_start(self, recipe: Recipe) -> None:
        found = self.plan.run_of(recipe.name) / "eval-0.json"
        if found.exists() and self.evaluates_start(recipe):
            replace_text(self.start_evaluation, found.read_text(encoding="utf-8"))

    def _decodes_as_start(self, recipe: Recipe) -> bool:
        return not recipe.settings.eval.shaped or all(other.settings.eval.shaped for other in self.plan.recipes)

    def status(self, recipe: Recipe) -> Mapping[str, str]:
        """``status`` and ``error`` of a recipe."""
        return self._states().get(recipe.name, {"status": "unfinished", "error": ""})

    def set_status(self, recipe: Recipe, status: Mapping[str, str]) -> None:
        content = {**self._states(), recipe.name: dict(status)}
        replace_text(self.plan.output / "state.json", json.dumps(content, indent=2) + "\n")

    def _states(self) -> dict[str, dict[str, str]]:
        path = self.plan.output / "state.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    # -- results ---------------------------------------------------------------------------------------------------------

    def report(self) -> list[Row]:
        """Table, JSON and picture of what there is; returns the rows."""
        from rl.types import BudgetKind
        from rl.zoo import compare, read_evaluation, read_result, write_reports
        from rl.zoo_figures import draw_zoo

        plan = self.plan
        results = []
        for recipe in plan.recipes:
            rollout = recipe.settings.rollout
            kind = BudgetKind(rollout.budget_kind) if has_budgets(recipe.settings) and not rollout.hard_budgets else None
            state = self.status(recipe)
            results.append(
                read_result(
                    plan.run_of(recipe.name),
                    recipe.name,
                    status=cast("Status", state["status"]),
                    error=state["error"],
                    budget_kind=kind,
                )
            )
        start = read_evaluation(self.start_evaluation) if self.start_evaluation.exists() else None
        rows = compare(start, results, max_length=plan.base.rollout.max_length)
        write_reports(plan.output, rows, allowance=plan.allowance, notes=plan.notes)
        if any(row.curve for row in rows):
            draw_zoo(rows, plan.output / "zoo.png")
        return rows

    def track(self, rows: Sequence[Row]) -> None:
        from rl.zoo import metrics_of
        from rl.zoo_tracking import track_zoo

        plan = self.plan
        files = [plan.output / name for name in ("zoo.md", "zoo.json", "zoo.png")]
        track_zoo(
            plan.base.tracking,
            RunFolder(plan.run_of("zoo")),
            config=plan.config_of("start"),
            params={"recipes": ",".join(recipe.name for recipe in plan.recipes), "max_tokens": plan.allowance},
            metrics=metrics_of(rows),
            artifacts=[path for path in files if path.exists()],
            runs=[RunFolder(plan.run_of(recipe.name)) for recipe in plan.recipes],
            complete=all(row.status == "finished" for row in rows),
        )

    def show(self, rows: Sequence[Row]) -> None:
        from rl.zoo import caps_text, figures_text

        for line in (figures_text(rows, markdown=False) + "\n" + caps_text(rows, markdown=False)).splitlines():
            self.console.say(line)
        for row in rows:
            if row.status == "failed":
                self.console.say(f"{row.recipe} failed: {row.error}")
        self.console.say(f"table {self.plan.output / 'zoo.md'}   picture {self.plan.output / 'zoo.png'}")


# -- the process of a recipe -------------------------------------------------------------------------------------------------


def run_child(
    command: Sequence[str],
    *,
    log: Path,
    lock: IO[str],
    stop: StopFlag,
    stop_deadline_s: float,
    beat: Callable[[], None],
    say: Callable[[str], None],
) -> int:
    """Run a command to its end, its output added to ``log``, ``beat`` called every `HEARTBEAT_S` seconds; its exit status.

    It is in a session of its own, so that a terminal's Ctrl-C reaches it once, through here: when ``stop`` is set it gets SIGINT
    and up to ``stop_deadline_s`` to end; a second Ctrl-C, or the deadline, ends it at once. It holds ``lock``, also as an orphan.
    """
    with log.open("ab") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=_environment(),
            start_new_session=True,
            pass_fds=(lock.fileno(),),
        )
    try:
        due = time.monotonic() + HEARTBEAT_S
        while (code := _ended(process, POLL_S)) is None:
            if stop.is_set:
                say(f"{stop.reason}: waiting up to {stop_deadline_s:.0f} s for the step in progress; Ctrl-C again ends it now")
                process.send_signal(signal.SIGINT)
                return _wait_for_end(process, stop_deadline_s)
            if time.monotonic() >= due:
                beat()
                due = time.monotonic() + HEARTBEAT_S
        return code
    except BaseException:  # a second Ctrl-C, or a heartbeat that failed: nothing that was started may go on unseen
        process.send_signal(signal.SIGINT)
        _wait_for_end(process, KILL_S)
        raise


def _wait_for_end(process: subprocess.Popen[bytes], seconds: float) -> int:
    code = _ended(process, seconds)
    if code is not None:
        return code
    os.killpg(process.pid, signal.SIGKILL)
    return process.wait()


def _ended(process: subprocess.Popen[bytes], seconds: float) -> int | None:
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None


def _environment() -> dict[str, str]:
    """This process's, with the packages of a checkout found from any directory."""
    root = str(Path(__file__).resolve().parent.parent)
    inherited = os.environ.get("PYTHONPATH")
    return os.environ | {"PYTHONPATH": f"{root}{os.pathsep}{inherited}" if inherited else root, "PYTHONUNBUFFERED": "1"}


@contextmanager
def _locked(folder: Path) -> Iterator[IO[str]]:
    """Hold the folder: one zoo at a time. The lock lives as long as any process that inherited the open file."""
    with (folder / ".lock").open("a", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BudgetRLError(
                f"another zoo, or a run that one started, is at work in {folder}", fix="wait for it, or give another --output"
            ) from None
        yield file


# -- texts -------------------------------------------------------------------------------------------------------------------


def progress_text(lines: Sequence[Mapping[str, Any]], allowance: int) -> str:
    """Where a run stands, from its metrics: ``step 34, 12.0k of 60.0k tokens, accuracy 0.612, 58.3 tokens an answer``."""
    trained = [line for line in lines if "tokens/total" in line]
    if not trained:
        return "no step yet"
    last = trained[-1]
    means = f"accuracy {last['train/accuracy']:.3f}, {last['train/tokens']:.1f} tokens an answer"
    return f"step {last['step']}, {short(last['tokens/total'])} of {short(allowance)} tokens, {means}"


def first_error(log: Path, began: int, code: int) -> str:
    """What a failed command said: the first line of its own error message after byte ``began``, else its last line."""
    with log.open("rb") as file:
        file.seek(began)
        lines = [line.strip() for line in file.read().decode(errors="replace").splitlines() if line.strip()]
    own = [line.removeprefix(_OWN_ERROR) for line in lines if line.startswith(_OWN_ERROR)]
    said = own[0] if own else lines[-1] if lines else "no message"
    return redact(said if code > 0 else f"killed by signal {-code}; {said}")


def short(tokens: float) -> str:
    """A number of tokens in at most five characters or so: ``950``, ``12.0k``, ``1.02M``."""
    if tokens < 1000:
        return f"{tokens:.0f}"
    return f"{tokens / 1000:.1f}k" if tokens < 1_000_000 else f"{tokens / 1_000_000:.2f}M"


def _step_tokens(plan: ZooPlan) -> int:
    """Response tokens of the largest step: by so much a recipe may spend more than its allowance."""
    from rl.preflight import derived_plan

    steps = [derived_plan(recipe.settings).rollouts_per_step * recipe.settings.rollout.max_length for recipe in plan.recipes]
    return max(steps)
