"""Advantages against hand-worked values, and how missing members, free members, scaling and centring act."""

from __future__ import annotations

import math

import pytest
import torch

import kernels
from reward.budget import budget_ceiling, hbpo
from rl.advantage import ADVANTAGES, compute, group_normalised, hierarchical, token_level_group_average
from rl.settings import AdvantageSettings

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


def test_the_estimators_are_reached_by_the_name_in_the_settings() -> None:
    reward = _worked_reward()
    assert set(ADVANTAGES) == {"group_normalised", "hierarchical"}
    _close(compute(reward, ONE_GROUP, BUDGET, CEILING, AdvantageSettings(estimator="hierarchical")), PAPER)
    grpo = compute(reward, ONE_GROUP, BUDGET, CEILING, AdvantageSettings())
    _close(grpo, group_normalised(reward, ONE_GROUP))
    assert not torch.allclose(grpo, PAPER)


def test_centring_subtracts_the_mean_of_the_valid_members_of_the_group_or_of_the_batch() -> None:
    reward = torch.tensor([3.0, 1.0, NAN, 0.0, 0.0, 2.0])
    group = torch.tensor([4, 4, 4, 8, 8, 8])
    budget, ceiling = torch.full((6,), 64.0), torch.full((6,), 3.5)
    plain = hierarchical(reward, group, budget, ceiling)
    settings = AdvantageSettings(estimator="hierarchical", centre="batch")
    valid = ~torch.isnan(reward)
    expected = torch.where(valid, plain - plain[valid].mean(), 0.0)
    _close(compute(reward, group, budget, ceiling, settings), expected)
    by_group = compute(reward, group, budget, ceiling, settings.model_copy(update={"centre": "group"}))
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
    _close(compute(reward, ONE_GROUP, BUDGET, CEILING, settings), inter + intra / std)


def test_spread_leaves_flat_groups_alone_and_bounds_nearly_flat_ones() -> None:
    settings = AdvantageSettings(estimator="hierarchical", intra_scale="spread")
    assert compute(torch.zeros(8), ONE_GROUP, BUDGET, CEILING, settings).tolist() == [0.0] * 8
    reward = torch.zeros(8)
    reward[0] = 1e-4
    inter = group_normalised(reward, ONE_GROUP)
    bound = 7 / math.sqrt(8)
    _close(compute(reward, ONE_GROUP, BUDGET, CEILING, settings), inter - bound)


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
    assert compute(none, ids, none, none, settings).shape == (0,)
    assert token_level_group_average(none, none, ids).shape == (0,)
