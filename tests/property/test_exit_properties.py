"""What holds for every path: where its exits lie, and that paths and exits come back as whole groups."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from rl.budget_draws import distinct
from rl.coordinator import CloseStep, Coordinator, RolloutsArrived, Score, ScoresArrived, StepBegan
from rl.exits import exit_leases, longest_response, merge
from rl.types import FinishReason, Group, Lease, Rollout
from rollout.openings import ExitWords
from tests.builders import make_lease, make_rollout, make_scored

END = 3
BITS = st.integers(0, 2**64 - 1)
WORDS = st.lists(st.integers(40, 49), max_size=4).map(lambda ids: ExitWords((*ids, END), END))
THOUGHTS = st.lists(st.integers(10, 30), max_size=40)
ENDINGS = st.sampled_from([(END, 30, 1), (END, 1), (END, 31, END, 1), (1,), ()])


def path_of(thought: list[int], ending: tuple[int, ...], *, group: int, exits: int) -> Rollout:
    lease = make_lease(group=group, member=exits, step=5, prefill_ids=(2,))
    finish = FinishReason.STOP if ending else FinishReason.LENGTH
    return make_rollout(lease, generated=(*thought, *ending), finish=finish)


def collected(leases: tuple[Lease, ...] | list[Rollout], order: random.Random) -> tuple[Group, ...]:
    """The groups a coordinator closes when these come back in some order; a lease is answered with two tokens."""
    rollouts = [make_rollout(one) if isinstance(one, Lease) else one for one in leases]
    coordinator = Coordinator()
    instructions = coordinator.step(StepBegan(tuple(rollout.lease for rollout in rollouts), (0, 1)))
    order.shuffle(rollouts)
    for rollout in rollouts:
        for score in coordinator.step(RolloutsArrived((rollout,))):
            assert isinstance(score, Score)
            instructions = coordinator.step(ScoresArrived(tuple(make_scored(answer) for answer in score.rollouts)))
    (close,) = instructions
    assert isinstance(close, CloseStep)
    return close.groups


@given(low=st.integers(-5, 99), size=st.integers(-2, 40), bits=st.lists(BITS, max_size=20))
def test_drawn_numbers_differ_increase_and_are_as_many_as_fit(low: int, size: int, bits: list[int]) -> None:
    chosen = distinct(low, low + size - 1, bits)
    assert len(chosen) == len(set(chosen)) == min(len(bits), max(size, 0))
    assert list(chosen) == sorted(chosen)
    assert all(low <= number < low + size for number in chosen)


@given(thought=THOUGHTS, ending=ENDINGS, words=WORDS, exits=st.integers(1, 9), seed=st.integers(0, 9))
def test_every_exit_is_a_strict_part_of_the_thinking_and_leaves_room_for_an_answer(
    thought: list[int], ending: tuple[int, ...], words: ExitWords, exits: int, seed: int
) -> None:
    path = path_of(thought, ending, group=0, exits=exits)
    leases = exit_leases([path], words, exits=exits, run_seed=seed)
    wanted = 0 if ending == (1,) else max(len(thought) - 1, 0)
    assert len(leases) == min(exits, wanted)
    lengths = [len(lease.prefill_ids) for lease in leases]
    assert lengths == sorted(set(lengths))
    for member, lease in enumerate(leases):
        kept = lease.prefill_ids[: -len(words.ids)]
        assert lease.prefill_ids == (*kept, *words.ids)
        assert kept == path.response_ids[: len(kept)]
        assert path.prefill_length < len(kept) < path.prefill_length + len(thought)
        assert lease.prefill_ids.count(END) == 1
        assert lease.max_new_tokens >= 1
        assert longest_response(lease) == longest_response(path.lease)
        assert lease.member == member and lease.seed != path.lease.seed


@given(
    thoughts=st.lists(st.tuples(THOUGHTS, ENDINGS), min_size=1, max_size=5),
    exits=st.integers(1, 4),
    lost=st.integers(0, 9),
    order=st.randoms(use_true_random=False),
)
def test_paths_and_exits_become_groups_in_prompt_order_whatever_came_back_when(
    thoughts: list[tuple[list[int], tuple[int, ...]]], exits: int, lost: int, order: random.Random
) -> None:
    paths = [path_of(thought, ending, group=g, exits=exits) for g, (thought, ending) in enumerate(thoughts)]
    words = ExitWords((END,), END)
    path_groups = collected(list(paths), order)
    rollouts = [member.rollout for group in path_groups for member in group.members]
    leases = exit_leases(rollouts, words, exits=exits, run_seed=1)
    exit_groups = collected(leases, order)
    if lost < len(path_groups):  # a path that was lost took its exits along
        kept = [group for group in exit_groups if group.prompt.id != f"q{lost}"]
        path_groups = tuple(Group(g.prompt, ()) if g.prompt.id == f"q{lost}" else g for g in path_groups)
    else:
        kept = list(exit_groups)
    merged = merge(path_groups, kept)
    assert [group.prompt.id for group in merged] == [f"q{g}" for g in range(len(paths))]
    for g, group in enumerate(merged):
        count = sum(lease.prompt.id == f"q{g}" for lease in leases)
        expected = [] if g == lost else [*range(count), exits]
        assert [member.rollout.lease.member for member in group.members] == expected
