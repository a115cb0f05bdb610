"""The conductor's pure helpers: what is learnt from, when a step is refused, and what a reader of samples.jsonl sees."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from rl.collection import Collected
from rl.errors import BudgetRLError
from rl.settings import Settings
from rl.step_rules import build_batch, effective_correction, idle_error, sample_record, unscored_error, unscored_members
from rl.types import FinishReason, Group, VerdictStatus
from tests.batches import with_effort
from tests.builders import make_group, make_lease, make_prompt, make_rollout, make_scored

HALF = math.sqrt(0.5)
"""(1 - 0.5) / std of {0, 1} with the sample correction."""


def _settings(**sections: Any) -> Settings:
    return Settings.model_validate(
        {"model": {"path": "model"}, "data": {"source": "problems.jsonl"}, "max_steps": 1, "prompts_per_step": 2} | sections
    )


# -- build_batch -----------------------------------------------------------------------------------------------------------


def test_an_unscored_member_is_left_out_of_the_batch_and_of_its_groups_statistics() -> None:
    groups = (make_group(0, [1.0, None, 0.0]), make_group(1, [0.0, 0.0, 0.0]))
    batch, advantage_N, members = build_batch(groups, _settings())
    assert [m.rollout.lease.ticket[7:] for m in members] == ["0000.000", "0000.002", "0001.000", "0001.001", "0001.002"]
    torch.testing.assert_close(advantage_N, torch.tensor([HALF, -HALF, 0, 0, 0]), atol=1e-5, rtol=0)
    assert batch.rollouts == 5
    assert batch.minibatch_N.tolist() == [0] * 5


def test_each_response_token_carries_its_rollouts_advantage() -> None:
    batch, _, _ = build_batch((make_group(0, [1.0, 0.0]), make_group(1, [0.0, 0.0])), _settings())
    expected = torch.tensor([0, 0, 0, HALF, HALF, 0, 0, 0, -HALF, -HALF] + [0.0] * 10)
    torch.testing.assert_close(batch.advantage_T, expected, atol=1e-5, rtol=0)


def test_groups_are_dealt_whole_and_in_order_to_the_mini_batches() -> None:
    groups = tuple(make_group(g, [1.0, 0.0]) for g in range(4))
    settings = _settings(prompts_per_step=4, learner={"minibatches": 2})
    assert build_batch(groups, settings)[0].minibatch_N.tolist() == [0, 0, 0, 0, 1, 1, 1, 1]


def test_a_budgeted_member_is_compared_with_its_ceiling_and_a_free_one_is_not() -> None:
    settings = _settings(
        reward={"method": "hbpo"},
        advantage={"estimator": "hierarchical"},
        rollout={"max_length": 64, "budgets": [16, "free"], "samples_per_prompt": 2},
    )
    _, advantage_N, _ = build_batch((make_group(0, [3.0, 1.0], budgets=[16, None]),), settings)
    below_ceiling = 3.0 - 4.0 * math.cos(math.pi / 8)  # budget 16 of 64: pi * 16 / (2 * 64)
    torch.testing.assert_close(advantage_N, torch.tensor([HALF + below_ceiling, -HALF]), atol=1e-5, rtol=0)


def test_a_weighted_method_is_compared_with_its_weighted_ceiling() -> None:
    settings = _settings(
        reward={"method": "hbpo", "method_weight": 0.25},
        advantage={"estimator": "hierarchical"},
        rollout={"max_length": 64, "budgets": [16, "free"], "samples_per_prompt": 2},
    )
    ceiling = 4.0 * math.cos(math.pi / 8)
    _, advantage_N, _ = build_batch((make_group(0, [0.25 * ceiling, 0.25 * ceiling], budgets=[16, 16]),), settings)
    torch.testing.assert_close(advantage_N, torch.zeros(2), atol=1e-5, rtol=0)


def test_the_budget_sentence_is_trained_on_as_configured() -> None:
    lease = make_lease(prefill_ids=(40, 41), budget=16)
    groups = (Group(make_prompt(), (make_scored(make_rollout(lease)),)),)
    for train_prefix, tokens in ((True, 4), (False, 2)):
        batch, _, _ = build_batch(groups, _settings(learner={"train_prefix": train_prefix}))
        assert int(batch.loss_mask_T.sum()) == tokens


def test_a_step_whose_every_answer_is_left_out_by_its_policy_is_refused() -> None:
    masked = replace(make_scored(status=VerdictStatus.TRUNCATED), reward=None)
    with pytest.raises(BudgetRLError, match="no answer of this step has a reward"):
        build_batch((Group(make_prompt(), (masked,)),), _settings())


def test_members_of_one_prompt_asked_for_different_efforts_are_not_compared() -> None:
    group = make_group(0, [1.0, 0.0, 1.0, 1.0])
    efforts = (0.5, 1.0, 0.5, 1.0)
    members = [
        replace(m, rollout=replace(m.rollout, lease=with_effort(m.rollout.lease, r)))
        for m, r in zip(group.members, efforts, strict=True)
    ]
    _, advantage_N, _ = build_batch((replace(group, members=tuple(members)),), _settings())
    torch.testing.assert_close(advantage_N, torch.tensor([0, -HALF, 0, HALF]), atol=1e-5, rtol=0)


def test_rewards_of_single_tokens_are_added_to_the_tokens_before_them() -> None:
    group = make_group(0, [1.0, 0.0])
    first, second = group.members
    assert first.reward is not None and second.reward is not None
    rewarded = (
        replace(first, reward=replace(first.reward, per_token=(1.0, 3.0))),
        replace(second, reward=replace(second.reward, per_token=(None, 2.0))),
    )
    batch, _, _ = build_batch((replace(group, members=rewarded),), _settings())
    # Token rewards 1, 3, 2: mean 2, sample std 1.
    expected = torch.tensor([0, 0, 0, HALF + 0.0, HALF + 1.0, 0, 0, 0, -HALF, -HALF])
    torch.testing.assert_close(batch.advantage_T, expected, atol=1e-5, rtol=0)


# -- refusals --------------------------------------------------------------------------------------------------------------


def _collected(*rewards: float | None, lost: tuple[str, ...] = ()) -> Collected:
    return Collected((make_group(0, rewards),), lost, generate_s=1.0, score_s=1.0)


def test_a_step_with_as_many_unscored_answers_as_allowed_goes_on() -> None:
    assert unscored_error(_collected(1.0, 0.0, 0.0, 0.0, None), 0.2) is None
    assert unscored_error(_collected(1.0, None, None), 1.0) is None


def test_a_step_without_any_scored_answer_is_refused_whatever_the_limit() -> None:
    error = unscored_error(_collected(None, None), 1.0)
    assert error is not None and "2 of 2 answers could not be scored" in error.cause


def test_a_step_with_more_is_refused_with_the_first_cause_and_the_settings_to_change() -> None:
    error = unscored_error(_collected(1.0, 0.0, None, None, 0.0), 0.2)
    assert error is not None
    assert error.cause == "2 of 5 answers could not be scored (limit 20%); first: grader needed more than 10 s"
    assert all(name in error.fix for name in ("unscored.jsonl", "reward.grade_deadline_s", "reward.max_unscored"))


def test_lost_rollouts_count_as_unscored() -> None:
    error = unscored_error(_collected(1.0, 0.0, lost=("000000.0000.002: engine 0 died",)), 0.2)
    assert error is not None and error.cause.endswith("first: 000000.0000.002: engine 0 died")
    assert error.cause.startswith("1 of 3 answers")


def test_the_worst_unscored_answers_are_the_longest() -> None:
    leases = [make_lease(member=m) for m in range(3)]
    members = [
        make_scored(make_rollout(lease, generated=range(n)), status=status)
        for lease, n, status in zip(
            leases, (2, 9, 5), (VerdictStatus.CRASHED, VerdictStatus.WRONG, VerdictStatus.TIMED_OUT), strict=True
        )
    ]
    collected = Collected((Group(make_prompt(), tuple(members)),), (), 1.0, 1.0)
    assert [m.rollout.lease.member for m in unscored_members(collected)] == [2, 0]


FLAT = {
    "adv/nonzero_tokens": 0.0, "group/flat": 1.0, "verdict/truncated": 0.0, "verdict/malformed": 0.0, "train/accuracy": 0.0,
}  # fmt: skip


@pytest.mark.parametrize(
    ("found", "advice"),
    [
        ({"verdict/truncated": 0.75}, "75% of answers are cut at rollout.max_length=4096: raise it"),
        ({"verdict/malformed": 0.6}, "60% of answers have no readable answer: compare data.extract=after_think"),
        ({"train/accuracy": 1.0}, "every answer is right: use harder data"),
        ({"train/accuracy": 0.5}, "no group has both right and wrong answers: use easier data"),
        ({}, "raise rollout.samples_per_prompt or prompts_per_step"),
    ],
)
def test_a_first_step_without_signal_is_refused_with_advice_that_fits(found: dict[str, float], advice: str) -> None:
    error = idle_error(FLAT | found, _settings())
    assert error is not None
    assert error.cause == "nothing can be learnt from the first step: every advantage is zero"
    assert advice in error.fix and "allow_idle=true" in error.fix


@pytest.mark.parametrize(
    ("found", "advice"),
    [
        ({"verdict/truncated": 0.5, "verdict/malformed": 0.4}, "50% of answers are cut at rollout.max_length=4096: raise it"),
        ({"verdict/truncated": 0.4, "verdict/malformed": 0.5}, "50% of answers have no readable answer: compare data.extract"),
    ],
)
def test_advantages_against_a_ceiling_do_not_hide_that_nothing_was_answered(found: dict[str, float], advice: str) -> None:
    error = idle_error(FLAT | {"adv/nonzero_tokens": 1.0} | found, _settings())
    assert error is not None
    assert error.cause.endswith("90% of answers are cut or unreadable, and no group has two different rewards")
    assert advice in error.fix


@pytest.mark.parametrize(
    "found",
    [
        {"group/flat": 0.9, "verdict/truncated": 0.95},
        {"group/flat": 1.0, "verdict/truncated": 0.5, "verdict/malformed": 0.3},
    ],
)
def test_a_first_step_with_any_signal_goes_on(found: dict[str, float]) -> None:
    assert idle_error(FLAT | {"adv/nonzero_tokens": 0.01} | found, _settings()) is None


def test_a_first_step_without_signal_goes_on_with_leave_to_idle() -> None:
    assert idle_error(FLAT, _settings(allow_idle=True)) is None


# -- correction and samples ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("temperature", "expected"), [(1.0, "none"), (0.7, "replay"), (1.2, "replay")])
def test_automatic_correction_replays_only_a_shaped_distribution(temperature: float, expected: str) -> None:
    assert effective_correction(_settings(rollout={"temperature": temperature})) == expected


@pytest.mark.parametrize("named", ["none", "truncated", "replay"])
def test_a_correction_that_is_named_is_used(named: str) -> None:
    assert effective_correction(_settings(correction=named, rollout={"temperature": 0.7})) == named


def test_a_sample_shows_question_answer_verdict_and_reward_parts() -> None:
    lease = make_lease(group=3, member=1, budget=16, prefill_ids=(40,))
    rollout = make_rollout(lease, finish=FinishReason.LENGTH, text="<think> 7")
    member = make_scored(rollout, status=VerdictStatus.WRONG, reward=0.5, parts={"correct": 0.0, "budget": 0.5}, extracted="7")
    assert sample_record(member, -0.25) == {
        "ticket": "000000.0003.001",
        "prompt": "question 3",
        "gold": "3",
        "answer": "<think> 7",
        "budget": "16",
        "budget_kind": "exact",
        "length": 3,
        "verdict": "wrong",
        "evidence": "",
        "extracted": "7",
        "reward": {"correct": 0.0, "budget": 0.5},
        "advantage": -0.25,
        "finish": "length",
    }


def test_a_sample_that_was_not_scored_has_no_reward() -> None:
    member = make_scored(status=VerdictStatus.CRASHED)
    assert sample_record(member, 0.0)["reward"] is None
