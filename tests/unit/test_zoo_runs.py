"""A zoo at work, with a short program in the place of training: order, state on disk, failures, Ctrl-C."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from launch import zoo
from launch.config import PACKAGED
from launch.zoo import first_error, progress_text, run_child, run_zoo, short
from launch.zoo_recipes import ZooPlan, plan_zoo
from rl.embedded import build_tiny
from rl.errors import BudgetRLError
from rl.settings import WarmStartSettings
from rl.waiting import StopFlag, StopRequested
from tests.e2e.runs import until

TRAIN = """
import json, signal, sys, time
from pathlib import Path
import yaml

config = yaml.safe_load(Path(sys.argv[1]).read_text())
folder = Path(config["output"]["dir"])
folder.mkdir(parents=True, exist_ok=True)
evaluate = {"step": 0, "results": {"free": {"q": {"accuracy": 1.0, "tokens": 9.0, "correct": [1], "lengths": [9]}}}}
lines = []
if "eval.before=true" in sys.argv:
    (folder / "eval-0.json").write_text(json.dumps(evaluate))
    lines = [{"step": 0, "eval/accuracy": 1.0}]
with (folder / "calls").open("a") as calls:
    calls.write(" ".join(sys.argv[2:]) + "\\n")
if folder.name.startswith("broken"):
    print("step 1", "budget-rl: the model is missing", "  fix: bring one", "more", sep="\\n")
    sys.exit(2)
lines += [{"step": 1, "tokens/total": 50.0, "time/step": 6.0, "train/accuracy": 0.5, "train/tokens": 9.0}]
(folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\\n" for line in lines))
if folder.name == "slow" and not (folder / "once").exists():
    (folder / "once").touch()
    signal.signal(signal.SIGINT, lambda *_: sys.exit(130))
    print("ready", flush=True)
    time.sleep(600)
(folder / "eval-1.json").write_text(json.dumps({**evaluate, "step": 1}))
with (folder / "metrics.jsonl").open("a") as metrics:
    metrics.write(json.dumps({"step": 1, "eval/accuracy": 1.0}) + "\\n")
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    build_tiny(folder, WarmStartSettings(hidden_size=32, layers=1, heads=1))
    return folder


@pytest.fixture
def program(tmp_path: Path) -> tuple[str, ...]:
    (tmp_path / "train.py").write_text(TRAIN)
    return sys.executable, str(tmp_path / "train.py")


@pytest.fixture
def stop() -> Iterator[StopFlag]:
    with StopFlag() as flag:
        yield flag


def planned(folder: Path, model: Path, *names: str, more: tuple[str, ...] = ()) -> ZooPlan:
    """A zoo on an untrained model, tracked nowhere; a name that is no packaged recipe becomes a file that changes nothing."""
    asked = []
    for name in names:
        packaged = (PACKAGED / "recipes" / f"{name}.yaml").exists()
        asked.append(name if packaged else str(folder / f"{name}.yaml"))
        if not packaged:
            (folder / f"{name}.yaml").write_text("learner: {lr: 1.0e-5}\n")
    overrides = (f"model={model}", "warm_start=null", "tracking.mlflow=off", "max_steps=1", *more)
    return plan_zoo(PACKAGED / "quickstart.yaml", ",".join(asked), overrides, output=folder / "zoo")


def calls(plan: ZooPlan, name: str) -> list[str]:
    """The overrides of every call that trained the recipe."""
    path = plan.run_of(name) / "calls"
    return path.read_text().splitlines() if path.exists() else []


def rows(plan: ZooPlan) -> dict[str, str]:
    """Recipe -> status, as zoo.json has it."""
    content = json.loads((plan.output / "zoo.json").read_text())
    return {row["recipe"]: row["status"] for row in content["rows"]}


# -- the whole ---------------------------------------------------------------------------------------------------------------


def test_recipes_are_trained_in_order_and_only_the_first_evaluates_the_start(
    tmp_path: Path, model: Path, program: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    plan = planned(tmp_path, model, "grpo", "hbpo")
    assert run_zoo(plan, program=program) == 0
    assert (calls(plan, "grpo"), calls(plan, "hbpo")) == (["eval.before=true"], ["eval.before=false"])
    assert rows(plan) == {"start": "finished", "grpo": "finished", "hbpo": "finished"}
    assert {"zoo.md", "zoo.json", "zoo.png", "start-eval.json", "state.json", "zoo.log"} <= {
        p.name for p in plan.output.iterdir()
    }
    shown = capsys.readouterr().out
    assert "grpo: step 1, 50 of 10.2k tokens, accuracy 0.500, 9.0 tokens an answer" in shown
    assert shown.index("grpo: training") < shown.index("hbpo: training")


def test_a_finished_recipe_is_not_trained_again_and_a_new_one_is(tmp_path: Path, model: Path, program: tuple[str, ...]) -> None:
    assert run_zoo(planned(tmp_path, model, "grpo"), program=program) == 0
    plan = planned(tmp_path, model, "grpo", "hbpo")
    assert run_zoo(plan, program=program) == 0
    assert (calls(plan, "grpo"), calls(plan, "hbpo")) == (["eval.before=true"], ["eval.before=false"])
    assert list(rows(plan)) == ["start", "grpo", "hbpo"]


def test_a_recipe_that_fails_is_reported_stops_no_other_and_is_tried_again(
    tmp_path: Path, model: Path, program: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    plan = planned(tmp_path, model, "broken", "grpo")
    assert run_zoo(plan, program=program) == 1
    assert rows(plan) == {"start": "finished", "broken": "failed", "grpo": "finished"}
    assert "- broken failed: the model is missing" in (plan.output / "zoo.md").read_text()
    assert "broken failed: the model is missing" in capsys.readouterr().out
    assert run_zoo(plan, program=program) == 1
    # The start was kept from its first attempt, although it failed.
    assert calls(plan, "broken") == ["eval.before=true", "eval.before=false"]
    assert calls(plan, "grpo") == ["eval.before=false"]


def test_the_start_is_evaluated_by_a_recipe_that_decodes_plainly(tmp_path: Path, model: Path, program: tuple[str, ...]) -> None:
    plan = planned(tmp_path, model, "cyclicreflex", "grpo")
    assert run_zoo(plan, program=program) == 0
    assert (calls(plan, "cyclicreflex"), calls(plan, "grpo")) == (["eval.before=false"], ["eval.before=true"])
    alone = planned(tmp_path / "zoo", model, "cyclicreflex")
    assert run_zoo(alone, program=program) == 0
    assert calls(alone, "cyclicreflex") == ["eval.before=true"]


def test_a_recipe_that_does_not_fit_the_model_is_named_before_the_first_run(
    tmp_path: Path, model: Path, program: tuple[str, ...]
) -> None:
    plan = planned(tmp_path, model, "grpo", "odd")
    odd = plan.recipes[1].settings
    words = odd.rollout.model_copy(update={"budget_template": "<think> Zounds {budget}"})
    recipe = plan.recipes[1].__class__("odd", odd.model_copy(update={"rollout": words}))
    wrong = ZooPlan(plan.base, plan.output, plan.allowance, (plan.recipes[0], recipe), ())
    with pytest.raises(BudgetRLError, match="^recipe odd: "):
        run_zoo(wrong, program=program)
    assert calls(plan, "grpo") == []


def test_ctrl_c_ends_the_child_cleanly_and_the_same_zoo_goes_on(
    tmp_path: Path, model: Path, program: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    plan = planned(tmp_path, model, "slow", "grpo")
    log = plan.run_of("slow").with_suffix(".log")

    def press() -> None:
        until(lambda: log.exists() and "ready" in log.read_text(), "the child", seconds=120)
        os.kill(os.getpid(), signal.SIGINT)

    presser = threading.Thread(target=press)
    presser.start()
    with pytest.raises(StopRequested):
        run_zoo(plan, program=program)
    presser.join()
    assert "the same command goes on from there" in capsys.readouterr().out
    assert rows(plan) == {"start": "finished", "slow": "unfinished", "grpo": "unfinished"}
    assert run_zoo(plan, program=program) == 0
    assert rows(plan) == {"start": "finished", "slow": "finished", "grpo": "finished"}
    assert calls(plan, "slow") == ["eval.before=true", "eval.before=false"]


def test_a_folder_in_use_by_a_run_that_was_left_behind_is_refused(tmp_path: Path, model: Path, program: tuple[str, ...]) -> None:
    """The lock is inherited: it holds as long as the child does, also after this process was killed."""
    plan = planned(tmp_path, model, "grpo")
    plan.output.mkdir()
    with zoo._locked(plan.output), pytest.raises(BudgetRLError, match="at work in"):
        run_zoo(plan, program=program)
    assert run_zoo(plan, program=program) == 0


# -- one child ---------------------------------------------------------------------------------------------------------------


def ran(tmp_path: Path, script: str, stop: StopFlag, *, deadline_s: float = 60.0, beat: Callable[[], None] = lambda: None) -> int:
    with (tmp_path / "lock").open("a") as lock:
        return run_child(
            (sys.executable, "-c", script),
            log=tmp_path / "child.log",
            lock=lock,
            stop=stop,
            stop_deadline_s=deadline_s,
            beat=beat,
            say=lambda text: None,
        )


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """A heartbeat at every look at the child, and many looks."""
    monkeypatch.setattr(zoo, "HEARTBEAT_S", 0.0)
    monkeypatch.setattr(zoo, "POLL_S", 0.01)


@pytest.mark.parametrize("code", [0, 3])
def test_a_child_s_status_and_output_are_kept(tmp_path: Path, stop: StopFlag, code: int) -> None:
    assert ran(tmp_path, f"print('hello'); raise SystemExit({code})", stop) == code
    assert (tmp_path / "child.log").read_text() == "hello\n"


def test_a_child_has_a_session_of_its_own_so_that_a_terminal_does_not_interrupt_it_twice(tmp_path: Path, stop: StopFlag) -> None:
    assert ran(tmp_path, "import os; print(os.getsid(0) == os.getpid())", stop) == 0
    assert (tmp_path / "child.log").read_text() == "True\n"


@pytest.mark.usefixtures("often")
def test_a_running_child_is_reported_on_until_it_ends(tmp_path: Path, stop: StopFlag) -> None:
    beats: list[int] = []

    def beat() -> None:
        beats.append(1)
        if len(beats) == 3:
            (tmp_path / "go").touch()

    waits = f"import pathlib, time\nwhile not pathlib.Path({str(tmp_path / 'go')!r}).exists(): time.sleep(0.01)"
    assert ran(tmp_path, waits, stop, beat=beat) == 0
    assert len(beats) >= 3


@pytest.mark.usefixtures("often")
def test_a_child_that_does_not_stop_in_time_is_killed(tmp_path: Path, stop: StopFlag) -> None:
    def press_when_deaf() -> None:
        if "deaf" in (tmp_path / "child.log").read_text() and not stop.is_set:
            os.kill(os.getpid(), signal.SIGINT)

    script = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); print('deaf', flush=True); time.sleep(600)"
    assert ran(tmp_path, script, stop, deadline_s=0.1, beat=press_when_deaf) == -signal.SIGKILL


@pytest.mark.usefixtures("often")
def test_a_heartbeat_that_fails_leaves_no_child_behind(tmp_path: Path, stop: StopFlag) -> None:
    def fail_when_started() -> None:
        if (tmp_path / "child.log").read_text():
            raise ValueError("damaged")

    with pytest.raises(ValueError, match="damaged"):
        ran(tmp_path, "import os, time; print(os.getpid(), flush=True); time.sleep(600)", stop, beat=fail_when_started)
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "child.log").read_text().split()[0]), 0)


# -- texts -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "code", "expected"),
    [
        ("step 1\nbudget-rl: no model\n  fix: bring one\n", 2, "no model"),
        ("Traceback\nKeyError: 'x'\n\n", 1, "KeyError: 'x'"),
        ("", 1, "no message"),
        ("step 1\n", -9, "killed by signal 9; step 1"),
        ("budget-rl: api_key=abcdefgh12345\n", 2, "api_key=[redacted]"),
    ],
)
def test_what_a_failed_command_said_is_found(tmp_path: Path, text: str, code: int, expected: str) -> None:
    log = tmp_path / "run.log"
    log.write_text("budget-rl: an error of an earlier attempt\n" + text)
    assert first_error(log, len("budget-rl: an error of an earlier attempt\n"), code) == expected


def test_progress_is_said_from_the_newest_step() -> None:
    assert progress_text([{"step": 0, "eval/accuracy": 0.5}], 60_000) == "no step yet"
    step = {"step": 34, "tokens/total": 12000.0, "train/accuracy": 0.612, "train/tokens": 58.26}
    found = progress_text([{**step, "step": 33}, step, {"step": 34, "eval/accuracy": 0.6}], 60_000)
    assert found == "step 34, 12.0k of 60.0k tokens, accuracy 0.612, 58.3 tokens an answer"


@pytest.mark.parametrize(("tokens", "text"), [(950, "950"), (1000, "1.0k"), (123_456, "123.5k"), (1_024_000, "1.02M")])
def test_numbers_of_tokens_are_short(tokens: int, text: str) -> None:
    assert short(tokens) == text
