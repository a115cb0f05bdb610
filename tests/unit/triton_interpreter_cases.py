"""The Triton kernels, run by Triton's interpreter, against the reference: values, gradients, awkward shapes, extreme logits.

Run by test_kernels_triton.py with TRITON_INTERPRET=1 in a process of its own: Triton looks at that when it is first imported.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

import kernels

SHAPES = [(1, 16, 2), (5, 7, 11), (33, 20, 301)]
"""Tokens, hidden size, vocabulary: none a multiple of a tile."""


def _case(tokens: int, hidden: int, vocabulary: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    return {
        "hidden": torch.randn(tokens, hidden, generator=generator),
        "weight": torch.randn(vocabulary, hidden, generator=generator),
        "bias": torch.randn(vocabulary, generator=generator),
        "target": torch.randint(vocabulary, (tokens,), generator=generator),
        "temperature": torch.rand(tokens, generator=generator) + 0.5,
        "shift": torch.randn(tokens, generator=generator),
    }


def _shaping(case: dict[str, torch.Tensor], kind: str) -> dict[str, Any]:
    shaped: dict[str, Any] = {} if kind == "raw" else {"temperature_T": case["temperature"]}
    return shaped | ({"bias_ids": [1, 0], "bias_T": case["shift"]} if kind == "biased" else {})


def _compare(call: Callable[..., tuple[torch.Tensor, ...]], leaves: list[torch.Tensor], *, atol: float = 3e-5) -> None:
    """Values and gradients of a fixed mixture of them, both backends."""
    results = []
    for backend in ("reference", "triton"):
        copies = [leaf.clone().requires_grad_() for leaf in leaves]
        values = call(*copies, backend=backend)
        mixture = [torch.linspace(-1.0, 2.0, value.numel()).roll(k) for k, value in enumerate(values)]
        sum((m * v).sum() for m, v in zip(mixture, values, strict=True)).backward()  # pyright: ignore
        results.append([*(value.detach() for value in values), *(copy.grad for copy in copies)])
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, atol=atol, rtol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["raw", "tempered", "biased"])
@pytest.mark.parametrize("return_raw", [False, True])
def test_values_and_gradients_from_logits(shape: tuple[int, int, int], kind: str, return_raw: bool) -> None:
    case = _case(*shape)
    options = {**_shaping(case, kind), "return_raw": return_raw}
    logits = case["hidden"] @ case["weight"].T
    _compare(lambda z, backend: kernels.logprob_entropy(z, case["target"], backend=backend, **options), [logits])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["raw", "biased"])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_values_and_gradients_from_hidden_states(shape: tuple[int, int, int], kind: str, softcap: float | None) -> None:
    case = _case(*shape)
    options = {**_shaping(case, kind), "return_raw": True, "softcap": softcap}

    def call(h: torch.Tensor, w: torch.Tensor, b: torch.Tensor, backend: str) -> tuple[torch.Tensor, ...]:
        return kernels.linear_logprob_entropy(h, w, case["target"], head_bias_V=b, backend=backend, **options)

    _compare(call, [case["hidden"], case["weight"], case["bias"]])


@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_the_gradient_may_overwrite_the_logits(backend: str) -> None:
    case = _case(5, 7, 11)
    gradients = []
    for inplace in (False, True):
        leaf = (case["hidden"] @ case["weight"].T).requires_grad_()
        logits = leaf * 1.0  # not a leaf: torch keeps those from being overwritten unseen
        options = {**_shaping(case, "biased"), "inplace_backward": inplace}
        values = kernels.logprob_entropy(logits, case["target"], backend=backend, **options)
        before = logits.detach().clone()
        (values[0] + values[1]).sum().backward()
        gradients.append(leaf.grad)
        assert torch.equal(logits.detach(), before) is not inplace
    torch.testing.assert_close(*gradients)


def test_small_blocks_of_the_backward_pass_change_nothing() -> None:
    from kernels import triton_linear
    from kernels.shaping import LogitShaping

    case = _case(33, 20, 301)
    shaping = LogitShaping(case["temperature"], None, None)
    gradients = []
    for block_bytes in (1, 2**20):
        hidden, weight = case["hidden"].clone().requires_grad_(), case["weight"].clone().requires_grad_()
        options = {"return_raw": False, "head_bias_V": None, "softcap": None, "block_bytes": block_bytes}
        logp, entropy = triton_linear.from_hidden(hidden, weight, case["target"], shaping, **options)
        (logp.sum() + entropy.sum()).backward()
        gradients.append((hidden.grad, weight.grad))
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_banned_tokens_and_huge_logits_are_exact(backend: str) -> None:
    logits = torch.tensor([[0.0, 0.0, -math.inf], [1e4, -1e4, 0.0], [-3e4, -3e4, -3e4]], requires_grad=True)
    logp, entropy = kernels.logprob_entropy(logits, torch.tensor([0, 0, 2]), backend=backend)
    torch.testing.assert_close(logp, torch.tensor([-math.log(2), 0.0, -math.log(3)]))
    torch.testing.assert_close(entropy, torch.tensor([math.log(2), 0.0, math.log(3)]))
    (logp + entropy).sum().backward()
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad[0], torch.tensor([0.5, -0.5, 0.0]))
    assert logits.grad[1:].sum(dim=-1).abs().max() < 1e-6


@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_huge_logits_from_hidden_states_are_exact(backend: str) -> None:
    hidden, weight = torch.full((1, 16), 100.0, requires_grad=True), torch.full((3, 16), -20.0)
    logp, entropy = kernels.linear_logprob_entropy(hidden, weight, torch.tensor([2]), backend=backend)
    torch.testing.assert_close(torch.cat([-logp, entropy]), torch.full((2,), math.log(3)))
    logp.sum().backward()
    assert hidden.grad is not None and hidden.grad.abs().max() < 1e-4


def test_the_vocabulary_of_a_large_model_that_is_no_multiple_of_anything() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 151_937, generator=generator)
    target = torch.tensor([151_936, 0])
    for found, expected in zip(*(kernels.logprob_entropy(logits, target, backend=b) for b in ("triton", "eager")), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_are_shaped_as_by_the_reference(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 301, generator=generator).to(dtype)
    logits[2, 7] = -math.inf
    rule = kernels.TemperatureRule(math.log(4.0), above=1.2, below=0.4, tau=0.3)
    options: dict[str, Any] = {"bias_ids": [3, 300], "bias_B": torch.randn(6, generator=generator), "base": 0.7}
    own = kernels.TemperatureRule(torch.linspace(0.5, 2.0, 6), 1.2, 0.4, tau=torch.tensor([0.3, 0.0, 0.1, 0.3, 0.0, 0.2]))
    for chosen in (None, rule, own):
        expected = kernels.shape_logits_(logits.float().clone(), temperature_rule=chosen, backend="reference", **options)
        found = kernels.shape_logits_(logits.clone(), temperature_rule=chosen, backend="triton", **options)
        torch.testing.assert_close(found.float(), expected, atol=2e-6 if dtype == torch.float32 else 0.05, rtol=1e-2)


def test_the_alignment_kl_and_its_gradients() -> None:
    generator = torch.Generator().manual_seed(0)
    heads = [(torch.randn(5, h, generator=generator), torch.randn(37, h, generator=generator)) for h in (8, 6, 4)]
    logits = [h @ w.T for h, w in heads]
    logits[1][:, 3] = logits[2][:, 3] = -math.inf
    logits[0][:, 3] = -math.inf

    def by_logits(student: torch.Tensor, backend: str) -> tuple[torch.Tensor, ...]:
        return kernels.alignment_kl(student, logits[1], logits[2], r=3.0, backend=backend)[:1]

    def by_hidden(h: torch.Tensor, w: torch.Tensor, backend: str) -> tuple[torch.Tensor, ...]:
        return kernels.linear_alignment_kl((h, w), heads[1], heads[2], r=3.0, backend=backend)[:1]

    _compare(by_logits, [logits[0]])
    _compare(by_hidden, list(heads[0]), atol=1e-4)
    found, expected = (kernels.alignment_kl(*logits, r=3.0, backend=b)[1] for b in ("triton", "reference"))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("chunk_bytes", [2**12, 2**27])
@pytest.mark.parametrize(("shape", "count"), [((1, 16, 5), 1), ((5, 7, 11), 11), ((33, 20, 301), 64)])
def test_the_bucketed_kl_and_its_gradients(
    shape: tuple[int, int, int], count: int, chunk_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kernels import triton_bucket

    monkeypatch.setattr(triton_bucket, "CHUNK_BYTES", chunk_bytes)
    case, generator = _case(*shape), torch.Generator().manual_seed(1)
    ids = torch.stack([torch.randperm(shape[2], generator=generator)[:count] for _ in range(shape[0])])
    teacher = torch.log_softmax(torch.randn(shape[0], count + 1, generator=generator), dim=-1)

    def call(h: torch.Tensor, w: torch.Tensor, backend: str) -> tuple[torch.Tensor, ...]:
        return (kernels.linear_bucket_kl(h, w, ids, teacher[:, :count], teacher[:, count], backend=backend),)

    _compare(call, [case["hidden"], case["weight"] / 4], atol=1e-4)


def test_blocks_of_rows_longer_than_a_tile_are_shaped_to_their_first_column() -> None:
    logits = torch.randn(2, 8192 + 3, generator=torch.Generator().manual_seed(0))
    rule = kernels.TemperatureRule(math.log(4.0), above=1.2, below=0.4, tau=0.3)
    options: dict[str, Any] = {"bias_ids": [3, 8194], "bias_B": torch.tensor([1.0, -2.0]), "temperature_rule": rule}
    found, expected = (kernels.shape_logits_(logits.clone(), backend=b, **options) for b in ("triton", "reference"))
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("packed", [False, True])
def test_advantages_of_ragged_groups(packed: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    count = 23
    reward = torch.randint(0, 4, (count,), generator=generator).float()
    reward[::7] = math.nan
    group = torch.randint(0, 5, (count,), generator=generator) * 10 - 20
    budget = torch.tensor([32.0, 64.0, math.inf])[torch.randint(0, 3, (count,), generator=generator)]
    ceiling = torch.where(torch.isinf(budget), math.nan, 3.0)
    length = torch.randint(0, 9, (count,), generator=generator)
    start = torch.cat([torch.zeros(1, dtype=torch.int64), length.cumsum(0)])
    options: dict[str, Any] = {"start_N": start, "tokens": int(start[-1])} if packed else {}
    for call in (
        lambda b: kernels.group_normalised_advantage(reward, group, backend=b, **options),
        lambda b: kernels.hierarchical_advantage(reward, group, budget, ceiling, backend=b, **options),
        lambda b: kernels.hierarchical_advantage(reward, group, budget, ceiling, intra_scale="spread", backend=b, **options),
        lambda b: kernels.token_level_group_average_advantage(reward, length, group, backend=b, **options),
        lambda b: kernels.token_level_group_average_advantage(reward, length, group, guard=1.0, backend=b, **options),
    ):
        expected = call("reference")
        for backend in ("eager", "triton"):
            torch.testing.assert_close(call(backend), expected, atol=1e-6, rtol=1e-5)


def test_without_a_gpu_or_the_interpreter_the_backend_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(kernels.NotAvailable, match="needs tensors on a GPU, these are on cpu; use backend='eager'"):
        kernels.shape_logits_(torch.zeros(1, 2), backend="triton")
