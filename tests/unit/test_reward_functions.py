"""Finding a reward function, telling its convention, what it is given and what is made of what it returns."""

from __future__ import annotations

import asyncio
import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from reward.function_calls import (
    Context,
    FunctionRequest,
    Log,
    Outcome,
    WrongResult,
    arguments_of,
    evidence_of,
    invoke,
    outcomes_of,
    without_special_tokens,
)
from reward.function_pool import function_names, function_request
from reward.functions import RewardFunctionError, absolute_path, fit_function, load_function
from rl.reward_settings import FunctionSettings
from tests.builders import make_lease, make_rollout

ROW = {"question": "2+2?", "answer": "4", "level": 3}
REQUEST = FunctionRequest("2+2?", "</think> 4", ("4",), json.dumps(ROW), (1, 2), (7, 8, 9))


@pytest.fixture(autouse=True)
def _same_imports(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A loaded file puts its folder on the path and itself among the modules; both are undone."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if name.startswith(("plugin", "reward_function_")):
            del sys.modules[name]


def write(folder: Path, text: str, name: str = "plugin.py") -> str:
    file = folder / name
    file.write_text(text, encoding="utf-8")
    return str(file)


def given(
    function: Callable[..., Any], *requests: FunctionRequest, context: Context | None = None, **fit: Any
) -> list[dict[str, Any]]:
    """The keyword arguments with which the function is called."""
    fitted = fit_function(function, **fit)
    return arguments_of(fitted, requests or (REQUEST,), context or Context("gsm8k"), step=5, log=Log())


def outcomes(function: Callable[..., Any], result: Any, *requests: FunctionRequest) -> list[Outcome]:
    return outcomes_of(fit_function(function), [result], requests or (REQUEST,), log=Log())


def trl(completions: Any, **kwargs: Any) -> Any: ...


def verl(data_source: Any, solution_str: Any, ground_truth: Any, extra_info: Any = None) -> Any: ...


def verl_batch(data_sources: Any, solution_strs: Any, ground_truths: Any, extra_infos: Any) -> Any: ...


# ---- loading ---------------------------------------------------------------------------------------------------------


def test_a_function_is_loaded_from_a_file_and_its_neighbours_can_be_imported(tmp_path: Path) -> None:
    write(tmp_path, "VALUE = 3", "plugin_neighbour.py")
    path = write(tmp_path, "from plugin_neighbour import VALUE\ndef f(completions):\n    return [VALUE for _ in completions]")
    assert load_function(f"{path}:f")(["a", "b"]) == [3, 3]


def test_a_function_is_loaded_from_a_module() -> None:
    assert load_function("json:dumps") is json.dumps


def test_a_file_called_like_a_loaded_module_does_not_take_its_place(tmp_path: Path) -> None:
    path = write(tmp_path, "def f(completions): return ['mine']", "json.py")
    assert load_function(f"{path}:f")([]) == ["mine"]
    assert sys.modules["json"] is json


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("{folder}/plugni.py:f", "did you mean plugin.py"),
        ("{folder}/nowhere/plugin.py:f", "there is no file"),
        ("{folder}/plugin.py:scoer", "has no function 'scoer'; did you mean score"),
        ("{folder}/plugin.py:LIMIT", "LIMIT in .* is of type int and cannot be called"),
        ("{folder}/plugin.py", "names no function"),
        ("score", "FILE.py:NAME or package.module:NAME"),
        ("no_such_package.rewards:f", "there is no module no_such_package"),
        ("json.no_such_part:f", "there is no module json.no_such_part"),
        ("json:dupms", "json has no function 'dupms'; did you mean dumps"),
    ],
)
def test_what_is_not_there_is_named_with_the_nearest(tmp_path: Path, path: str, message: str) -> None:
    write(tmp_path, "LIMIT = 4\ndef score(completions): ...")
    with pytest.raises(RewardFunctionError, match=message):
        load_function(path.format(folder=tmp_path))


@pytest.mark.parametrize(
    ("text", "last_line"),
    [
        ("import no_such_library", "No module named 'no_such_library'"),
        ("def f(:\n", "SyntaxError"),
        ("raise ValueError('the licence file is missing')", "the licence file is missing"),
        ("raise SystemExit('no key')", "SystemExit: no key"),
    ],
)
def test_an_import_that_raises_is_shown_by_its_last_lines(tmp_path: Path, text: str, last_line: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(RewardFunctionError, match=last_line) as caught:
        load_function(f"{path}:f")
    assert path in caught.value.cause


def test_a_files_path_is_made_absolute_and_a_modules_is_left(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert absolute_path("rewards/a.py:f") == f"{tmp_path}/rewards/a.py:f"
    assert absolute_path("package.a:f") == "package.a:f"


# ---- the convention --------------------------------------------------------------------------------------------------


class Judge:
    async def __call__(self, completions: Any, answer: Any) -> Any: ...


async def waits(solution_str: Any, ground_truth: Any) -> Any: ...


@pytest.mark.parametrize(
    ("function", "convention", "batches"),
    [
        (trl, "trl", True),
        (lambda completion_ids, **kwargs: [], "trl", True),
        (lambda prompts, completions, answer: [], "trl", True),
        (Judge(), "trl", True),
        (verl, "verl", False),
        (lambda solution_str, ground_truth, method="strict": 0, "verl", False),
        (waits, "verl", True),
        (verl_batch, "verl_batch", True),
    ],
)
def test_the_names_of_the_parameters_tell_the_convention(function: Any, convention: str, batches: bool) -> None:
    fitted = fit_function(function)
    assert (fitted.convention, fitted.takes_batches) == (convention, batches)


@pytest.mark.parametrize("function", [lambda text, gold: 0, lambda: 0, lambda *answers: 0, lambda **anything: 0, lambda x, /: 0])
def test_a_signature_that_fits_neither_convention_is_refused_naming_both(function: Any) -> None:
    with pytest.raises(RewardFunctionError, match=r"fits neither convention.*completions.*solution_str"):
        fit_function(function)


def test_a_function_of_any_arguments_needs_the_convention_said() -> None:
    def anything(**kwargs: Any) -> Any: ...

    assert fit_function(anything, convention="trl").convention == "trl"
    assert fit_function(anything, convention="verl").convention == "verl"


def test_a_convention_that_does_not_fit_is_refused() -> None:
    with pytest.raises(RewardFunctionError, match=r"\(data_source, solution_str, .*\) does not fit convention=trl"):
        fit_function(verl, convention="trl")
    assert fit_function(verl_batch, convention="verl").convention == "verl_batch"


def test_parameters_of_both_conventions_are_refused_until_one_is_chosen() -> None:
    def both(completions: Any = None, solution_str: Any = None) -> Any: ...

    with pytest.raises(RewardFunctionError, match="fits both"):
        fit_function(both)
    assert fit_function(both, convention="verl").convention == "verl"


def test_a_parameter_that_verl_does_not_give_must_come_from_the_arguments() -> None:
    def judge(solution_str: Any, ground_truth: Any, url: str) -> Any: ...

    with pytest.raises(RewardFunctionError, match="needs 'url'"):
        fit_function(judge)
    assert fit_function(judge, arguments={"url": "http://localhost"}).convention == "verl"


def test_an_argument_that_the_function_does_not_take_is_refused_with_the_nearest() -> None:
    with pytest.raises(RewardFunctionError, match=r"no parameter 'extra_inof' of `arguments`; did you mean extra_info"):
        fit_function(verl, arguments={"extra_inof": {}})


def test_a_column_that_the_data_lacks_is_named_with_those_there_are() -> None:
    with pytest.raises(RewardFunctionError, match=r"needs 'difficulty', which nothing gives \(there are: answer, .*level"):
        given(lambda completions, difficulty: [])


# ---- what a function is given ----------------------------------------------------------------------------------------


def test_trl_functions_get_every_column_of_the_rows_as_lists() -> None:
    other = FunctionRequest("3+3?", "6", ("6",), json.dumps({"answer": "six", "source": "book"}), (), (1,))
    (kwargs,) = given(trl, REQUEST, other)
    assert kwargs["prompts"] == ["2+2?", "3+3?"] and kwargs["completions"] == ["</think> 4", "6"]
    assert kwargs["completion_ids"] == [[7, 8, 9], [1]]
    assert kwargs["answer"] == ["4", "six"] and kwargs["level"] == [3, None] and kwargs["source"] == [None, "book"]
    assert kwargs["solution"] == kwargs["ground_truth"] == ["4", "6"], "no such column: the reference answer"
    assert kwargs["trainer_state"].global_step == 5
    assert "prompt_ids" not in kwargs, "TRL does not give them"


def test_trl_functions_get_only_what_they_take() -> None:
    assert given(lambda completions, level: [])[0].keys() == {"completions", "level"}
    assert given(lambda completions, prompt_ids: [])[0]["prompt_ids"] == [[1, 2]]


def test_columns_of_the_data_do_not_take_the_place_of_the_answers() -> None:
    row = json.dumps({"completions": "theirs", "prompt": "theirs", "completion_ids": "theirs"})
    (kwargs,) = given(trl, FunctionRequest("q", "ours", ("4",), row, (), (1, 2)))
    assert kwargs["completions"] == ["ours"] and kwargs["completion_ids"] == [[1, 2]]
    assert "prompt" not in kwargs


def test_trl_functions_get_chat_messages_where_a_chat_template_is_used() -> None:
    (kwargs,) = given(trl, context=Context(messages=True, system_prompt="be brief"))
    assert kwargs["completions"] == [[{"role": "assistant", "content": "</think> 4"}]]
    assert kwargs["prompts"] == [[{"role": "system", "content": "be brief"}, {"role": "user", "content": "2+2?"}]]


def test_verl_functions_get_one_answer_at_a_time_as_text() -> None:
    first, second = given(verl, REQUEST, REQUEST, context=Context("gsm8k", messages=True))
    assert first == second == {"data_source": "gsm8k", "solution_str": "</think> 4", "ground_truth": "4", "extra_info": ROW}


def test_rows_in_verls_layout_give_their_own_values() -> None:
    row = {"data_source": "aime", "reward_model": {"ground_truth": {"target": ["4"]}}, "extra_info": {"index": 7}}
    (kwargs,) = given(verl, FunctionRequest("q", "a", ("4",), json.dumps(row)))
    assert kwargs == {"data_source": "aime", "solution_str": "a", "ground_truth": {"target": ["4"]}, "extra_info": {"index": 7}}


def test_several_accepted_answers_are_given_as_a_list() -> None:
    request = FunctionRequest("q", "a", ("4", "four"))
    assert given(verl, request)[0]["ground_truth"] == ["4", "four"]
    assert given(trl, request)[0]["answer"] == [["4", "four"]]


def test_verls_batched_form_gets_lists_under_the_plural_names() -> None:
    (kwargs,) = given(verl_batch, REQUEST, REQUEST)
    assert kwargs["solution_strs"] == ["</think> 4"] * 2 and kwargs["extra_infos"] == [ROW, ROW]
    assert kwargs["data_sources"] == ["gsm8k"] * 2 and kwargs["ground_truths"] == ["4", "4"]


def test_the_configured_arguments_win() -> None:
    assert given(verl, arguments={"data_source": "math_dapo"})[0]["data_source"] == "math_dapo"


def test_special_tokens_are_taken_out_and_think_tags_stay() -> None:
    text = "<think>a<|im|>b</think>4<|im_end|><|im_end|>"
    assert without_special_tokens(text, ["<|im|>", "<|im_end|>", "<think>", "</think>", ""]) == "<think>ab</think>4"
    assert without_special_tokens(text, []) == text


def test_a_rollout_is_shown_with_its_budget_words_and_without_special_tokens() -> None:
    rollout = make_rollout(make_lease(prefill_ids=(5,)), generated=(8, 9), text="<think>x</think>0</s>")
    request = function_request(rollout, special_tokens=("</s>",), template="Q: {question}\nA:")
    assert request.prompt == "Q: question 0\nA:" and request.completion == "<think>x</think>0"
    assert request.golds == ("0",) and request.completion_ids == (5, 8, 9) and request.prompt_ids == (1, 2, 3)


# ---- what is made of the result --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("result", "values"),
    [
        ([1, 0.5], [1.0, 0.5]),
        ((True, None), [1.0, None]),
        (np.array([1.0, 0.25], dtype=np.float32), [1.0, 0.25]),
        (torch.tensor([1.0, 0.25]), [1.0, 0.25]),
        ([torch.tensor(2.0), np.float64(3.0)], [2.0, 3.0]),
        ((x for x in (1, 2)), [1.0, 2.0]),
    ],
)
def test_trl_results_are_numbers_of_any_library_or_none(result: Any, values: list[float | None]) -> None:
    found = outcomes(trl, result, REQUEST, REQUEST)
    assert [outcome.value for outcome in found] == values
    assert [outcome.status for outcome in found] == ["none" if value is None else "ok" for value in values]


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (None, "returned None where a list"),
        (1.0, "returned 1.0 where a list"),
        ("1.0", "returned the text '1.0' where a list"),
        ({"score": 1}, "returned a dict of 1 where a list"),
        ([], "returned 0 items for 2 completions"),
        ([1.0], "returned 1 items for 2 completions"),
        ([1.0] * 3, "returned more items for 2 completions"),
        (iter(int, 1), "returned more items for 2 completions"),
    ],
)
def test_a_trl_result_that_cannot_be_shared_out_is_wrong_as_a_whole(result: Any, message: str) -> None:
    with pytest.raises(WrongResult, match=message):
        outcomes(trl, result, REQUEST, REQUEST)


@pytest.mark.parametrize(
    ("item", "evidence"),
    [
        (math.nan, "returned nan; return a finite number, or None"),
        (math.inf, "returned inf"),
        (10**400, "returned something of type int, which is no number (OverflowError)"),
        ("yes", "returned the text 'yes' where a number is due"),
        ("y" * 99, "returned a text of 99 characters where"),
        ({"score": 1.0}, "returned a dict of 1 where a number is due"),
        (object(), "returned something of type object where a number is due"),
        ([1.0, 2.0], "returned 2 rewards for a completion of 3 tokens"),
        ([1.0, math.nan, 1.0], "returned nan"),
        ([1.0, "x", 1.0], "returned the text 'x'"),
    ],
)
def test_an_item_that_is_no_reward_is_crashed_with_what_came_back_and_its_neighbour_is_scored(item: Any, evidence: str) -> None:
    bad, good = outcomes(trl, [item, 1.0], REQUEST, REQUEST)
    assert bad.status == "crashed" and bad.value is None and bad.evidence.startswith(evidence)
    assert good == Outcome("ok", 1.0)


def test_rewards_of_single_tokens_add_up_to_the_value() -> None:
    (outcome,) = outcomes(trl, [[0.1, None, 0.2]])
    assert outcome.status == "ok" and outcome.per_token == (0.1, None, 0.2)
    assert outcome.value == math.fsum([0.1, 0.2])
    assert outcomes(trl, [[None, None, None]]) == [Outcome("none")]


@pytest.mark.parametrize(
    ("result", "outcome"),
    [
        (1, Outcome("ok", 1.0)),
        (True, Outcome("ok", 1.0)),
        (np.float32(0.5), Outcome("ok", 0.5)),
        (None, Outcome("none")),
        ({"score": -1.0, "acc": False, "pred": "5"}, Outcome("ok", -1.0, correct=False, extras={"acc": 0.0})),
        ({"score": 1, "acc": np.True_, "format": 0.5}, Outcome("ok", 1.0, correct=True, extras={"acc": 1.0, "format": 0.5})),
        ({"score": 0.3, "acc": 0.3, "x": math.nan}, Outcome("ok", 0.3, correct=None, extras={"acc": 0.3})),
        ({"score": None, "acc": 1}, Outcome("none", correct=True, extras={"acc": 1.0})),
        ({"reward": 1.0}, Outcome("crashed", evidence="returned a dict without `score` (it has: reward)")),
        ({"score": "1"}, Outcome("crashed", evidence="returned the text '1' where a number is due")),
        ((1.0, "because"), Outcome("crashed", evidence="returned a tuple of 2 where a number is due")),
        ({"score": 1.0, **{f"x{i}" * 20: i for i in range(600)}}, None),
    ],
)
def test_verl_results_are_a_number_or_a_dict_with_a_score(result: Any, outcome: Outcome | None) -> None:
    (found,) = outcomes(verl, result)
    if outcome is None:
        assert found.status == "crashed" and "returned 600 further numbers" in found.evidence
    else:
        assert found == outcome


def test_verls_batched_form_returns_a_list_of_such() -> None:
    assert outcomes(verl_batch, [1.0, {"score": 0.0, "acc": 0}], REQUEST, REQUEST) == [
        Outcome("ok", 1.0),
        Outcome("ok", 0.0, correct=False, extras={"acc": 0.0}),
    ]
    with pytest.raises(WrongResult, match="1 items for 2"):
        outcomes(verl_batch, [1.0], REQUEST, REQUEST)


def test_what_a_trl_function_logs_becomes_numbers_beside_its_rewards() -> None:
    log = Log()
    log.metric("share", 0.5)
    log.extra("length", [3, 4])
    log.extra("words", ["a", "b"])
    log.extra("incomplete", [1])
    found = outcomes_of(fit_function(trl), [[1.0, None]], [REQUEST, REQUEST], log=log)
    assert [outcome.extras for outcome in found] == [{"share": 0.5, "length": 3.0}, {"share": 0.5, "length": 4.0}]


def test_the_evidence_of_an_exception_names_kind_words_and_place() -> None:
    def judge(solution_str: str) -> float:
        raise ValueError("no  answer\nhere " + "x" * 1000)

    with pytest.raises(ValueError) as caught:
        judge("")
    evidence = evidence_of(caught.value)
    assert evidence.startswith("ValueError: no answer here xx")
    assert evidence.endswith(f"(test_reward_functions.py, line {caught.traceback[-1].lineno + 1})") and len(evidence) <= 300


# ---- calling ---------------------------------------------------------------------------------------------------------


def called(function: Callable[..., Any], *calls: Mapping[str, Any]) -> list[Any]:
    with asyncio.Runner() as runner:
        return invoke(fit_function(function), calls, runner)


def test_async_calls_wait_together_and_a_failure_is_an_item_of_the_result() -> None:
    arrived: list[str] = []

    async def judge(solution_str: str) -> float:
        arrived.append(solution_str)
        while len(arrived) < 3:  # for ever if one call had to end before the next begins
            await asyncio.sleep(0)
        if solution_str == "bad":
            raise ValueError("bad")
        return 1.0

    first, second, third = called(judge, {"solution_str": "a"}, {"solution_str": "bad"}, {"solution_str": "c"})
    assert (first, third) == (1.0, 1.0) and isinstance(second, ValueError)


def test_the_failure_of_the_only_call_is_raised() -> None:
    async def judge(completions: list[str]) -> list[float]:
        raise ValueError("no such luck")

    with pytest.raises(ValueError, match="no such luck"):
        called(judge, {"completions": []})


def test_a_plain_function_that_returns_something_to_wait_for_is_waited_for() -> None:
    async def later() -> list[float]:
        return [1.0]

    assert called(lambda completions: later(), {"completions": ["a"]}) == [[1.0]]


# ---- names -----------------------------------------------------------------------------------------------------------


def test_functions_are_called_by_their_name_or_the_last_part_of_their_path() -> None:
    assert function_names([FunctionSettings(path="a.py:f"), FunctionSettings(path="b.c:g", name="mine")]) == ["f", "mine"]


def test_two_functions_of_one_name_are_refused() -> None:
    with pytest.raises(RewardFunctionError, match="2 of reward.functions are called 'f'"):
        function_names([FunctionSettings(path="a.py:f"), FunctionSettings(path="b.py:f")])
