"""Dynamic sampling: which groups are flat, how many prompts replace them, and what a step with rounds adds up to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from rl.collection import Collected, Collector
from rl.embedded import tiny_tokenizer
from rl.errors import BudgetRLError
from rl.generation import Generated, generate_step
from rl.prompts import PromptStream
from rl.refill import Refill, teaches
from rl.reward_state import RewardState
from rl.sampling_state import SamplingState
from rl.settings import Settings
from rl.types import Group, Lease, Reward, Scored, Shaping, VerdictStatus
from rl.waiting import StopFlag
from rollout.budgets import BudgetPlan
from rollout.progress import EngineStats
from tests.builders import make_effort, make_group, make_lease, make_prompt, make_rollout, make_scored

BASE: dict[str, Any] = {"model": {"path": "m"}, "data": {"source": "x.json"}, "max_steps": 1, "prompts_per_step": 4}


def _settings(**sections: Any) -> Settings:
    rollout = {"samples_per_prompt": 2, "max_length": 64, "refill": 2} | sections.pop("rollout", {})
    return Settings.model_validate(BASE | {"rollout": rollout} | sections)


SETTINGS = _settings()


def _group(index: int, parts: Sequence[Mapping[str, float]], *, right: Sequence[bool]) -> Group:
    """A group whose rewards have these parts."""
    members = []
    for m, (named, correct) in enumerate(zip(parts, right, strict=True)):
        status = VerdictStatus.CORRECT if correct else VerdictStatus.WRONG
        rollout = make_rollout(make_lease(group=index, member=m))
        members.append(make_scored(rollout, status=status, reward=sum(named.values()), parts=named))
    return Group(make_prompt(index), tuple(members))


# -- which groups teach something --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rewards", "expected"),
    [
        ([1.0, 0.0], True),
        ([1.0, 1.0], False),
        ([0.0, 0.0], False),
        ([1.0, 1.0 + 5e-7], False),  # below advantage.std_floor
        ([1.0, 1.0 + 2e-6], True),
        ([1.0, None], False),  # one of two answers could not be judged: nothing to compare with
        ([1.0, None, 0.0], True),
        ([None, None], False),
        ([], False),
    ],
)
def test_a_group_teaches_where_two_of_its_rewards_differ(rewards: list[float | None], expected: bool) -> None:
    assert teaches(make_group(0, rewards), SETTINGS) is expected


def test_answers_to_different_efforts_are_not_compared() -> None:
    half, twice = make_effort(0.5), make_effort(2.0)
    assert not teaches(make_group(0, [1.0, 1.0, 0.0, 0.0], budgets=[half, half, twice, twice]), SETTINGS)
    assert teaches(make_group(0, [1.0, 0.0, 0.0, 0.0], budgets=[half, half, twice, twice]), SETTINGS)
    assert teaches(make_group(0, [1.0, 1.0, 0.0, 0.0], budgets=[32, 32, 64, 64]), SETTINGS)


def test_a_penalty_for_length_alone_teaches_only_without_the_guard_that_leaves_it_out() -> None:
    reward = {"method": "dapo", "overlong_buffer": 8}
    long = [{"correct": 0.0, "overlong": -0.5}, {"correct": 0.0, "overlong": 0.0}]
    wrong = _group(0, long, right=[False, False])
    assert not teaches(wrong, _settings(reward=reward))
    assert teaches(wrong, _settings(reward=reward, advantage={"length_guard": False}))
    assert teaches(wrong, _settings(reward=reward, advantage={"estimator": "token_level_average"}))
    # The guard keeps the length of answers that are all right.
    right = _group(0, [{"correct": 1.0, "overlong": -0.5}, {"correct": 1.0, "overlong": 0.0}], right=[True, True])
    assert teaches(right, _settings(reward=reward))


def test_rewards_of_single_tokens_teach_where_the_totals_do_not() -> None:
    def with_tokens(values: Sequence[float | None]) -> Group:
        members = tuple(
            Scored(member.rollout, member.verdict, Reward(1.0, {"correct": 1.0}, per_token=tuple(values)))
            for member in make_group(0, [1.0, 1.0]).members
        )
        return Group(make_prompt(0), members)

    assert teaches(with_tokens([0.0, None, 1.0]), SETTINGS)
    assert not teaches(with_tokens([1.0, None, 1.0]), SETTINGS)


# -- how many prompts a round takes ------------------------------------------------------------------------------------------


def _flat(index: int) -> Group:
    return make_group(index, [0.0, 0.0])


def _mixed(index: int) -> Group:
    return make_group(index, [0.0, 1.0])


def test_a_round_replaces_what_is_flat_until_the_step_is_full() -> None:
    refill = Refill(4, 2)
    assert refill.missing == 4
    refill = refill.with_round([_mixed(0), _flat(1), _flat(2), _mixed(3)], SETTINGS)
    assert refill.missing == 2
    refill = refill.with_round([_flat(4), _mixed(5)], SETTINGS)
    assert refill.missing == 1
    refill = refill.with_round([_mixed(6)], SETTINGS)
    assert (refill.missing, refill.short_by) == (0, 0)
    assert [group.prompt.id for group in refill.kept] == ["q0", "q3", "q5", "q6"]
    assert refill.figures() == {"rollouts/generated": 14, "rollouts/refilled_groups": 3, "rollouts/discarded_groups": 3}


def test_after_the_last_round_a_step_is_short_and_says_so() -> None:
    refill = Refill(2, 1).with_round([_flat(0), _mixed(1)], SETTINGS).with_round([_flat(2)], SETTINGS)
    assert (refill.missing, refill.short_by) == (0, 1)
    assert [group.prompt.id for group in refill.kept] == ["q1"]
    assert "rewards differ in 1 groups of 3 after rollout.refill=1" in refill.shortage(SETTINGS)


def test_where_no_group_teaches_the_step_has_as_many_as_ever_those_with_rewards_first() -> None:
    lost = Group(make_prompt(0), ())
    refill = Refill(2, 1).with_round([lost, _flat(1)], SETTINGS).with_round([_flat(2), _flat(3)], SETTINGS)
    assert [group.prompt.id for group in refill.kept] == ["q1", "q2"]
    assert refill.short_by == 2
    assert refill.figures()["rollouts/discarded_groups"] == 2


def test_without_refilling_every_group_is_kept_whatever_its_rewards() -> None:
    refill = Refill(2, 0).with_round([_flat(0), _mixed(1)], SETTINGS)
    assert (refill.missing, refill.short_by) == (0, 0)
    assert refill.kept == refill.groups and len(refill.kept) == 2
    assert refill.figures() == {"rollouts/generated": 4}


# -- a step in rounds --------------------------------------------------------------------------------------------------------


class _Rounds:
    """Stands for engines and graders: answers the leases it is asked for, right for the second member of some prompts."""

    def __init__(self, mixed: set[str], *, unscored: bool = False) -> None:
        self.mixed, self.unscored = mixed, unscored
        self.asked: list[tuple[Lease, ...]] = []

    def collect(self, leases: tuple[Lease, ...], *, stop: StopFlag) -> Collected:
        self.asked.append(leases)
        members: dict[str, list[Scored]] = {}
        prompts = {}
        for lease in leases:
            key = lease.ticket.rpartition(".")[0]
            right = lease.member == 1 and lease.prompt.id in self.mixed
            status = VerdictStatus.CORRECT if right else VerdictStatus.WRONG
            status = VerdictStatus.CRASHED if self.unscored else status
            prompts[key] = lease.prompt
            members.setdefault(key, []).append(Scored(make_rollout(lease), make_scored(status=status).verdict))
        groups = tuple(Group(prompts[key], tuple(found)) for key, found in members.items())
        return Collected(groups, (), 2.0, 0.5, (EngineStats(seconds=2.0, steps=1, generated=3 * len(leases)),))


@pytest.fixture
def step(monkeypatch: pytest.MonkeyPatch) -> Any:
    """``step(rounds, settings, cursor)``: the step after three, on twelve prompts."""
    stream = PromptStream(tuple(make_prompt(index, token_ids=(5, 6)) for index in range(12)), 0)

    def run(rounds: _Rounds, settings: Settings, cursor: int = 0, check: Any = lambda collected: None) -> Generated:
        collector = Collector([], [], settings)
        monkeypatch.setattr(collector, "collect", rounds.collect)
        return generate_step(
            collector, BudgetPlan(settings.rollout, tiny_tokenizer()), stream, settings, cursor=cursor, step=3,
            shaping=Shaping(), sampling=SamplingState(), rewards=RewardState(), stop=StopFlag(), check=check,
        )  # fmt: skip

    run.stream = stream  # pyright: ignore[reportFunctionMemberAccess]
    return run


def test_prompts_are_taken_in_the_order_of_the_stream_and_no_ticket_or_seed_comes_twice(step: Any) -> None:
    order = [prompt.id for prompt in step.stream.take(0, 12)[0]]
    rounds = _Rounds({order[0], order[3], order[5]})
    found = step(rounds, SETTINGS)
    assert [[lease.prompt.id for lease in asked[::2]] for asked in rounds.asked] == [order[:4], order[4:6], order[6:7]]
    leases = [lease for asked in rounds.asked for lease in asked]
    assert [lease.ticket for lease in leases] == [f"000003.{p:04d}.{m:03d}" for p in range(7) for m in range(2)]
    assert len({lease.seed for lease in leases}) == 14 and {lease.min_version for lease in leases} == {3}
    assert found.cursor == 7
    assert [group.prompt.id for group in found.refill.kept] == [order[0], order[3], order[5]]
    assert (
        [group.prompt.id for group in found.refill.groups] == [group.prompt.id for group in found.collected.groups] == order[:7]
    )


def test_a_step_that_is_full_at_once_is_the_step_without_refilling(step: Any) -> None:
    every = {prompt.id for prompt in step.stream.take(0, 12)[0]}
    with_it, without = _Rounds(every), _Rounds(every)
    refilled, plain = step(with_it, SETTINGS, 2), step(without, _settings(rollout={"refill": 0}), 2)
    assert with_it.asked == without.asked and len(with_it.asked) == 1
    assert refilled.refill.kept == plain.refill.kept and refilled.cursor == plain.cursor == 6


def test_the_rounds_of_a_step_add_up(step: Any) -> None:
    found = step(_Rounds(set()), SETTINGS)
    assert found.cursor == 12
    assert (found.collected.generate_s, found.collected.score_s) == (6.0, 1.5)
    (stats,) = found.collected.stats
    assert (stats.seconds, stats.generated) == (6.0, 3 * 24)
    assert len(found.collected.groups) == 12 and len(found.refill.kept) == 4


def test_a_step_begun_again_from_its_cursor_asks_for_the_same(step: Any) -> None:
    order = [prompt.id for prompt in step.stream.take(0, 12)[0]]
    first, again = _Rounds({order[1], order[4]}), _Rounds({order[1], order[4]})
    assert step(first, SETTINGS).cursor == step(again, SETTINGS).cursor
    assert first.asked == again.asked


def test_too_many_answers_without_a_verdict_end_the_step_at_once(step: Any) -> None:
    rounds = _Rounds(set(), unscored=True)

    def refuse(collected: Collected) -> None:
        raise BudgetRLError(f"{len(collected.groups)} groups without a verdict")

    with pytest.raises(BudgetRLError, match="4 groups"):
        step(rounds, SETTINGS, check=refuse)
    assert len(rounds.asked) == 1


def test_all_rounds_are_checked_together(step: Any) -> None:
    """One lost answer of a round with a single prompt is no reason to stop a run."""
    seen: list[int] = []
    step(_Rounds(set()), SETTINGS, check=lambda collected: seen.append(len(collected.groups)))
    assert seen == [4, 8, 12]


def test_early_exits_are_refilled_with_their_paths(step: Any) -> None:
    settings = _settings(rollout={"exits": 1, "refill": 1}, learner={"train_prefix": True}, reward={"method": "s_grpo"})
    rounds = _Rounds(set())
    found = step(rounds, settings)
    paths, more = rounds.asked[0], rounds.asked[2]
    assert [lease.ticket for lease in paths] == [f"000003.{p:04d}.001" for p in range(4)]
    assert [lease.ticket for lease in more] == [f"000003.{p:04d}.001" for p in range(4, 8)]
    assert found.cursor == 8
