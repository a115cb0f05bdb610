"""Drawn and remembered budgets against numbers worked by hand."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from rl.budget_draws import Turn, between, dealt_level, distinct, drawn_effort, middle, remembered_budget
from rl.budget_settings import BudgetEffort, BudgetMemory, BudgetRange
from rl.memory import CorrectLengths

LAST = 2**64 - 1
TURN = Turn(run_seed=3, step=7, position=2, prompt_id="abc")


def memory(**changes: object) -> BudgetMemory:
    return BudgetMemory.model_validate({"kind": "memory", "start": 64} | changes)


@pytest.mark.parametrize(("bits", "budget"), [(0, 100), (2**62 - 1, 100), (2**62, 101), (2**63, 102), (LAST, 103)])
def test_a_uniform_draw_gives_each_number_its_equal_share_of_the_bits(bits: int, budget: int) -> None:
    assert between(100, 103, bits, scale="uniform") == budget


@pytest.mark.parametrize(("bits", "budget"), [(0, 100), (2**62, 141), (2**63, 200), (3 * 2**62, 282), (LAST, 399)])
def test_a_log_uniform_draw_multiplies_by_equal_factors(bits: int, budget: int) -> None:
    assert between(100, 399, bits, scale="log_uniform") == budget  # 100 * 4^(bits / 2^64): 100, 141.4, 200, 282.8


@pytest.mark.parametrize("scale", ["uniform", "log_uniform"])
def test_a_range_of_one_number_has_one_draw(scale: str) -> None:
    assert {between(7, 7, bits, scale=scale) for bits in (0, 2**63, LAST)} == {7}  # pyright: ignore[reportArgumentType]


def test_a_range_the_wrong_way_round_has_none() -> None:
    with pytest.raises(ValueError, match="low=8 and high=7"):
        between(8, 7, 0, scale="uniform")


def test_log_uniform_draws_fall_into_each_octave_alike_and_uniform_ones_by_its_size() -> None:
    turns = [Turn(0, step, 0, "q") for step in range(4000)]
    for scale, shares in (("log_uniform", (0.25, 0.25, 0.25, 0.25)), ("uniform", (1 / 15, 2 / 15, 4 / 15, 8 / 15))):
        drawn = [between(16, 255, turn.bits(), scale=scale) for turn in turns]  # pyright: ignore[reportArgumentType]
        octaves = Counter(n.bit_length() for n in drawn)
        assert [octaves[k] / len(turns) for k in (5, 6, 7, 8)] == pytest.approx(shares, abs=0.03)


def test_the_bits_of_a_turn_are_those_of_its_name() -> None:
    # hashlib.sha256(b"budget|3|7|2:abc|group").hexdigest()[:16] and the same with member 1
    assert TURN.bits() == 0x25BC21B36E4A94E2
    assert TURN.bits(1) == 0x62599F26F81615A8
    # hashlib.sha256(b"exit|3|7|2:abc|1").hexdigest()[:16]: a place in the thinking says nothing about a budget
    assert TURN.bits(1, what="exit") == 0x81B6FE6D3BE61817


def test_every_part_of_a_turn_changes_the_draw() -> None:
    turns = [TURN, Turn(4, 7, 2, "abc"), Turn(3, 8, 2, "abc"), Turn(3, 7, 3, "abc"), Turn(3, 7, 2, "abd")]
    assert len({*(turn.bits() for turn in turns), *(TURN.bits(m) for m in range(4))}) == 9


def test_a_draw_neither_reads_nor_moves_the_random_state_of_the_process() -> None:
    random.seed(1)
    state = random.getstate()
    first = TURN.bits()
    random.seed(2)
    assert TURN.bits() == first
    random.setstate(state)
    TURN.bits()
    assert random.getstate() == state


@pytest.mark.parametrize(("scale", "between_ends"), [("uniform", 205), ("log_uniform", 101)])
def test_the_middle_of_a_range_is_the_mean_that_fits_its_scale(scale: str, between_ends: int) -> None:
    # (25 + 386) / 2 = 205.5, sqrt(25 * 410) = 101.2
    high = 386 if scale == "uniform" else 410
    assert middle(BudgetRange.model_validate({"kind": "range", "low": 25, "high": high, "scale": scale})) == between_ends


@pytest.mark.parametrize(
    ("changes", "room", "budget"),
    [
        ({}, 160, 40),
        ({"statistic": "mean"}, 160, 50),  # 151 / 3 = 50.3
        ({"factor": 1.5}, 160, 60),
        ({"factor": 0.9, "statistic": "mean"}, 160, 45),  # 45.3
        ({"factor": 0.5, "floor": 32}, 160, 32),
        ({"factor": 10}, 160, 160),
    ],
)
def test_a_remembered_budget_is_so_many_times_the_statistic_within_floor_and_room(
    changes: dict[str, object], room: int, budget: int
) -> None:
    assert remembered_budget(memory(**changes), CorrectLengths(shortest=40, total=151, count=3), room=room) == budget


def test_a_prompt_without_a_correct_answer_gets_the_start() -> None:
    assert remembered_budget(memory(factor=0.1), None, room=160) == 64
    assert remembered_budget(memory(), None, room=50) == 50


# -- efforts -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "effort"), [(0, 0.5), (2**62, 0.78), (2**63, 1.22), (3 * 2**62, 1.92), (LAST, 3.0)])
def test_an_effort_is_a_log_uniform_number_of_hundredths(bits: int, effort: float) -> None:
    # 50 * (301 / 50)^(bits / 2^64): 50, 78.3, 122.7, 192.2, 300.9
    assert drawn_effort(BudgetEffort(kind="effort"), bits) == effort


def test_as_many_efforts_lie_below_one_as_the_range_has_octaves_there() -> None:
    source = BudgetEffort(kind="effort", low=0.5, high=2)
    drawn = [drawn_effort(source, Turn(0, step, 0, "q").bits()) for step in range(4000)]
    assert sum(effort < 1 for effort in drawn) / len(drawn) == pytest.approx(0.5, abs=0.03)


def test_levels_are_dealt_to_the_prompts_of_a_step_in_turn_and_the_next_step_begins_one_further() -> None:
    dealt = [[dealt_level([0.5, 1.0, 2.0], Turn(0, step, place, "q")) for place in range(4)] for step in range(2)]
    assert dealt == [[0.5, 1.0, 2.0, 0.5], [1.0, 2.0, 0.5, 1.0]]


# -- different numbers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bits", "chosen"),
    [
        ((2**63, 2**63), (12, 14)),  # of 0 to 3 the 2; of 0 to 4 again the 2, so the last one, 4
        ((0, LAST), (10, 14)),
        ((LAST, 0), (10, 13)),
        ((2**62,), (11,)),
    ],
)
def test_different_numbers_are_drawn_by_hand_as_by_floyd(bits: tuple[int, ...], chosen: tuple[int, ...]) -> None:
    assert distinct(10, 14, bits) == chosen


def test_a_range_too_small_for_its_draws_gives_all_it_has() -> None:
    assert distinct(3, 5, [LAST] * 3) == (3, 4, 5)
    assert distinct(3, 4, [LAST] * 3) == (3, 4)
    assert distinct(3, 2, [LAST] * 3) == ()
    assert distinct(3, 1, [LAST] * 3) == ()


def test_every_pair_of_numbers_is_drawn_alike() -> None:
    turns = [Turn(0, step, 0, "q") for step in range(6000)]
    pairs = Counter(distinct(1, 4, [turn.bits(m, what="exit") for m in range(2)]) for turn in turns)
    assert len(pairs) == 6
    assert list(pairs.values()) == pytest.approx([1000] * 6, abs=120)
