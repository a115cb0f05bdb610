"""Advantages against hand-worked values, and how missing members, free members, scaling and centring act."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import get_args

import pytest
import torch

import kernels
from reward.budget import budget_ceiling, hbpo
from rl.advantage import (
    ADVANTAGES,
    batch_normalised,
    compute,
    decoupled,
    group_centred,
    group_normalised,
    guarded,
    hierarchical,
    leave_one_out,
    loss_tokens,
    token_level_group_average,
)
from rl.batch import pack_rollouts
from rl.settings import AdvantageSettings
from tests.batches import scored_batch
from tests.builders import make_lease, make_rollout

NAN = math.nan
BUDGET = torch.tensor([512.0, 512.0, 1024.0, 1024.0, 2048.0, 2048.0, 2560.0, 2560.0])
LENGTH = torch.tensor([300, 700, 900, 1500, 1800, 2600, 4096, 2400])
CORRECT = torch.tensor([True, True, True, False, True, True, False, True])
CEILING = budget_ceiling(BUDGET, max_length=4096)
ONE_GROUP = torch.zeros(8, dtype=torch.int64)
PAPER = torch.tensor([0.952658, 0.882228, -0.981701, -3.299311, -0.073825, -0.570639, -2.562693, -1.169010])


def _close(value: torch.Tensor, expected: torch.Tensor | list[float]) -> None:
    torch.testing.assert_close(value, torch.as_tensor(expected, dtype=torch.float32), atol=1e-5, rtol=0)


def _worked_reward() -> torch.Tensor:
    return hbpo(CORRECT, LENGTH, BUDGET, max_length=4096)


def _code_reward() -> torch.Tensor:
    reward = hbpo(CORRECT, LENGTH, BUDGET, max_length=4096, form="min")
    reward[6] = -1.0  # malformed
    return reward


def test_the_worked_group_has_the_papers_rewards_and_advantages() -> None:
    reward = _worked_reward()
    _close(reward, [3.923141, 3.810838, 3.695518, 0.0, 2.828427, 2.036238, 0.0, 2.222281])
    _close(hierarchical(reward, ONE_GROUP, BUDGET, CEILING), PAPER)


def test_the_published_codes_variant_is_reached_by_options() -> None:
    reward = _code_reward()
    _close(reward, [3.921799, 3.810838, 3.695518, 0.0, 2.828427, 2.036238, -1.0, 2.222281])
    twice = [0.835968, 0.775146, -2.869939, -4.895621, -0.441903, -0.876138, -4.970530, -3.204251]
    once = [0.892791, 0.831968, -1.022180, -3.047862, -0.045808, -0.480043, -3.359389, -1.593110]
    _close(hierarchical(reward, ONE_GROUP, BUDGET, CEILING, intra_coef=2.0), twice)
    _close(hierarchical(reward, ONE_GROUP, BUDGET, CEILING), once)


def test_an_all_wrong_group_is_pushed_down_by_its_ceilings() -> None:
    _close(hierarchical(torch.zeros(8), ONE_GROUP, BUDGET, CEILING), -CEILING)


def test_an_all_correct_group_within_budget_is_ranked_by_its_ceilings() -> None:
    advantage = hierarchical(CEILING, ONE_GROUP, BUDGET, CEILING)
    _close(advantage, [1.037273] * 2 + [0.724879] * 2 + [-0.465133] * 2 + [-1.297019] * 2)


def test_a_group_of_one_and_a_flat_group_have_no_group_term() -> None:
    reward, group = torch.tensor([3.0, 0.1, 0.1, 0.1]), torch.tensor([7, -2, -2, -2])
    assert group_normalised(reward, group).tolist() == [0.0] * 4
    budget, ceiling = torch.full((4,), 64.0), torch.full((4,), 3.5)
    _close(hierarchical(reward, group, budget, ceiling), [-0.5, -3.4, -3.4, -3.4])


def test_group_normalised_uses_the_sample_standard_deviation() -> None:
    advantage = group_normalised(torch.tensor([1.0, 0.0, 0.0, 0.0]), torch.zeros(4, dtype=torch.int64))
    _close(advantage, [1.499997, -0.499999, -0.499999, -0.499999])
    assert advantage.dtype == torch.float32


def test_a_missing_member_gets_zero_and_leaves_the_others_as_if_it_had_never_been() -> None:
    reward = torch.cat([_worked_reward(), torch.tensor([NAN, NAN])])
    group = torch.zeros(10, dtype=torch.int64)
    budget, ceiling = torch.cat([BUDGET, BUDGET[:2]]), torch.cat([CEILING, CEILING[:2]])
    _close(hierarchical(reward, group, budget, ceiling), torch.cat([PAPER, torch.zeros(2)]))
    assert group_normalised(torch.full((3,), NAN), torch.zeros(3, dtype=torch.int64)).tolist() == [0.0] * 3


def test_a_free_member_shares_the_group_term_and_has_no_subgroup_term() -> None:
    reward, group = torch.tensor([3.0, 1.0, 2.0, 0.0]), torch.zeros(4, dtype=torch.int64)
    budget = torch.tensor([64.0, 64.0, math.inf, math.inf])
    ceiling = torch.tensor([3.5, 3.5, NAN, NAN])
    inter = group_normalised(reward, group)
    _close(hierarchical(reward, group, budget, ceiling), inter + torch.tensor([-1.5, -1.5, 0.0, 0.0]))


def test_the_same_budget_in_two_groups_makes_two_subgroups() -> None:
    reward, group = torch.tensor([1.0, 3.0, 2.0, 4.0]), torch.tensor([5, 9, 5, 9])
    budget, ceiling = torch.full((4,), 64.0), torch.full((4,), 4.0)
    root = math.sqrt(0.5)
    _close(hierarchical(reward, group, budget, ceiling), [-root - 2.5, -root - 0.5, root - 2.5, root - 0.5])


@pytest.mark.parametrize(
    ("reward", "length", "expected"),
    [
        ([1, -1, 1, -1], [3, 5, 2, 4], [1.341639, -0.745355, 1.341639, -0.745355]),
        ([1, -1, -1, -1], [2, 2, 6, 4], [2.449486, -0.408248, -0.408248, -0.408248]),
        ([1, -1, -1, -1], [1, 10, 10, 9], [1.499999, -0.5, -0.5, -0.5]),
    ],
)
def test_the_token_level_average_has_its_worked_values(reward: list[float], length: list[int], expected: list[float]) -> None:
    group = torch.zeros(4, dtype=torch.int64)
    _close(token_level_group_average(torch.tensor(reward, dtype=torch.float32), torch.tensor(length), group), expected)


def test_the_guard_can_be_switched_off_and_acts_on_its_own_group_only() -> None:
    reward = torch.tensor([1.0, -1.0, -1.0, -1.0, 1.0, -1.0, 1.0, -1.0])
    length, group = torch.tensor([1, 10, 10, 9, 3, 5, 2, 4]), torch.tensor([1, 1, 1, 1, 0, 0, 0, 0])
    guarded = token_level_group_average(reward, length, group)
    _close(guarded, [1.499999, -0.5, -0.5, -0.5, 1.341639, -0.745355, 1.341639, -0.745355])
    free = token_level_group_average(reward, length, group, guard=None)
    _close(free, [5.385150, -0.185695, -0.185695, -0.185695, 1.341639, -0.745355, 1.341639, -0.745355])


def test_the_token_level_average_takes_its_guard_from_the_settings_and_no_length_guard() -> None:
    reward, length = torch.tensor([1.0, -1.0, -1.0, -1.0]), torch.tensor([1.0, 10, 10, 9])
    group = torch.zeros(4, dtype=torch.int64)
    batch = scored_batch(reward, group, length_N=length, length_reward_N=reward)
    settings = AdvantageSettings(estimator="token_level_average")
    _close(compute(batch, settings), [1.499999, -0.5, -0.5, -0.5])
    _close(compute(batch, settings.model_copy(update={"guard": None})), [5.385150, -0.185695, -0.185695, -0.185695])
    _close(compute(batch, settings.model_copy(update={"guard": 6.0})), [5.385150, -0.185695, -0.185695, -0.185695])
    assert torch.equal(compute(batch, settings), compute(batch, settings.model_copy(update={"length_guard": False})))


def test_the_token_level_average_weighs_tokens_with_loss_and_not_those_put_there() -> None:
    reward, length = torch.tensor([1.0, -1.0, 1.0, -1.0]), torch.tensor([13.0, 15, 12, 14])
    group = torch.zeros(4, dtype=torch.int64)
    batch = scored_batch(reward, group, length_N=length)
    settings = AdvantageSettings(estimator="token_level_average")
    own = replace(batch, loss_tokens_N=length - 10)
    _close(compute(own, settings), [1.341639, -0.745355, 1.341639, -0.745355])  # |o| = 3, 5, 2, 4
    assert not torch.allclose(compute(batch, settings), compute(own, settings))


@pytest.mark.parametrize("train_prefix", [True, False])
def test_the_tokens_with_loss_are_those_that_the_batch_marks(train_prefix: bool) -> None:
    plain = make_rollout(make_lease(prefill_ids=(7, 7, 7)), generated=(8, 9, 5, 6))
    forced = replace(make_rollout(make_lease(member=1), generated=(8, 9, 5)), forced=(1,))
    none = torch.zeros(2)
    batch = pack_rollouts([plain, forced], none, none.long(), train_prefix=train_prefix)
    marked = [int(part.sum()) for part in batch.loss_mask_T.split(batch.start_N.diff().tolist())]
    assert [loss_tokens(r, train_prefix=train_prefix) for r in (plain, forced)] == marked == [7 if train_prefix else 4, 2]


def test_the_estimators_are_reached_by_the_name_in_the_settings() -> None:
    reward = _worked_reward()
    assert set(ADVANTAGES) == set(get_args(AdvantageSettings.model_fields["estimator"].annotation))
    _close(compute(scored_batch(reward, ONE_GROUP, BUDGET, CEILING), AdvantageSettings(estimator="hierarchical")), PAPER)
    grpo = compute(scored_batch(reward, ONE_GROUP, BUDGET, CEILING), AdvantageSettings())
    _close(grpo, group_normalised(reward, ONE_GROUP))
    assert not torch.allclose(grpo, PAPER)


def test_centring_subtracts_the_mean_of_the_valid_members_of_the_group_or_of_thescored_batch() -> None:
    reward = torch.tensor([3.0, 1.0, NAN, 0.0, 0.0, 2.0])
    group = torch.tensor([4, 4, 4, 8, 8, 8])
    budget, ceiling = torch.full((6,), 64.0), torch.full((6,), 3.5)
    plain = hierarchical(reward, group, budget, ceiling)
    settings = AdvantageSettings(estimator="hierarchical", centre="batch")
    valid = ~torch.isnan(reward)
    expected = torch.where(valid, plain - plain[valid].mean(), 0.0)
    _close(compute(scored_batch(reward, group, budget, ceiling), settings), expected)
    by_group = compute(scored_batch(reward, group, budget, ceiling), settings.model_copy(update={"centre": "group"}))
    assert by_group[2] == 0.0
    _close(torch.stack([by_group[:2].sum(), by_group[3:].sum()]), [0.0, 0.0])
    _close(by_group[:2], plain[:2] - plain[:2].mean())


def test_spread_divides_the_subgroup_term_by_the_groups_spread() -> None:
    settings = AdvantageSettings(estimator="hierarchical", intra_scale="spread")
    reward = _worked_reward()
    std = float(reward.double().std())
    assert std == pytest.approx(1.594537, abs=1e-5)
    intra = torch.tensor([-0.056152, -1.847759, -0.396095, -1.111140]).repeat_interleave(2)
    inter = group_normalised(reward, ONE_GROUP)
    _close(compute(scored_batch(reward, ONE_GROUP, BUDGET, CEILING), settings), inter + intra / std)


def test_spread_leaves_flat_groups_alone_and_bounds_nearly_flat_ones() -> None:
    settings = AdvantageSettings(estimator="hierarchical", intra_scale="spread")
    assert compute(scored_batch(torch.zeros(8), ONE_GROUP, BUDGET, CEILING), settings).tolist() == [0.0] * 8
    reward = torch.zeros(8)
    reward[0] = 1e-4
    inter = group_normalised(reward, ONE_GROUP)
    bound = 7 / math.sqrt(8)
    _close(compute(scored_batch(reward, ONE_GROUP, BUDGET, CEILING), settings), inter - bound)


def test_bad_arguments_are_named() -> None:
    two, ids = torch.ones(2), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match="group_N has shape"):
        group_normalised(two, ids[:1])
    with pytest.raises(TypeError, match="group_N must hold integer ids"):
        group_normalised(two, two)
    with pytest.raises(ValueError, match="infinite reward"):
        group_normalised(torch.tensor([math.inf, 0.0]), ids)
    with pytest.raises(ValueError, match="budget_N holds NaN"):
        hierarchical(two, ids, torch.tensor([NAN, 1.0]), two)
    with pytest.raises(ValueError, match="ceiling_N has shape"):
        hierarchical(two, ids, two, torch.ones(3))
    with pytest.raises(ValueError, match="length_N holds a negative"):
        token_level_group_average(two, -two, ids)
    with pytest.raises(ValueError, match="intra_scale must be"):
        kernels.hierarchical_advantage(two, ids, two, two, intra_scale="range")


def test_an_empty_batch_gives_an_empty_result() -> None:
    none, ids = torch.ones(0), torch.zeros(0, dtype=torch.int64)
    settings = AdvantageSettings(estimator="hierarchical", centre="batch")
    assert compute(scored_batch(none, ids, none, none), settings).shape == (0,)
    assert token_level_group_average(none, none, ids).shape == (0,)


# -- the two guards: what a reward for length does without them, and with them ---------------------------------------------

TWO = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
LENGTHS = torch.tensor([400.0, 600, 800, 1000, 1200, 1400, 1600, 2000])


def test_without_the_guard_a_wrong_but_shorter_answer_is_trained_as_hard_as_a_right_one() -> None:
    penalty = -1e-4 / 8 * LENGTHS  # ALP where nothing is right: beta max(p, 1/K) n with beta 1e-4 and K = 8
    wrong = torch.zeros(8, dtype=torch.bool)
    plain = group_normalised(penalty, ONE_GROUP)
    assert float(plain.max()) > 1.3 and float(plain.min()) < -1.5
    assert guarded(penalty, penalty, wrong, ONE_GROUP).tolist() == [0.0] * 8
    settings = AdvantageSettings()
    batch = scored_batch(penalty, ONE_GROUP, length_reward_N=penalty, correct_N=wrong)
    assert compute(batch, settings).tolist() == [0.0] * 8
    _close(compute(batch, settings.model_copy(update={"length_guard": False})), plain)


def test_where_all_are_right_the_guard_leaves_a_length_reward_at_its_natural_size() -> None:
    penalty = -1e-4 * LENGTHS
    reward = 1.0 + penalty
    right = torch.ones(8, dtype=torch.bool)
    assert float(group_normalised(reward, ONE_GROUP).max()) > 1.3
    _close(guarded(reward, penalty, right, ONE_GROUP), penalty - penalty.mean())


def test_where_some_are_right_the_guard_changes_nothing() -> None:
    penalty = -1e-4 * LENGTHS
    right = torch.tensor([True, False] * 4)
    reward = right + penalty
    _close(guarded(reward, penalty, right, TWO), group_normalised(reward, TWO))


def test_the_guard_lets_other_parts_speak_where_all_are_wrong() -> None:
    form = torch.tensor([0.0, -1.0, 0.0, 0.0])
    penalty = torch.tensor([-0.3, 0.0, 0.0, 0.0])
    wrong, group = torch.zeros(4, dtype=torch.bool), torch.zeros(4, dtype=torch.int64)
    _close(guarded(form + penalty, penalty, wrong, group), group_normalised(form, group))


def test_the_guard_leaves_members_without_a_reward_out_of_everything() -> None:
    reward = torch.tensor([0.9, 0.7, NAN, NAN])
    penalty = torch.tensor([-0.1, -0.3, NAN, -5.0])
    right, group = torch.tensor([True, True, False, False]), torch.zeros(4, dtype=torch.int64)
    _close(guarded(reward, penalty, right, group), [0.1, -0.1, 0.0, 0.0])


def test_a_linear_penalty_punishes_a_long_correct_answer_and_the_decoupled_advantage_does_not() -> None:
    # The worked group of 500, 1000, 6000 right and 700, 900, 3000 wrong tokens.
    length = torch.tensor([500.0, 1000, 6000, 700, 900, 3000])
    right = torch.tensor([True, True, True, False, False, False])
    group = torch.zeros(6, dtype=torch.int64)
    advantage = decoupled(right, length, group, scale=8192, tau=0.5)
    _close(advantage, [1.276025, 1.129392, 0.333196, -0.912869, -0.912869, -0.912869])
    assert float((advantage[:3] / group_normalised(right.double(), group)[:3]).mean()) == pytest.approx(1.0)


def test_the_decoupled_advantage_keeps_its_sign_for_answers_of_any_length_and_takes_its_scale_from_the_cap() -> None:
    length = torch.tensor([10.0, 10_000_000, 20, 30])
    right, group = torch.tensor([True, True, False, False]), torch.zeros(4, dtype=torch.int64)
    advantage = decoupled(right, length, group, scale=100, tau=0.1)
    assert (advantage[:2] >= 0).all() and bool(torch.isfinite(advantage).all())
    batch = scored_batch(right.double(), group, correct_N=right, length_N=length, max_length=100)
    _close(compute(batch, AdvantageSettings(estimator="decoupled", tau=0.1)), advantage)
    only_right = decoupled(torch.ones(4, dtype=torch.bool), length, group)
    assert only_right.tolist() == [0.0] * 4
    with pytest.raises(ValueError, match=r"tau=0\.0 must be above 0"):
        decoupled(right, length, group, tau=0.0)


# -- the plainer estimators -------------------------------------------------------------------------------------------------


def test_centred_leave_one_out_and_batch_normalised_advantages_by_hand() -> None:
    reward = torch.tensor([1.0, 0.0, 0.0, NAN, 1.0, 1.0, 1.0, 0.0])
    _close(group_centred(reward, TWO), [2 / 3, -1 / 3, -1 / 3, 0.0, 0.25, 0.25, 0.25, -0.75])
    _close(leave_one_out(reward, TWO), [1.0, -0.5, -0.5, 0.0, 1 / 3, 1 / 3, 1 / 3, -1.0])
    # Seven rewards, four of them 1: mean 4/7, sample std sqrt(2/7).
    std = math.sqrt(2 / 7)
    expected = [(r - 4 / 7) / std for r in (1.0, 0.0, 0.0)] + [0.0] + [(r - 4 / 7) / std for r in (1.0, 1.0, 1.0, 0.0)]
    _close(batch_normalised(reward), expected)
    batch = scored_batch(reward, TWO)
    _close(compute(batch, AdvantageSettings(estimator="reward")), reward.nan_to_num())


def test_a_success_on_a_hard_prompt_and_a_failure_on_an_easy_one_weigh_more_under_the_lead_weight() -> None:
    reward = torch.tensor([1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 0.0])
    plain = group_normalised(reward, TWO)
    weighted = compute(scored_batch(reward, TWO), AdvantageSettings(difficulty_weight="lead"))
    # Positive advantages by the pass rates 1/4 and 3/4, the others by the failure rates 3/4 and 1/4.
    _close(weighted, plain * torch.tensor([1.492638] + [0.95] * 3 + [0.95] * 3 + [1.492638]))
