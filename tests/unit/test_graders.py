"""Extraction and graders on hand-worked answers."""

from __future__ import annotations

import json
from typing import Any

import pytest
import reasoning_gym
from hypothesis import given
from hypothesis import strategies as st

from reward.graders import MAX_ANSWER_CHARS, MalformedAnswer, extract_answer, grade_exact, grade_math, grade_reasoning_gym

SPECIAL = ("<|im_end|>", "</s>", "<eos>", "<think>", "</think>")


def gym(task: str, answer: str, entry: dict[str, Any]) -> tuple[bool, str]:
    return grade_reasoning_gym(answer, entry["answer"], json.loads(json.dumps(entry)), {"task": task})


@pytest.mark.parametrize(
    ("how", "text", "answer"),
    [
        ("after_think", "<think> 3 + 4 = 7 </think> 7 <eos>", "7"),
        ("after_think", "a</think>\n7<|im_end|></s>", "7"),
        ("after_think", "a</think> 7 </think> 8", "7 </think> 8"),
        ("after_think", "a</think>1<eos>4", "1 4"),
        ("boxed", "\\boxed{1}</think> so \\boxed{2}, no, \\boxed{3}", "3"),
        ("boxed", "</think>\\boxed{\\frac{1}{2}}</s>", "\\frac{1}{2}"),
        ("boxed", "</think>\\boxed{\\{1, 2\\}}", "\\{1, 2\\}"),
        ("boxed", "</think>\\boxed{5} or \\boxed{6", "5"),
        ("boxed", "</think>{ } } \\boxed{\\boxed{5}} {", "5"),
        ("last_line", "first\nsecond\n\n", "second"),
        ("last_line", "first\n</think>\nsecond\n 42 <eos>\n", "42"),
    ],
)
def test_the_answer_is_found_where_the_settings_say(how: str, text: str, answer: str) -> None:
    assert extract_answer(text, how=how, special_tokens=SPECIAL) == answer


@pytest.mark.parametrize(
    ("how", "text", "reason"),
    [
        ("after_think", "the answer is 7", "no </think>"),
        ("boxed", "\\boxed{7}", "no </think>"),
        ("boxed", "\\boxed{7}</think> 7", "boxed"),
        ("boxed", "</think>\\boxed{7", "boxed"),
        ("boxed", "</think>\\boxed{}", "blank"),
        ("after_think", "a</think> <eos>\n", "blank"),
        ("last_line", " \n ", "blank"),
        ("after_think", "</think>" + "7" * (MAX_ANSWER_CHARS + 1), "20001 characters"),
    ],
)
def test_a_response_without_a_usable_answer_is_malformed_and_says_why(how: str, text: str, reason: str) -> None:
    with pytest.raises(MalformedAnswer, match=reason):
        extract_answer(text, how=how, special_tokens=SPECIAL)


def test_a_long_chain_of_thought_does_not_count_as_a_long_answer() -> None:
    assert extract_answer("x" * 10**6 + "</think> 7", how="after_think") == "7"
    assert extract_answer("x" * 10**6 + "\n7", how="last_line") == "7"


def test_an_unknown_extraction_is_refused() -> None:
    with pytest.raises(ValueError, match="first_word"):
        extract_answer("</think>7", how="first_word")


@given(st.text(alphabet="ab {}\\", max_size=30))
def test_the_last_box_is_found_whatever_stands_before_it(noise: str) -> None:
    # A backslash at the end of the noise would escape the next one.
    assert extract_answer("</think>" + noise + " \\boxed{x{y}z}", how="boxed") == "x{y}z"


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        ("1/2", "0.5"),
        ("0.5", "\\frac{1}{2}"),
        ("\\frac{1}{2}", "1/2"),
        ("$\\frac{1}{2}$", "\\boxed{0.5}"),
        ("x^2+2x+1", "(x+1)^2"),
        ("70,000", "70000"),
        ("2 + 3 = 5\n#### 5", "5"),
        ("5", "the answer is 5"),
        ("\\text{Monday}", "\\text{Monday}"),
    ],
)
def test_equal_mathematics_is_correct(gold: str, answer: str) -> None:
    assert grade_math(answer, gold, {}, {})[0]


@pytest.mark.parametrize(
    ("gold", "answer"), [("1/2", "1/3"), ("5", "-5"), ("2", "2 or 3"), ("5", "no idea"), ("14", "4"), ("4", "}{\\frac")]
)
def test_other_mathematics_is_wrong(gold: str, answer: str) -> None:
    assert not grade_math(answer, gold, {}, {})[0]


def test_a_gold_answer_that_is_no_mathematics_is_an_error_and_not_a_wrong_answer() -> None:
    with pytest.raises(ValueError, match="gold answer"):
        grade_math("5", "#### ", {}, {})


def test_exact_ignores_blanks_and_unicode_width_but_not_case() -> None:
    assert grade_exact(" new\n york ", "new york", {}, {})[0]
    assert grade_exact("\uff14\uff12", "42", {}, {})[0]
    assert not grade_exact("New York", "new york", {}, {})[0]


def test_reasoning_gym_counts_a_full_score_only() -> None:
    entry = reasoning_gym.create_dataset("chain_sum", size=1, seed=1)[0]
    assert entry["answer"] == "-4"
    assert gym("chain_sum", "-4", entry) == (True, "scored 1")
    assert gym("chain_sum", "-5", entry) == (False, "scored 0")
    assert gym("chain_sum", "-44", entry) == (False, "scored 0.6667")


def test_a_reasoning_gym_entry_names_its_own_task() -> None:
    entry = reasoning_gym.create_dataset("chain_sum", size=1, seed=1)[0]
    assert grade_reasoning_gym("-4", "-4", entry, {})[0]
    with pytest.raises(ValueError, match="no reasoning-gym task"):
        grade_reasoning_gym("-4", "-4", {"answer": "-4"}, {})


def test_a_task_whose_scorer_refuses_its_own_answer_is_an_error() -> None:
    entry = reasoning_gym.create_dataset("arc_agi", size=1, seed=0)[0]
    with pytest.raises(ValueError, match="arc_agi gives 0.05"):
        gym("arc_agi", entry["answer"], entry)


@pytest.mark.parametrize(
    "task",
    ["countdown", "simple_integration", "intermediate_integration", "polynomial_multiplication", "string_insertion", "n_queens"],
)
def test_tasks_whose_scorers_evaluate_answers_still_accept_the_right_one(task: str) -> None:
    for entry in reasoning_gym.create_dataset(task, size=3, seed=5):
        assert gym(task, entry["answer"], entry)[0]


@pytest.mark.parametrize("task", ["countdown", "n_queens", "spiral_matrix", "binary_matrix", "string_insertion", "puzzle24"])
@pytest.mark.parametrize("code", ["print(7)", "[print(7)]", "().__class__", "x.y", "exec(chr(7))"])
def test_code_in_an_answer_is_not_run(task: str, code: str, capfd: pytest.CaptureFixture[str]) -> None:
    entry = reasoning_gym.create_dataset(task, size=1, seed=5)[0]
    assert not gym(task, code, entry)[0]
    assert capfd.readouterr().out == ""
