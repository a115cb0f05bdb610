"""What holds for every distribution, whatever the logits."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import kernels
from kernels import eager_linear
from kernels.shaping import LogitShaping

BACKENDS = ("reference", "eager")
seeds = st.integers(0, 2**31)
sizes = st.tuples(st.integers(1, 9), st.integers(1, 33))
scales = st.sampled_from([0.0, 0.1, 1.0, 10.0, 1000.0])


def _case(seed: int, size: tuple[int, int], scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(*size, generator=generator) * scale
    return logits, torch.randint(size[1], (size[0],), generator=generator)


@pytest.mark.parametrize("backend", BACKENDS)
@given(seed=seeds, size=sizes, scale=scales)
def test_log_probs_are_never_positive_and_entropy_lies_between_zero_and_log_vocabulary(
    backend: str, seed: int, size: tuple[int, int], scale: float
) -> None:
    logits, target = _case(seed, size, scale)
    logp, entropy = kernels.logprob_entropy(logits, target, backend=backend)
    assert (logp <= 0).all()
    assert (entropy >= 0).all() and (entropy <= math.log(size[1]) + 1e-5).all()


@pytest.mark.parametrize("backend", BACKENDS)
@given(seed=seeds, size=sizes, shift=st.floats(-50, 50))
def test_a_constant_added_to_all_logits_of_a_token_changes_nothing(
    backend: str, seed: int, size: tuple[int, int], shift: float
) -> None:
    logits, target = _case(seed, size, 2.0)
    moved = logits + shift * torch.arange(size[0])[:, None] / size[0]
    for value, other in zip(
        kernels.logprob_entropy(logits, target, backend=backend),
        kernels.logprob_entropy(moved, target, backend=backend),
        strict=True,
    ):
        torch.testing.assert_close(value, other, atol=1e-4, rtol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@given(seed=seeds, size=sizes)
def test_a_temperature_without_bound_makes_every_token_equally_likely(backend: str, seed: int, size: tuple[int, int]) -> None:
    logits, target = _case(seed, size, 5.0)
    hot = torch.full((size[0],), 1e8)
    logp, entropy = kernels.logprob_entropy(logits, target, temperature_T=hot, backend=backend)
    torch.testing.assert_close(entropy, torch.full_like(entropy, math.log(size[1])), atol=1e-5, rtol=0)
    torch.testing.assert_close(logp, -entropy, atol=1e-5, rtol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@given(seed=seeds, size=sizes)
def test_the_probabilities_of_all_tokens_add_up_to_one_under_any_shaping(backend: str, seed: int, size: tuple[int, int]) -> None:
    logits, _ = _case(seed, size, 3.0)
    tokens, vocabulary = size
    generator = torch.Generator().manual_seed(seed)
    temperature, bias = torch.rand(tokens, generator=generator) + 0.3, torch.randn(tokens, generator=generator)
    ids = torch.randperm(vocabulary, generator=generator)[: vocabulary // 2]
    total = torch.zeros(tokens)
    for token in range(vocabulary):
        target = torch.full((tokens,), token)
        shaping: dict[str, Any] = {"temperature_T": temperature, "bias_ids": ids, "bias_T": bias}
        total += kernels.logprob_entropy(logits, target, backend=backend, **shaping)[0].exp()
    torch.testing.assert_close(total, torch.ones(tokens), atol=1e-4, rtol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@given(seed=seeds, size=sizes)
def test_a_sparse_bias_equals_adding_it_to_the_logits(backend: str, seed: int, size: tuple[int, int]) -> None:
    logits, target = _case(seed, size, 2.0)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randperm(size[1], generator=generator)[: max(1, size[1] // 2)]
    bias = torch.randn(size[0], generator=generator)
    dense = logits.clone()
    dense[:, ids] += bias[:, None].to(dense.dtype)
    sparse = kernels.logprob_entropy(logits, target, bias_ids=ids, bias_T=bias, backend=backend)
    for value, other in zip(sparse, kernels.logprob_entropy(dense, target, backend=backend), strict=True):
        torch.testing.assert_close(value, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@given(seed=seeds, size=sizes)
def test_gradients_of_a_row_add_up_to_zero_and_repeat_exactly(backend: str, seed: int, size: tuple[int, int]) -> None:
    logits, target = _case(seed, size, 2.0)
    gradients = []
    for _ in range(2):
        leaf = logits.clone().requires_grad_()
        logp, entropy = kernels.logprob_entropy(leaf, target, backend=backend)
        (logp + 0.5 * entropy).sum().backward()
        assert leaf.grad is not None
        gradients.append(leaf.grad)
    assert torch.equal(*gradients)
    assert gradients[0].sum(dim=-1).abs().max() < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
@given(seed=seeds, size=sizes, share=st.floats(0, 0.9))
def test_impossible_tokens_act_as_if_the_vocabulary_did_not_hold_them(
    backend: str, seed: int, size: tuple[int, int], share: float
) -> None:
    logits, _ = _case(seed, size, 2.0)
    kept = torch.rand(size[1], generator=torch.Generator().manual_seed(seed)) >= share
    kept[0] = True
    target = torch.zeros(size[0], dtype=torch.int64)
    masked = torch.where(kept, logits, -math.inf).requires_grad_()
    values = kernels.logprob_entropy(masked, target, backend=backend)
    for value, other in zip(values, kernels.logprob_entropy(logits[:, kept], target, backend=backend), strict=True):
        torch.testing.assert_close(value, other, atol=1e-5, rtol=1e-5)
    (values[0] + values[1]).sum().backward()
    assert masked.grad is not None
    assert torch.isfinite(masked.grad).all() and not masked.grad[:, ~kept].any()


@given(seed=seeds, size=sizes, width=st.integers(1, 8), chunk=st.integers(1, 12), softcap=st.sampled_from([None, 3.0]))
def test_chunked_heads_equal_the_whole_product(
    seed: int, size: tuple[int, int], width: int, chunk: int, softcap: float | None
) -> None:
    tokens, vocabulary = size
    generator = torch.Generator().manual_seed(seed)
    hidden, weight = (torch.randn(n, width, generator=generator, dtype=torch.float64) for n in (tokens, vocabulary))
    target = torch.randint(vocabulary, (tokens,), generator=generator)
    temperature, mix = (torch.rand(tokens, generator=generator, dtype=torch.float64) + 0.5 for _ in range(2))
    gradients = []
    for chunked in (False, True):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        if chunked:
            shaping = LogitShaping(temperature, None, None)
            options = {"return_raw": True, "head_bias_V": None, "softcap": softcap, "max_tokens": chunk, "block_bytes": 64}
            values = eager_linear.from_hidden(h, w, target, shaping, **options)
        else:
            options = {"temperature_T": temperature, "softcap": softcap, "return_raw": True, "backend": "reference"}
            values = kernels.linear_logprob_entropy(h, w, target, **options)
        loss = sum((k - 1.5) * (mix * value).sum() for k, value in enumerate(values))
        loss.backward()  # pyright: ignore
        gradients.append((*(value.detach().float() for value in values), h.grad, w.grad))
    for value, other in zip(*gradients, strict=True):
        torch.testing.assert_close(value, other, atol=1e-5, rtol=1e-4)
