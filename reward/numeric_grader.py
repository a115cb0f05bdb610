"""The grader for numbers: the last number of the answer against the gold within a tolerance, in exact arithmetic."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Any

from reward.bounds import MAX_BITS
from reward.extraction import final_part
from reward.grading import Grade, MalformedAnswer

REL_TOL = 1e-6
MAX_DIGITS = 1000
_HUNDRED = Fraction(100)


@dataclass(frozen=True)
class Number:
    """A number as written."""

    value: Fraction
    """Without regard to a percent sign: 50 for ``50%``."""
    is_percentage: bool = False

    @property
    def readings(self) -> tuple[Fraction, ...]:
        """What it may stand for: ``50%`` is a half, and "how many percent?" is answered by 50."""
        return (self.value, self.value / _HUNDRED) if self.is_percentage else (self.value,)


def grade_numeric(answer: str, golds: Sequence[str], entry: Mapping[str, Any], options: Mapping[str, Any]) -> Grade:
    """Right when ``|a - g| <= max(rel_tol |g|, abs_tol)`` for the answer's last number a and any gold g.

    ``options``: ``rel_tol`` (1e-6) and ``abs_tol`` (0). Either side may be an integer, a decimal, a fraction, a power of ten or a
    percentage, in any script's digits; a percent sign on one side only divides by 100 or does not, as fits. Raises
    MalformedAnswer when the answer holds no number, ValueError when a gold holds none.
    """
    found = _read(answer, "answer")
    if found is None:
        raise MalformedAnswer("no number in the answer")
    # As written in decimal: the float 1e-6 is a little less.
    rel_tol, abs_tol = (Fraction(str(options.get(name, default))) for name, default in (("rel_tol", REL_TOL), ("abs_tol", 0)))
    wanted = [_gold_number(gold) for gold in golds]
    for gold in wanted:
        readings = (found.value,) if gold.is_percentage and found.is_percentage else found.readings
        targets = (gold.value,) if gold.is_percentage and found.is_percentage else gold.readings
        if any(abs(a - g) <= max(rel_tol * abs(g), abs_tol) for a in readings for g in targets):
            return True, f"{_short(found)} is {_short(gold)}"
    return False, f"{_short(found)} is not {' or '.join(map(_short, wanted))}"


@lru_cache(maxsize=4096)
def _gold_number(gold: str) -> Number:
    try:
        found = _read(gold, "gold answer")
    except MalformedAnswer as error:
        raise ValueError(str(error)) from error
    if found is None:
        raise ValueError(f"the gold answer {gold[:80]!r} holds no number; set data.grader=exact")
    return found


def _read(text: str, what: str) -> Number | None:
    try:
        return last_number(final_part(text))
    except OverflowError as error:
        raise MalformedAnswer(f"a number in the {what} is too long: {error}") from None


def _short(number: Number) -> str:
    if abs(number.value) < 10**15 and number.value.denominator == 1:
        shown = str(number.value.numerator)
    else:
        try:
            shown = f"{float(number.value):.6g}"
        except OverflowError:
            shown = "a huge number"
    return shown + "%" * number.is_percentage


# ---- reading ---------------------------------------------------------------------------------------------------------

_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?![\d,])|\d+)(?:\.\d+)?|\.\d+"
_NUMBER = re.compile(
    rf"""(?<![\w.^])(?:(?<![)\]}}])(?P<sign>[-+])[ ]?)?
    (?:(?P<whole>\d+)[ ](?=\d+/\d))?                                     # 2 1/2
    (?P<mantissa>{_DIGITS})
    (?:[eE](?P<exponent>[-+]?\d+)(?!\w)|[ ]?[*x][ ]?10[ ]?\^[ ]?\{{?(?P<ten>[-+]?\d+)\}}?
       |\^\{{?(?P<power>[-+]?\d+)\}}?)?
    (?:[ ]?/[ ]?(?P<under>{_DIGITS})(?![\d/]))?
    (?P<percent>[ ]?(?:%|percent\b))?""",
    re.VERBOSE | re.ASCII,
)
_FRACTION = re.compile(r"(\d)? ?\\[dtc]?frac ?(?:\{([^{}]*)\} ?\{([^{}]*)\}|(\d) ?(\d))")
_UNIT_POWER = re.compile(r"(?<=[A-Za-z)}]) ?[\^_] ?(?:\{[^{}]*\}|[-+]?\w+)")
_LATEX = (
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"\\[,!;: ]"), ""),
    (re.compile(r"\\([%$])"), r"\1"),
    (re.compile(r"\\(?:times|cdot)(?![A-Za-z])"), "*"),
    (re.compile(r"\\(?:left|right|text|mathrm|mathbf|textbf|displaystyle)(?![A-Za-z])"), " "),
    (re.compile(r"\*\*"), "^"),
    (re.compile(r"(\d)\^\(([-+]?\d+)\)"), r"\1^\2"),
)
_SUPERSCRIPTS = {ord(c): plain for c, plain in zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺", "0123456789-+", strict=True)}
_SUPERSCRIPT_RUN = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺]+")
_OTHER_CHARS = str.maketrans(
    dict.fromkeys("‐‑‒–—−﹣－", "-")
    | dict.fromkeys("＋﹢", "+")
    | dict.fromkeys("⁄∕／", "/")
    | dict.fromkeys("×·⋅∙＊", "*")
    | dict.fromkeys("％﹪٪", "%")
    | dict.fromkeys("\xa0\u2007\u202f\u3000", " ")
    | {"．": ".", "٫": ".", "，": ",", "٬": ",", "\u2009": "", "\u200a": ""}
)


def last_number(text: str) -> Number | None:
    """The last number written in a text, None if there is none; raises OverflowError for one too long to compute with."""
    found = list(_NUMBER.finditer(_plain(text)))
    return _value(found[-1]) if found else None


def _plain(text: str) -> str:
    """Digits, signs and operators of any script as ASCII, LaTeX fractions as ``a/b``, powers of units away."""
    text = _SUPERSCRIPT_RUN.sub(lambda run: "^" + run.group().translate(_SUPERSCRIPTS), text)
    text = "".join(c if c.isascii() else _ascii(c) for c in text.translate(_OTHER_CHARS))
    text = " ".join(text.split())  # single blanks keep every search below linear
    for pattern, plain in _LATEX:
        text = pattern.sub(plain, text)
    return _UNIT_POWER.sub(" ", _FRACTION.sub(_as_quotient, text))


def _ascii(char: str) -> str:
    digit = unicodedata.decimal(char, None)
    if digit is not None:
        return str(digit)
    if unicodedata.decomposition(char).startswith("<fraction>"):  # 2½ is 2 1/2
        return " " + unicodedata.normalize("NFKC", char).replace("⁄", "/")
    return char


def _as_quotient(match: re.Match[str]) -> str:
    before, top, bottom, one, other = match.groups()
    return f"{before + ' ' if before else ''}{(top or one or '').strip()}/{(bottom or other or '').strip()}"


def _value(match: re.Match[str]) -> Number:
    value = _decimal(match["mantissa"])
    exponent = match["exponent"] or match["ten"]
    if exponent is not None:
        value *= _power(Fraction(10), exponent)
    elif match["power"] is not None:
        value = _power(value, match["power"])
    if match["under"] is not None:
        under = _decimal(match["under"])
        if under == 0:
            raise OverflowError("division by zero")
        value /= under
    if match["whole"] is not None:
        value += _decimal(match["whole"])
    return Number(-value if match["sign"] == "-" else value, match["percent"] is not None)


def _decimal(digits: str) -> Fraction:
    if len(digits) > MAX_DIGITS:
        raise OverflowError(f"{len(digits)} digits, more than {MAX_DIGITS}")
    return Fraction(digits.replace(",", ""))


def _power(base: Fraction, exponent: str) -> Fraction:
    size = max(base.numerator.bit_length(), base.denominator.bit_length())
    if len(exponent) > 10 or abs(int(exponent)) * size > MAX_BITS:
        raise OverflowError(f"a number of more than {MAX_BITS} bits")
    if base == 0 and int(exponent) < 0:
        raise OverflowError("division by zero")
    return base ** int(exponent)
