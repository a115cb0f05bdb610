"""What holds for every batch of groups: order, names and strangers do not matter; sums are what the formulas say."""

from __future__ import annotations

import math

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from rl.advantage import compute, group_normalised, hierarchical, token_level_group_average
from rl.settings import AdvantageSettings
from tests.batches import scored_batch

Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
VARIANTS = [
    AdvantageSettings(estimator=estimator, intra_scale=scale, centre=centre)
    for estimator, scale in (("group_normalised", "none"), ("hierarchical", "none"), ("hierarchical", "spread"))
    for centre in ("none", "group", "batch")
] + [AdvantageSettings(estimator="token_level_average", guard=guard) for guard in (None, 5.0)]
variants = st.sampled_from(VARIANTS)


@st.composite
def batches(draw: st.DrawFn) -> Batch:
    """Rewards (some missing), groups, budgets (some free), ceilings and lengths of 1 to 40 rollouts in random order."""
    n = draw(st.integers(1, 40))
    member = st.tuples(
        st.sampled_from([-3, 0, 17, 2**40]),
        st.sampled_from([32.0, 64.0, 96.0, math.inf]),
        st.one_of(st.sampled_from([0.0, 1.0, 3.5, math.nan]), st.floats(-1, 4, width=32)),
        st.integers(0, 200),
    )
    rows = draw(st.lists(member, min_size=n, max_size=n))
    group, budget, reward, length = (list(column) for column in zip(*rows, strict=True))
    ceiling = [math.nan if math.isinf(b) else 4 * math.cos(math.pi * b / 256) for b in budget]
    values = [torch.tensor(v, dtype=torch.float64) for v in (reward, budget, ceiling, length)]
    return values[0], values[1], values[2], values[3], torch.tensor(group)


def _oracle(batch: Batch, intra_coef: float) -> np.ndarray:
    """The formula of the paper, member by member."""
    reward, budget, ceiling, _, group = (value.numpy() for value in batch)
    out = np.zeros(len(reward))
    for k in np.flatnonzero(~np.isnan(reward)):
        peers = reward[(group == group[k]) & ~np.isnan(reward)]
        flat = len(peers) < 2 or peers.max() == peers.min()
        out[k] = 0.0 if flat else (reward[k] - peers.mean()) / (peers.std(ddof=1) + 1e-6)
        if not np.isnan(ceiling[k]):
            siblings = reward[(group == group[k]) & (budget == budget[k]) & ~np.isnan(reward)]
            out[k] += intra_coef * (siblings.mean() - ceiling[k])
    return out


@given(batch=batches(), intra_coef=st.sampled_from([0.0, 1.0, 2.0]))
def test_the_vectorised_form_equals_the_formula_written_member_by_member(batch: Batch, intra_coef: float) -> None:
    reward, budget, ceiling, _, group = batch
    advantage = hierarchical(reward, group, budget, ceiling, intra_coef=intra_coef)
    np.testing.assert_allclose(advantage.numpy(), _oracle(batch, intra_coef), atol=1e-4, rtol=1e-5)


@given(batch=batches(), settings=variants, seed=st.integers(0, 2**31))
def test_the_order_of_the_members_does_not_matter(batch: Batch, settings: AdvantageSettings, seed: int) -> None:
    reward, budget, ceiling, _, group = batch
    order = torch.randperm(len(reward), generator=torch.Generator().manual_seed(seed))
    advantage = compute(scored_batch(reward, group, budget, ceiling), settings)
    shuffled = compute(scored_batch(reward[order], group[order], budget[order], ceiling[order]), settings)
    torch.testing.assert_close(shuffled, advantage[order], atol=1e-4, rtol=1e-4)


@given(batch=batches(), settings=variants)
def test_the_names_of_groups_and_budgets_do_not_matter(batch: Batch, settings: AdvantageSettings) -> None:
    reward, budget, ceiling, _, group = batch
    renamed_group, renamed_budget = 1000 - group * 7, torch.where(torch.isinf(budget), 5.0, 1000.0 - budget)
    advantage = compute(scored_batch(reward, group, budget, ceiling), settings)
    renamed = compute(scored_batch(reward, renamed_group, renamed_budget, ceiling), settings)
    torch.testing.assert_close(renamed, advantage, atol=1e-4, rtol=1e-4)


@given(batch=batches(), settings=variants)
def test_every_advantage_is_finite_and_missing_members_have_none(batch: Batch, settings: AdvantageSettings) -> None:
    reward, budget, ceiling, _, group = batch
    advantage = compute(scored_batch(reward, group, budget, ceiling), settings)
    assert advantage.dtype == torch.float32 and torch.isfinite(advantage).all()
    assert not advantage[torch.isnan(reward)].any()


@given(batch=batches(), settings=variants)
def test_removing_the_missing_members_changes_nothing_for_the_rest(batch: Batch, settings: AdvantageSettings) -> None:
    valid = ~torch.isnan(batch[0])
    reward, budget, ceiling, _, group = batch
    whole = compute(scored_batch(reward, group, budget, ceiling), settings)[valid]
    rest = compute(scored_batch(reward[valid], group[valid], budget[valid], ceiling[valid]), settings)
    torch.testing.assert_close(rest, whole, atol=1e-4, rtol=1e-4)


@given(batch=batches())
def test_uncentred_advantages_of_one_group_do_not_depend_on_the_others(batch: Batch) -> None:
    reward, budget, ceiling, _, group = batch
    whole = hierarchical(reward, group, budget, ceiling)
    for name in group.unique():
        own = group == name
        alone = hierarchical(reward[own], group[own], budget[own], ceiling[own])
        torch.testing.assert_close(alone, whole[own], atol=1e-4, rtol=1e-4)


@given(batch=batches())
def test_group_advantages_add_up_to_zero(batch: Batch) -> None:
    reward, _, _, length, group = batch
    valid = ~torch.isnan(reward)
    plain = group_normalised(reward, group).double()
    weighted = token_level_group_average(reward, length, group, guard=None).double() * length
    for name in group.unique():
        own = (group == name) & valid
        assert abs(plain[own].sum()) < 1e-4
        # weights of float32 values up to 5 times lengths up to 200
        assert abs(weighted[own].sum()) < 0.05


@given(batch=batches(), estimator=st.sampled_from([v for v in VARIANTS if v.centre != "none"]))
def test_centred_advantages_add_up_to_zero(batch: Batch, estimator: AdvantageSettings) -> None:
    reward, budget, ceiling, _, group = batch
    advantage = compute(scored_batch(reward, group, budget, ceiling), estimator).double()
    assert abs(advantage.sum()) < 1e-3
    if estimator.centre == "group":
        assert all(abs(advantage[group == name].sum()) < 1e-3 for name in group.unique())


@given(batch=batches(), scale=st.floats(0.5, 8.0), shift=st.floats(-2.0, 2.0))
def test_group_normalised_ignores_the_rewards_unit_and_origin(batch: Batch, scale: float, shift: float) -> None:
    reward, _, _, _, group = batch
    reward = (reward * 4).round() / 4  # spreads far above the floor, where the unit cannot matter
    advantage = group_normalised(reward, group)
    torch.testing.assert_close(group_normalised(reward * scale + shift, group), advantage, atol=1e-3, rtol=0)


@given(batch=batches())
def test_the_subgroup_term_is_never_positive_for_rewards_below_their_ceiling(batch: Batch) -> None:
    reward, budget, ceiling, _, group = batch
    reward = torch.minimum(reward, torch.where(torch.isnan(ceiling), reward, ceiling))
    full = hierarchical(reward, group, budget, ceiling)
    assert (full - group_normalised(reward, group) <= 1e-5).all()
