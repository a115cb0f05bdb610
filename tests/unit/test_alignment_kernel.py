"""AlignDistil's teacher and KL: worked values, both forms against each other, gradients, chunks, refusals."""

from __future__ import annotations

import pytest
import torch

import kernels
from kernels import eager_alignment

DPO = torch.tensor([[2, 0.5, -1, 0, -0.5], [0.2, 0.1, 0, -0.1, -0.2], [-1, 3, 0.5, 0, -2]])
REVERSE = torch.tensor([[0.5, 1.5, -0.5, 0, 0], [0.2, 0.1, 0, -0.1, -0.2], [1, 0, 0.5, 0, 0.5]])
STUDENT = torch.tensor([[1, 1, -1, 0.2, -0.4], [0.5, 0, -0.2, 0.1, -0.3], [-0.5, 2, 0.4, 0.1, -1]])
BACKENDS = ("reference", "eager")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("r", "alpha", "kl"),
    [
        (20.0, (9.646640, 0.001, 14.793100), (13.240152, 0.020284, 17.328544)),
        (2.0, (0.965564, 0.001, 1.480210), (1.234563, 0.020284, 1.725806)),
    ],
)
def test_three_rows_have_their_worked_values(backend: str, r: float, alpha: tuple[float, ...], kl: tuple[float, ...]) -> None:
    kl_T, alpha_T = kernels.alignment_kl(STUDENT, DPO, REVERSE, r=r, backend=backend)
    torch.testing.assert_close(alpha_T, torch.tensor(alpha), atol=5e-6, rtol=1e-6)
    torch.testing.assert_close(kl_T, torch.tensor(kl), atol=5e-6, rtol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_gradient_of_the_weighed_loss_has_its_worked_value(backend: str) -> None:
    student = STUDENT.clone().requires_grad_()
    kl_T, alpha_T = kernels.alignment_kl(student, DPO, REVERSE, r=20.0, backend=backend)
    loss = (0.1 / alpha_T * kl_T).mean()  # beta_0 = 0.1, mean over the tokens of one response
    # Row 2 has alpha 0.001, which multiplies its rounding by 100.
    assert loss.item() == pytest.approx(0.760917, abs=1e-5)
    loss.backward()
    assert student.grad is not None
    expected = torch.tensor([-0.017429, 0.013835, 0.000993, 0.000762, 0.001840])
    torch.testing.assert_close(student.grad[0], expected, atol=1e-6, rtol=0)
    assert student.grad.sum(dim=-1).abs().max() < 1e-6


def _heads(dtype: torch.dtype = torch.float64) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    sizes = (4, 6, 3)  # hidden sizes may differ between the models
    return [
        (torch.randn(7, h, generator=generator, dtype=dtype), torch.randn(13, h, generator=generator, dtype=dtype)) for h in sizes
    ]


@pytest.mark.parametrize("chunk_bytes", [1, 16 * 13 * 3, 2**26])
def test_the_written_gradients_pass_the_numerical_check_for_any_chunk(chunk_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eager_alignment, "CHUNK_BYTES", chunk_bytes)
    student, dpo, reverse = _heads()
    leaves = tuple(x.requires_grad_() for x in student)
    assert torch.autograd.gradcheck(lambda *s: kernels.linear_alignment_kl(s, dpo, reverse, r=2.0)[0], leaves)
    logits = (student[0] @ student[1].T).detach().requires_grad_()
    d, r = (h @ w.T for h, w in (dpo, reverse))
    assert torch.autograd.gradcheck(lambda z: kernels.alignment_kl(z, d, r, r=2.0)[0], (logits,))


@pytest.mark.parametrize("backend", BACKENDS)
def test_hidden_states_and_logits_give_the_same(backend: str) -> None:
    heads = _heads(torch.float32)
    from_hidden = kernels.linear_alignment_kl(*heads, r=5.0, backend=backend)
    from_logits = kernels.alignment_kl(*(h @ w.T for h, w in heads), r=5.0, backend=backend)
    for a, b in zip(from_hidden, from_logits, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_student_that_is_its_teacher_has_no_kl_and_banned_tokens_no_share(backend: str) -> None:
    banned = DPO.clone()
    banned[:, 3] = -torch.inf
    kl_T, alpha_T = kernels.alignment_kl(banned, banned, banned, r=20.0, backend=backend)
    torch.testing.assert_close(kl_T, torch.zeros(3), atol=1e-6, rtol=0)
    torch.testing.assert_close(alpha_T, torch.full((3,), 1e-3))


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="reverse_TV has shape"):
        kernels.alignment_kl(STUDENT, DPO, REVERSE[:2], r=1.0)
    with pytest.raises(ValueError, match="eps above 0"):
        kernels.alignment_kl(STUDENT, DPO, REVERSE, r=1.0, eps=0.0)
    student, dpo, reverse = _heads()
    with pytest.raises(ValueError, match="dpo has .tokens, vocabulary. .7, 12."):
        kernels.linear_alignment_kl(student, (dpo[0], dpo[1][:12]), reverse, r=1.0)
