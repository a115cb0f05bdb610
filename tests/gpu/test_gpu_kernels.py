"""Triton kernels on a GPU against the reference in float64: log-probs, shaping, advantages; odd sizes and real ones.

Needs torch, triton and pytest only: `python -m pytest --noconftest tests/gpu/test_gpu_kernels.py` runs where the rest of the
project is not installed. With TRITON_INTERPRET=1 as well, and no GPU, Triton's interpreter runs the cases without `real` or
`memory` in their name; those with bfloat16 products fail there (docs/kernels.md).
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import kernels
from tests.gpu.agreement import DEVICE, DTYPES, GRADIENT, ODD, REAL, Shape, agree, compare, normal

pytestmark = pytest.mark.gpu

def _case(shape: Shape, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    tokens, hidden, vocabulary = shape
    generator = torch.Generator().manual_seed(sum(shape))
    return {
        "hidden": normal(generator, tokens, hidden, dtype=dtype),
        "weight": normal(generator, vocabulary, hidden, dtype=dtype, scale=2.0 / math.sqrt(hidden)),
        "bias": normal(generator, vocabulary, dtype=dtype),
        "logits": normal(generator, tokens, vocabulary, dtype=dtype, scale=2.0),
        "target": torch.randint(vocabulary, (tokens,), generator=generator).to(DEVICE),
        "temperature": (torch.rand(tokens, generator=generator) + 0.5).to(DEVICE),
        "shift": normal(generator, tokens),
    }


def _shaping(case: dict[str, torch.Tensor], kind: str) -> dict[str, Any]:
    shaped: dict[str, Any] = {} if kind == "raw" else {"temperature_T": case["temperature"]}
    return shaped | ({"bias_ids": [1, 0], "bias_T": case["shift"]} if kind == "biased" else {})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["raw", "tempered", "biased"])
@pytest.mark.parametrize("return_raw", [False, True])
@pytest.mark.parametrize("shape", ODD, ids=str)
def test_log_probs_and_entropies_of_logits(shape: Shape, return_raw: bool, kind: str, dtype: torch.dtype) -> None:
    case = _case(shape, dtype)
    options = {**_shaping(case, kind), "return_raw": return_raw}
    compare(lambda z, b: kernels.logprob_entropy(z, case["target"], backend=b, **options), [case["logits"]])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["raw", "biased"])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("shape", ODD, ids=str)
def test_log_probs_and_entropies_of_hidden_states(shape: Shape, softcap: float | None, kind: str, dtype: torch.dtype) -> None:
    case = _case(shape, dtype)
    options = {**_shaping(case, kind), "return_raw": True, "softcap": softcap}

    def call(h: torch.Tensor, w: torch.Tensor, b: torch.Tensor, backend: str) -> tuple[torch.Tensor, ...]:
        return kernels.linear_logprob_entropy(h, w, case["target"], head_bias_V=b, backend=backend, **options)

    compare(call, [case["hidden"], case["weight"], case["bias"]])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["raw", "biased"])
@pytest.mark.parametrize("shape", REAL, ids=str)
def test_real_sizes_of_logits(shape: Shape, kind: str, dtype: torch.dtype) -> None:
    test_log_probs_and_entropies_of_logits(shape, kind == "biased", kind, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["raw", "biased"])
@pytest.mark.parametrize("shape", REAL, ids=str)
def test_real_sizes_of_hidden_states(shape: Shape, kind: str, dtype: torch.dtype) -> None:
    test_log_probs_and_entropies_of_hidden_states(shape, None, kind, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_blocks_of_the_backward_pass_change_nothing(dtype: torch.dtype) -> None:
    from kernels import triton_linear
    from kernels.shaping import LogitShaping

    case = _case((130, 96, 1000), dtype)
    shaping = LogitShaping(case["temperature"], None, None)
    gradients = []
    for block_bytes in (1, 2**28):
        hidden, weight = case["hidden"].clone().requires_grad_(), case["weight"].clone().requires_grad_()
        options: dict[str, Any] = {"return_raw": False, "head_bias_V": None, "softcap": None, "block_bytes": block_bytes}
        logp, entropy = triton_linear.from_hidden(hidden, weight, case["target"], shaping, **options)
        (logp.sum() + entropy.sum()).backward()
        gradients.append((hidden.grad, weight.grad))
    for found, expected in zip(*gradients, strict=True):
        agree(found, expected, GRADIENT[dtype], "gradient")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_gradient_may_overwrite_the_logits(dtype: torch.dtype) -> None:
    case = _case((130, 96, 1000), dtype)
    gradients = []
    for inplace in (False, True):
        leaf = case["logits"].clone().requires_grad_()
        logits, options = leaf * 1.0, {**_shaping(case, "biased"), "inplace_backward": inplace}
        values = kernels.logprob_entropy(logits, case["target"], backend="triton", **options)
        before = logits.detach().clone()
        (values[0] + values[1]).sum().backward()
        gradients.append(leaf.grad)
        assert torch.equal(logits.detach(), before) is not inplace
    assert torch.equal(*gradients)


def test_banned_tokens_and_huge_logits_are_exact() -> None:
    logits = torch.tensor([[0.0, 0.0, -math.inf], [1e4, -1e4, 0.0], [-3e4, -3e4, -3e4]], device=DEVICE, requires_grad=True)
    logp, entropy = kernels.logprob_entropy(logits, torch.tensor([0, 0, 2], device=DEVICE), backend="triton")
    torch.testing.assert_close(logp.cpu(), torch.tensor([-math.log(2), 0.0, -math.log(3)]))
    torch.testing.assert_close(entropy.cpu(), torch.tensor([math.log(2), 0.0, math.log(3)]))
    (logp + entropy).sum().backward()
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad[0].cpu(), torch.tensor([0.5, -0.5, 0.0]))
    assert logits.grad[1:].sum(dim=-1).abs().max() < 1e-6


def test_huge_logits_of_hidden_states_are_exact() -> None:
    hidden = torch.full((1, 20), 100.0, device=DEVICE, requires_grad=True)
    weight, target = torch.full((3, 20), -20.0, device=DEVICE), torch.tensor([2], device=DEVICE)
    logp, entropy = kernels.linear_logprob_entropy(hidden, weight, target, backend="triton")
    torch.testing.assert_close(torch.cat([-logp, entropy]).cpu(), torch.full((2,), math.log(3)))
    logp.sum().backward()
    assert hidden.grad is not None and hidden.grad.abs().max() < 1e-4


def test_no_tokens_give_empty_values_and_zero_gradients() -> None:
    hidden = torch.zeros(0, 16, device=DEVICE, requires_grad=True)
    weight, target = torch.ones(30, 16, device=DEVICE, requires_grad=True), torch.zeros(0, dtype=torch.int64, device=DEVICE)
    values = kernels.linear_logprob_entropy(hidden, weight, target, return_raw=True, backend="triton")
    assert [value.shape for value in values] == [(0,)] * 4
    torch.cat(values).sum().backward()
    assert weight.grad is not None and not weight.grad.any()


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16], ids=str)
@pytest.mark.parametrize("vocabulary", [301, 8192 + 3])
@pytest.mark.parametrize("biased", [False, True])
def test_logits_are_shaped_in_place(biased: bool, vocabulary: int, dtype: torch.dtype) -> None:
    _check_shaping(6, vocabulary, dtype, biased=biased)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocabulary", [49_152, 151_936])
def test_real_sizes_of_shaping_in_place(vocabulary: int, dtype: torch.dtype) -> None:
    _check_shaping(256, vocabulary, dtype, biased=True)


def _check_shaping(rows: int, vocabulary: int, dtype: torch.dtype, *, biased: bool) -> None:
    generator = torch.Generator().manual_seed(vocabulary)
    wide = normal(generator, rows, vocabulary + 5, dtype=dtype, scale=2.0)
    logits = wide[:, :vocabulary]  # rows need not be next to each other
    logits[2, 7] = -math.inf
    options: dict[str, Any] = {"base": 0.7}
    if biased:
        options |= {"bias_ids": [3, vocabulary - 1], "bias_B": normal(generator, rows)}
    tau = (torch.arange(rows) % 3 * 0.1).to(DEVICE)
    own = kernels.TemperatureRule(torch.linspace(0.5, 2.0, rows, device=DEVICE), 1.2, 0.4, tau=tau)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 4e-3, torch.float16: 1e-3}[dtype]
    for rule in (None, kernels.TemperatureRule(math.log(4.0), above=1.2, below=0.4, tau=0.3), own):
        expected = kernels.shape_logits_(logits.float().clone(), temperature_rule=rule, backend="reference", **options)
        mine = wide.clone()
        found = kernels.shape_logits_(mine[:, :vocabulary], temperature_rule=rule, backend="triton", **options)
        assert found.data_ptr() == mine.data_ptr() and torch.equal(mine[:, vocabulary:], wide[:, vocabulary:])
        assert torch.equal(torch.isneginf(found), torch.isneginf(expected))
        finite = torch.isfinite(expected)
        agree(found[finite], expected[finite], tolerance, "shaped logits")


def _rollouts(count: int, groups: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(count)
    reward = torch.randint(0, 4, (count,), generator=generator).float()
    reward[::7] = math.nan
    group = torch.randint(0, groups, (count,), generator=generator) * 10 - 20
    budget = torch.tensor([32.0, 64.0, math.inf])[torch.randint(0, 3, (count,), generator=generator)]
    length = torch.randint(0, 9, (count,), generator=generator)
    ceiling = torch.where(torch.isinf(budget), math.nan, 3.0)
    start = torch.cat([torch.zeros(1, dtype=torch.int64), length.cumsum(0)])
    return {"reward": reward, "group": group, "budget": budget, "ceiling": ceiling, "length": length, "start": start}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("count", "groups", "against"), [(1, 1, "reference"), (23, 5, "reference"), (4096, 256, "eager")])
def test_advantages_of_ragged_groups(count: int, groups: int, against: str, packed: bool) -> None:
    data = _rollouts(count, groups)

    def run(backend: str, device: str) -> list[torch.Tensor]:
        d = {name: value.to(device) for name, value in data.items()}
        o: dict[str, Any] = {"start_N": d["start"], "tokens": int(data["start"][-1])} if packed else {}
        o["backend"] = backend
        two_level = (d["reward"], d["group"], d["budget"], d["ceiling"])
        by_token = (d["reward"], d["length"], d["group"])
        return [
            kernels.group_normalised_advantage(d["reward"], d["group"], **o),
            kernels.hierarchical_advantage(*two_level, intra_coef=0.3, **o),
            kernels.hierarchical_advantage(*two_level, intra_scale="spread", **o),
            kernels.token_level_group_average_advantage(*by_token, **o),
            kernels.token_level_group_average_advantage(*by_token, guard=1.0, **o),
            kernels.token_level_group_average_advantage(*by_token, guard=None, **o),
        ]

    for found, expected in zip(run("triton", DEVICE), run(against, "cpu"), strict=True):
        torch.testing.assert_close(found.cpu(), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_second_run_gives_the_same_bits(dtype: torch.dtype) -> None:
    """A sum that depended on the order of programs, or a race, would not."""
    case = _case((130, 96, 1000), dtype)
    runs = []
    for _ in range(2):
        hidden, weight = (case[name].clone().requires_grad_() for name in ("hidden", "weight"))
        values = kernels.linear_logprob_entropy(hidden, weight, case["target"], backend="triton", **_shaping(case, "biased"))
        torch.cat(values).sum().backward()
        runs.append([*values, hidden.grad, weight.grad])
    assert all(torch.equal(one, other) for one, other in zip(*runs, strict=True))


def test_a_real_matrix_of_more_than_two_to_the_31_logits_is_addressed_to_its_last_row() -> None:
    tokens, vocabulary = 16_384, 151_936
    logits = torch.zeros(tokens, vocabulary, dtype=torch.bfloat16, device=DEVICE)
    last = normal(torch.Generator().manual_seed(0), 2, vocabulary, dtype=torch.bfloat16, scale=2.0)
    logits[-2:] = last
    target = torch.full((tokens,), vocabulary - 1, device=DEVICE)
    logits.requires_grad_()
    values = kernels.logprob_entropy(logits, target, backend="triton")
    (values[0][-2:].sum() + values[1].sum()).backward()
    alone = last.clone().requires_grad_()
    expected = kernels.logprob_entropy(alone, target[-2:], backend="triton")
    (expected[0] + expected[1]).sum().backward()
    assert logits.grad is not None and alone.grad is not None
    assert torch.equal(torch.stack(values)[:, -2:], torch.stack(expected)) and torch.equal(logits.grad[-2:], alone.grad)
    torch.testing.assert_close(values[1][0].item(), math.log(vocabulary), atol=1e-4, rtol=0)
    del logits.grad, values
    rule = kernels.TemperatureRule(math.log(4.0), above=1.2, below=0.4, tau=0.3)
    shaped = kernels.shape_logits_(logits.detach(), temperature_rule=rule, backend="triton")
    assert torch.equal(shaped[-2:], kernels.shape_logits_(last, temperature_rule=rule, backend="triton"))
