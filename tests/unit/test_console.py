from __future__ import annotations

import io
import logging
import os
import pty
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rl.console import COLUMNS, Console, header_line, redirect_library_chatter, step_line
from rl.run_folder import RunFolder
from rl.settings import OutputSettings
from rl.types import StepReport

METRICS = {
    "train/accuracy": 0.5,
    "train/tokens": 77.32,
    "train/reward": 1.25,
    "adv/mean": -0.031,
    "policy/entropy": 0.8,
    "policy/approx_kl": 1e-4,
    "mismatch/max": 4.3e-5,
    "policy/clip_fraction": 0.01,
    "learn/grad_norm": 1.3,
    "rate/tokens_per_s": 4321.0,
    "time/step": 3.2,
    "time/generate": 2.0,
    "time/score": 0.1,
    "time/learn": 1.0,
    "time/sync": 0.1,
}
PRINTABLE = set(map(chr, range(32, 127))) | {"\n", "─"}


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder.create(OutputSettings(dir=str(tmp_path / "run")), "run")


@pytest.fixture(autouse=True)
def logging_as_it_was() -> Iterator[None]:
    """Put the process-wide logging state back, which this module's subject changes by design."""
    root = logging.getLogger()
    handlers, level, own = root.handlers[:], root.level, logging.getLogger("budget_rl").handlers[:]
    yield
    for handler in root.handlers:
        if handler not in handlers:
            handler.close()
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.getLogger("budget_rl").handlers[:] = own
    logging.captureWarnings(False)


def _opened(folder: RunFolder) -> tuple[Console, io.StringIO]:
    stream = io.StringIO()
    console = Console(stream=stream)
    console.opening(folder, {"version": "0.1"})
    return console, stream


def _logged(folder: RunFolder) -> list[str]:
    return [line.split(" | ", 1)[1] for line in folder.log.read_text().splitlines()]


def test_the_output_folder_is_printed_first(folder: RunFolder) -> None:
    _, stream = _opened(folder)
    assert stream.getvalue() == f"output   {folder.path}\nversion  0.1\n"


def test_a_step_is_one_line_under_its_header_with_the_same_columns_in_the_log(folder: RunFolder) -> None:
    console, stream = _opened(folder)
    console.step(StepReport(1, METRICS))
    console.step(StepReport(2, {"train/accuracy": 0.25}))
    header, first, second = stream.getvalue().splitlines()[2:]
    assert header.split() == ["step", *(column.title for column in COLUMNS)]
    values = "1 0.500 77.3 +1.250 -0.031 0.800 1.0e-04 4.3e-05 0.010 1.300 4321 3.2 2.0 0.1 1.0 0.1"
    assert " ".join(first.split()) == values
    assert second.split() == ["2", "0.250", *["-"] * (len(COLUMNS) - 1)]
    assert _logged(folder)[2:] == [header, first, second]


def test_the_header_comes_again_after_thirty_lines(folder: RunFolder) -> None:
    console, stream = _opened(folder)
    for step in range(1, 62):
        console.step(StepReport(step, METRICS))
    assert [i for i, line in enumerate(stream.getvalue().splitlines()[2:]) if line == header_line()] == [0, 31, 62]


@given(st.integers(0, 999_999), st.dictionaries(st.sampled_from(sorted(METRICS)), st.floats(0, 9.9)))
def test_columns_stay_under_their_titles(step: int, metrics: dict[str, float]) -> None:
    line = step_line(StepReport(step, metrics))
    assert len(line) == len(header_line())
    ends = [i + 1 for i, c in enumerate(header_line() + " ") if c == " " and header_line()[i - 1 : i].strip()]
    assert all((line + " ")[end - 1] == " " for end in ends)


def test_without_a_terminal_there_is_no_bar_and_no_control_character(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    console, stream = _opened(folder)
    with console.progress("warm start", total=20) as advance:
        for _ in range(20):
            advance(1)
    with console.progress("training", total=2, plain_lines=False) as advance:
        console.step(StepReport(1, METRICS))
        advance(1)
    console.first_step_table(StepReport(1, {"verdict/truncated": 0.6, "group/flat": 0.2, "adv/nonzero_tokens": 0.0}))
    console.say("model text \x1b[31mred\x1b[0m \x07bell\rback", style="red")
    shown = stream.getvalue()
    assert set(shown) <= PRINTABLE
    assert [line for line in shown.splitlines() if line.startswith("warm start")][::9] == [
        "warm start  2 of 20 (10%)",
        "warm start  20 of 20 (100%)",
    ]
    assert "model text red bellback\n" in shown


def test_on_a_terminal_the_bar_is_drawn_and_wide_columns_are_left_out(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    reader, writer = pty.openpty()
    with os.fdopen(writer, "w") as terminal:
        console = Console(stream=terminal)
        console.opening(folder, {})
        with console.progress("training", total=2) as advance:
            console.step(StepReport(1, METRICS))
            advance(2)
        terminal.write("\0")
        terminal.flush()
        shown = ""
        while "\0" not in shown:  # a terminal hands over what it has, not all that was written
            shown += os.read(reader, 65536).decode()
    os.close(reader)
    assert "training" in shown and "2/2" in shown
    assert "tok/s" in shown and "sync_s" not in shown
    assert "sync_s" in folder.log.read_text()


def test_the_first_step_table_says_what_to_do_about_a_bad_share(folder: RunFolder) -> None:
    console, stream = _opened(folder)
    console.first_step_table(
        StepReport(1, {"verdict/truncated": 0.6, "group/flat": 0.2, "prompts/dropped": 0.0, "adv/nonzero_tokens": 0.9})
    )
    rows = {line.strip()[:12]: line for line in stream.getvalue().splitlines()}
    assert "60.0%" in rows["answers cut "] and "raise rollout.max_length" in rows["answers cut "]
    assert rows["groups with "].rstrip().endswith("20.0%")
    assert rows["tokens with "].rstrip().endswith("90.0%")


def test_library_chatter_and_warnings_go_to_the_file_and_notes_to_both(
    folder: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    library = logging.getLogger("chatty_library.core")
    library.addHandler(logging.StreamHandler(sys.stderr))
    library.propagate = False
    console, stream = _opened(folder)
    redirect_library_chatter(folder.log)
    redirect_library_chatter(folder.log)
    library.warning("chatter")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        logging.captureWarnings(False)
        redirect_library_chatter(folder.log)
        warnings.warn("a python warning", stacklevel=1)
    logging.getLogger("budget_rl.test").warning("a [note] of ours")
    logging.getLogger("budget_rl.test").debug("too fine")
    captured = capsys.readouterr()
    assert "chatter" not in captured.out + captured.err and "python warning" not in captured.err
    assert stream.getvalue().splitlines()[2:] == ["warning: a [note] of ours"]
    text = folder.log.read_text()
    assert [text.count(part) for part in ("chatter\n", "UserWarning: a python warning", "a [note] of ours")] == [1, 1, 1]
    console.close()


def test_a_closed_console_shows_no_more_notes(folder: RunFolder) -> None:
    console, stream = _opened(folder)
    console.close()
    logging.getLogger("budget_rl").warning("late")
    assert "late" not in stream.getvalue()


def test_the_traceback_of_an_error_and_its_cause_is_in_the_log_and_not_on_the_console(folder: RunFolder) -> None:
    console, stream = _opened(folder)
    shown = stream.getvalue()
    try:
        try:
            raise KeyError("in the worker")
        except KeyError as cause:
            raise RuntimeError("first\n  second") from cause
    except RuntimeError as error:
        console.record_error(error)
    assert stream.getvalue() == shown
    logged = _logged(folder)
    assert [line for line in logged if line.startswith(("KeyError", "RuntimeError"))] == [
        "KeyError: 'in the worker'",
        "RuntimeError: first",
    ]
    assert sum(line.startswith("Traceback") for line in logged) == 2


def test_a_log_that_cannot_be_written_does_not_hide_the_error(folder: RunFolder) -> None:
    console, _ = _opened(folder)
    folder.log.unlink()
    folder.log.mkdir()
    console.record_error(RuntimeError("the first error"))


def test_the_log_goes_on_in_the_folder_of_the_fresh_run_when_an_earlier_one_is_set_aside(folder: RunFolder) -> None:
    console, _ = _opened(folder)
    console.say("earlier run")
    folder.append_metrics(StepReport(1, {}))
    earlier, began = folder.log.read_text(), folder.log_size()
    redirect_library_chatter(folder.log)
    logging.getLogger("library").info("while checking")
    folder.set_aside_earlier_run(log_from=began)
    logging.getLogger("library").info("while training")
    console.say("step 1")
    assert [line.split(": ")[-1] for line in _logged(folder) if "kept as" not in line] == [
        "while checking",
        "while training",
        "step 1",
    ]
    assert (folder.path.with_name("run.before-1") / "run.log").read_text() == earlier


def test_no_secret_reaches_console_or_log(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    canaries = ("hf_canaryCANARY123", "green-canary-77", "canary-named")
    monkeypatch.setenv("A_SERVICE_PASSWORD", canaries[1])
    console, stream = _opened(folder)
    redirect_library_chatter(folder.log)
    text = f"{canaries[0]} {canaries[1]} api_key={canaries[2]}"
    console.say(text)
    logging.getLogger("budget_rl.test").warning(text)
    logging.getLogger("library").warning("%s", text)
    try:
        raise RuntimeError(text)
    except RuntimeError as error:
        console.record_error(error)
        logging.getLogger("library").exception("failed")
    written = stream.getvalue() + folder.log.read_text()
    # A traceback quotes the line `text = f"..."` of this file, which holds no canary.
    assert [canary for canary in canaries if canary in written] == []
    assert written.count("[redacted]") >= 12
