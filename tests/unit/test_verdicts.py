"""From a rollout to its verdict and reward: the rules that need no grader, and the whole worker with real children."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pytest
import reasoning_gym

from reward.actor import RewardActor, chosen_grader, grader_options
from reward.function_verdicts import decided
from reward.scoring import with_rewards
from reward.verdicts import answer_or_verdict
from rl.settings import DataSettings, RewardSettings
from rl.types import (
    Budget,
    BudgetKind,
    FinishReason,
    FunctionScore,
    Group,
    Lease,
    Prompt,
    Rollout,
    Shaping,
    Verdict,
    VerdictStatus,
)

ENTRY = reasoning_gym.create_dataset("chain_sum", size=1, seed=1)[0]
"""4 - 1 - 7 = -4"""


def rollout(text: str, *, finish: FinishReason = FinishReason.STOP, length: int = 20, gold: str = ENTRY["answer"]) -> Rollout:
    budget = Budget(32, BudgetKind.EXACT, "<think> {budget} tokens")
    prompt = Prompt("p", ENTRY["question"], gold, (1, 2), json.dumps(ENTRY))
    lease = Lease("0.0.0", prompt, 0, budget, Shaping(), (3,), 63, 0, 0)
    return Rollout(lease, tuple(range(length)), 1, (-0.5,) * (length - 1), finish, 0, text)


@pytest.fixture(scope="module")
def actor() -> Iterator[RewardActor]:
    settings = RewardSettings.model_validate({"grade_deadline_s": 30})
    actor = RewardActor(settings, DataSettings(source="reasoning_gym:chain_sum"), ("<eos>", "<think>", "</think>"))
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
    assert all(s.reward is None for s in scored)


def test_scored_rollouts_survive_the_trip_between_actors(actor: RewardActor) -> None:
    scored = actor.score([rollout("</think>-4")])
    assert pickle.loads(pickle.dumps(scored)) == scored  # noqa: S301 - our own bytes, as Ray does it
    assert actor.score([]) == []


def test_an_answer_that_would_hang_the_parser_is_malformed_before_it_is_parsed() -> None:
    actor = RewardActor(RewardSettings.model_validate({"grade_deadline_s": 2}), DataSettings(source="maths.jsonl"), ())
    try:
        tower, fine = actor.score([rollout("</think>$9^{9^{9^{9}}}$", gold="4"), rollout("</think>$\\frac{8}{2}$", gold="4")])
    finally:
        actor.close()
    assert tower.verdict.status is VerdictStatus.MALFORMED and tower.verdict.is_scored
    assert fine.verdict.status is VerdictStatus.CORRECT


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


# -- the run's own functions -----------------------------------------------------------------------------------------------

OWN = """
import time

def brevity(completions, **columns):
    return [-len(text) / 100 for text in completions]

def judge(data_source, solution_str, ground_truth, extra_info):
    return {"score": 0.5, "acc": solution_str.strip().endswith(ground_truth)}

def hangs_on_x(data_source, solution_str, ground_truth, extra_info):
    while "x" in solution_str:
        time.sleep(0.01)
    return 1.0
"""


@pytest.fixture(scope="module")
def functions_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rewards") / "own.py"
    path.write_text(OWN)
    return path


def test_functions_score_beside_the_grader_and_their_values_make_the_reward(functions_file: Path) -> None:
    functions = [{"path": f"{functions_file}:brevity", "weight": 2.0}]
    settings = RewardSettings.model_validate({"functions": functions})
    actor = RewardActor(settings, DataSettings(source="rows.jsonl", grader="exact"), ())
    try:
        scored = actor.score([rollout("</think>-4"), rollout("</think>5")])
    finally:
        actor.close()
    assert [s.verdict.status for s in scored] == [VerdictStatus.CORRECT, VerdictStatus.WRONG]
    groups = [Group(s.rollout.lease.prompt, (s,)) for s in scored]
    rewarded = with_rewards(groups, settings, max_length=64)
    # "</think>-4" has ten characters, "</think>5" nine.
    assert [g.members[0].reward.total for g in rewarded if g.members[0].reward] == pytest.approx([1 - 0.2, -0.18])


def test_the_first_function_decides_where_the_grader_is_function(functions_file: Path) -> None:
    settings = RewardSettings.model_validate({"functions": [{"path": f"{functions_file}:judge", "weight": 0.0}]})
    actor = RewardActor(settings, DataSettings(source="rows.jsonl", grader="function"), ())
    try:
        cut = rollout("-4", finish=FinishReason.LENGTH)
        statuses = [s.verdict.status for s in actor.score([rollout("it is -4"), rollout("it is 5"), cut])]
    finally:
        actor.close()
    assert statuses == [VerdictStatus.CORRECT, VerdictStatus.WRONG, VerdictStatus.TRUNCATED]


def test_an_answer_that_hangs_a_function_is_timed_out_and_the_others_are_scored(functions_file: Path) -> None:
    functions = [{"path": f"{functions_file}:hangs_on_x"}]
    settings = RewardSettings.model_validate({"functions": functions, "function_deadline_s": 2})
    actor = RewardActor(settings, DataSettings(source="rows.jsonl", grader="exact"), ())
    try:
        before, hung, after = actor.score([rollout("</think>-4"), rollout("</think>x"), rollout("</think>3")])
    finally:
        actor.close()
    assert hung.verdict.status is VerdictStatus.TIMED_OUT
    assert hung.verdict.evidence.startswith("reward function hangs_on_x: ")
    assert [s.verdict.status for s in (before, after)] == [VerdictStatus.CORRECT, VerdictStatus.WRONG]
    assert [s.functions[0].value for s in (before, after)] == [1.0, 1.0]


def said(
    status: Literal["ok", "none", "timed_out", "crashed"], value: float | None = None, *, correct: bool | None = None
) -> FunctionScore:
    return FunctionScore("f", status, value, correct=correct, evidence="why")


RIGHT = Verdict(VerdictStatus.CORRECT, "4")


@pytest.mark.parametrize(
    ("verdict", "score", "settings", "expected"),
    [
        (RIGHT, said("ok", 0.0), {}, RIGHT),
        (RIGHT, said("crashed"), {}, Verdict(VerdictStatus.CRASHED, "4", "reward function f: why")),
        (RIGHT, said("timed_out"), {"weight": 0.0}, RIGHT),
        (None, said("timed_out"), {"weight": 0.0}, Verdict(VerdictStatus.TIMED_OUT, None, "reward function f: why")),
        (None, said("ok", 1.0), {}, Verdict(VerdictStatus.CORRECT, None, "f gave 1")),
        (None, said("ok", 0.99), {}, Verdict(VerdictStatus.WRONG, None, "f gave 0.99")),
        (None, said("ok", -3.0, correct=True), {}, Verdict(VerdictStatus.CORRECT, None, "f gave -3")),
        (RIGHT, said("none"), {}, RIGHT),
    ],
)
def test_a_functions_score_bears_on_the_verdict_only_where_it_counts(
    verdict: Verdict | None, score: FunctionScore, settings: dict[str, float], expected: Verdict
) -> None:
    chosen = RewardSettings.model_validate({"functions": [{"path": "f.py:f", **settings}]})
    assert decided(verdict, (score,), chosen) == expected


def test_an_answer_that_no_function_applies_to_has_no_number_where_functions_are_all_there_is() -> None:
    chosen = RewardSettings.model_validate({"method": "none", "functions": [{"path": "f.py:f"}]})
    assert decided(RIGHT, (said("none"),), chosen).status is VerdictStatus.CRASHED
    undecided = decided(None, (said("none"),), RewardSettings.model_validate({"functions": [{"path": "f.py:f"}]}))
    assert undecided.status is VerdictStatus.CRASHED and "it decides" in undecided.evidence
