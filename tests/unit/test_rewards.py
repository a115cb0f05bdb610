"""Rewards from verdicts: the worked group of the paper's form, the published code's form, the baselines, and their parts."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reward.scoring import REWARDS, rewards
from rl.settings import RewardSettings
from rl.types import Budget, BudgetKind, Verdict, VerdictStatus

CORRECT, WRONG, MALFORMED = VerdictStatus.CORRECT, VerdictStatus.WRONG, VerdictStatus.MALFORMED
TRUNCATED, TIMED_OUT, CRASHED = VerdictStatus.TRUNCATED, VerdictStatus.TIMED_OUT, VerdictStatus.CRASHED
Row = tuple[int | None, int, VerdictStatus]
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


def budget(tokens: int | None) -> Budget:
    return Budget(tokens or 0, BudgetKind.EXACT if tokens else BudgetKind.FREE, "<think>")


def totals(rows: list[Row], max_length: int = 4096, **settings: object) -> list[float | None]:
    result = rewards(
        [Verdict(status) for _, _, status in rows],
        [budget(tokens) for tokens, _, _ in rows],
        [length for _, length, _ in rows],
        settings=RewardSettings.model_validate(settings),
        max_length=max_length,
    )
    return [None if reward is None else reward.total for reward in result]


def test_hbpo_gives_the_papers_values() -> None:
    expected = [3.923141, 3.810838, 3.695518, 0, 2.828427, 2.036238, 0, 2.222281]
    assert totals(GROUP, method="hbpo") == pytest.approx(expected, abs=1e-6)


def test_hbpo_in_the_published_codes_form_gives_its_values() -> None:
    expected = [3.921799, 3.810838, 3.695518, 0, 2.828427, 2.036238, -1, 2.222281]
    assert totals(GROUP, method="hbpo", form="min", bad_format=-1.0) == pytest.approx(expected, abs=1e-6)


def test_hbpo_pays_a_member_without_a_budget_by_the_cosine_alone() -> None:
    assert totals([(None, 2048, CORRECT), (None, 2048, WRONG)], method="hbpo") == pytest.approx([4 * math.cos(math.pi / 4), 0])


def test_correct_pays_one_for_a_correct_answer_and_nothing_else() -> None:
    rows: list[Row] = [(512, 9, CORRECT), (None, 9, WRONG), (512, 9, MALFORMED), (512, 4096, TRUNCATED)]
    assert totals(rows, method="correct") == [1, 0, 0, 0]


def test_dapo_adds_the_overlong_penalty() -> None:
    rows: list[Row] = [(None, 6144, CORRECT), (None, 7168, CORRECT), (None, 8192, WRONG), (None, 10240, TRUNCATED)]
    assert totals(rows, 10240, method="dapo", overlong_buffer=4096) == [1, 0.75, -0.5, -1]
    assert totals(rows, 10240, method="dapo") == [1, 1, 0, 0]


def test_a_truncated_answer_counts_as_wrong_under_every_method() -> None:
    for method in REWARDS:
        assert totals([(512, 4096, TRUNCATED)], method=method, bad_format=-1.0) == [0]


def test_what_could_not_be_scored_gets_no_number() -> None:
    result = totals([(512, 9, TIMED_OUT), (512, 9, CORRECT), (512, 9, CRASHED)], method="correct")
    assert result == [None, 1, None]
    assert totals([(512, 9, CRASHED)], method="hbpo") == [None]


@given(
    st.sampled_from(sorted(REWARDS)),
    st.lists(st.tuples(st.sampled_from([None, 64, 128]), st.integers(1, 256), st.sampled_from(list(VerdictStatus))), max_size=12),
)
def test_the_parts_sum_to_the_total_and_every_answer_has_the_same_parts(method: str, rows: list[Row]) -> None:
    settings = RewardSettings.model_validate({"method": method, "bad_format": -0.5, "overlong_buffer": 64})
    verdicts = [Verdict(status) for _, _, status in rows]
    result = rewards(verdicts, [budget(b) for b, _, _ in rows], [n for _, n, _ in rows], settings=settings, max_length=256)
    assert [reward is None for reward in result] == [not verdict.is_scored for verdict in verdicts]
    scored = [reward for reward in result if reward is not None]
    assert all(reward.total == math.fsum(reward.parts.values()) for reward in scored)
    assert len({tuple(sorted(reward.parts)) for reward in scored}) <= 1


def test_sequences_of_different_length_are_refused() -> None:
    with pytest.raises(ValueError, match="2 budgets"):
        rewards([Verdict(CORRECT)], [budget(1), budget(2)], [3], settings=RewardSettings.model_validate({}), max_length=8)
