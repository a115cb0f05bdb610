"""Triton kernels of distillation on a GPU against the reference in float64: AlignDistil's KL, the bucketed KL, memory of a step.

Needs torch, triton and pytest only, like test_gpu_kernels.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

import kernels
from tests.gpu.agreement import DEVICE, DTYPES, ODD, REAL, ROUNDED, VALUE, Shape, agree, compare, normal

pytestmark = pytest.mark.gpu


def _models(shape: Shape, dtype: torch.dtype) -> list[tuple[torch.Tensor, torch.Tensor]]:
    tokens, hidden, vocabulary = shape
    generator = torch.Generator().manual_seed(sum(shape))
    widths = (hidden, hidden + 8, max(hidden // 2, 1))  # hidden sizes may differ between the models
    return [
        (normal(generator, tokens, h, dtype=dtype), normal(generator, vocabulary, h, dtype=dtype, scale=1.5 / math.sqrt(h)))
        for h in widths
    ]


def _check_alignment_of_logits(shape: Shape, dtype: torch.dtype, r: float) -> None:
    student, dpo, reverse = [(h @ w.T) for h, w in _models(shape, dtype)]
    student[:, 1] = dpo[:, 1] = reverse[:, 1] = -math.inf

    def call(z: torch.Tensor, backend: str) -> tuple[torch.Tensor, ...]:
        frozen = [x.double() if backend == "reference" else x for x in (dpo, reverse)]
        return kernels.alignment_kl(z, *frozen, r=r, backend=backend)

    agree(call(student, "triton")[1], call(student.double(), "reference")[1], VALUE, "alpha")
    compare(lambda z, backend: call(z, backend)[:1], [student])


def _check_alignment_of_hidden_states(shape: Shape, dtype: torch.dtype) -> None:
    student, *frozen = _models(shape, dtype)

    def call(h: torch.Tensor, w: torch.Tensor, backend: str) -> tuple[torch.Tensor, ...]:
        dpo, reverse = [(x.double(), y.double()) if backend == "reference" else (x, y) for x, y in frozen]
        return kernels.linear_alignment_kl((h, w), dpo, reverse, r=3.0, backend=backend)[:1]

    compare(call, student, value=ROUNDED[dtype], gradient=ROUNDED)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", ODD[1:], ids=str)
@pytest.mark.parametrize("r", [1, 3.0, 20.0])
def test_the_alignment_kl_of_logits(r: float, shape: Shape, dtype: torch.dtype) -> None:
    _check_alignment_of_logits(shape, dtype, r)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", ODD[1:], ids=str)
def test_the_alignment_kl_of_hidden_states(shape: Shape, dtype: torch.dtype) -> None:
    _check_alignment_of_hidden_states(shape, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", REAL, ids=str)
def test_real_sizes_of_the_alignment_kl(shape: Shape, dtype: torch.dtype) -> None:
    _check_alignment_of_logits(shape, dtype, 3.0)
    _check_alignment_of_hidden_states(shape, dtype)


def test_parts_of_the_alignment_kl_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from kernels import triton_alignment

    results = []
    for chunk_bytes in (2**10, 2**27):
        monkeypatch.setattr(triton_alignment, "CHUNK_BYTES", chunk_bytes)
        student, *frozen = _models((33, 20, 301), torch.float32)
        leaves = [x.requires_grad_() for x in student]
        kl, alpha = kernels.linear_alignment_kl((leaves[0], leaves[1]), *frozen, r=3.0, backend="triton")
        kl.square().sum().backward()
        results.append([kl.detach(), alpha, *(x.grad for x in leaves)])
    for k, (found, expected) in enumerate(zip(*results, strict=True)):
        agree(found, expected, 1e-5, str(k))


def _bucket_kl(*arguments: torch.Tensor, backend: str) -> torch.Tensor:
    from kernels import triton_bucket

    function: Any = triton_bucket.from_hidden if backend == "triton" else partial(kernels.linear_bucket_kl, backend=backend)
    return function(*arguments)


def _check_bucket(tokens: int, width: int, vocabulary: int, count: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(tokens + vocabulary)
    hidden = normal(generator, tokens, width, dtype=dtype)
    weight = normal(generator, vocabulary, width, dtype=dtype, scale=2.0 / math.sqrt(width))
    ids = torch.stack([torch.randperm(vocabulary, generator=generator)[:count] for _ in range(tokens)]).to(DEVICE)
    teacher = torch.log_softmax(normal(generator, tokens, count + 1, scale=2.0), dim=-1)

    def call(h: torch.Tensor, w: torch.Tensor, backend: str) -> tuple[torch.Tensor, ...]:
        known = teacher.double() if backend == "reference" else teacher
        return (_bucket_kl(h, w, ids, known[:, :count], known[:, count], backend=backend),)

    compare(call, [hidden, weight], value=ROUNDED[dtype], gradient=ROUNDED)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [(1, 16, 5, 1), (5, 7, 11, 3), (5, 7, 11, 11), (33, 20, 301, 64), (130, 96, 9000, 5)], ids=str)
def test_the_bucketed_kl_of_hidden_states(size: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    _check_bucket(*size, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", REAL, ids=str)
def test_real_sizes_of_the_bucketed_kl(shape: Shape, dtype: torch.dtype) -> None:
    _check_bucket(*shape, 64, dtype)


def test_parts_of_the_bucketed_kl_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from kernels import triton_bucket

    monkeypatch.setattr(triton_bucket, "CHUNK_BYTES", 2**12)
    _check_bucket(33, 20, 301, 64, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_second_run_gives_the_same_bits(dtype: torch.dtype) -> None:
    """A race between the threads of a program, or a sum in any order, would not."""
    student, *frozen = _models((130, 96, 9000), dtype)
    ids, teacher = torch.arange(64, device=DEVICE).expand(130, 64).contiguous(), torch.full((130, 65), -5.0, device=DEVICE)
    runs = []
    for _ in range(3):
        hidden, weight = (x.detach().clone().requires_grad_() for x in student)
        kl, alpha = kernels.linear_alignment_kl((hidden, weight), *frozen, r=3.0, backend="triton")
        bucketed = _bucket_kl(hidden, weight, ids, teacher[:, :64], teacher[:, 64], backend="triton")
        (kl + bucketed).sum().backward()
        runs.append([kl, alpha, bucketed, hidden.grad, weight.grad])
    assert all(torch.equal(one, two) and torch.equal(one, three) for one, two, three in zip(*runs, strict=True))


def _peak_bytes(step: Callable[[], torch.Tensor], leaves: list[torch.Tensor]) -> int:
    """Most memory that a forward and backward pass holds at once beyond what was there."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step().backward()
    peak = torch.cuda.max_memory_allocated() - before
    for leaf in leaves:
        leaf.grad = None
    return peak


def test_memory_of_a_distillation_step_stays_within_one_and_a_half_of_a_policy_step() -> None:
    tokens, width, vocabulary, count = 4096, 2048, 151_936, 64
    generator = torch.Generator(DEVICE).manual_seed(0)

    def normal_here(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=DEVICE, dtype=torch.bfloat16) * scale

    student, dpo, reverse = [(normal_here(tokens, width), normal_here(vocabulary, width, scale=0.03)) for _ in range(3)]
    leaves = [x.requires_grad_() for x in student]
    target = torch.randint(vocabulary, (tokens,), generator=generator, device=DEVICE)
    ids = torch.arange(count, device=DEVICE).expand(tokens, count).contiguous()
    teacher = torch.full((tokens, count + 1), -5.0, device=DEVICE)

    def policy() -> torch.Tensor:
        logp, entropy = kernels.linear_logprob_entropy(leaves[0], leaves[1], target, backend="triton")
        return logp.mean() + entropy.mean()

    def aligned() -> torch.Tensor:
        return kernels.linear_alignment_kl((leaves[0], leaves[1]), dpo, reverse, r=2.0, backend="triton")[0].mean()

    def bucketed() -> torch.Tensor:
        return _bucket_kl(leaves[0], leaves[1], ids, teacher[:, :count], teacher[:, count], backend="triton").mean()

    plain = _peak_bytes(policy, leaves)
    gradients = sum(x.numel() * x.element_size() for x in leaves)
    assert plain < gradients + 0.3 * tokens * vocabulary * 2, f"the policy step holds {plain / 2**20:.0f} MiB"
    for step in (aligned, bucketed):
        peak = _peak_bytes(step, leaves)
        assert peak <= 1.5 * plain, f"{step.__name__}: {peak / 2**20:.0f} MiB, the policy step {plain / 2**20:.0f} MiB"
