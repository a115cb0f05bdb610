"""Reward functions of other libraries, and in their styles, run unchanged; `reward-check` finds each broken promise."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from reward.check import NASTY, Finding, check_function
from reward.function_calls import FunctionRequest
from reward.function_pool import FunctionPool
from rl.reward_settings import FunctionSettings
from rl.types import FunctionScore

PLUGINS = Path(__file__).with_name("plugin_functions.py")
ROOT = PLUGINS.parent.parent.parent
VERL = "verl.utils.reward_score"
VERL_FUNCTIONS = {
    "gsm8k": f"{VERL}.gsm8k:compute_score",
    "math_dapo": f"{VERL}.math_dapo:compute_score",
    "math_reward": f"{VERL}.math_reward:compute_score",
    "default": f"{VERL}:default_compute_score",
    "math_batch": f"{VERL}.math_batch:compute_score_batched",
}
ANSWERS = (
    "#### 72",
    "so #### 71",
    "the answer is $\\boxed{72}$",
    "Answer: 72",
    "<think>Answer: 72",
    "",
    "\\boxed{" * 40,
    "\0 72",
)
DEADLINE_S = 60.0


def plugin(called: str, **settings: Any) -> FunctionSettings:
    return FunctionSettings.model_validate({"path": f"{PLUGINS}:{called}", **settings})


# ---- verl --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scores_of_verls_functions() -> dict[str, list[FunctionScore]]:
    functions = [FunctionSettings(path=path, name=name) for name, path in VERL_FUNCTIONS.items()]
    row = json.dumps({"question": "How many?", "answer": "long text\n#### 72", "reward_model": {"ground_truth": "72"}})
    requests = [FunctionRequest("How many?", text, ("long text\n#### 72",), row) for text in ANSWERS]
    with FunctionPool(functions, DEADLINE_S, data_source="openai/gsm8k") as pool:
        columns = zip(*pool.score(requests), strict=True)
        return dict(zip(VERL_FUNCTIONS, map(list, columns), strict=True))


@pytest.mark.parametrize("name", VERL_FUNCTIONS)
def test_verls_own_functions_give_through_the_pool_what_they_give_directly(
    name: str, scores_of_verls_functions: dict[str, list[FunctionScore]]
) -> None:
    module, _, attribute = VERL_FUNCTIONS[name].partition(":")
    function = getattr(importlib.import_module(module), attribute)
    direct = {
        "default": lambda text: function("openai/gsm8k", text, "72", {}),
        "math_batch": lambda text: function(["openai/gsm8k"], [text], ["72"], [{}])[0],
    }.get(name, lambda text: function(text, "72"))
    for text, score in zip(ANSWERS, scores_of_verls_functions[name], strict=True):
        expected = direct(text)
        assert score.status == "ok", (text, score)
        if isinstance(expected, dict):
            assert (score.value, score.correct, score.extras) == (expected["score"], expected["acc"], {"acc": expected["acc"]})
        else:
            assert (score.value, score.correct) == (expected, None)
    assert len({score.value for score in scores_of_verls_functions[name]}) == 2, "it must tell right from wrong"


def test_a_function_in_verls_style_says_whether_the_answer_is_correct() -> None:
    with FunctionPool([plugin("graded")], DEADLINE_S) as pool:
        right, wrong = (
            scores[0] for scores in pool.score([FunctionRequest("q", t, ("4",)) for t in ("it is 4", "I think it is 5")])
        )
    assert (right.value, right.correct, right.extras) == (1.0, True, {"acc": 1.0, "brief": 1.0})
    assert (wrong.value, wrong.correct, wrong.extras) == (-1.0, False, {"acc": 0.0, "brief": 0.0})


# ---- TRL's style -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chat_pool() -> Iterator[FunctionPool]:
    functions = [
        plugin("right_answer"),
        plugin("easy_ones_only"),
        plugin("judged", messages=False),
        plugin("late"),
        plugin("think_end"),
    ]
    with FunctionPool(functions, DEADLINE_S, chat=True, system_prompt="be brief") as pool:
        yield pool


def test_functions_in_trls_style_get_messages_columns_and_progress(chat_pool: FunctionPool) -> None:
    rows = [json.dumps({"answer": "4", "level": level}) for level in (1, 5)]
    requests = [
        FunctionRequest("2+2?", "<think>hm</think>4", ("4",), rows[0], (1,), (7, 8, 7)),
        FunctionRequest("3+3?!", "no idea", ("4",), rows[1], (1,), (8, 8)),
    ]
    first, second = chat_pool.score(requests, step=12)
    assert [s.value for s in first] == [1.0, 1.0, 1.0, 12.0, 2.0]
    assert [s.value for s in second] == [0.0, None, 0.0, 12.0, None]
    assert [s.status for s in second] == ["ok", "none", "ok", "ok", "none"]
    assert first[4].per_token == (1.0, None, 1.0)
    assert (first[1].extras, second[1].extras) == ({"asked": 4.0}, {"asked": 5.0})
    assert [s.name for s in first] == ["right_answer", "easy_ones_only", "judged", "late", "think_end"]


# ---- reward-check ------------------------------------------------------------------------------------------------------


def failed(findings: list[Finding]) -> list[str]:
    return [finding.name for finding in findings if finding.status == "FAILED"]


def named(findings: list[Finding], name: str) -> Finding:
    (finding,) = [finding for finding in findings if finding.name == name]
    return finding


@pytest.mark.parametrize(("name", "form"), [("right_answer", "takes only chat messages"), ("judged", "takes only plain texts")])
def test_a_good_function_passes_in_the_form_that_it_takes(name: str, form: str) -> None:
    findings = check_function(plugin(name), deadline_s=DEADLINE_S)
    assert failed(findings) == []
    assert named(findings, "messages or texts").found == form
    assert named(findings, "nasty texts").found == f"{len(NASTY)} survived"


def test_a_good_function_in_verls_style_passes_and_tells_right_from_wrong() -> None:
    findings = check_function(plugin("graded"), deadline_s=DEADLINE_S)
    assert {finding.status for finding in findings} == {"ok"}
    assert named(findings, "gold above garbage").found == "for 4 of 4 questions"


@pytest.mark.parametrize(
    ("name", "broken", "found"),
    [
        ("too_few", {"type, length, finite"}, "returned 0 items for 1 completions"),
        ("infinite", {"type, length, finite"}, "returned inf"),
        ("text", {"type, length, finite"}, "returned the text '1.0'"),
        ("needs_a_column", {"type, length, finite"}, "needs 'difficulty', which nothing gives"),
        ("forgetful", {"same twice"}, "other scores the second time"),
        ("by_place", {"any order", "alone as in a batch"}, "answer 0 got 0 in the batch and 31 batch backwards"),
        ("by_batch", {"alone as in a batch"}, "alone"),
        ("emptying", {"leaves its inputs alone"}, "it changed answer"),
        ("recursive", {"nasty texts"}, "5000 open brackets: crashed, RecursionError"),
        ("slow_on_digits", {"nasty texts"}, "a number of 5000 digits: timed_out"),
        ("nowhere", {"loads"}, "has no function 'nowhere'"),
    ],
)
def test_each_broken_promise_is_found_and_named(name: str, broken: set[str], found: str) -> None:
    findings = check_function(plugin(name), deadline_s=3.0 if name == "slow_on_digits" else DEADLINE_S)
    assert set(failed(findings)) == broken
    first = next(finding for finding in findings if finding.status == "FAILED")
    assert found in first.found and first.fix


def test_a_function_that_scores_nothing_is_not_called_again_and_nothing_is_said_of_the_rest() -> None:
    findings = check_function(plugin("text"), deadline_s=DEADLINE_S)
    assert [finding.name for finding in findings if finding.status == "ok"] == ["loads"]


def test_prints_and_indifference_to_the_answer_are_warnings() -> None:
    findings = check_function(plugin("chatty"), deadline_s=DEADLINE_S)
    assert failed(findings) == []
    assert named(findings, "gold above garbage").status == "warning"
    printed = named(findings, "prints")
    assert printed.status == "warning" and "'judging 42" in printed.found


def flat(table: str) -> str:
    """The words of a table whose cells are broken into lines."""
    return " ".join(table.replace("│", " ").split())


def reward_check(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "160"}
    command = [sys.executable, "-m", "launch", "reward-check", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240, check=False)


def test_the_command_line_exits_with_0_for_a_good_function_on_rows_of_a_file(tmp_path: Path) -> None:
    rows = [{"question": f"{i}+{i}?", "answer": str(2 * i), "level": i} for i in range(8)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    done = reward_check(f"{PLUGINS}:easy_ones_only", "--data", str(tmp_path / "rows.jsonl"), "--samples", "6")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "TRL's convention" in done.stdout and "48 answers" in done.stdout


def test_the_check_starts_neither_ray_nor_an_engine() -> None:
    script = (
        "import sys\nfrom launch.command import main\n"
        f"status = main(['reward-check', {f'{PLUGINS}:graded'!r}, '--samples', '1'])\n"
        "print('STATUS', status, *[name for name in ('ray', 'vllm', 'deepspeed', 'verl') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    assert done.stdout.splitlines()[-1] == "STATUS 0", done.stdout + done.stderr


def test_the_command_line_exits_with_1_for_a_function_that_breaks_a_promise() -> None:
    done = reward_check(f"{PLUGINS}:emptying", "--samples", "1")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "FAILED: leaves its inputs alone: work on copies" in done.stdout


def test_the_command_line_takes_arguments_and_variables_from_a_configuration(tmp_path: Path) -> None:
    config = tmp_path / "mine.yaml"
    config.write_text(
        f"defaults: [/quickstart, _self_]\nreward:\n  functions:\n"
        f"  - {{path: '{PLUGINS}:needs_a_column', arguments: {{difficulty: [1]}}}}\n",
        encoding="utf-8",
    )
    done = reward_check(f"{PLUGINS}:needs_a_column", "--config", str(config), "--samples", "1")
    assert "though each alone does" in flat(done.stdout)
    assert "returned 1 items for 8 completions" in flat(done.stdout), done.stdout + done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--samples", "0"], "must be positive"), (["--data", "nowhere.jsonl"], "no file nowhere.jsonl")],
)
def test_what_cannot_be_tried_is_an_error_of_its_own(arguments: list[str], message: str) -> None:
    done = reward_check(f"{PLUGINS}:graded", *arguments)
    assert done.returncode == 2 and message in done.stderr
