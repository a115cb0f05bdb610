"""What holds of AlignDistil's teacher, its loss and the bucketed KL, whatever the logits."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

import kernels
from rl.alignment import alignment_loss, compose_teacher, kl_weight, token_reward

seeds = st.integers(0, 2**31)
sizes = st.tuples(st.integers(1, 6), st.integers(2, 17))
scales = st.sampled_from([0.0, 0.1, 1.0, 10.0])
strengths = st.sampled_from([0.0, 1.0, 20.0, 30.0])


def _logits(seed: int, size: tuple[int, int], scale: float, count: int = 3) -> torch.Tensor:
    """``count`` matrices, float64."""
    return scale * torch.randn(count, *size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _full_kl(student: torch.Tensor, log_star: torch.Tensor) -> torch.Tensor:
    log_s = student.log_softmax(dim=-1)
    return (log_s.exp() * (log_s - log_star)).sum(dim=-1)


def _bucketed(log_star: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return ids.int(), log_star.gather(1, ids), log_star.scatter(1, ids, -torch.inf).logsumexp(dim=1)


def _ids(seed: int, size: tuple[int, int]) -> torch.Tensor:
    """A permutation of the vocabulary in each row."""
    return torch.rand(size, generator=torch.Generator().manual_seed(seed + 1)).argsort(dim=1)


@given(seed=seeds, size=sizes, scale=scales, r=strengths)
def test_the_teacher_is_a_distribution_and_its_weight_lies_between_eps_and_r_plus_eps(
    seed: int, size: tuple[int, int], scale: float, r: float
) -> None:
    dpo, reverse, _ = _logits(seed, size, scale)
    log_star, alpha = compose_teacher(dpo, reverse, r=r)
    torch.testing.assert_close(log_star.exp().sum(dim=-1), torch.ones(size[0], dtype=torch.float64))
    assert (alpha >= 1e-3).all() and (alpha <= r + 1e-3 + 1e-12).all()


@given(seed=seeds, size=sizes, scale=scales, r=strengths)
def test_two_equal_models_compose_themselves(seed: int, size: tuple[int, int], scale: float, r: float) -> None:
    dpo, _, _ = _logits(seed, size, scale)
    log_star, alpha = compose_teacher(dpo, dpo + 3.0, r=r)
    torch.testing.assert_close(log_star, dpo.log_softmax(dim=-1))
    torch.testing.assert_close(alpha, torch.full((size[0],), 1e-3, dtype=torch.float64))


@given(seed=seeds, size=sizes, scale=scales, r=strengths)
def test_the_loss_is_never_negative_and_zero_for_the_teacher_itself(
    seed: int, size: tuple[int, int], scale: float, r: float
) -> None:
    dpo, reverse, student = _logits(seed, size, scale)
    log_star, alpha = compose_teacher(dpo, reverse, r=r)
    mask = torch.ones(size[0])
    assert alignment_loss(student, log_star, alpha, mask).item() >= -1e-9
    assert abs(alignment_loss(log_star, log_star, alpha, mask).item()) < 1e-9
    reward = token_reward(log_star[:, 0], log_star[:, 0], alpha)
    assert not reward.any()


@given(seed=seeds, size=sizes, scale=scales, bound=st.floats(0.01, 200.0))
def test_a_weight_never_exceeds_its_bound_and_is_otherwise_what_it_was(
    seed: int, size: tuple[int, int], scale: float, bound: float
) -> None:
    _, alpha = compose_teacher(*_logits(seed, size, scale, 2), r=20.0)
    free, bounded = kl_weight(alpha), kl_weight(alpha, beta_max=bound)
    assert (bounded <= bound).all()
    assert torch.equal(bounded[free <= bound], free[free <= bound])


@given(seed=seeds, size=sizes, scale=scales, r=strengths, data=st.data())
def test_a_bucketed_kl_is_a_lower_bound_that_rises_to_the_full_one(
    seed: int, size: tuple[int, int], scale: float, r: float, data: st.DataObject
) -> None:
    dpo, reverse, student = _logits(seed, size, scale)
    log_star, _ = compose_teacher(dpo, reverse, r=r)
    full, ids, head = _full_kl(student, log_star), _ids(seed, size), torch.eye(size[1], dtype=torch.float64)
    fewer = data.draw(st.integers(1, size[1]))
    more = data.draw(st.integers(fewer, size[1]))
    few = kernels.linear_bucket_kl(student, head, *_bucketed(log_star, ids[:, :fewer]))
    many = kernels.linear_bucket_kl(student, head, *_bucketed(log_star, ids[:, :more]))
    every = kernels.linear_bucket_kl(student, head, *_bucketed(log_star, ids))
    slack = 1e-9 * (1 + full)
    assert (few >= -slack).all() and (few <= many + slack).all() and (many <= full + slack).all()
    torch.testing.assert_close(every, full, atol=1e-9, rtol=1e-9)


@given(seed=seeds, size=sizes, scale=scales, k=st.integers(1, 17))
def test_the_order_of_the_ids_and_a_constant_in_the_logits_change_nothing(
    seed: int, size: tuple[int, int], scale: float, k: int
) -> None:
    dpo, reverse, student = _logits(seed, size, scale)
    log_star, _ = compose_teacher(dpo, reverse, r=2.0)
    ids, head = _ids(seed, size)[:, :k], torch.eye(size[1], dtype=torch.float64)
    found = kernels.linear_bucket_kl(student, head, *_bucketed(log_star, ids))
    turned = kernels.linear_bucket_kl(student + 5.0, head, *_bucketed(log_star, ids.flip(1)))
    torch.testing.assert_close(found, turned)


@given(seed=seeds, size=sizes, scale=scales, k=st.integers(1, 17))
def test_the_bucketed_gradient_leaves_the_sum_of_logits_alone_and_the_backends_agree(
    seed: int, size: tuple[int, int], scale: float, k: int
) -> None:
    dpo, reverse, student = _logits(seed, size, scale)
    log_star, _ = compose_teacher(dpo, reverse, r=2.0)
    head, teacher = torch.eye(size[1], dtype=torch.float64), _bucketed(log_star, _ids(seed, size)[:, :k])
    gradients = []
    for backend in ("eager", "reference"):
        leaf = student.clone().requires_grad_()
        kernels.linear_bucket_kl(leaf, head, *teacher, backend=backend).sum().backward()
        assert leaf.grad is not None
        gradients.append(leaf.grad)
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(gradients[0].sum(dim=-1), torch.zeros(size[0], dtype=torch.float64), atol=1e-9, rtol=0)
