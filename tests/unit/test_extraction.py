"""Where an answer is looked for, on hand-worked responses."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reward.extraction import MAX_ANSWER_CHARS, MAX_WHOLE_CHARS, extract_answer, final_part
from reward.grading import MalformedAnswer

SPECIAL = ("<|im_end|>", "</s>", "<eos>", "<think>", "</think>")


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
        ("whole", "<think> 4 </think> 7 <eos>", "<think> 4 </think> 7"),
        ("whole", " no tags at all\n", "no tags at all"),
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
        ("whole", " <eos> ", "blank"),
        ("after_think", "</think>" + "7" * (MAX_ANSWER_CHARS + 1), "20001 characters"),
        ("whole", "7" * (MAX_WHOLE_CHARS + 1), "1000001 characters"),
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
    ("text", "part"),
    [("so \\boxed{4} it is", "4"), ("2 + 2 = 4\n#### 4", "4"), ("just 4", "just 4"), ("\\boxed{4 #### 5", "5")],
)
def test_the_final_part_is_the_last_box_or_what_follows_the_hashes(text: str, part: str) -> None:
    assert final_part(text) == part
