"""HAPO's clip widths, redistribution and loss: worked values of both published forms, edges, gradients, and what is refused."""

from __future__ import annotations

import math
from typing import Literal

import pytest
import torch

from rl.heterogeneous import clip_widths, entropy_statistics, redistribute, signal
from rl.losses import Heterogeneous, PolicyLoss, policy_loss

Zone = Literal["base", "adapted"]

ENTROPY = torch.tensor([0.002, 0.35, 1.9, 0.04, 0.9, 0.0001, 2.0, 0.5, 0.6, 0.0, 2.3, 0.15, 0.01, 0.7, 0.02], dtype=torch.float64)
"""Eight tokens of a right answer and seven of a wrong one."""
ADVANTAGE = torch.tensor([0.8] * 8 + [-1.25] * 7, dtype=torch.float64)
RATIO = torch.tensor([1.0, 1.12, 1.5, 0.85, 1.3, 0.55, 1.2, 1.05, 0.95, 0.7, 0.8, 1.35, 0.65, 1.0, 0.88], dtype=torch.float64)
ALL = torch.ones(15, dtype=torch.bool)
STATS = entropy_statistics(ENTROPY)
SIGNED, LITERAL = signal(ENTROPY, STATS), signal(ENTROPY, STATS, literal=True)


def _close(found: torch.Tensor, expected: list[float]) -> None:
    torch.testing.assert_close(found.double(), torch.tensor(expected, dtype=torch.float64), atol=1e-5, rtol=0)


def _loss(
    signal_T: torch.Tensor | None,
    *,
    high: float = 0.28,
    zone: Zone = "base",
    clip: float | None = 1.0,
    advantage: float | None = 1.0,
    mask_T: torch.Tensor = ALL,
    logp_T: torch.Tensor | None = None,
) -> PolicyLoss:
    chosen = None if signal_T is None else Heterogeneous(signal_T, clip, advantage, zone)
    new_T = RATIO.log() if logp_T is None else logp_T
    old_T = torch.zeros(15, dtype=torch.float64)
    return policy_loss(new_T, old_T, ADVANTAGE, mask_T, clip_low=0.2, clip_high=high, dual_clip=10.0, heterogeneous=chosen)


# -- worked values -----------------------------------------------------------------------------------------------------------

LOW = [.266712, .210313, .2, .233999, .2, .299425, .2, .206419, .204428, .4, .2, .219566, .249137, .202744, .241568]  # fmt: skip
HIGH = [.28, .28, .502985, .28, .28, .28, .518292, .28, .28, .28, .56, .28, .28, .28, .28]  # fmt: skip
REPO_HIGH = [.266712, .210313, .359275, .233999, .2, .299425, .370209, .206419, .204428, .4, .4, .219566, .249137, .202744, .241568]  # fmt: skip  # noqa: E501


def test_sure_tokens_may_fall_further_and_unsure_ones_rise_further() -> None:
    low_T, high_T = clip_widths(SIGNED)
    _close(low_T, LOW)
    _close(high_T, HIGH)


def test_with_the_published_codes_signs_only_ceilings_move() -> None:
    low_T, high_T = clip_widths(LITERAL, low=0.2, high=0.2)
    _close(low_T, [0.2] * 15)
    _close(high_T, REPO_HIGH)


def test_half_a_kappa_moves_the_widths_half_as_far() -> None:
    low_T, high_T = clip_widths(SIGNED, kappa=0.5)
    _close(low_T, [0.2 + (x - 0.2) / 2 for x in LOW])
    _close(high_T, [0.28 + (x - 0.28) / 2 for x in HIGH])


def test_unsure_tokens_that_move_gain_and_sure_ones_that_stay_lose() -> None:
    _close(
        redistribute(ADVANTAGE, SIGNED, RATIO),
        [.533152, .758747, 1.437100, .8, .8, .8, 1.480834, .774326, -1.222327, -1.25, -2.5, -1.25, -1.25, -1.232848, -1.25],
    )  # fmt: skip


def test_the_published_codes_form_only_ever_adds() -> None:
    _close(
        redistribute(ADVANTAGE, LITERAL, RATIO, low=0.2, high=0.2, zone="adapted"),
        [.8, .841253, 1.437100, .935996, .8, 1.197699, 1.480834, .8, -1.25, -2.5, -2.5, -1.372286, -1.557107, -1.25, -1.509800],
    )  # fmt: skip


@pytest.mark.parametrize(
    ("signal_T", "high", "zone", "expected"),
    [
        (SIGNED, 0.28, "base", 0.048166),
        (SIGNED, 0.2, "base", 0.062835),
        (SIGNED, 0.28, "adapted", 0.087392),
        (LITERAL, 0.2, "adapted", 0.142496),
        (None, 0.28, "base", 0.104067),
    ],
)
def test_the_loss_of_each_form_has_its_worked_value(
    signal_T: torch.Tensor | None, high: float, zone: Zone, expected: float
) -> None:
    result = _loss(signal_T, high=high, zone=zone)
    assert float(result.loss / result.tokens) == pytest.approx(expected, abs=1e-6)


def test_each_token_of_the_recommended_loss_has_its_worked_value() -> None:
    expected = [
        -.533152, -.849796, -2.155650, -.68, -1.024, -.44, -1.777001, -.813042,
        1.161211, .875, 2.0, 1.6875, .938579, 1.232848, 1.1,
    ]  # fmt: skip
    for token, value in enumerate(expected):
        assert float(_loss(SIGNED, mask_T=torch.arange(15) == token).loss) == pytest.approx(value, abs=1e-5)


# -- what each part does by itself -------------------------------------------------------------------------------------------


def test_without_either_part_the_loss_is_the_plain_one() -> None:
    plain, neither = _loss(None), _loss(SIGNED, clip=None, advantage=None)
    assert float(neither.loss) == float(plain.loss)
    assert int(neither.redistributed) == int(plain.redistributed) == 0
    assert neither.clipped_T.tolist() == plain.clipped_T.tolist()


def test_each_part_alone_leaves_the_others_quantity_as_it_is() -> None:
    widths_only = _loss(SIGNED, advantage=None)
    assert int(widths_only.redistributed) == 0
    # Ratios of 1.5 and 0.7 lie inside the widths of these two tokens, and outside the base widths.
    assert (widths_only.clipped_T[[2, 9]].tolist(), _loss(None).clipped_T[[2, 9]].tolist()) == ([False, False], [True, True])
    advantages_only = _loss(SIGNED, clip=None)
    assert int(advantages_only.redistributed) == 8
    assert advantages_only.clipped_T.tolist() == _loss(None).clipped_T.tolist()


def test_the_adapted_zone_of_unadapted_widths_is_the_base_zone() -> None:
    assert float(_loss(SIGNED, clip=None, zone="adapted").loss) == float(_loss(SIGNED, clip=None).loss)


def test_the_zone_of_the_loss_follows_the_kappa_of_its_clip() -> None:
    # ln-ratio of token 1 is inside 1 + 0.28 (1 + 0.25 h) / 2 only for a kappa above what makes it 1.2.
    signal_T, ratio_T = torch.tensor([1.0]), torch.tensor([1.2])
    one = torch.ones(1, dtype=torch.bool)
    for kappa, grown in ((0.25, True), (1.0, False)):
        chosen = Heterogeneous(signal_T, kappa, 1.0, "adapted")
        result = policy_loss(ratio_T.log(), torch.zeros(1), torch.ones(1), one, dual_clip=None, heterogeneous=chosen)
        assert float(-result.loss) == pytest.approx(2.4 if grown else 1.2, abs=1e-5)


def test_the_dual_clip_holds_a_redistributed_advantage_at_a_multiple_of_itself() -> None:
    one = torch.ones(1, dtype=torch.bool)
    result = policy_loss(
        torch.tensor([3.5]).log(), torch.zeros(1), -torch.ones(1), one, dual_clip=3.0, heterogeneous=Heterogeneous(torch.ones(1))
    )
    assert float(result.loss) == pytest.approx(6.0)  # 3 times the doubled advantage, instead of 3.5 times
    assert int(result.dual_clipped) == 1


def test_the_zone_has_its_edges_outside() -> None:
    """Strict bounds, in either precision: a ratio on an edge counts as having left."""
    for dtype in (torch.float32, torch.float64):
        edges_T = torch.tensor([1 - 0.2 / 2, 1 + 0.28 / 2], dtype=dtype)
        inner_T = torch.tensor([0.9001, 1.1399], dtype=dtype)
        one_T, sure_T, unsure_T = torch.ones(2, dtype=dtype), torch.full((2,), -0.5), torch.full((2,), 0.5)
        assert redistribute(one_T, unsure_T, edges_T).tolist() == [1.5, 1.5]
        assert redistribute(one_T, sure_T, edges_T).tolist() == [1.0, 1.0]
        assert redistribute(one_T, unsure_T, inner_T).tolist() == [1.0, 1.0]
        assert redistribute(one_T, sure_T, inner_T).tolist() == [0.5, 0.5]


def test_a_signal_past_the_statistics_counts_as_their_extreme() -> None:
    wild, ends = torch.tensor([7.0, -7.0]), torch.tensor([1.0, -1.0])
    for found, expected in zip(clip_widths(wild), clip_widths(ends), strict=True):
        assert found.tolist() == expected.tolist()
    one_T, ratio_T = torch.ones(2), torch.tensor([1.5, 1.0])
    assert redistribute(one_T, wild, ratio_T).tolist() == redistribute(one_T, ends, ratio_T).tolist() == [2.0, 0.0]


def test_on_the_first_update_sure_tokens_are_damped_and_the_published_form_changes_nothing() -> None:
    ones_T = torch.ones(15, dtype=torch.float64)
    damped = redistribute(ADVANTAGE, SIGNED, ones_T)
    assert (damped.abs() <= ADVANTAGE.abs()).all() and bool((damped.abs() < ADVANTAGE.abs())[SIGNED < 0].all())
    assert damped[SIGNED >= 0].tolist() == ADVANTAGE[SIGNED >= 0].tolist()
    sure_T = ENTROPY < 0.9
    literal = redistribute(ADVANTAGE, LITERAL, ones_T, low=0.2, high=0.2, zone="adapted")
    assert literal.tolist() == ADVANTAGE.tolist() and bool(sure_T.any())


# -- gradients ---------------------------------------------------------------------------------------------------------------


def test_the_gradient_is_that_of_the_loss_with_widths_and_advantages_held_fixed() -> None:
    start = RATIO.log().requires_grad_()
    _loss(SIGNED, logp_T=start).loss.backward()
    scaled = redistribute(ADVANTAGE, SIGNED, RATIO)
    low_T, high_T = clip_widths(SIGNED)
    by_hand = RATIO.log().requires_grad_()
    ratio_T = by_hand.exp()
    surrogate_T = torch.minimum(scaled * ratio_T, scaled * torch.clamp(ratio_T, 1 - low_T.double(), 1 + high_T.double()))
    (-surrogate_T).sum().backward()
    assert start.grad is not None and by_hand.grad is not None
    torch.testing.assert_close(start.grad, by_hand.grad)
    assert bool((start.grad != 0).any())


def test_autograd_agrees_with_finite_differences_away_from_the_edges() -> None:
    inner = torch.arange(15) != 10  # whose ratio of 0.8 lies on the edge of its clip; the others are 0.01 or more from all edges
    assert torch.autograd.gradcheck(
        lambda logp_T: _loss(SIGNED, logp_T=logp_T, mask_T=inner).loss, (RATIO.log().requires_grad_(),), eps=1e-7, atol=1e-5
    )


def test_neither_signal_nor_old_policy_receives_a_gradient() -> None:
    signal_T = SIGNED.clone().requires_grad_()
    logp_T, old_T = RATIO.log().requires_grad_(), torch.zeros(15, dtype=torch.float64, requires_grad=True)
    chosen = Heterogeneous(signal_T)
    policy_loss(logp_T, old_T, ADVANTAGE, ALL, heterogeneous=chosen).loss.backward()
    assert signal_T.grad is None and old_T.grad is None and logp_T.grad is not None
    ratio_T = RATIO.clone().requires_grad_()
    assert not redistribute(ADVANTAGE, signal_T, ratio_T).requires_grad
    assert not any(width.requires_grad for width in clip_widths(signal_T))


# -- bad values --------------------------------------------------------------------------------------------------------------


def test_a_signal_outside_the_mask_is_never_used_and_a_nan_inside_is_not_hidden() -> None:
    broken = SIGNED.clone()
    broken[3] = math.nan
    mask_T = torch.arange(15) != 3
    assert float(_loss(broken, mask_T=mask_T).loss) == pytest.approx(float(_loss(SIGNED, mask_T=mask_T).loss))
    for part in ({"advantage": None}, {"clip": None}, {}):
        assert math.isnan(float(_loss(broken, **part).loss))


def test_what_makes_no_sense_is_refused() -> None:
    one, two = torch.ones(1), torch.ones(2)
    for kappa in (-0.1, 1.1):
        with pytest.raises(ValueError, match="kappa must lie between 0 and 1"):
            clip_widths(one, kappa=kappa)
        with pytest.raises(ValueError, match="kappa must lie between 0 and 1"):
            redistribute(one, one, one, kappa=kappa)
    with pytest.raises(ValueError, match="reaches a ratio of 0; lower low below 0.5"):
        clip_widths(one, low=0.5)
    with pytest.raises(ValueError, match="must not be negative"):
        clip_widths(one, low=-0.1)
    with pytest.raises(ValueError, match="signal_T has shape"):
        redistribute(one, two, one)
    with pytest.raises(ValueError, match="ratio_T has shape"):
        redistribute(one, one, two)
    with pytest.raises(ValueError, match="zone must be base or adapted"):
        redistribute(one, one, one, zone="wide")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="signal_T has shape"):
        policy_loss(one, one, one, torch.ones(1, dtype=torch.bool), heterogeneous=Heterogeneous(two))
