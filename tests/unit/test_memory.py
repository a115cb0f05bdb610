"""What is remembered of each prompt: only its correct answers, exactly, and the same after a resume."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rl.memory import CorrectLengths, PromptMemory
from rl.types import Group, Scored, VerdictStatus
from tests.builders import make_lease, make_prompt, make_rollout, make_scored

WRONG = [status for status in VerdictStatus if status is not VerdictStatus.CORRECT]


def answer(length: int, status: VerdictStatus = VerdictStatus.CORRECT) -> Scored:
    return make_scored(make_rollout(make_lease(prefill_ids=(7,)), generated=(5,) * (length - 1)), status=status)


def group(prompt: int, *members: Scored) -> Group:
    return Group(make_prompt(prompt), members)


def test_shortest_and_mean_of_the_correct_answers_grow_step_by_step() -> None:
    memory = PromptMemory()
    assert memory.of("q0") is None
    memory.observe([group(0, answer(40), answer(60)), group(1, answer(9))])
    memory.observe([group(0, answer(51))])
    seen = memory.of("q0")
    assert seen == CorrectLengths(shortest=40, total=151, count=3)
    assert seen.mean == pytest.approx(151 / 3)
    assert memory.of("q1") == CorrectLengths(9, 9, 1)
    assert len(memory) == 2


def test_a_shorter_answer_takes_the_place_of_the_shortest() -> None:
    memory = PromptMemory()
    memory.observe([group(0, answer(40)), group(0, answer(12))])
    assert memory.of("q0") == CorrectLengths(12, 52, 2)


@pytest.mark.parametrize("status", WRONG)
def test_an_answer_that_is_not_known_to_be_correct_leaves_no_trace(status: VerdictStatus) -> None:
    memory = PromptMemory()
    memory.observe([group(0, answer(5, status))])
    assert memory.of("q0") is None
    assert memory.to_json() == {}


def test_a_group_that_lost_all_its_members_changes_nothing() -> None:
    memory = PromptMemory()
    memory.observe([group(0)])
    assert len(memory) == 0


STEPS = st.lists(st.lists(st.tuples(st.integers(0, 3), st.lists(st.integers(2, 40), max_size=4)), max_size=4), max_size=4)
Steps = list[list[tuple[int, list[int]]]]


@given(before=STEPS, after=STEPS)
def test_a_resumed_memory_goes_on_as_if_never_stopped(before: Steps, after: Steps) -> None:
    def observe(memory: PromptMemory, steps: Steps) -> None:
        for step in steps:
            memory.observe([group(prompt, *(answer(length) for length in lengths)) for prompt, lengths in step])

    whole, stopped = PromptMemory(), PromptMemory()
    observe(whole, before + after)
    observe(stopped, before)
    resumed = PromptMemory.from_json(json.loads(json.dumps(stopped.to_json())))
    observe(resumed, after)
    assert resumed.to_json() == whole.to_json()
    assert all(resumed.of(f"q{p}") == whole.of(f"q{p}") for p in range(4))


@pytest.mark.parametrize("entry", [[1, 2], [0, 5, 1], [5, 5, 0], [5, 9, 2], [5.0, 5, 1], [True, 5, 1], "abc"])
def test_an_entry_that_no_answers_can_have_left_is_refused(entry: object) -> None:
    with pytest.raises(ValueError, match="the memory of prompt q9 is"):
        PromptMemory.from_json({"q9": entry})  # pyright: ignore[reportArgumentType]
