"""The graders that compare text: the same words, a choice letter, a regular expression."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from reward.extraction import final_part, normalise
from reward.grading import Grade, MalformedAnswer

LETTERS = "ABCDEFGHIJ"


def grade_exact(answer: str, golds: Sequence[str], entry: Mapping[str, Any], options: Mapping[str, Any]) -> Grade:
    """Right when the answer is the same text as any gold after ``normalise``; case counts."""
    return normalise(answer) in map(normalise, golds), "text compared"


def grade_choice(answer: str, golds: Sequence[str], entry: Mapping[str, Any], options: Mapping[str, Any]) -> Grade:
    """Right when the letter that the answer chooses is the one that any gold names.

    Understood are a letter by itself ("B", "b", "(B)", "B.", "\\text{B}"), one that opens the text ("B) Paris"), one that is
    called the answer ("the answer is B"), and a text with one letter in brackets. ``options``: ``letters`` (ABCDEFGHIJ), the
    choices there are. Raises MalformedAnswer when the answer chooses no letter or several, ValueError when a gold does.
    """
    letters = str(options.get("letters", LETTERS)).upper()
    wanted = {_gold_letter(gold, letters) for gold in golds}  # first: a gold outside the letters is no fault of the answer
    chosen = chosen_letter(answer, letters)
    if chosen is None:
        raise MalformedAnswer(f"no single letter of {letters} is chosen")
    return chosen in wanted, f"{chosen} against {' or '.join(sorted(wanted))}"


def grade_format(answer: str, golds: Sequence[str], entry: Mapping[str, Any], options: Mapping[str, Any]) -> Grade:
    """Right when the regular expression ``options["pattern"]`` matches the whole answer part; gold answers play no role."""
    matches = re.fullmatch(options["pattern"], answer) is not None
    return matches, "matches the pattern" if matches else "does not match the pattern"


@lru_cache(maxsize=4096)
def _gold_letter(gold: str, letters: str) -> str:
    letter = chosen_letter(gold, letters)
    if letter is None:
        raise ValueError(f"the gold answer {gold[:80]!r} names no single letter of {letters}; set data.grader=exact")
    return letter


def chosen_letter(text: str, letters: str = LETTERS) -> str | None:
    """The letter of ``letters`` that a text chooses, None when it chooses none or leaves it open."""
    plain = normalise(_MARKUP.sub(" ", _WRAPPER.sub(r" \1 ", normalise(final_part(text)))))
    patterns = _patterns(letters)
    alone = patterns.alone.fullmatch(plain)
    if alone:
        return alone[1].upper()
    named = {match[1] for match in patterns.named.finditer(plain)}
    # A sentence may mention several choices on its way; only one may be called the answer, or open the text or be in brackets.
    marked = [*patterns.bracketed.finditer(plain), *patterns.opening.finditer(plain)]
    found = named or {match[1] for match in marked}
    return found.pop() if len(found) == 1 else None


class _Patterns:
    """How a choice among some letters may be written, in text without markup."""

    def __init__(self, letters: str) -> None:
        letter = f"([{re.escape(letters)}])"
        any_case = f"([{re.escape(letters + letters.lower())}])"
        not_several = rf"(?! ?(?:,|/|or\b|and\b|&) ?[(\[]?[{re.escape(letters)}]\b)"
        announced = r"(?i:(?:the )?(?:final |correct )?(?:answer|option|choice)(?: is)?)?"
        self.alone = re.compile(rf"{announced}[ :]*[(\[]? ?{any_case} ?[)\]]?[ .:]*")
        self.opening = re.compile(rf"^[(\[]?{letter}(?:[)\]]|[.:])(?= |$){not_several}")
        self.named = re.compile(rf"(?i:answer|option|choice)(?: is| would be| must be)?[ :]*[(\[]?{letter}\b{not_several}")
        self.bracketed = re.compile(rf"[(\[]{letter}[)\]]")


_patterns = lru_cache(maxsize=16)(_Patterns)
_WRAPPER = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mathsf|bf|rm|boxed)\s?\{([^{}]*)\}")
_MARKUP = re.compile(r"[*_$`{}\"']|\\[()\[\]]|\\(?:left|right)(?![A-Za-z])")
