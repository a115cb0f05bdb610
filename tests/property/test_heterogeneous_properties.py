"""What holds of HAPO's loss for any entropies, ratios and advantages."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from rl.heterogeneous import clip_widths, entropy_statistics, redistribute, signal
from rl.losses import Heterogeneous, policy_loss

Tokens = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
kappas = st.floats(0.0, 1.0)
zones = st.sampled_from(["base", "adapted"])


@st.composite
def tokens(draw: st.DrawFn) -> Tokens:
    """Entropies, advantages and log ratios of 1 to 40 tokens."""
    row = st.tuples(st.floats(0.0, 12.0), st.floats(-5.0, 5.0), st.floats(-1.5, 1.5))
    rows = draw(st.lists(row, min_size=1, max_size=40))
    entropy, advantage, log_ratio = (torch.tensor(column, dtype=torch.float64) for column in zip(*rows, strict=True))
    return entropy, advantage, log_ratio


def _signal(entropy_T: torch.Tensor, *, literal: bool) -> torch.Tensor:
    return signal(entropy_T, entropy_statistics(entropy_T), literal=literal)


@given(found=tokens(), literal=st.booleans(), kappa=kappas, zone=zones)
def test_an_advantage_keeps_its_sign_and_at_most_doubles(found: Tokens, literal: bool, kappa: float, zone: str) -> None:
    entropy_T, advantage_T, log_ratio_T = found
    signal_T = _signal(entropy_T, literal=literal)
    result_T = redistribute(advantage_T, signal_T, log_ratio_T.exp(), kappa=kappa, zone=zone)  # pyright: ignore[reportArgumentType]
    assert (result_T * advantage_T >= 0).all()
    assert (result_T.abs() <= (1 + kappa) * advantage_T.abs() + 1e-9).all()
    if literal:
        assert (result_T.abs() >= advantage_T.abs()).all()


@given(found=tokens(), literal=st.booleans(), kappa=kappas, low=st.floats(0.0, 0.45), high=st.floats(0.0, 0.9))
def test_widths_only_grow_and_leave_a_floor_above_zero(
    found: Tokens, literal: bool, kappa: float, low: float, high: float
) -> None:
    low_T, high_T = clip_widths(_signal(found[0], literal=literal).double(), low=low, high=high, kappa=kappa)
    assert (low_T >= low).all() and (low_T <= low * (1 + kappa) + 1e-9).all() and (1 - low_T > 0).all()
    assert (high_T >= high).all() and (high_T <= high * (1 + kappa) + 1e-9).all()
    assert ((low_T == low) | (high_T == high)).all()  # a token is sure or unsure, not both


@given(found=tokens(), literal=st.booleans(), kappa=kappas, zone=zones, cut=st.integers(0, 40))
def test_the_loss_of_a_batch_is_that_of_its_parts_once_the_signal_is_known(
    found: Tokens, literal: bool, kappa: float, zone: str, cut: int
) -> None:
    entropy_T, advantage_T, log_ratio_T = found
    signal_T = _signal(entropy_T, literal=literal)

    def loss(part: slice) -> torch.Tensor:
        chosen = Heterogeneous(signal_T[part], kappa, kappa, zone)  # pyright: ignore[reportArgumentType]
        mask_T = torch.ones_like(log_ratio_T[part], dtype=torch.bool)
        zero_T = torch.zeros_like(log_ratio_T[part])
        return policy_loss(log_ratio_T[part], zero_T, advantage_T[part], mask_T, heterogeneous=chosen).loss

    torch.testing.assert_close(loss(slice(0, cut)) + loss(slice(cut, None)), loss(slice(None)), atol=1e-9, rtol=1e-9)


@given(found=tokens(), literal=st.booleans())
def test_wider_clips_never_raise_what_a_token_is_charged(found: Tokens, literal: bool) -> None:
    """``min(r A, clip(r) A)`` can only grow with the widths, so the loss can only fall; without a dual clip."""
    entropy_T, advantage_T, log_ratio_T = found
    mask_T, zero_T = torch.ones_like(log_ratio_T, dtype=torch.bool), torch.zeros_like(log_ratio_T)
    losses = [
        policy_loss(log_ratio_T, zero_T, advantage_T, mask_T, dual_clip=None, heterogeneous=chosen).loss
        for chosen in (Heterogeneous(_signal(entropy_T, literal=literal), kappa, None) for kappa in (0.0, 0.5, 1.0))
    ]
    assert losses[0] >= losses[1] - 1e-9 and losses[1] >= losses[2] - 1e-9
