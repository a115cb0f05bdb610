"""Bounds on an expression before any parser or computer-algebra system sees it: length, nesting and the size of its numbers."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field

from reward.grading import MalformedAnswer

MAX_EXPRESSION_CHARS = 4_000
MAX_NESTING = 10
"""LaTeX parsers take time exponential in the nesting: math-verify needs 1 s for 10 pairs of braces, over 20 s for 20."""
MAX_BITS = 100_000
"""Size of the largest number that a written power, factorial or exponent may stand for; 10^30000 has this many bits."""

_TOKEN = re.compile(r"\*\*|\d+(?:[.,]\d+)*(?:[eE][-+]?\d+)?|\\[a-zA-Z]+|\\?[{}()\[\]]|[\^/!]|[a-zA-Z]")
_FRACTIONS = frozenset(("\\frac", "\\dfrac", "\\tfrac", "\\cfrac"))
_LOG2_OF_10 = math.log2(10)


def check_expression(text: str, *, max_chars: int = MAX_EXPRESSION_CHARS, max_nesting: int = MAX_NESTING) -> None:
    """Refuse a text that could keep a parser busy for ever; raises MalformedAnswer naming the bound it breaks.

    Counted are characters, braces, brackets and parentheses open at once, and bits of the largest number written with ``^``,
    ``**``, ``!`` or an exponent: ``log2(a^b) = log2(a) 2^log2(b)``, estimated from above for products, from the numerator alone
    for fractions, and with letters as 1.
    """
    if len(text) > max_chars:
        raise MalformedAnswer(f"an expression of {len(text)} characters, more than {max_chars}")
    stack = [_Group()]
    for match in _TOKEN.finditer(text):
        token = match.group()
        group = stack[-1]
        if token[-1] in "{([":
            stack.append(_Group())
            if len(stack) > max_nesting + 1:
                raise MalformedAnswer(f"an expression nested more than {max_nesting} deep")
        elif token[-1] in "})]":
            if len(stack) > 1:
                inner = stack.pop().closed()
                stack[-1].add(inner)
        elif token in ("^", "**"):
            group.raises = bool(group.tower)
        elif token == "!":
            group.factorial()
        elif token == "/" or token in _FRACTIONS:
            group.divide(1 if token == "/" else 2)
        elif token[0] != "\\":
            group.add(_bits_of_number(token) if token[0].isdigit() else 0.0)
    while stack:
        stack.pop().closed()


@dataclass
class _Group:
    """What stands between two brackets; sizes are base-2 logarithms."""

    bits: float = 0.0
    """Of the product of the elements so far."""
    tower: list[float] = field(default_factory=list)
    """The element in progress and the exponents over it, from the bottom."""
    raises: bool = False
    """Whether the next element is an exponent."""
    until_denominator: int = 0
    """1: the next element is one; 2: the one after it."""

    def add(self, bits: float) -> None:
        if bits > MAX_BITS:
            raise MalformedAnswer(_TOO_LARGE)
        if not self.raises:
            self._finish_element()
        self.tower.append(bits)
        self.raises = False

    def factorial(self) -> None:
        if self.tower:
            self.tower[-1] = _checked(self.tower[-1], times=self.tower[-1])

    def divide(self, elements: int) -> None:
        self._finish_element()
        self.until_denominator = elements

    def closed(self) -> float:
        self._finish_element()
        return self.bits

    def _finish_element(self) -> None:
        if not self.tower:
            return
        value = self.tower[-1]
        for base in reversed(self.tower[:-1]):
            value = _checked(value, times=base)
        self.tower, self.raises = [], False
        if self.until_denominator != 1:
            self.bits += value
        self.until_denominator = max(0, self.until_denominator - 1)


_TOO_LARGE = f"a number of more than {MAX_BITS} bits"


def _checked(exponent_bits: float, *, times: float) -> float:
    """Bits of ``base ** (2 ** exponent_bits)`` for a base of ``times`` bits."""
    bits = max(times, 1.0) * 2.0 ** min(exponent_bits, 64.0)
    if bits > MAX_BITS:
        raise MalformedAnswer(_TOO_LARGE)
    return bits


def _bits_of_number(token: str) -> float:
    digits, _, exponent = token.replace(",", "").lower().partition("e")
    whole = digits.partition(".")[0].lstrip("0")
    size = math.log2(int(whole)) if 0 < len(whole) <= 18 else len(whole) * _LOG2_OF_10
    if exponent:
        size += _LOG2_OF_10 * float(exponent.lstrip("+-").lstrip("0")[:18] or 0)
    return size
