"""Graders on hand-worked answers."""

from __future__ import annotations

import json
from typing import Any

import pytest
import reasoning_gym
from pydantic import ValidationError

from reward.bounds import check_expression
from reward.grading import MalformedAnswer
from reward.gym_grader import grade_reasoning_gym
from reward.math_grader import grade_math, plain_number
from reward.options import check_options
from reward.text_graders import chosen_letter, grade_choice, grade_exact, grade_format
from rl.settings import DataSettings


def gym(task: str, answer: str, entry: dict[str, Any]) -> tuple[bool, str]:
    return grade_reasoning_gym(answer, (entry["answer"],), json.loads(json.dumps(entry)), {"task": task})


# ---- mathematics -----------------------------------------------------------------------------------------------------


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
        ("so it is \\boxed{5}.", "5"),
        ("5", "the answer is 5"),
        ("5", "first \\boxed{4}, no: \\boxed{5}"),
        ("\\text{Monday}", "\\text{Monday}"),
        ("0.333333", "1/3"),
        ("-0", "0"),
    ],
)
def test_equal_mathematics_is_correct(gold: str, answer: str) -> None:
    assert grade_math(answer, (gold,), {}, {})[0]


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        ("1/2", "1/3"),
        ("5", "-5"),
        ("2", "2 or 3"),
        ("5", "no idea"),
        ("14", "4"),
        ("4", "}{\\frac"),
        ("4", "\\boxed{4} \\boxed{5}"),
    ],
)
def test_other_mathematics_is_wrong(gold: str, answer: str) -> None:
    assert not grade_math(answer, (gold,), {}, {})[0]


def test_any_of_several_golds_is_right_even_beside_one_that_is_no_mathematics() -> None:
    golds = ("#### ", "x+1", "7")
    assert grade_math("1+x", golds, {}, {})[0]
    assert grade_math("7.0", golds, {}, {})[0]
    assert not grade_math("8", golds[1:], {}, {})[0]
    with pytest.raises(ValueError, match="gold answer"):
        grade_math("8", golds, {}, {})


@pytest.mark.parametrize("gold", ["#### ", "{" * 20 + "1" + "}" * 20, "9^{9^{9^9}}"])
def test_a_gold_answer_that_cannot_be_parsed_is_an_error_and_not_a_wrong_answer(gold: str) -> None:
    with pytest.raises(ValueError, match="gold answer") as caught:
        grade_math("5", (gold,), {}, {})
    assert not isinstance(caught.value, MalformedAnswer)


@pytest.mark.parametrize(
    ("answer", "bound"),
    [
        ("{" * 11 + "1" + "}" * 11, "nested"),
        ("\\frac{1}{" * 11 + "2" + "}" * 11, "nested"),
        ("(" * 3000, "nested"),
        ("9**9**9**9", "bits"),
        ("9^{9^{9^9}}", "bits"),
        ("((2^{100})^{100})^{100}", "bits"),
        ("1e999999999", "bits"),
        ("99999!", "bits"),
        ("((9!)!)!", "bits"),
        ("\\sum_{n=1}^{9999999} n", "bits"),
        ("x+" * 2001 + "x", "4003 characters"),
        ("\\boxed{}", "blank"),
    ],
)
def test_an_answer_beyond_the_bounds_is_malformed_before_a_parser_sees_it(answer: str, bound: str) -> None:
    with pytest.raises(MalformedAnswer, match=bound):
        grade_math(answer, ("4",), {}, {})


@pytest.mark.parametrize(
    "expression",
    [
        "2^{99999}",
        "10^{9999}",
        "2^{\\frac{2023}{2024}}",
        "2^{1/1000000}",
        "90^\\circ",
        "e^{e^{e^{e}}}",
        "x^{x^{x^x}}",
        "2^{2^{10}}",
        "2023!",
        "\\frac{1}{1+\\frac{1}{1+\\frac{1}{1+\\frac{1}{2}}}}",
        "}})) unbalanced",
    ],
)
def test_what_people_write_is_within_the_bounds(expression: str) -> None:
    check_expression(expression)


@pytest.mark.parametrize("text", ["5 apples", "x", "1/0", "1,23", "--5", "1e5", "٣", "\\frac{1}{x}", "", "9" * 40])
def test_only_plain_numbers_are_compared_without_math_verify(text: str) -> None:
    assert plain_number(text) is None


# ---- text ------------------------------------------------------------------------------------------------------------


def test_exact_ignores_blanks_and_unicode_width_but_not_case() -> None:
    assert grade_exact(" new\n york ", ("new york",), {}, {})[0]
    assert grade_exact("\uff14\uff12", ("41", "42"), {}, {})[0]
    assert not grade_exact("New York", ("new york",), {}, {})[0]


@pytest.mark.parametrize(
    "answer",
    [
        "B",
        "b",
        "(B)",
        "B.",
        "B)",
        "[B]",
        "**B**",
        "\\text{B}",
        "$\\boxed{\\text{(B)}}$",
        "Answer: B",
        "the answer is b",
        "The correct answer is (B), because A is too small.",
        "B) Paris",
        "(B) Paris",
        "B: Paris",
        "Final answer: **B**.",
        "It cannot be C, therefore (B).",
        "first \\boxed{A}, no: \\boxed{B}",
        "\uff22",
    ],
)
def test_the_chosen_letter_is_found_however_it_is_written(answer: str) -> None:
    assert chosen_letter(answer) == "B"
    assert grade_choice(answer, ("A", "(B)"), {}, {}) == (True, "B against A or B")
    assert not grade_choice(answer, ("C) Rome",), {}, {})[0]


@pytest.mark.parametrize(
    "answer", ["A or B", "Answer: A, B", "Paris", "I think so", "(A) or (B)", "The answer is A. The answer is B.", "K"]
)
def test_an_answer_that_chooses_nothing_or_several_is_malformed(answer: str) -> None:
    with pytest.raises(MalformedAnswer, match="no single letter"):
        grade_choice(answer, ("A",), {}, {})


def test_the_letters_to_choose_from_are_an_option_and_a_gold_outside_them_is_an_error() -> None:
    assert grade_choice("K", ("k",), {}, {"letters": "jk"})[0]
    with pytest.raises(ValueError, match="gold answer 'E'"):
        grade_choice("A", ("E",), {}, {"letters": "ABCD"})


def test_a_format_must_match_the_whole_answer() -> None:
    options = {"pattern": r"(?s)<think>.*</think>\s*\d+"}
    assert grade_format("<think>\n3+4\n</think> 7", (), {}, options) == (True, "matches the pattern")
    assert grade_format("<think> </think> 7 apples", ("7",), {}, options) == (False, "does not match the pattern")


# ---- options ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("grader", "options", "reason"),
    [
        ("numeric", {"reltol": 0.1}, r"no option 'reltol'; did you mean rel_tol\? \(it reads abs_tol, rel_tol\)"),
        ("numeric", {"rel_tol": -1}, "rel_tol=-1 is no tolerance"),
        ("numeric", {"abs_tol": "a"}, "abs_tol='a' is no tolerance"),
        ("math", {"rel_tol": 0.1}, r"no option 'rel_tol' \(it reads none\)"),
        ("choice", {"letters": "ABA"}, "give each letter once"),
        ("format", {}, "needs data.grader_options.pattern"),
        ("format", {"pattern": "(a"}, "no regular expression: missing"),
        ("format", {"pattern": 7}, "is no text"),
    ],
)
def test_options_that_a_grader_cannot_use_are_refused_and_named(grader: str, options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        check_options(grader, options)


@pytest.mark.parametrize(
    ("grader", "options"),
    [
        ("auto", {}),
        ("function", {}),
        ("numeric", {"rel_tol": 0, "abs_tol": 1e-3}),
        ("choice", {"letters": "ABCD"}),
        ("format", {"pattern": "a+"}),
    ],
)
def test_options_that_a_grader_reads_are_taken(grader: str, options: dict[str, Any]) -> None:
    check_options(grader, options)


def test_options_are_checked_with_the_configuration() -> None:
    assert DataSettings(source="rows.jsonl", grader="numeric", grader_options={"abs_tol": 1}).grader_options == {"abs_tol": 1}
    with pytest.raises(ValidationError, match="data.grader=auto has no option 'abs_tol'"):
        DataSettings(source="rows.jsonl", grader_options={"abs_tol": 1})


# ---- reasoning-gym ---------------------------------------------------------------------------------------------------


def test_reasoning_gym_counts_a_full_score_only() -> None:
    entry = reasoning_gym.create_dataset("chain_sum", size=1, seed=1)[0]
    assert entry["answer"] == "-4"
    assert gym("chain_sum", "-4", entry) == (True, "scored 1")
    assert gym("chain_sum", "-5", entry) == (False, "scored 0")
    assert gym("chain_sum", "-44", entry) == (False, "scored 0.6667")


def test_a_reasoning_gym_entry_names_its_own_task() -> None:
    entry = reasoning_gym.create_dataset("chain_sum", size=1, seed=1)[0]
    assert grade_reasoning_gym("-4", ("-4",), entry, {})[0]
    with pytest.raises(ValueError, match="no reasoning-gym task"):
        grade_reasoning_gym("-4", ("-4",), {"answer": "-4"}, {})


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


def test_an_answer_that_breaks_the_scorer_is_wrong_but_a_broken_entry_is_an_error() -> None:
    entry = reasoning_gym.create_dataset("prime_factorization", size=1, seed=5)[0]
    assert gym("prime_factorization", "two", entry) == (False, "the scorer cannot read it: ValueError")
    assert gym("prime_factorization", entry["answer"], entry)[0]
    with pytest.raises(KeyError):
        grade_reasoning_gym("5", ("5",), {"metadata": {"source_dataset": "chain_sum"}}, {})


def test_what_a_scorer_gives_to_nonsense_and_to_nan_as_well_is_not_correct() -> None:
    halting = next(e for e in reasoning_gym.create_dataset("game_of_life_halting", size=20, seed=1) if e["answer"] == "True")
    assert gym("game_of_life_halting", "no idea", halting) == (False, "refused: the scorer gives 1 to nonsense too")
    assert gym("game_of_life_halting", "true", halting)[0]
    number = reasoning_gym.create_dataset("complex_arithmetic", size=1, seed=1)[0]
    assert not gym("complex_arithmetic", "nan", number)[0]
    assert gym("complex_arithmetic", number["answer"], number)[0]


@pytest.mark.parametrize("task", ["countdown", "simple_integration", "puzzle24", "coin_flip"])
@pytest.mark.parametrize("answer", ["9**9**9**9", "1e99999999", "(" * 101])
def test_a_formula_that_would_keep_a_scorer_busy_is_malformed(task: str, answer: str) -> None:
    entry = reasoning_gym.create_dataset(task, size=1, seed=5)[0]
    with pytest.raises(MalformedAnswer):
        gym(task, answer, entry)
