"""Reverse KL over a few ids and one bucket of the rest: worked values, gradients, chunks, refusals."""

from __future__ import annotations

import pytest
import torch

import kernels
from kernels import eager_bucket
from rl.alignment import compose_teacher

DPO = torch.tensor([[2, 0.5, -1, 0, -0.5], [0.2, 0.1, 0, -0.1, -0.2], [-1, 3, 0.5, 0, -2]], dtype=torch.float64)
REVERSE = torch.tensor([[0.5, 1.5, -0.5, 0, 0], [0.2, 0.1, 0, -0.1, -0.2], [1, 0, 0.5, 0, 0.5]], dtype=torch.float64)
STUDENT = torch.tensor([[1, 1, -1, 0.2, -0.4], [0.5, 0, -0.2, 0.1, -0.3], [-0.5, 2, 0.4, 0.1, -1]], dtype=torch.float64)
EYE = torch.eye(5, dtype=torch.float64)  # a head that hands logits through
BACKENDS = ("reference", "eager")


def _bucketed(log_star_TV: torch.Tensor, id_TK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs of the ids and log of the mass of all others."""
    rest_TV = log_star_TV.scatter(1, id_TK.long(), -torch.inf)
    return log_star_TV.gather(1, id_TK.long()), rest_TV.logsumexp(dim=1)


def _case(tokens: int = 7, k: int = 3, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    vocabulary, hidden = 13, 4
    generator = torch.Generator().manual_seed(1)
    hidden_TH = torch.randn(tokens, hidden, generator=generator, dtype=dtype)
    weight_VH = torch.randn(vocabulary, hidden, generator=generator, dtype=dtype)
    id_TK = torch.stack([torch.randperm(vocabulary, generator=generator)[:k] for _ in range(tokens)]).int()
    star_TV = torch.log_softmax(3 * torch.randn(tokens, vocabulary, generator=generator, dtype=dtype), dim=-1)
    return [hidden_TH, weight_VH, id_TK, *_bucketed(star_TV, id_TK)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("whose", "expected"),
    [("teacher", (12.003295, 0.012489, 14.517605)), ("student", (12.786094, 0.019753, 14.517605))],
)
def test_the_top_two_ids_and_a_tail_have_their_worked_values(backend: str, whose: str, expected: tuple[float, ...]) -> None:
    log_star_TV, _ = compose_teacher(DPO, REVERSE, r=20.0)
    id_TK = kernels.top_ids(log_star_TV if whose == "teacher" else STUDENT, EYE, 2)
    kl_T = kernels.linear_bucket_kl(STUDENT, EYE, id_TK, *_bucketed(log_star_TV, id_TK), backend=backend)
    torch.testing.assert_close(kl_T, torch.tensor(expected, dtype=torch.float64), atol=1e-5, rtol=0)


def test_without_the_bucket_other_values_come_out() -> None:
    """The worked values of the sum over the teacher's two ids alone; the first is less than a sixth of the bucketed one."""
    log_star_TV, _ = compose_teacher(DPO, REVERSE, r=20.0)
    id_TK = kernels.top_ids(log_star_TV, EYE, 2).long()
    logp_TK = STUDENT.log_softmax(dim=-1).gather(1, id_TK)
    kl_T = (logp_TK.exp() * (logp_TK - log_star_TV.gather(1, id_TK))).sum(dim=1)
    torch.testing.assert_close(kl_T, torch.tensor([1.954118, 0.048932, 5.843467], dtype=torch.float64), atol=1e-5, rtol=0)


@pytest.mark.parametrize("chunk_bytes", [1, 12 * 13 * 3, 2**26])
def test_the_written_gradients_pass_the_numerical_check_for_any_chunk(chunk_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eager_bucket, "CHUNK_BYTES", chunk_bytes)
    hidden_TH, weight_VH, *teacher = _case()
    leaves = (hidden_TH.requires_grad_(), weight_VH.requires_grad_())
    assert torch.autograd.gradcheck(lambda h, w: kernels.linear_bucket_kl(h, w, *teacher), leaves)


def test_both_backends_give_the_same_values_and_gradients() -> None:
    hidden_TH, weight_VH, *teacher = _case(dtype=torch.float32)
    found = []
    for backend in BACKENDS:
        leaves = [hidden_TH.clone().requires_grad_(), weight_VH.clone().requires_grad_()]
        kl_T = kernels.linear_bucket_kl(leaves[0], leaves[1], *teacher, backend=backend)
        (kl_T * torch.arange(1.0, 8.0)).sum().backward()
        found.append([kl_T.detach(), *(leaf.grad for leaf in leaves)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_the_gradient_in_a_logit_is_its_share_times_what_its_bucket_lies_above_the_kl() -> None:
    _, _, id_TK, logp_TK, tail_T = _case()
    logits = torch.randn(7, 13, generator=torch.Generator().manual_seed(2), dtype=torch.float64, requires_grad=True)
    kl_T = kernels.linear_bucket_kl(logits, torch.eye(13, dtype=torch.float64), id_TK, logp_TK, tail_T)
    kl_T.sum().backward()
    log_s, ids = logits.detach().log_softmax(dim=-1), id_TK.long()
    own_TK, own_tail_T = _bucketed(log_s, ids)
    bucket_TV = (own_tail_T - tail_T)[:, None].expand(7, 13).scatter(1, ids, own_TK - logp_TK)
    torch.testing.assert_close(logits.grad, log_s.exp() * (bucket_TV - kl_T.detach()[:, None]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_ids_that_cover_the_vocabulary_give_the_full_kl_and_no_tail(backend: str) -> None:
    hidden_TH, weight_VH, *_ = _case(dtype=torch.float32)
    star_TV = torch.log_softmax(torch.randn(7, 13, generator=torch.Generator().manual_seed(3)), dim=-1)
    id_TK = torch.arange(13).expand(7, 13).flip(1)
    leaves = [hidden_TH.requires_grad_(), weight_VH.requires_grad_()]
    logp_TK, tail_T = _bucketed(star_TV, id_TK)
    assert torch.isneginf(tail_T).all()
    kl_T = kernels.linear_bucket_kl(leaves[0], leaves[1], id_TK, logp_TK, tail_T, backend=backend)
    log_s = torch.log_softmax(leaves[0] @ leaves[1].T, dim=-1)
    full_T = (log_s.exp() * (log_s - star_TV)).sum(dim=-1)
    torch.testing.assert_close(kl_T, full_T, atol=1e-5, rtol=1e-5)
    for bucketed, full in zip(torch.autograd.grad(kl_T.sum(), leaves), torch.autograd.grad(full_T.sum(), leaves), strict=True):
        torch.testing.assert_close(bucketed, full, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_tail_far_below_rounding_keeps_its_size(backend: str) -> None:
    """The teacher gives all but e^-90 to two ids: one minus their sum would be 0. The student gives the others tau = 0.731059:
    KL = 0.731059 (ln 0.731059 + 90) + 0.268941 ln 0.268941 = 65.213, and a logit of theirs feels 0.365529 (89.687 - KL)."""
    star = torch.log_softmax(torch.tensor([[0.0, -90.0, 0.0, -90.0]]), dim=-1)
    id_TK = torch.tensor([[0, 2]])
    logp_TK, tail_T = _bucketed(star, id_TK)
    assert tail_T.item() == pytest.approx(-90.0, abs=1e-4)
    logits = torch.tensor([[0.0, 1.0, 0.0, 1.0]], requires_grad=True)
    kl_T = kernels.linear_bucket_kl(logits, torch.eye(4), id_TK, logp_TK, tail_T, backend=backend)
    kl_T.sum().backward()
    assert kl_T.item() == pytest.approx(65.2131, abs=1e-3)
    assert logits.grad is not None and logits.grad[0].tolist() == pytest.approx([-8.94584, 8.94584] * 2, abs=1e-3)


def test_bfloat16_heads_add_the_weight_gradient_up_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """400 tokens, one a chunk, each adding the same small gradient: in bfloat16 the sum would stop growing after 256."""
    monkeypatch.setattr(eager_bucket, "CHUNK_BYTES", 1)
    hidden_TH, weight_VH, *teacher = _case(tokens=1, k=3)
    many = [value.to(torch.bfloat16).expand(400, -1) for value in (hidden_TH,)]
    leaf = weight_VH.to(torch.bfloat16).requires_grad_()
    rest = [value.expand(400, *value.shape[1:]) for value in teacher]
    kernels.linear_bucket_kl(many[0], leaf, *rest).sum().backward()
    single = weight_VH.to(torch.bfloat16).requires_grad_()
    kernels.linear_bucket_kl(many[0][:1], single, *(value[:1] for value in rest)).sum().backward()
    assert leaf.grad is not None and single.grad is not None
    torch.testing.assert_close(leaf.grad.float(), 400 * single.grad.float(), atol=0, rtol=2**-7)


def test_the_likeliest_ids_come_first_and_in_any_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden_TH, weight_VH, *_ = _case(dtype=torch.float32)
    expected = (hidden_TH @ weight_VH.T).argsort(dim=1, descending=True)[:, :4].int()
    for chunk_bytes in (1, 2**26):
        monkeypatch.setattr(eager_bucket, "CHUNK_BYTES", chunk_bytes)
        assert torch.equal(kernels.top_ids(hidden_TH, weight_VH, 4), expected)


def test_no_tokens_give_no_values() -> None:
    hidden_TH, weight_VH, *teacher = (value if i == 1 else value[:0] for i, value in enumerate(_case()))
    leaf = weight_VH.requires_grad_()
    kl_T = kernels.linear_bucket_kl(hidden_TH, leaf, *teacher)
    kl_T.sum().backward()
    assert kl_T.shape == (0,) and leaf.grad is not None and not leaf.grad.any()
    assert kernels.top_ids(hidden_TH, weight_VH, 2).shape == (0, 2)


def test_bad_arguments_are_named() -> None:
    hidden_TH, weight_VH, id_TK, logp_TK, tail_T = _case()
    call = kernels.linear_bucket_kl
    with pytest.raises(ValueError, match="id_TK must have shape .7, K."):
        call(hidden_TH, weight_VH, id_TK[:3], logp_TK, tail_T)
    with pytest.raises(ValueError, match="outside the vocabulary .0, 13."):
        call(hidden_TH, weight_VH, id_TK + 12, logp_TK, tail_T)
    with pytest.raises(ValueError, match="row 0 has an id twice"):
        call(hidden_TH, weight_VH, torch.zeros_like(id_TK), logp_TK, tail_T)
    with pytest.raises(ValueError, match="teacher_logp_TK has shape"):
        call(hidden_TH, weight_VH, id_TK, logp_TK[:, :1], tail_T)
    with pytest.raises(ValueError, match="tail_T must have shape .7,."):
        call(hidden_TH, weight_VH, id_TK, logp_TK, tail_T[:2])
    with pytest.raises(TypeError, match="id_TK must be integer"):
        call(hidden_TH, weight_VH, logp_TK, logp_TK, tail_T)
    with pytest.raises(kernels.NotAvailable, match="needs tensors on a GPU"):
        call(hidden_TH, weight_VH, id_TK, logp_TK, tail_T, backend="triton")
    with pytest.raises(ValueError, match="k must lie in .1, 13."):
        kernels.top_ids(hidden_TH, weight_VH, 14)
