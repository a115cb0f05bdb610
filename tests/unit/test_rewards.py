"""From verdicts to rewards: methods with their columns, the run's own functions, the overlong penalty and policies."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from reward.methods import LENGTH_PARTS, METHODS
from reward.scoring import length_parts, with_rewards
from rl.reward_settings import OPTIONS, Method, RewardSettings
from rl.reward_state import Reference, RewardState
from rl.types import Budget, BudgetKind, FunctionScore, Group, Lease, Reward, Verdict, VerdictStatus
from tests.builders import make_lease, make_prompt, make_rollout, make_scored

CORRECT, WRONG, MALFORMED = VerdictStatus.CORRECT, VerdictStatus.WRONG, VerdictStatus.MALFORMED
TRUNCATED, TIMED_OUT, CRASHED = VerdictStatus.TRUNCATED, VerdictStatus.TIMED_OUT, VerdictStatus.CRASHED
Row = tuple[Budget | int | None, int, VerdictStatus]
GROUP: list[Row] = [
    (512, 300, CORRECT),
    (512, 700, CORRECT),
    (1024, 900, CORRECT),
    (1024, 1500, WRONG),
    (2048, 1800, CORRECT),
    (2048, 2600, CORRECT),
    (2560, 4096, MALFORMED),
    (2560, 2400, CORRECT),
]
LENGTHS = (400, 600, 800, 1000, 1200, 1400, 1600, 2000)
RIGHT = (True, False, True, True, False, True, True, True)
"""The group of the specification's worked values: six of eight right."""


def budget(tokens: Budget | int | None) -> Budget:
    if isinstance(tokens, Budget):
        return tokens
    return Budget(tokens or 0, BudgetKind.EXACT if tokens else BudgetKind.FREE, "<think>")


def group_of(rows: Sequence[Row], index: int = 0) -> Group:
    members = []
    for m, (asked, length, status) in enumerate(rows):
        lease = replace(make_lease(group=index, member=m), budget=budget(asked))
        members.append(replace(make_scored(make_rollout(lease, generated=range(length)), status=status), reward=None))
    return Group(make_prompt(index), tuple(members))


def rewards(
    rows: Sequence[Row], max_length: int = 4096, *, state: RewardState | None = None, step: int = 0, **settings: Any
) -> list[Reward | None]:
    chosen = RewardSettings.model_validate(settings)
    (group,) = with_rewards([group_of(rows)], chosen, max_length=max_length, state=state, step=step)
    return [member.reward for member in group.members]


def totals(rows: Sequence[Row], max_length: int = 4096, **settings: Any) -> list[float | None]:
    return [None if reward is None else reward.total for reward in rewards(rows, max_length, **settings)]


def worked(budgets: Sequence[Budget | int | None] | int | None = None) -> list[Row]:
    asked = budgets if isinstance(budgets, list) else [budgets] * 8
    return [(b, n, CORRECT if right else WRONG) for b, n, right in zip(asked, LENGTHS, RIGHT, strict=True)]  # type: ignore[misc]


# -- methods ----------------------------------------------------------------------------------------------------------------


def test_hbpo_gives_the_papers_values() -> None:
    expected = [3.923141, 3.810838, 3.695518, 0, 2.828427, 2.036238, 0, 2.222281]
    assert totals(GROUP, method="hbpo") == pytest.approx(expected, abs=1e-6)


def test_hbpo_in_the_published_codes_form_gives_its_values() -> None:
    expected = [3.921799, 3.810838, 3.695518, 0, 2.828427, 2.036238, -1, 2.222281]
    policies = {"malformed": "penalise"}
    assert totals(GROUP, method="hbpo", form="min", policies=policies, penalty=-1.0) == pytest.approx(expected, abs=1e-6)


def test_hbpo_pays_a_member_without_a_budget_by_the_cosine_alone() -> None:
    assert totals([(None, 2048, CORRECT), (None, 2048, WRONG)], method="hbpo") == pytest.approx([4 * math.cos(math.pi / 4), 0])


def test_correct_pays_one_for_a_correct_answer_and_nothing_else() -> None:
    rows: list[Row] = [(512, 9, CORRECT), (None, 9, WRONG), (512, 9, MALFORMED), (512, 4096, TRUNCATED)]
    assert totals(rows, method="correct") == [1, 0, 0, 0]


def test_the_overlong_penalty_is_added_to_any_method() -> None:
    rows: list[Row] = [(None, 6144, CORRECT), (None, 7168, CORRECT), (None, 8192, WRONG), (None, 10240, TRUNCATED)]
    assert totals(rows, 10240, method="dapo", overlong_buffer=4096) == [1, 0.75, -0.5, -1]
    assert totals(rows, 10240, method="dapo") == [1, 1, 0, 0]
    assert totals(rows, 10240, method="correct", overlong_buffer=4096) == [1, 0.75, -0.5, -1]


EFFORT = Budget(0, BudgetKind.EFFORT, " Effort {effort}.", place="suffix", effort=1.0)
SEEN = RewardState()
SEEN.memory.observe([group_of([(None, 1000, CORRECT), (None, 1700, CORRECT)])])
REFERENCE = RewardState(reference={"q0": Reference(1100.0, 0.7)}, averages={"q0": 1500.0})
TARGETS = RewardState(targets=(2000, 1500, 1024))


@pytest.mark.parametrize(
    ("method", "rows", "options", "expected"),
    [
        ("lcpo_exact", worked(1000), {}, [0.82, -0.12, 0.94, 1, -0.06, 0.88, 0.82, 0.7]),
        ("lcpo_max", worked(1000), {}, [0.68, 0, 0.56, 0.5, 0, 0.38, 0.32, 0.2]),
        ("laser", worked(), {"target": 1024}, [1.5, -0.5, 1.5, 1.5, -0.5, 1, 1, 1]),
        ("laser_d", worked(), {"state": TARGETS}, [1.5, -0.5, 1.5, 1.5, -0.5, 1, 1, 1]),
        ("laser_de", worked(), {"state": TARGETS}, [1.5, -0.5, 1.5, 1.5, 0, 1, 1, 1]),
        ("alp", worked(), {"max_length": 2000}, [0.97, -0.045, 0.94, 0.925, -0.09, 0.895, 0.88, 0.85]),
        ("efficient", worked(), {}, [0.981934, 0, 0.968047, 0.959338, 0, 0.940662, 0.931953, 0.918066]),
        ("kimi", worked(), {}, [1.5, 0, 1.25, 1.125, 0, 0.875, 0.75, 0.5]),
        ("kimi", worked(), {"warmup": 5, "step": 4}, [1.0, 0, 1, 1, 0, 1, 1, 1]),
        ("history_min", worked(), {"state": SEEN}, [1.809017, 0, 1.309017, 1, -0.309017, 0.412215, 0.3, 0.3]),
        ("shorterbetter", worked(), {}, [2, -0.2, 1.6, 1.4, -0.8, 1, 0.8, 0.4]),
        (
            "dast",
            worked(),
            {"max_length": 2000},
            [0.857143, -0.614286, 0.714286, 0.642857, -0.228571, 0.5, 0.428571, 0.285714],
        ),
        ("grpo_lead", worked(), {}, [1.071443, -1, 1.035105, 1.017401, -1, 0.982896, 0.966085, 0.933321]),
        (
            "o1_pruner",
            worked(),
            {"state": REFERENCE},
            [2.35, -0.566667, 0.975, 0.7, -1.483333, 0.385714, 0.2875, 0.15],
        ),
        ("budgetthinker", worked(1000), {}, [1, 0.15, 1, 1, 0.204, 0.85, 0.85, 0.85]),
        ("adaptthink", worked(), {"state": REFERENCE}, [0.3, -0.7, 0.3, 0.3, -0.7, 0.3, 0.3, 0.3]),
        ("adlp", worked(), {}, [0.6, -0.6, 0.2, 0.0, -1.2, -0.4, -0.6, -1.0]),
        # Mean length 1125: within it are 400, 800 and 1000, and under the running mean 1500 also 1400.
        ("aec", worked(EFFORT), {}, [1, 0, 1, 1, 0, 0, 0, 0]),
        ("aec", worked(EFFORT), {"average": "ema", "state": REFERENCE}, [1, 0, 1, 1, 0, 1, 0, 0]),
        ("aec", worked(EFFORT), {"average": "frozen", "state": REFERENCE}, [1, 0, 1, 1, 0, 0, 0, 0]),
        ("aec", worked(EFFORT), {"soft_delta": 0.25}, [1, 0, 1, 1, 0, 0.022222, 0, 0]),
        (
            "cosine",
            worked(),
            {"max_length": 4096},
            [4 * math.cos(math.pi * n / 8192) * r for n, r in zip(LENGTHS, RIGHT, strict=True)],
        ),
        ("classic", worked(), {}, [float(r) for r in RIGHT]),
        ("triangle", worked(1000), {}, [0.88, 0.12, 0.96, 1, 0.16, 0.92, 0.88, 0.8]),
    ],
)
def test_every_method_gives_the_worked_values_of_its_formula(
    method: str, rows: list[Row], options: dict[str, Any], expected: list[float]
) -> None:
    assert totals(rows, method=method, **options) == pytest.approx(expected, abs=1e-5)


def test_exits_are_ordered_by_where_they_leave_the_path_and_the_path_comes_last() -> None:
    def member(index: int, prefill: int, status: VerdictStatus) -> Any:
        lease = make_lease(member=index, prefill_ids=[7] * prefill)
        return replace(make_scored(make_rollout(lease), status=status), reward=None)

    # The path is member 4; the exits, in order: wrong, right, right, wrong, then the path: right.
    members = (member(0, 4, WRONG), member(1, 8, CORRECT), member(2, 11, CORRECT), member(3, 20, WRONG), member(4, 1, CORRECT))
    settings = RewardSettings(method="s_grpo")
    (group,) = with_rewards([Group(make_prompt(), members)], settings, max_length=64)
    assert [m.reward.total for m in group.members if m.reward] == [0, 1, 0.5, 0, 0.25]


def test_a_truncated_answer_counts_as_a_wrong_one_of_its_length_under_every_method() -> None:
    state = RewardState(reference={"q0": Reference(1100.0, 0.7)}, targets=(2000, 1500, 1024))
    for method in METHODS:
        asked = {"aec": EFFORT, "lcpo_exact": 512, "lcpo_max": 512, "triangle": 512, "budgetthinker": 512}.get(method)
        options: dict[str, Any] = {"target": 900} if method == "laser" else {}
        options |= {"functions": [{"path": "f.py:f"}]} if method == "none" else {}
        cut, wrong = (
            with_rewards(
                [with_function(group_of([(asked, 4096, status)]), "f" if method == "none" else "")],
                RewardSettings.model_validate({"method": method, **options}),
                max_length=4096,
                state=state,
            )[0]
            .members[0]
            .reward
            for status in (TRUNCATED, WRONG)
        )
        assert cut is not None and wrong is not None and cut.total == wrong.total


def test_what_could_not_be_scored_gets_no_number() -> None:
    result = totals([(512, 9, TIMED_OUT), (512, 9, CORRECT), (512, 9, CRASHED)], method="correct")
    assert result == [None, 1, None]
    assert totals([(512, 9, CRASHED)], method="hbpo") == [None]


def test_what_could_not_be_scored_is_in_no_statistic_of_its_group() -> None:
    seven = worked()[:3] + worked()[4:]
    eight = [*worked()[:3], (None, 9999, CRASHED), *worked()[4:]]
    assert [t for t in totals(eight, method="kimi") if t is not None] == pytest.approx(totals(seven, method="kimi"))


@given(
    st.sampled_from(["correct", "classic", "cosine", "hbpo", "dapo", "alp", "efficient", "kimi", "dast", "grpo_lead", "adlp"]),
    st.lists(st.tuples(st.sampled_from([None, 64, 128]), st.integers(1, 255), st.sampled_from(list(VerdictStatus))), max_size=12),
    st.sampled_from(["shape", "mask", "penalise"]),
)
def test_the_parts_sum_to_the_total_and_every_answer_has_the_same_parts(method: str, rows: list[Row], policy: str) -> None:
    settings = {"method": method, "policies": {"malformed": policy}, "penalty": -0.5, "overlong_buffer": 64}
    result = rewards(rows, 256, **settings)
    unscored = [status in (TIMED_OUT, CRASHED) or (policy == "mask" and status is MALFORMED) for _, _, status in rows]
    assert [reward is None for reward in result] == unscored
    scored = [reward for reward in result if reward is not None]
    assert all(reward.total == math.fsum(reward.parts.values()) for reward in scored)
    assert len({tuple(sorted(reward.parts)) for reward in scored}) <= 1


def test_each_method_is_there_and_reads_the_constants_that_the_settings_list_for_it() -> None:
    assert set(METHODS) == set(OPTIONS) == set(get_args(Method))


def test_the_part_that_depends_on_the_length_has_its_own_name() -> None:
    for method in ("lcpo_exact", "alp", "kimi", "shorterbetter", "hbpo", "adlp"):
        (reward, *_) = rewards(worked(1000), method=method)
        assert reward is not None and LENGTH_PARTS & set(reward.parts)


# -- policies ---------------------------------------------------------------------------------------------------------------


def test_policies_shape_mask_or_penalise_each_verdict_by_name() -> None:
    rows: list[Row] = [(None, 9, CORRECT), (None, 9, WRONG), (None, 9, MALFORMED), (None, 64, TRUNCATED)]
    policies = {"wrong": "shape", "malformed": "penalise", "truncated": "mask"}
    found = rewards(rows, 64, policies=policies, penalty=-2.0)
    assert [None if r is None else r.total for r in found] == [1, 0, -2, None]
    assert found[2] is not None and found[2].parts == {"correct": 0.0, "penalty": -2.0}
    assert found[0] is not None and found[0].parts == {"correct": 1.0, "penalty": 0.0}


# -- the run's own functions ------------------------------------------------------------------------------------------------


def with_function(group: Group, *names: str, value: float | None = 1.0, per_token: Any = None) -> Group:
    scores = tuple(FunctionScore(name, "ok", value=value, per_token=per_token) for name in names if name)
    return replace(group, members=tuple(replace(m, functions=scores) for m in group.members))


def test_functions_are_added_with_their_weights_beside_the_weighted_method() -> None:
    settings = RewardSettings.model_validate(
        {"method_weight": 0.5, "functions": [{"path": "a.py:style", "weight": 2.0}, {"path": "a.py:brevity", "weight": -1.0}]}
    )
    group = group_of([(None, 9, CORRECT)])
    scores = (FunctionScore("style", "ok", value=0.25), FunctionScore("brevity", "none"))
    group = replace(group, members=tuple(replace(m, functions=scores) for m in group.members))
    (rewarded,) = with_rewards([group], settings, max_length=64)
    reward = rewarded.members[0].reward
    assert reward is not None and dict(reward.parts) == {"correct": 0.5, "function/style": 0.5}
    assert reward.total == 1.0 and reward.per_token is None


def test_rewards_of_single_tokens_stand_beside_the_total() -> None:
    settings = RewardSettings.model_validate({"functions": [{"path": "a.py:steps", "weight": 2.0}]})
    group = with_function(group_of([(None, 2, CORRECT)]), "steps", value=1.5, per_token=(None, 1.5))
    (rewarded,) = with_rewards([group], settings, max_length=64)
    reward = rewarded.members[0].reward
    assert reward is not None and reward.total == 1.0 and reward.per_token == (None, 3.0)


# -- settings ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "kimi", "alpha": 0.1}, "reward.alpha has no effect with reward.method=kimi: it reads warmup, weight"),
        ({"method": "correct", "form": "min"}, "reward.form has no effect with reward.method=correct: it reads no constants"),
        ({"method": "laser"}, "needs reward.target"),
        ({"method": "none"}, "leaves no reward at all"),
        ({"monitor": {"first": 90, "last": 80}}, "first=90 is above last=80"),
    ],
)
def test_settings_that_would_do_nothing_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        RewardSettings.model_validate(settings)


def test_an_option_is_the_methods_own_until_it_is_set() -> None:
    assert RewardSettings(method="lcpo_max").option("alpha") == 3e-4
    assert RewardSettings(method="lcpo_max", alpha=0.0).option("alpha") == 0.0
    assert RewardSettings(method="hbpo").option("alpha") is None


def test_an_effort_method_names_a_member_that_was_asked_for_none() -> None:
    with pytest.raises(ValueError, match="rollout 000000.0000.000 was asked for no effort"):
        totals(worked(512), method="aec")


def test_a_lease_of_another_prompt_finds_its_own_memory() -> None:
    lease: Lease = make_lease(group=3)
    member = replace(make_scored(make_rollout(lease, generated=[7] * 500)), reward=None, verdict=Verdict(CORRECT))
    (group,) = with_rewards([Group(make_prompt(3), (member,))], RewardSettings(method="history_min"), max_length=64, state=SEEN)
    assert [m.reward.total for m in group.members if m.reward] == [1.0]


def test_a_function_of_a_parts_name_takes_the_place_of_no_part() -> None:
    settings = RewardSettings.model_validate({"functions": [{"path": "r.py:correct", "weight": 0.1}]})
    group = with_function(group_of([(None, 9, CORRECT)]), "correct", value=0.0)
    (rewarded,) = with_rewards([group], settings, max_length=64)
    assert [m.reward.total for m in rewarded.members if m.reward] == [1.0]


def test_a_member_left_out_by_its_policy_is_in_no_statistic_of_its_group() -> None:
    rows: list[Row] = [(None, 10, CORRECT), (None, 20, CORRECT), (None, 60, TRUNCATED)]
    masked = {"truncated": "mask"}
    assert totals(rows, method="kimi", policies=masked) == [1.5, 0.5, None]
    assert totals(rows[:2], method="kimi") == [1.5, 0.5]


def test_only_what_depends_on_the_length_is_called_so() -> None:
    wrong: list[Row] = [(1000, 600, WRONG), (1000, 600, MALFORMED)]
    form = rewards(wrong, method="budgetthinker")
    assert [r.parts["form"] for r in form if r] == pytest.approx([0.15, 0.0])
    assert [r.parts["length"] for r in form if r] == [0.0, 0.0]
    explored = rewards([(None, 60, WRONG), (None, 10, WRONG)], method="laser_de", state=RewardState(targets=(32, 32, 32)))
    assert [r.parts["explore"] for r in explored if r] == [0.5, 0.0]
    assert length_parts(RewardSettings.model_validate({"functions": [{"path": "a.py:b", "length": True}]})) >= {"function/b"}


def test_siblings_asked_for_different_efforts_share_an_average_and_nothing_else() -> None:
    half = replace(EFFORT, effort=0.5)
    rows: list[Row] = [(EFFORT, 40, CORRECT), (EFFORT, 80, CORRECT), (half, 10, CORRECT), (half, 30, CORRECT)]
    # The prompt's mean is 40: effort 1 allows 40, effort 0.5 allows 20.
    assert totals(rows, method="aec") == [1, 0, 1, 0]
    assert totals(rows, method="kimi") == [1.5, 0.5, 1.5, 0.5]
