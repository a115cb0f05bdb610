"""Numbers in the ways people and models write them."""

from __future__ import annotations

from fractions import Fraction

import pytest

from reward.extraction import final_part
from reward.grading import MalformedAnswer
from reward.numeric_grader import MAX_DIGITS, Number, grade_numeric, last_number


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1,234.5", "1234.5"),
        ("1{,}234{,}567", "1234567"),
        ("1\\,234\\,567", "1234567"),
        ("1e3", "1000"),
        ("-2.5E-2", "-0.025"),
        ("3/4", "3/4"),
        ("1 / 3", "1/3"),
        ("2 1/2", "5/2"),
        ("-\\frac{1}{2}", "-1/2"),
        ("2\\tfrac12", "5/2"),
        ("2½", "5/2"),
        ("10^{-3}", "1/1000"),
        ("10²", "100"),
        ("1.5 \\times 10^{-3}", "0.0015"),
        ("6×10³", "6000"),
        ("٣٫٥", "3.5"),
        ("１２", "12"),
        ("−5", "-5"),
        ("x = -5", "-5"),
        ("3-5", "5"),
        (".5", "1/2"),
        ("$1,234.", "1234"),
        ("9.8 m/s^2", "9.8"),
        ("7\\text{ cm}^{2}", "7"),
        ("90^\\circ", "90"),
        ("the answer is 42, not 41", "41"),
        ("\\boxed{42}, not 41", "42"),
        ("1, 2, 3", "3"),
    ],
)
def test_the_last_number_is_read_exactly(text: str, value: str) -> None:
    assert last_number(final_part(text)) == Number(Fraction(value))


@pytest.mark.parametrize("text", ["", "no number", "x2", "n^2", "cm³", "five"])
def test_a_text_without_a_number_of_its_own_holds_none(text: str) -> None:
    assert last_number(text) is None
    with pytest.raises(MalformedAnswer, match="no number"):
        grade_numeric(text, ("5",), {}, {})


@pytest.mark.parametrize(
    ("answer", "gold", "is_right"),
    [
        ("0.3333333", "1/3", True),
        ("0.33333", "1/3", False),
        ("1000001", "1000000", True),
        ("1000002", "1000000", False),
        ("0.0000001", "0", False),
        ("-0", "0", True),
        ("50%", "0.5", True),
        ("50%", "50", True),
        ("0.5", "50\\%", True),
        ("50 percent", "50%", True),
        ("0.5%", "50%", False),
        ("5", "6\n#### 5", True),
    ],
)
def test_numbers_match_within_a_millionth_and_percent_signs_in_either_reading(answer: str, gold: str, is_right: bool) -> None:
    assert grade_numeric(answer, (gold,), {}, {})[0] is is_right


def test_tolerances_are_options_and_zero_is_exact() -> None:
    assert grade_numeric("101", ("100",), {}, {"rel_tol": 0.01})[0]
    assert not grade_numeric("102", ("100",), {}, {"rel_tol": 0.01})[0]
    assert grade_numeric("0.01", ("0",), {}, {"abs_tol": 0.01})[0]
    huge = "1234567890123456789"
    assert not grade_numeric(huge + "1", (huge + "2",), {}, {"rel_tol": 0})[0]
    assert grade_numeric(huge + "1", (huge + "2",), {}, {})[0]


def test_any_gold_is_right_and_the_evidence_names_what_was_compared() -> None:
    assert grade_numeric("so 7.0", ("6", "7"), {}, {}) == (True, "7 is 7")
    assert grade_numeric("so 8", ("6", "7"), {}, {}) == (False, "8 is not 6 or 7")


@pytest.mark.parametrize("answer", ["1e9999999999", "9^999999", "9" * (MAX_DIGITS + 1), "1/0", "0^{-1}"])
def test_a_number_too_long_to_compute_with_is_malformed(answer: str) -> None:
    with pytest.raises(MalformedAnswer, match="too long"):
        grade_numeric(answer, ("5",), {}, {})


@pytest.mark.parametrize("gold", ["none", "1e9999999999"])
def test_a_gold_without_a_usable_number_is_an_error_and_not_a_wrong_answer(gold: str) -> None:
    with pytest.raises(ValueError, match="gold answer") as caught:
        grade_numeric("5", (gold,), {}, {})
    assert not isinstance(caught.value, MalformedAnswer)
