"""Early exits: which leases a step has, where a path can be left, and how paths and exits become groups."""

from __future__ import annotations

from dataclasses import replace

import pytest

from rl.budget_draws import Turn
from rl.collection import Collected
from rl.coordinator import CloseStep, Coordinator, StepBegan
from rl.embedded import tiny_tokenizer
from rl.exits import exit_leases, exit_places, join, longest_response, merge, path_leases
from rl.leases import step_leases, ticket_seed
from rl.memory import PromptMemory
from rl.prompts import PromptEncoder
from rl.settings import DataSettings, RolloutSettings
from rl.types import FinishReason, Group, Lease, Prompt, Rollout, Shaping
from rollout.budgets import BudgetPlan
from rollout.openings import ExitWords
from rollout.progress import EngineStats
from tests.builders import make_lease, make_prompt, make_rollout, make_scored

END = 3
WORDS = ExitWords(ids=(40, END), end=END)
THOUGHT = (21, 22, 23, 24, 25)
ANSWERED = (*THOUGHT, END, 30, 1)
"""Five tokens of thinking, the end of it, an answer and the end of sequence."""


def path(generated: tuple[int, ...] = ANSWERED, *, finish: FinishReason = FinishReason.STOP, exits: int = 2) -> Rollout:
    """A full path behind an opening of two tokens, with room for 62 more."""
    return make_rollout(make_lease(group=4, member=exits, step=7, prefill_ids=(2, 9)), generated=generated, finish=finish)


def paths_of(budgets: object, *, exits: int = 3, step: int = 7, **changes: object) -> tuple[Lease, ...]:
    values = {"budgets": budgets, "samples_per_prompt": exits + 1, "exits": exits, "max_length": 160} | changes
    tokenizer = tiny_tokenizer()
    encoder = PromptEncoder(tokenizer, DataSettings(source="x.json"))
    plan = BudgetPlan(RolloutSettings.model_validate(values), tokenizer, encoder=encoder, max_steps=10)
    prompts = [Prompt(id=q, question=q, answer="7", token_ids=encoder.encode(q)) for q in ("4 + 3 =", "5 + 3 =")]
    asked = {"step": step, "run_seed": 3, "shaping": Shaping(0.5), "min_version": step, "memory": PromptMemory()}
    return path_leases(prompts, plan, exits=exits, **asked)  # pyright: ignore[reportArgumentType]


# -- full paths --------------------------------------------------------------------------------------------------------------


def test_each_prompt_has_one_path_which_is_the_last_member_of_its_group() -> None:
    leases = paths_of(["free"])
    assert [(lease.ticket, lease.member) for lease in leases] == [("000007.0000.003", 3), ("000007.0001.003", 3)]
    assert [lease.seed for lease in leases] == [ticket_seed(3, 7, f"{p}:{q} + 3 =", 3) for p, q in enumerate((4, 5))]
    assert {(lease.max_new_tokens, lease.min_version, lease.shaping.temperature) for lease in leases} == {(159, 7, 0.5)}


def test_a_path_has_the_budget_and_the_cap_that_its_group_would_have() -> None:
    budgets = {"kind": "range", "low": 16, "high": 60}
    leases = paths_of(budgets, length_schedule=[[0, 100], [7, 60]])
    encoder = PromptEncoder(tiny_tokenizer(), DataSettings(source="x.json"))
    plan = BudgetPlan(
        RolloutSettings.model_validate({"budgets": budgets, "max_length": 160, "length_schedule": [[0, 100], [7, 60]]}),
        tiny_tokenizer(),
        encoder=encoder,
    )
    group = step_leases(
        [lease.prompt for lease in leases],
        plan,
        samples=4,
        step=7,
        run_seed=3,
        shaping=Shaping(0.5),
        min_version=7,
        memory=PromptMemory(),
    )
    assert leases == (group[3], group[7])
    assert {longest_response(lease) for lease in leases} == {60}


# -- where a path can be left ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("generated", "finish", "places"),
    [
        (ANSWERED, FinishReason.STOP, (3, 6)),  # behind 21, 22, 23 or 24 of the five tokens that follow an opening of two
        ((21, 22, END, 30, END, 1), FinishReason.STOP, (3, 3)),  # the first end counts
        ((21, END, 30, 1), FinishReason.STOP, (3, 2)),
        ((END, 30, 1), FinishReason.STOP, (3, 1)),
        (THOUGHT, FinishReason.LENGTH, (3, 6)),  # cut inside: all of it is thinking
        ((*THOUGHT, END, 30), FinishReason.LENGTH, (3, 6)),  # cut inside the answer
        ((*THOUGHT, 1), FinishReason.STOP, (3, 1)),  # stopped without ever ending its thinking
        ((), FinishReason.LENGTH, (3, 1)),
    ],
)
def test_a_path_can_be_left_inside_its_thinking_only(
    generated: tuple[int, ...], finish: FinishReason, places: tuple[int, int]
) -> None:
    assert exit_places(path(generated, finish=finish), WORDS) == places


def test_a_path_is_left_early_enough_for_the_exit_words_and_a_token_of_answer() -> None:
    cut = path((21,) * 62, finish=FinishReason.LENGTH)
    assert longest_response(cut.lease) == cut.length == 64
    assert exit_places(cut, WORDS) == (3, 61)  # 61 and two words leave one of 64
    last = exit_leases([cut], WORDS, exits=80, run_seed=1)[-1]
    assert (len(last.prefill_ids), last.max_new_tokens) == (63, 1)


# -- exits -------------------------------------------------------------------------------------------------------------------


def test_exits_keep_the_path_up_to_their_place_and_go_on_with_the_exit_words() -> None:
    full = path(exits=4)
    leases = exit_leases([full], WORDS, exits=4, run_seed=3)
    assert [lease.prefill_ids for lease in leases] == [
        (2, 9, 21, 40, END),
        (2, 9, 21, 22, 40, END),
        (2, 9, 21, 22, 23, 40, END),
        (2, 9, 21, 22, 23, 24, 40, END),
    ]
    assert [lease.max_new_tokens for lease in leases] == [59, 58, 57, 56]
    assert [(lease.ticket, lease.member) for lease in leases] == [(f"000007.0004.00{m}", m) for m in range(4)]
    assert [lease.seed for lease in leases] == [ticket_seed(3, 7, "4:q4", m) for m in range(4)]
    unchanged = {"prefill_ids": (), "max_new_tokens": 0, "ticket": "", "member": 0, "seed": 0}
    assert {replace(lease, **unchanged) for lease in leases} == {replace(full.lease, **unchanged)}


def test_fewer_places_than_exits_give_one_exit_each_and_the_others_are_left_out() -> None:
    leases = exit_leases([path((21, 22, 23, END, 30, 1), exits=5)], WORDS, exits=5, run_seed=3)
    assert [(lease.member, len(lease.prefill_ids)) for lease in leases] == [(0, 5), (1, 6)]
    assert exit_leases([path((END, 30, 1))], WORDS, exits=5, run_seed=3) == ()
    assert exit_leases([], WORDS, exits=5, run_seed=3) == ()


def test_the_places_are_drawn_by_the_turn_and_do_not_depend_on_who_generated_the_path() -> None:
    long = path(tuple(range(100, 140)) + (END, 30, 1))
    again = replace(long, lease=replace(long.lease, attempt=1), weight_version=9)
    first = exit_leases([long], WORDS, exits=2, run_seed=3)
    assert exit_leases([again], WORDS, exits=2, run_seed=3) == first  # and the exits of a second attempt are first attempts
    bits = [Turn(3, 7, 4, "q4").bits(member, what="exit") for member in range(2)]
    low, high = sorted((bits[0] * 38 >> 64, bits[1] * 39 >> 64))  # of 39 places, which differ here
    assert [len(lease.prefill_ids) - 2 for lease in first] == [3 + low, 3 + high]
    assert exit_leases([long], WORDS, exits=2, run_seed=4) != first


def test_exits_without_words_are_a_programming_error() -> None:
    with pytest.raises(ValueError, match=r"settings with rollout\.exits"):
        exit_leases([path()], None, exits=2, run_seed=3)


# -- groups ------------------------------------------------------------------------------------------------------------------


def group_of_members(group: int, *members: int) -> Group:
    return Group(make_prompt(group), tuple(make_scored(make_rollout(make_lease(group=group, member=m))) for m in members))


def members_of(groups: tuple[Group, ...]) -> list[list[tuple[str, int]]]:
    return [[(group.prompt.id, m.rollout.lease.member) for m in group.members] for group in groups]


def test_a_group_is_its_exits_in_order_and_the_path_last_whatever_came_first() -> None:
    merged = merge([group_of_members(0, 3), group_of_members(1, 3)], [group_of_members(1, 1, 0), group_of_members(0, 0, 2)])
    assert members_of(merged) == [[("q0", 0), ("q0", 2), ("q0", 3)], [("q1", 0), ("q1", 1), ("q1", 3)]]


def test_a_path_without_exits_stays_alone_and_a_lost_path_leaves_its_group_empty() -> None:
    merged = merge([group_of_members(0, 3), group_of_members(1), group_of_members(2, 3)], [group_of_members(2)])
    assert members_of(merged) == [[("q0", 3)], [], [("q2", 3)]]
    assert [group.prompt.id for group in merged] == ["q0", "q1", "q2"]


def test_exits_that_belong_to_no_path_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"exits of group 000000\.0001 leave a path that is not there"):
        merge([group_of_members(0, 3)], [group_of_members(1, 0)])
    with pytest.raises(ValueError, match=r"two members of group 000000\.0000 have one index"):
        merge([group_of_members(0, 3)], [group_of_members(0, 3)])


def test_the_two_collections_of_a_step_are_one_with_the_times_and_losses_of_both() -> None:
    first = EngineStats(seconds=2.0, steps=4, generated=100)
    second = EngineStats(seconds=1.0, steps=1, generated=20)
    paths = Collected((group_of_members(0, 2),), ("a: lost",), 3.0, 0.5, (first, first))
    exits = Collected((group_of_members(0, 0, 1),), ("b: lost",), 1.0, 0.25, (second,))
    joined = join(paths, exits)
    assert members_of(joined.groups) == [[("q0", 0), ("q0", 1), ("q0", 2)]]
    assert (joined.lost, joined.generate_s, joined.score_s) == (("a: lost", "b: lost"), 4.0, 0.75)
    assert [(one.seconds, one.steps, one.generated) for one in joined.stats] == [(3.0, 5, 120), (2.0, 4, 100)]


def test_a_step_without_any_exit_closes_at_once() -> None:
    assert Coordinator().step(StepBegan((), (0,))) == [CloseStep((), ())]
