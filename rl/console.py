"""What a run shows: folder and facts, one aligned line per step, notes, a progress bar on terminals; the log gets the same."""

from __future__ import annotations

import logging
import logging.handlers
import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import rich.console
from rich import box
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from rl.redaction import redact
from rl.run_folder import RunFolder
from rl.types import StepReport

HEADER_EVERY = 30
"""Step lines between repetitions of the header."""

_OWN_LOGGER = "budget_rl"
# Escape sequences, everything below 32 except tab and newline, and DEL: model text and messages must not steer the terminal.
_CONTROL = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|[\x00-\x08\x0b-\x1f\x7f\x80-\x9f]")
_PLAIN_MARKS = 10


@dataclass(frozen=True)
class Column:
    """One column of the step line: header, metric, width in characters and how a value is written."""

    title: str
    metric: str
    width: int
    style: str
    rank: int
    """Narrow terminals leave out the columns of highest rank; files have all."""


COLUMNS: tuple[Column, ...] = (
    Column("acc", "train/accuracy", 5, ".3f", 0),
    Column("tokens", "train/tokens", 7, ".1f", 0),
    Column("reward", "train/reward", 7, "+.3f", 1),
    Column("adv", "adv/mean", 7, "+.3f", 2),
    Column("entropy", "policy/entropy", 7, ".3f", 2),
    Column("kl", "policy/approx_kl", 8, ".1e", 3),
    Column("gap", "mismatch/max", 8, ".1e", 3),
    Column("clip", "policy/clip_fraction", 6, ".3f", 3),
    Column("grad", "learn/grad_norm", 7, ".3f", 2),
    Column("tok/s", "rate/tokens_per_s", 6, ".0f", 1),
    Column("step_s", "time/step", 6, ".1f", 1),
    Column("gen_s", "time/generate", 6, ".1f", 4),
    Column("score_s", "time/score", 7, ".1f", 4),
    Column("learn_s", "time/learn", 7, ".1f", 4),
    Column("sync_s", "time/sync", 6, ".1f", 4),
)
"""Columns of console, log and table after the step number; docs/metrics.md explains the metrics."""

PAIR_COLUMNS: tuple[Column, ...] = (
    Column("pair_acc", "pair/accuracy", 8, ".3f", 0),
    Column("margin", "pair/margin", 7, "+.3f", 0),
    Column("chosen", "pair/chosen_reward", 7, "+.3f", 1),
    Column("rejected", "pair/rejected_reward", 8, "+.3f", 1),
    Column("loss", "pair/loss", 7, ".4f", 0),
    Column("entropy", "policy/entropy", 7, ".3f", 2),
    Column("lr", "learn/lr", 8, ".1e", 3),
    Column("grad", "learn/grad_norm", 7, ".3f", 2),
    Column("tok/s", "rate/tokens_per_s", 6, ".0f", 1),
    Column("step_s", "time/step", 6, ".1f", 1),
)
"""The same of a stage that learns from pairs."""

DISTIL_COLUMNS: tuple[Column, ...] = (
    Column("acc", "train/accuracy", 5, ".3f", 0),
    Column("tokens", "train/tokens", 7, ".1f", 0),
    Column("kl_teach", "distil/kl", 8, ".4f", 0),
    Column("contrast", "distil/contrastive_reward", 8, "+.3f", 0),
    Column("tvd", "distil/tvd", 6, ".3f", 2),
    Column("entropy", "policy/entropy", 7, ".3f", 2),
    Column("gap", "mismatch/max", 8, ".1e", 3),
    Column("grad", "learn/grad_norm", 7, ".3f", 2),
    Column("tok/s", "rate/tokens_per_s", 6, ".0f", 1),
    Column("step_s", "time/step", 6, ".1f", 1),
    Column("gen_s", "time/generate", 6, ".1f", 4),
    Column("teach_s", "time/teach", 7, ".1f", 4),
    Column("learn_s", "time/learn", 7, ".1f", 4),
)
"""The same of a distillation: KL to the teacher in nats per token, contrastive reward per answer."""

COLUMNS_OF = {"rl": COLUMNS, "preference": PAIR_COLUMNS, "distil": DISTIL_COLUMNS}
"""Columns by `stage`."""

STEP_WIDTH = 6


def header_line(columns: tuple[Column, ...] = COLUMNS) -> str:
    """Titles, right-aligned over the values of `step_line`."""
    return " ".join([f"{'step':>{STEP_WIDTH}}", *(f"{c.title:>{c.width}}" for c in columns)])


def step_line(report: StepReport, columns: tuple[Column, ...] = COLUMNS) -> str:
    """One step as a line; a metric the report lacks is shown as ``-``."""
    return " ".join([f"{report.step:>{STEP_WIDTH}}", *(f"{cell(report.metrics, c):>{c.width}}" for c in columns)])


def cell(metrics: Mapping[str, float | None], column: Column) -> str:
    """The column's metric as text: ``-`` where absent or null."""
    value = metrics.get(column.metric)
    return "-" if value is None else format(value, column.style)


class Console:
    """The driver's voice. `log` is the run's log file (None before the folder exists); `stream` defaults to standard output.

    On a terminal there are colours and a progress bar; elsewhere plain lines without any control character.
    """

    def __init__(
        self, log: Path | None = None, *, stream: TextIO | None = None, columns: tuple[Column, ...] = COLUMNS
    ) -> None:
        self._stream = stream or sys.stdout
        # Rich would also take FORCE_COLOR and notebook variables for a terminal; files must stay plain.
        self._rich = rich.console.Console(file=self._stream, force_terminal=self._stream.isatty(), highlight=False)
        self._log = log
        self._columns = columns
        self._lines_since_header = HEADER_EVERY
        self._notes = _Notes(self)
        logger = logging.getLogger(_OWN_LOGGER)
        for old in [handler for handler in logger.handlers if isinstance(handler, _Notes)]:
            logger.removeHandler(old)
        logger.addHandler(self._notes)
        logger.setLevel(logging.INFO)

    def close(self) -> None:
        """Stop showing what the logger `budget_rl` says."""
        logging.getLogger(_OWN_LOGGER).removeHandler(self._notes)

    def opening(self, folder: RunFolder, facts: Mapping[str, str]) -> None:
        """Print the output folder first, then `facts` (version, model, data ...); the log lies in the folder from here on."""
        self._log = folder.log
        width = max(len(name) for name in ("output", *facts))
        for name, value in {"output": str(folder.path), **facts}.items():
            self.say(f"{name:<{width}}  {value}")

    def say(self, text: str, *, style: str = "") -> None:
        """Print a line and write it to the log, secrets and control characters taken out."""
        self._print(text, style=style)
        self._record(text)

    def step(self, report: StepReport) -> None:
        """Print the step's line, under a header every `HEADER_EVERY` lines; the log gets every column, narrow terminal or not."""
        columns = self._fitting()
        if self._lines_since_header >= HEADER_EVERY:
            self._lines_since_header = 0
            self._print(header_line(columns), style="bold")
            self._record(header_line(self._columns))
        self._lines_since_header += 1
        self._print(step_line(report, columns))
        self._record(step_line(report, self._columns))

    def first_step_table(self, report: StepReport) -> None:
        """Show the shares of step 1 that tell whether anything can be learnt, each with what to do about a bad one."""
        table = Table(title="after step 1", box=box.SIMPLE, title_justify="left", pad_edge=False)
        for title in ("share of", "value", "remark"):
            table.add_column(title, justify="right" if title == "value" else "left")
        for name, metric, limit, above, remark in _FIRST_STEP:
            value = report.metrics.get(metric)
            bad = value is not None and (value > limit if above else value <= limit)
            table.add_row(name, "-" if value is None else f"{value:.1%}", Text(remark if bad else "", style="yellow"))
            self._record(f"after step 1: {name} {'-' if value is None else f'{value:.1%}'} {remark if bad else ''}".rstrip())
        self._rich.print(table)

    @contextmanager
    def progress(
        self, description: str, *, total: int | None, done: int = 0, plain_lines: bool = True
    ) -> Iterator[Callable[[int], None]]:
        """A bar over `total` units (None: unknown), of which `done` are done; yields the function that adds units.

        Off a terminal there is no bar; with `plain_lines` a line is printed at every tenth instead. Bars do not nest.
        """
        if self._rich.is_terminal and not self._rich.is_dumb_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
            )
            with Progress(*columns, console=self._rich, transient=True) as bar:
                task = bar.add_task(_clean(description), total=total, completed=done)
                yield lambda units: bar.advance(task, units)
            return
        count = done

        def advance(units: int) -> None:
            nonlocal count
            before, count = count, count + units
            if plain_lines and total and before * _PLAIN_MARKS // total < count * _PLAIN_MARKS // total:
                self._print(f"{description}  {count} of {total} ({count / total:.0%})")

        yield advance

    def record_error(self, error: BaseException) -> None:
        """Write the traceback, with its causes here and in a worker, to the log; whoever catches the error prints it."""
        with suppress(OSError):  # a full disk may be what went wrong, and must not hide it
            for line in "".join(traceback.format_exception(error)).splitlines():
                self._record(line)

    def _fitting(self) -> tuple[Column, ...]:
        if not self._rich.is_terminal:
            return self._columns
        for rank in range(max(c.rank for c in self._columns), -1, -1):
            columns = tuple(c for c in self._columns if c.rank <= rank)
            if len(header_line(columns)) <= self._rich.width:
                return columns
        return tuple(c for c in self._columns if c.rank == 0)

    def _print(self, text: str, *, style: str = "") -> None:
        self._rich.print(Text(_clean(text), style=style), soft_wrap=True)

    def _record(self, text: str) -> None:
        if self._log is None:
            return
        with self._log.open("a", encoding="utf-8") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} | {_clean(text)}\n")


_FIRST_STEP: tuple[tuple[str, str, float, bool, str], ...] = (
    ("answers cut at the length limit", "verdict/truncated", 0.5, True, "raise rollout.max_length"),
    ("answers that a grader or function timed out on", "verdict/timed_out", 0.0, True, "see `evidence` in samples.jsonl"),
    ("answers that a grader or function crashed on", "verdict/crashed", 0.0, True, "see `evidence` in samples.jsonl"),
    (
        "groups with all rewards equal",
        "group/flat",
        0.8,
        True,
        "too easy or too hard: change data.task or raise samples_per_prompt",
    ),
    ("prompts dropped as too long", "prompts/dropped", 0.1, True, "raise data.max_prompt_length"),
    ("tokens with non-zero advantage", "adv/nonzero_tokens", 0.0, False, "nothing to learn from: see the rows above"),
)


class _Notes(logging.Handler):
    """Shows what the logger `budget_rl` says on the console; the log file has it through the root logger, or from here."""

    def __init__(self, console: Console) -> None:
        super().__init__(logging.INFO)
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if record.levelno > logging.INFO:
            text = f"{record.levelname.lower()}: {text}"
        self._console._print(text, style="yellow" if record.levelno > logging.INFO else "")
        if not any(isinstance(handler, _LogFile) for handler in logging.getLogger().handlers):
            self._console._record(text)


class _LogFile(logging.handlers.WatchedFileHandler):
    """The log file of a run, shared by all loggers of the driver; opened anew when the folder of an earlier run is renamed."""


class _CleanFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return _clean(super().format(record))


def redirect_library_chatter(log_path: Path) -> None:
    """Send Python logging and warnings of every library in this process to the file instead of the console.

    Libraries that install their own console handler when imported or started (vLLM, DeepSpeed, Ray) bring it back: call again
    after that; repeating is harmless, and a new path replaces the old one. Our own logger `budget_rl` keeps the console and
    reaches the file as well.
    """
    # Read when these libraries are imported; a user's own choice stays.
    os.environ.setdefault("MLFLOW_CONFIGURE_LOGGING", "false")
    if (
        "transformers" in sys.modules
    ):  # its bars for reading and writing weights are no logging; this module is too light to import it
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
    root = logging.getLogger()
    current = [handler for handler in root.handlers if isinstance(handler, _LogFile)]
    if [Path(handler.baseFilename) for handler in current] != [Path(os.path.abspath(log_path))]:
        for handler in current:
            root.removeHandler(handler)
            handler.close()
        target = _LogFile(log_path, encoding="utf-8")
        target.setFormatter(_CleanFormatter("%(asctime)s | %(levelname)s %(name)s: %(message)s", "%Y-%m-%d %H:%M:%S"))
        root.addHandler(target)
    root.setLevel(logging.INFO)
    logging.captureWarnings(True)
    for logger in [root, *(item for item in logging.root.manager.loggerDict.values() if isinstance(item, logging.Logger))]:
        if _mute(logger):
            logger.propagate = True


def _mute(logger: logging.Logger) -> bool:
    """Remove the handlers that write to the console; whether there were any."""
    # Ray's handler picks its stream when it writes, but is a StreamHandler on standard error all the same.
    consoles = (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__)
    noisy = [h for h in logger.handlers if isinstance(h, logging.StreamHandler) and h.stream in consoles]
    for handler in noisy:
        logger.removeHandler(handler)
    return bool(noisy)


def _clean(text: str) -> str:
    return _CONTROL.sub("", redact(text))
