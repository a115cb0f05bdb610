"""What holds for every length and budget: longer never pays beyond the budget, wrong never pays, order does not matter."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reward import budget as rules
from reward.budget import budget_ceiling, hbpo, overlong

LIMIT = 4096
FORMS = ("piecewise", "min")
lengths = st.integers(1, 2 * LIMIT)
budgets = st.one_of(st.integers(1, LIMIT).map(float), st.just(math.inf))
slopes = st.one_of(st.none(), st.floats(0.0, 0.01))
for_each_rule = settings(max_examples=40)
"""Each of these tests runs for up to 28 rules."""


def _reward(length: int, budget: float, *, correct: bool = True, form: str = "piecewise", alpha: float | None = None) -> float:
    out = hbpo(torch.tensor([correct]), torch.tensor([length]), torch.tensor([budget]), max_length=LIMIT, form=form, alpha=alpha)
    return out.item()


@pytest.mark.parametrize("form", FORMS)
@given(a=lengths, b=lengths, budget=budgets, alpha=slopes)
def test_beyond_the_budget_a_longer_correct_answer_never_earns_more(
    form: str, a: int, b: int, budget: float, alpha: float | None
) -> None:
    start = 1 if math.isinf(budget) else int(budget)
    short, long = sorted(min(LIMIT, max(start, n)) for n in (a, b))
    assert _reward(long, budget, form=form, alpha=alpha) <= _reward(short, budget, form=form, alpha=alpha) + 1e-6


@given(length=lengths, budget=st.integers(1, LIMIT))
def test_within_the_budget_every_correct_answer_earns_the_ceiling(length: int, budget: int) -> None:
    length = min(length, budget)
    ceiling = budget_ceiling(torch.tensor([budget]), max_length=LIMIT).item()
    assert _reward(length, float(budget)) == pytest.approx(ceiling, abs=1e-6)


@pytest.mark.parametrize("form", FORMS)
@given(length=st.integers(1, LIMIT), budget=st.integers(1, LIMIT), alpha=slopes)
def test_no_answer_earns_more_than_its_ceiling(form: str, length: int, budget: int, alpha: float | None) -> None:
    ceiling = budget_ceiling(torch.tensor([budget]), max_length=LIMIT).item()
    assert _reward(length, float(budget), form=form, alpha=alpha) <= ceiling + 1e-6


@given(length=lengths, budget=budgets, alpha=slopes)
def test_the_minimum_form_never_earns_more_than_the_piecewise_form(length: int, budget: float, alpha: float | None) -> None:
    assert _reward(length, budget, form="min", alpha=alpha) <= _reward(length, budget, alpha=alpha) + 1e-6


@pytest.mark.parametrize("form", FORMS)
@given(length=lengths, budget=budgets)
def test_wrong_and_over_long_answers_earn_exactly_nothing(form: str, length: int, budget: float) -> None:
    assert _reward(length, budget, correct=False, form=form) == 0.0
    assert _reward(length + LIMIT, budget, form=form) == 0.0


@given(low=st.integers(1, LIMIT - 1), gap=st.integers(1, LIMIT))
def test_a_smaller_budget_has_a_higher_ceiling(low: int, gap: int) -> None:
    ceiling = budget_ceiling(torch.tensor([low, min(LIMIT, low + gap)]), max_length=LIMIT)
    assert ceiling[0] > ceiling[1]
    assert abs(ceiling[1]) <= 4.0


@given(a=lengths, b=lengths, buffer=st.integers(0, LIMIT), factor=st.floats(0, 2))
def test_the_overlong_penalty_never_shrinks_with_length_and_stays_within_its_factor(
    a: int, b: int, buffer: int, factor: float
) -> None:
    short, long = overlong(torch.tensor(sorted((a, b))), max_length=LIMIT, buffer=buffer, factor=factor).tolist()
    assert -factor - 1e-6 <= long <= short <= 0.0
    if max(a, b) <= LIMIT - buffer:
        assert long == 0.0


@dataclass(frozen=True)
class Batch:
    """N rollouts with everything that some rule reads."""

    correct: torch.Tensor
    flag: torch.Tensor
    """no thinking; repetitive; well formed"""
    length: torch.Tensor
    group: torch.Tensor
    budget: torch.Tensor
    """the budget; target; shortest; reference length; average length"""
    effort: torch.Tensor
    accuracy: torch.Tensor

    def with_columns(self, change: Callable[[torch.Tensor], torch.Tensor], *names: str) -> Batch:
        columns = {f.name: getattr(self, f.name) for f in fields(self)}
        return Batch(**{name: change(value) if name in names or not names else value for name, value in columns.items()})


@st.composite
def batches(draw: st.DrawFn, *, one_prompt: bool = False) -> Batch:
    """1 to 24 rollouts of up to three prompts in random order; of one prompt, everything but correctness and length is shared."""
    shared = st.tuples(
        st.booleans(), st.integers(1, LIMIT), st.sampled_from([0.5, 0.75, 1.0, 1.7, 3.0]), st.floats(0, 1, width=32)
    )
    constant = draw(shared)
    row = st.tuples(st.booleans(), lengths, st.sampled_from([-3, 17, 2**40]), st.just(constant) if one_prompt else shared)
    rows = draw(st.lists(row, min_size=1, max_size=24))
    correct, length, group, rest = zip(*rows, strict=True)
    flag, budget, effort, accuracy = zip(*rest, strict=True)
    group = (5,) * len(rows) if one_prompt else group
    return Batch(*(torch.tensor(column) for column in (correct, flag, length, group, budget, effort, accuracy)))


Rule = Callable[[Batch], torch.Tensor]
ALONE: dict[str, Rule] = {
    "classic": lambda b: rules.classic(b.correct, b.length, max_length=LIMIT),
    "cosine": lambda b: rules.cosine(b.correct, b.length, max_length=LIMIT),
    "hbpo": lambda b: rules.hbpo(b.correct, b.length, b.budget, max_length=LIMIT),
    "hbpo min": lambda b: rules.hbpo(b.correct, b.length, b.budget, max_length=LIMIT, form="min"),
    "overlong": lambda b: rules.overlong(b.length, max_length=LIMIT, buffer=1000),
    "lcpo_exact": lambda b: rules.lcpo_exact(b.correct, b.length, b.budget),
    "lcpo_max": lambda b: rules.lcpo_max(b.correct, b.length, b.budget),
    "laser": lambda b: rules.laser(b.correct, b.length, b.budget),
    "laser_de": lambda b: rules.laser_de(b.correct, b.length, b.budget, b.flag),
    "triangle": lambda b: rules.triangle(b.length, b.budget),
    "triangle_mix": lambda b: rules.triangle_mix(b.correct, b.length, b.budget),
    "budgetthinker": lambda b: rules.budgetthinker(b.correct, b.length, b.budget, b.flag),
    "aec": lambda b: rules.aec(b.correct, b.length, b.effort, b.budget),
    "aec soft": lambda b: rules.aec(b.correct, b.length, b.effort, b.budget, soft_delta=0.25),
    "history_min": lambda b: rules.history_min(b.correct, b.length, b.budget),
    "dast": lambda b: rules.dast(b.correct, b.length, b.budget),
    "o1_pruner": lambda b: rules.o1_pruner(b.correct, b.length, b.budget, b.accuracy),
    "adaptthink": lambda b: rules.adaptthink(b.correct, b.flag, b.accuracy),
    "adlp": lambda b: rules.adlp(b.correct, b.length, weight=1e-3),
}
GROUPED: dict[str, Rule] = {
    "group_mean_length": lambda b: rules.group_mean_length(b.length, b.group),
    "alp": lambda b: rules.alp(b.correct, b.length, b.group, max_length=LIMIT),
    "efficient": lambda b: rules.efficient(b.correct, b.length, b.group),
    "kimi": lambda b: rules.kimi(b.correct, b.length, b.group),
    "shorterbetter": lambda b: rules.shorterbetter(b.correct, b.length, b.group),
    "dast_budget": lambda b: rules.dast_budget(b.correct, b.length, b.group, max_length=LIMIT),
    "grpo_lead": lambda b: rules.grpo_lead(b.correct, b.length, b.group),
    "s_grpo": lambda b: rules.s_grpo(b.correct, b.length, b.group),
    "difficulty_bands": lambda b: rules.difficulty_bands(b.correct, b.group),
}
RULES = ALONE | GROUPED

MEASURES = ("group_mean_length", "dast_budget", "difficulty_bands")
"""What is no reward itself."""
SCALE_FREE = ["aec", "aec soft", "dast", "efficient", "grpo_lead", "history_min", "kimi", "laser", "o1_pruner", "triangle"]
FALLING = [name for name in RULES if name not in {"triangle", "triangle_mix", "lcpo_exact", *MEASURES}]
"""Rules under which a correct answer never gains by being longer."""
BOUNDS = {
    "classic": (0, 1),
    "cosine": (0, 4),
    "hbpo": (-1, 4),
    "overlong": (-1, 0),
    "lcpo_max": (0, 1),
    "laser": (-0.5, 1.5),
    "laser_de": (-0.5, 1.5),
    "triangle": (0, 1),
    "triangle_mix": (0, 1),
    "budgetthinker": (0, 1),
    "aec": (0, 1),
    "aec soft": (0, 1),
    "history_min": (-1, 2),
    "dast": (-1, 1),
    "o1_pruner": (-2, 4),
    "efficient": (0, 1),
    "kimi": (-0.5, 1.5),
    "s_grpo": (0, 1),
    "dast_budget": (1, 2 * LIMIT),
}


def _same(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-6)


@pytest.mark.parametrize("name", RULES)
@for_each_rule
@given(batch=batches(), order=st.randoms(use_true_random=False))
def test_the_order_of_rollouts_does_not_matter(name: str, batch: Batch, order: random.Random) -> None:
    places = list(range(len(batch.length)))
    order.shuffle(places)
    _same(RULES[name](batch.with_columns(lambda column: column[places])), RULES[name](batch)[places])


@pytest.mark.parametrize("name", ALONE)
@for_each_rule
@given(batch=batches())
def test_each_member_is_rewarded_on_its_own(name: str, batch: Batch) -> None:
    single = [ALONE[name](batch.with_columns(lambda column, i=i: column[i : i + 1])) for i in range(len(batch.length))]
    _same(ALONE[name](batch), torch.cat(single))


@pytest.mark.parametrize("name", GROUPED)
@for_each_rule
@given(batch=batches(), factor=st.sampled_from([-1, 3]), shift=st.integers(-100, 100))
def test_the_names_of_groups_do_not_matter(name: str, batch: Batch, factor: int, shift: int) -> None:
    renamed = batch.with_columns(lambda group: factor * group + shift, "group")
    assert GROUPED[name](renamed).tolist() == GROUPED[name](batch).tolist()


@pytest.mark.parametrize("name", GROUPED)
@for_each_rule
@given(batch=batches())
def test_a_group_is_rewarded_as_if_it_were_alone(name: str, batch: Batch) -> None:
    together = GROUPED[name](batch)
    for label in batch.group.unique():
        mine = batch.group == label
        _same(GROUPED[name](batch.with_columns(lambda column, mine=mine: column[mine])), together[mine])


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("dtype", [torch.int32, torch.float32, torch.float64])
@for_each_rule
@given(batch=batches())
def test_results_are_float32_and_finite_whatever_the_type_of_lengths(name: str, dtype: torch.dtype, batch: Batch) -> None:
    result = RULES[name](batch.with_columns(lambda column: column.to(dtype), "length", "budget"))
    assert result.dtype == (torch.int64 if name == "difficulty_bands" else torch.float32)
    assert torch.isfinite(result).all()
    assert result.tolist() == RULES[name](batch).tolist()


@pytest.mark.parametrize("name", BOUNDS)
@for_each_rule
@given(batch=batches())
def test_rewards_stay_within_their_bounds(name: str, batch: Batch) -> None:
    low, high = BOUNDS[name]
    result = RULES[name](batch)
    assert low - 1e-6 <= result.min().item() <= result.max().item() <= high + 1e-6


@pytest.mark.parametrize("name", SCALE_FREE)
@for_each_rule
@given(batch=batches(), factor=st.sampled_from([2, 3, 1000]))
def test_only_the_proportions_of_lengths_matter(name: str, batch: Batch, factor: int) -> None:
    _same(RULES[name](batch.with_columns(lambda column: factor * column, "length", "budget")), RULES[name](batch))


@pytest.mark.parametrize("name", FALLING)
@for_each_rule
@given(batch=batches(one_prompt=True))
def test_of_two_correct_answers_to_one_prompt_the_longer_never_earns_more(name: str, batch: Batch) -> None:
    if name in ("hbpo", "hbpo min"):  # over-long answers earn 0, which a far overrun falls below
        batch = batch.with_columns(lambda length: length.clamp(max=LIMIT), "length")
    right = batch.correct
    length, reward = batch.length[right], RULES[name](batch)[right]
    if name == "hbpo min":  # its slope rises towards the budget for very short answers: it falls beyond it only
        length, reward = length[length >= batch.budget[0]], reward[length >= batch.budget[0]]
    assert (reward[length.argsort()].diff() <= 1e-6).all()


@pytest.mark.parametrize("name", ["triangle", "triangle_mix", "lcpo_exact"])
@for_each_rule
@given(batch=batches(one_prompt=True))
def test_of_two_equal_answers_the_one_further_from_its_target_never_earns_more(name: str, batch: Batch) -> None:
    for part in (batch.correct, ~batch.correct):
        order = (batch.length[part] - batch.budget[part]).abs().argsort()
        assert (RULES[name](batch)[part][order].diff() <= 1e-6).all()


@pytest.mark.parametrize("name", ["efficient", "grpo_lead", "shorterbetter", "s_grpo", "laser", "o1_pruner"])
@for_each_rule
@given(batch=batches(one_prompt=True))
def test_a_correct_answer_earns_more_than_a_wrong_one_of_the_same_length(name: str, batch: Batch) -> None:
    twin = batch.with_columns(lambda column: torch.cat([column, column]))
    half = torch.arange(len(twin.length)) < len(batch.length)
    reward = RULES[name](replace(twin, correct=half))
    assert (reward[half] >= reward[~half] if name == "o1_pruner" else reward[half] > reward[~half]).all()


@given(batch=batches())
def test_a_rate_of_passing_decides_the_band(batch: Batch) -> None:
    bands = rules.difficulty_bands(batch.correct, batch.group)
    for right, label, band in zip(batch.correct, batch.group, bands, strict=True):
        mine = batch.correct[batch.group == label]
        hits, size = int(mine.sum()), len(mine)
        assert band == (2 if 3 * hits >= 2 * size else 1 if 3 * hits >= size else 0), right


@given(batch=batches())
def test_the_kth_correct_exit_is_found_by_counting(batch: Batch) -> None:
    reward = rules.s_grpo(batch.correct, batch.length, batch.group)
    for i in range(len(reward)):
        mine = (batch.group == batch.group[i]) & batch.correct & (batch.length < batch.length[i])
        assert reward[i] == (0.5 ** int(mine.sum()) if batch.correct[i] else 0.0)
