"""The command line as a user sees it: in a process of its own, by exit status and streams."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from launch import command
from launch.config import PACKAGED, load_settings
from launch.submission import submit_command, submit_environment
from rl.errors import BudgetRLError, ConfigError
from rl.waiting import StopRequested

ROOT = PACKAGED.parent
QUICKSTART = str(PACKAGED / "quickstart.yaml")
HEAVY = ("torch", "ray", "vllm", "transformers", "deepspeed", "verl", "mlflow")


def run(*arguments: str, cwd: Path = ROOT, program: tuple[str, ...] = ("-m", "launch")) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *program, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, timeout=120, check=False
    )


def imports_of(*arguments: str) -> tuple[int, list[str]]:
    """Exit status of a command and the heavy libraries it imported."""
    script = (
        "import sys\nfrom launch.command import main\n"
        "try:\n    status = main(sys.argv[1:])\nexcept SystemExit as stop:\n    status = stop.code\n"
        f"print('IMPORTED', status or 0, *[name for name in {HEAVY!r} if name in sys.modules])"
    )
    last = run(*arguments, program=("-c", script)).stdout.splitlines()[-1].split()
    assert last[0] == "IMPORTED"
    return int(last[1]), last[2:]


def test_version_prints_the_version_of_the_project() -> None:
    done = run("--version")
    assert done.returncode == 0
    assert re.match(r"budget-rl \d+\.\d+\.\d+", done.stdout)


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (["--version"], 0),
        (["train", QUICKSTART, "--dry-run"], 0),
        (["train", QUICKSTART, "learner.lrr=1"], 2),
        (["train", "no.yaml"], 2),
    ],
)
def test_quick_answers_import_no_heavy_library(arguments: list[str], status: int) -> None:
    assert imports_of(*arguments) == (status, [])


def test_a_dry_run_shows_settings_that_load_again_and_the_plan(tmp_path: Path) -> None:
    done = run("train", QUICKSTART, "learner.lr=0.125", "--dry-run", "prompts_per_step=4")
    assert done.returncode == 0, done.stderr
    text, _, tables = done.stdout.partition("One step")
    (tmp_path / "shown.yaml").write_text(text, encoding="utf-8")
    assert load_settings(tmp_path / "shown.yaml") == load_settings(Path(QUICKSTART), ["learner.lr=0.125", "prompts_per_step=4"])
    samples = yaml.safe_load(text)["rollout"]["samples_per_prompt"]
    assert re.search(rf"rollouts +│ +{4 * samples} │", tables)
    for actor in ("rollout engine", "learner rank", "reward worker"):
        assert actor in tables


def test_a_dry_run_shows_no_secret(tmp_path: Path) -> None:
    done = run("train", QUICKSTART, "tracking.mlflow='https://user:hunter22@host/'", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "hunter22" not in done.stdout


def test_an_unknown_key_is_one_message_and_status_2() -> None:
    done = run("train", QUICKSTART, "learner.lrr=1")
    assert done.returncode == 2
    assert "did you mean learner.lr?" in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_a_file_alone_means_train() -> None:
    assert run("launch/hbpo.yaml", "--dry-run").returncode == 0


def test_the_job_file_runs_itself() -> None:
    """As ``ray job submit launch/hbpo.yaml`` does: the shell executes the file by its first line."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["launch/hbpo.yaml", "max_steps=3", "--dry-run"],
        cwd=ROOT, env={**os.environ, "PATH": path}, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "max_steps: 3" in done.stdout


def test_a_file_that_is_not_there_says_where_it_was_looked_for(tmp_path: Path) -> None:
    done = run("launch/hbpo.yaml", cwd=tmp_path)
    assert done.returncode == 2
    assert str(tmp_path) in done.stderr
    assert "--working-dir ." in done.stderr


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["train", QUICKSTART, "--fast"], "unrecognised arguments: --fast"),
        (["doctor", "a.b=c"], "unrecognised arguments: a.b=c"),
        (["trian", QUICKSTART], "invalid choice"),
        ([], "COMMAND"),
        (["export", "ckpt", "out", "--public"], "add --push"),
        (["export", "ckpt", "out", "--push", "name"], "--push user/name"),
        (["export", "ckpt", "out"], "no checkpoint folder"),
        (["eval", "./nowhere"], "no checkpoint or model folder"),
        (["eval", "org/name"], "add --config"),
        (["submit", QUICKSTART, "learner.lrr=1"], "did you mean learner.lr?"),
    ],
)
def test_a_wrong_call_says_what_is_wrong(
    arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        status = command.main(arguments)
    except SystemExit as stop:  # argparse
        status = stop.code
    assert status == 2
    assert expected in capsys.readouterr().err


def test_the_traceback_is_shown_on_request(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BUDGET_RL_DEBUG", "1")
    assert command.main(["train", "no.yaml"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_a_defect_is_short_on_screen_and_whole_in_a_file(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def defect(options: object) -> int:
        raise RuntimeError("boom")

    monkeypatch.setattr(command, "_doctor", defect)
    assert command.main(["doctor"]) == 1
    error = capsys.readouterr().err
    assert "unexpected RuntimeError: boom" in error
    assert "Traceback" not in error
    found = re.search(r"traceback: (\S+\.log)", error)
    assert found is not None
    log = Path(found[1])
    assert "in defect" in log.read_text(encoding="utf-8")
    log.unlink()


@pytest.mark.parametrize("error", [KeyboardInterrupt(), StopRequested("SIGINT while waiting for rollouts")])
def test_ctrl_c_ends_with_130(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def interrupted(options: object) -> int:
        raise error

    monkeypatch.setattr(command, "_doctor", interrupted)
    assert command.main(["doctor"]) == 130


def test_an_error_survives_the_way_between_processes() -> None:
    import pickle

    error = pickle.loads(pickle.dumps(ConfigError("cause", fix="the fix")))  # noqa: S301 - our own bytes
    assert isinstance(error, ConfigError)
    assert str(error) == "cause\n  fix: the fix"
    assert str(BudgetRLError("cause")) == "cause"


def test_the_submitted_command_goes_to_the_loopback_address_with_an_absolute_file() -> None:
    parts = submit_command(Path(QUICKSTART), ["rollout.budgets=[32, free]"])
    assert parts[1:5] == ["job", "submit", "--address", "http://127.0.0.1:8265"]
    entry = parts[parts.index("--") + 1 :]
    assert entry == [sys.executable, "-m", "launch", "train", QUICKSTART, "rollout.budgets=[32, free]"]


def test_the_submission_authenticates_and_keeps_proxies_and_other_clusters_out() -> None:
    assert submit_environment({"RAY_ADDRESS": "ray://elsewhere:10001", "NO_PROXY": "a.b"}) == {
        "RAY_AUTH_MODE": "token",
        "NO_PROXY": "a.b,127.0.0.1",
    }
    assert submit_environment({"RAY_AUTH_MODE": "disabled"})["RAY_AUTH_MODE"] == "disabled"
