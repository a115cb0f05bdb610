"""Worked traces of `chain_sum` problems by a noisy teacher that over-thinks: the warm start's training data.

The teacher adds up step by step, errs now and then, re-checks far more often than it helps, and sometimes opens with a
budget sentence that its number of re-checks loosely follows.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from rl.budget_draws import BITS, between, drawn_effort
from rl.budget_settings import BudgetEffort, BudgetRange, BudgetSchedule, budget_bounds
from rl.data import DataError, Problem
from rl.errors import ConfigError
from rl.prompts import PromptEncoder
from rl.settings import RolloutSettings, WarmStartSettings
from rl.types import Budget
from rollout.markers import END_THINK
from rollout.openings import Openings

TRACE_BUDGETS = (32, 48, 64, 96, 128)
REFLECTION_WEIGHTS = {"wait": 0.4, "Wait": 0.25, "but": 0.1, "But": 0.1, "Alternatively": 0.15}
MAX_STEP_CHECKS = 5
MAX_CHAIN_CHECKS = 2
MAX_RATE = 0.85  # of re-checks under a large budget; the caps above bind beyond it anyway
FIX_RATE = 0.3  # of re-checks of a wrong step that put it right: low, so that length buys little accuracy
BREAK_RATE = 0.02  # of re-checks of a right step that make it wrong
BUDGET_NOISE = 0.2  # the length aimed at is the budget times 1 +- this
IGNORE_RATE = 0.1  # of budgeted traces that think as if they had no budget
NO_THINK_SHARE = 0.2  # of traces that answer at once, where members are opened without thinking
STEP_TOKENS = 7  # of a worked step, about; these two only steer the length towards a budget
CHECK_TOKENS = 11  # of a re-checked step
SLIPS = (-2, -1, -1, 1, 1, 2)  # a wrong result is this far off


@dataclass(frozen=True)
class Trace:
    """One supervised example; loss on the response only."""

    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    """Opening sentence, working, `</think>`, answer, end of sequence."""
    budget: int
    """Tokens asked for in the opening sentence; 0: none asked for."""
    correct: bool
    """Whether the teacher's final answer is right."""


def make_traces(
    problems: Sequence[Problem],
    *,
    settings: WarmStartSettings,
    rollout: RolloutSettings,
    tokenizer: PreTrainedTokenizerBase,
    encoder: PromptEncoder,
) -> list[Trace]:
    """One trace per problem, each at most `rollout.max_length` response tokens; a function of problems and settings only.

    Trace i depends on (settings.seed, question i), so that more problems never change the earlier traces.

    Raises:
        DataError: a question that is not a sum, or with words outside the vocabulary.
        ConfigError: a max_length below the shortest working.
    """
    teacher = _Teacher(settings=settings, rollout=rollout, tokenizer=tokenizer, encoder=encoder)
    return [teacher.trace(problem) for problem in problems]


def parse_sum(question: str) -> list[int]:
    """Signed terms of the sum in `... : 4 + 3 - 5 =`, for example [4, 3, -5].

    Raises:
        DataError: the question has no such ending.
    """
    expression = question.rpartition(":")[2].strip().removesuffix("=").split()
    signs, numbers = ["+", *expression[1::2]], expression[0::2]
    spelt = all(n.removeprefix("-").isdecimal() for n in numbers) and set(signs) <= {"+", "-"}
    if not spelt or len(signs) != len(numbers) or len(numbers) < 2:
        raise DataError(
            f"{question!r} is not a chain_sum question, and the warm start only has a teacher for that task",
            fix="use data.source=reasoning_gym:chain_sum, or switch to another model with warm_start=null and model.path",
        )
    return [int(n) if sign == "+" else -int(n) for sign, n in zip(signs, numbers, strict=True)]


def trace_budgets(rollout: RolloutSettings) -> Callable[[random.Random], int] | None:
    """How to draw the tokens of a trace's budget sentence; None where no trace can have one.

    Beside a list, from the fixed ladder `TRACE_BUDGETS`, so that one warm start serves many lists; else any number between the
    smallest and the largest budget that can occur, spread as the run will spread them.
    """
    if isinstance(rollout.budgets, BudgetEffort):
        return None
    source, bounds = rollout.budgets, budget_bounds(rollout.budgets, room=rollout.max_length)
    ladder = [b for b in TRACE_BUDGETS if b <= rollout.max_length]
    if rollout.budget_place == "none" or (isinstance(source, list) and not ladder):
        return None
    if isinstance(source, list) or bounds is None:
        return lambda rng: rng.choice(ladder)
    if isinstance(source, BudgetRange):
        return lambda rng: between(*bounds, rng.getrandbits(BITS), scale=source.scale)
    scale = "log_uniform" if isinstance(source, BudgetSchedule) else "uniform"  # an exponential stays as long in every octave
    return lambda rng: between(*bounds, rng.getrandbits(BITS), scale=scale)


class _Teacher:
    def __init__(
        self,
        *,
        settings: WarmStartSettings,
        rollout: RolloutSettings,
        tokenizer: PreTrainedTokenizerBase,
        encoder: PromptEncoder,
    ) -> None:
        self._settings = settings
        self._rollout = rollout
        self._tokenizer = tokenizer
        self._openings = Openings(rollout, tokenizer, encoder)
        self._budgets = trace_budgets(rollout)
        self._lines: dict[str, tuple[int, ...]] = {}

    def trace(self, problem: Problem) -> Trace:
        rng = random.Random(f"trace/{self._settings.seed}/{problem.question}")
        terms = parse_sum(problem.question)  # first: of another task the tokenizer could only say which word it does not know
        budget = self._draw_budget(rng)
        prompt_ids = self._openings.prompt_ids(problem.question, budget)
        prefill = self._openings.prefill_ids(budget, prompt_ids)
        rate = self._check_rate(rng, budget, steps=len(terms) - 1, prefill=len(prefill))
        working = _Working(terms, rng=rng, error_rate=self._settings.error_rate, encode=self._encode)
        answer = working.write(rate, room=self._rollout.max_length - len(prefill))
        thinking = () if budget.no_think else (*working.ids, *self._encode(END_THINK))
        response = (*prefill, *thinking, *self._encode(f"{answer}{self._tokenizer.eos_token}"))
        if len(response) > self._rollout.max_length:
            raise ConfigError(
                f"rollout.max_length={self._rollout.max_length} is too short for the working of {problem.question!r}, "
                f"{len(response)} tokens",
                fix="raise rollout.max_length, or make the sums shorter with data.task.max_terms",
            )
        return Trace(prompt_ids=prompt_ids, response_ids=response, budget=budget.tokens, correct=answer == sum(terms))

    def _draw_budget(self, rng: random.Random) -> Budget:
        source, share = self._rollout.budgets, self._settings.budget_share
        if isinstance(source, BudgetEffort):
            drawn = rng.choice(source.levels) if source.levels else drawn_effort(source, rng.getrandbits(BITS))
            return self._openings.effort(drawn) if rng.random() < share else self._openings.free
        if self._rollout.budgets_name("no_think") and rng.random() < NO_THINK_SHARE:
            return self._openings.no_think
        if self._budgets is not None and rng.random() < self._settings.budget_share:
            return self._openings.budget(self._budgets(rng))
        return self._openings.free

    def _check_rate(self, rng: random.Random, budget: Budget, *, steps: int, prefill: int) -> float:
        """Chance p of each further re-check; p / (1 - p) of them are expected, which is solved for the length aimed at."""
        usual = self._settings.recheck_rate
        if budget.effort is not None and rng.random() >= IGNORE_RATE:
            checks = budget.effort * usual / max(1 - usual, 1 - MAX_RATE)
            return min(checks / (1 + checks), MAX_RATE)
        if budget.is_free or rng.random() < IGNORE_RATE:
            return usual
        target = budget.tokens * rng.uniform(1 - BUDGET_NOISE, 1 + BUDGET_NOISE)
        unchecked = prefill + steps * STEP_TOKENS + 4
        expected = max(0.0, target - unchecked) / (steps * (CHECK_TOKENS + STEP_TOKENS))
        return min(expected / (1 + expected), MAX_RATE)

    def _encode(self, line: str) -> tuple[int, ...]:
        # Lines repeat a lot over 20,000 traces, and encoding line by line equals encoding the whole.
        if line not in self._lines:
            self._lines[line] = tuple(self._tokenizer.encode(line, add_special_tokens=False))
        return self._lines[line]


class _Working:
    """The tokens between the opening and `</think>`.

    What the teacher believes is kept as one slip per step, `believed result - right result` given the same left side, so
    that the answer is always sum(terms) + sum(slips).
    """

    def __init__(
        self, terms: list[int], *, rng: random.Random, error_rate: float, encode: Callable[[str], tuple[int, ...]]
    ) -> None:
        self._terms = terms
        self._rng = rng
        self._error_rate = error_rate
        self._encode = encode
        self._slips: list[int] = []
        self.ids: list[int] = list(encode("\n"))

    def write(self, check_rate: float, *, room: int) -> int:
        """Write the working and return the answer it arrives at; no re-check is begun that could overrun `room` tokens."""
        digits = len(str(sum(abs(t) for t in self._terms) + max(SLIPS) * len(self._terms)))
        line = 3 * digits + 5  # longest worked step: three numbers, two signs, two operators and the newline
        room -= digits + 3  # </think>, a signed answer, end of sequence
        steps = len(self._terms) - 1
        for left in range(steps - 1, -1, -1):
            self._slips.append(self._slip(self._error_rate))
            self._say(f"{self._equation(len(self._slips) - 1)}\n")
            for _ in range(self._draws(check_rate, MAX_STEP_CHECKS)):
                if len(self.ids) + (left + 1) * line + 4 <= room:
                    self._check_step()
        for _ in range(self._draws(check_rate, MAX_CHAIN_CHECKS)):
            if len(self.ids) + steps * line + 4 <= room:
                self._check_chain()
        return self._believed(steps)

    def _check_step(self) -> None:
        """`wait check 7 + 5 = 12 ok`: the last step again; `no` where it comes out differently, which is then believed."""
        old = self._slips[-1]
        self._slips[-1] = self._reconsider(old)
        verdict = "ok" if self._slips[-1] == old else "no"
        self._say(f"{self._reflection()} check {self._equation(len(self._slips) - 1)} {verdict}\n")

    def _check_chain(self) -> None:
        """`wait again`, then every step again; `no` where the answer comes out differently."""
        old = sum(self._slips)
        self._slips = [self._reconsider(slip) for slip in self._slips]
        self._say(f"{self._reflection()} again\n")
        last = len(self._slips) - 1
        for step in range(last):
            self._say(f"{self._equation(step)}\n")
        self._say(f"{self._equation(last)} {'ok' if sum(self._slips) == old else 'no'}\n")

    def _believed(self, steps: int) -> int:
        """The partial sum believed after so many steps."""
        return sum(self._terms[: steps + 1]) + sum(self._slips[:steps])

    def _equation(self, step: int) -> str:
        term = self._terms[step + 1]
        return f"{self._believed(step)} {'-' if term < 0 else '+'} {abs(term)} = {self._believed(step + 1)}"

    def _slip(self, rate: float) -> int:
        return self._rng.choice(SLIPS) if self._rng.random() < rate else 0

    def _reconsider(self, slip: int) -> int:
        if slip == 0:
            return self._slip(BREAK_RATE)
        return 0 if self._rng.random() < FIX_RATE else slip

    def _draws(self, rate: float, cap: int) -> int:
        count = 0
        while count < cap and self._rng.random() < rate:
            count += 1
        return count

    def _reflection(self) -> str:
        return self._rng.choices(list(REFLECTION_WEIGHTS), weights=list(REFLECTION_WEIGHTS.values()))[0]

    def _say(self, line: str) -> None:
        self.ids.extend(self._encode(line))
