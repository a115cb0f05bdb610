"""From a rollout to its verdict and reward: the rules that need no grader, and the whole worker with real children."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from collections.abc import Iterator

import pytest
import reasoning_gym

from reward.actor import RewardActor, chosen_grader, grader_options
from reward.verdicts import answer_or_verdict
from rl.settings import DataSettings, RewardSettings
from rl.types import Budget, BudgetKind, FinishReason, Lease, Prompt, Rollout, Shaping, Verdict, VerdictStatus

ENTRY = reasoning_gym.create_dataset("chain_sum", size=1, seed=1)[0]
"""4 - 1 - 7 = -4"""


def rollout(text: str, *, finish: FinishReason = FinishReason.STOP, length: int = 20, gold: str = ENTRY["answer"]) -> Rollout:
    budget = Budget(32, BudgetKind.EXACT, "<think> {budget} tokens")
    prompt = Prompt("p", ENTRY["question"], gold, (1, 2), json.dumps(ENTRY))
    lease = Lease("0.0.0", prompt, 0, budget, Shaping(), (3,), 63, 0, 0)
    return Rollout(lease, tuple(range(length)), 1, (-0.5,) * (length - 1), finish, 0, text)


@pytest.fixture(scope="module")
def actor() -> Iterator[RewardActor]:
    settings = RewardSettings.model_validate({"method": "hbpo", "bad_format": -1.0, "grade_deadline_s": 30})
    actor = RewardActor(settings, DataSettings(source="reasoning_gym:chain_sum"), 64, ("<eos>", "<think>", "</think>"))
    assert len(actor.ready()) == 1
    yield actor
    actor.close()


def test_an_answer_cut_by_the_cap_is_truncated_even_if_it_looks_right() -> None:
    verdict = answer_or_verdict(rollout("a</think>-4", finish=FinishReason.LENGTH, length=64), extract="after_think")
    assert verdict == Verdict(VerdictStatus.TRUNCATED, None, "cut at 64 tokens")


def test_an_answer_that_cannot_be_found_is_malformed_and_another_goes_to_the_grader() -> None:
    verdict = answer_or_verdict(rollout("-4"), extract="after_think")
    assert isinstance(verdict, Verdict) and verdict.status is VerdictStatus.MALFORMED
    assert answer_or_verdict(rollout("-4"), extract="last_line") == "-4"


def test_the_worker_scores_every_kind_of_answer_in_order(actor: RewardActor) -> None:
    rollouts = [
        rollout("<think> 4-1=3 3-7=-4 </think> -4 <eos>"),
        rollout("<think> wait </think> -44 <eos>"),
        rollout("<think> -4 <eos>"),
        rollout("<think> 4-1", finish=FinishReason.LENGTH, length=64),
        rollout("</think>-4", length=48),
    ]
    scored = actor.score(rollouts)
    status = VerdictStatus
    expected = [status.CORRECT, status.WRONG, status.MALFORMED, status.TRUNCATED, status.CORRECT]
    assert [s.verdict.status for s in scored] == expected
    assert [s.rollout for s in scored] == rollouts
    assert scored[1].verdict == Verdict(status.WRONG, "-44", "scored 0.6667")
    # L=64, b=32: C = 4 cos(pi/4) = 2.828427; n=48: 4 cos(3 pi/8) - 16/64 = 1.280734.
    assert [s.reward.total for s in scored if s.reward] == pytest.approx([2.828427, 0, -1, 0, 1.280734], abs=1e-6)


def test_scored_rollouts_survive_the_trip_between_actors(actor: RewardActor) -> None:
    scored = actor.score([rollout("</think>-4")])
    assert pickle.loads(pickle.dumps(scored)) == scored  # noqa: S301 - our own bytes, as Ray does it
    assert actor.score([]) == []


def test_an_answer_that_hangs_the_parser_is_timed_out_and_carries_no_number() -> None:
    actor = RewardActor(RewardSettings.model_validate({"grade_deadline_s": 2}), DataSettings(source="maths.jsonl"), 64, ())
    try:
        hung, fine = actor.score([rollout("</think>$9^{9^{9^{9}}}$", gold="4"), rollout("</think>$\\frac{8}{2}$", gold="4")])
    finally:
        actor.close()
    assert hung.verdict.status is VerdictStatus.TIMED_OUT and hung.reward is None
    assert fine.verdict.status is VerdictStatus.CORRECT and fine.reward is not None


def test_auto_takes_the_tasks_own_scorer_for_reasoning_gym_and_math_for_the_rest() -> None:
    own = DataSettings(source="reasoning_gym:chain_sum", task={"max_terms": 3})
    assert chosen_grader(own) == "reasoning_gym"
    assert json.loads(grader_options(own)) == {"task": "chain_sum", "params": {"max_terms": 3}}
    assert chosen_grader(DataSettings(source="openai/gsm8k")) == "math"
    assert chosen_grader(DataSettings(source="rows.jsonl", grader="exact")) == "exact"
    assert grader_options(DataSettings(source="rows.jsonl")) == "{}"


def test_the_grader_child_loads_no_heavy_library_before_it_is_asked_to() -> None:
    heavy = ("torch", "pydantic", "reasoning_gym", "math_verify", "ray")
    code = f"import reward.child, sys; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"
