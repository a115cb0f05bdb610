"""Every Triton kernel on a GPU against the reference in float64: values, gradients, odd and real sizes, memory.

Needs torch, triton and pytest only: `python -m pytest --noconftest tests/gpu/test_gpu_kernels.py` runs it where the rest of the
project is not installed. With TRITON_INTERPRET=1 as well, and no GPU, Triton's interpreter runs the cases without `real` or
`memory` in their name; those with bfloat16 products fail there (docs/kernels.md).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

import kernels

pytestmark = pytest.mark.gpu

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ODD = [(1, 16, 2), (5, 7, 11), (33, 20, 301), (130, 96, 1000)]
"""Tokens, hidden size, vocabulary: less than a tile, and a tile and a bit."""
REAL = [(257, 576, 49_152), (130, 896, 151_936)]
DTYPES = [torch.float32, torch.bfloat16]
GRADIENT = {torch.float32: 1e-4, torch.bfloat16: 8e-3}
"""Relative error (2-norm) allowed to a gradient, which has the dtype of what it is the gradient of."""
ROUNDED = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
"""The same where logits are products rounded to the dtype."""
VALUE = 1e-4
"""The same for values computed in float32 from given numbers."""

Shape = tuple[int, int, int]


def _normal(generator: torch.Generator, *shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(*shape, generator=generator) * scale).to(dtype).to(DEVICE)


def _case(shape: Shape, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    tokens, hidden, vocabulary = shape
    generator = torch.Generator().manual_seed(sum(shape))
    return {
        "hidden": _normal(generator, tokens, hidden, dtype=dtype),
        "weight": _normal(generator, vocabulary, hidden, dtype=dtype, scale=2.0 / math.sqrt(hidden)),
        "bias": _normal(generator, vocabulary, dtype=dtype),
        "logits": _normal(generator, tokens, vocabulary, dtype=dtype, scale=2.0),
        "target": torch.randint(vocabulary, (tokens,), generator=generator).to(DEVICE),
        "temperature": (torch.rand(tokens, generator=generator) + 0.5).to(DEVICE),
        "shift": _normal(generator, tokens),
    }


def _shaping(case: dict[str, torch.Tensor], kind: str) -> dict[str, Any]:
    shaped: dict[str, Any] = {} if kind == "raw" else {"temperature_T": case["temperature"]}
    return shaped | ({"bias_ids": [1, 0], "bias_T": case["shift"]} if kind == "biased" else {})


def _agree(found: torch.Tensor, expected: torch.Tensor, tolerance: float, name: str) -> None:
    """Relative error in the 2-norm, and no entry off by more than twenty times that share of the largest."""
    assert found.shape == expected.shape, name
    difference = found.double() - expected.double()
    assert bool(torch.isfinite(found).all()), f"{name} is not finite everywhere"
    error = float(difference.norm() / expected.double().norm().clamp(min=1e-3))
    worst = float(difference.abs().max() / expected.double().abs().max().clamp(min=1e-3)) if found.numel() else 0.0
    assert error <= tolerance and worst <= 20 * tolerance, f"{name}: relative error {error:.2e}, worst {worst:.2e}"


def _compare(
    call: Callable[..., tuple[torch.Tensor, ...]],
    leaves: Sequence[torch.Tensor],
    *,
    value: float = VALUE,
    gradient: dict[torch.dtype, float] = GRADIENT,
) -> None:
    """``call(*leaves, backend)`` on triton against the reference in float64: values, and gradients of a mixture of them."""
    results = []
    for backend in ("triton", "reference"):
        exact = backend == "reference"
        copies = [(leaf.double() if exact else leaf.clone()).requires_grad_() for leaf in leaves]
        values = call(*copies, backend)
        mixture = [torch.linspace(-1.0, 2.0, v.numel(), device=v.device, dtype=v.dtype).roll(k) for k, v in enumerate(values)]
        sum((m * v).sum() for m, v in zip(mixture, values, strict=True)).backward()  # pyright: ignore
        results.append((values, [copy.grad for copy in copies]))
    for k, (found, expected) in enumerate(zip(results[0][0], results[1][0], strict=True)):
        assert found.dtype == torch.float32
        _agree(found.detach(), expected.detach(), value, f"value {k}")
    for k, (found, expected) in enumerate(zip(results[0][1], results[1][1], strict=True)):
        assert found is not None and expected is not None and found.dtype == leaves[k].dtype
        _agree(found, expected, gradient[found.dtype], f"gradient {k}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["raw", "tempered", "biased"])
@pytest.mark.parametrize("return_raw", [False, True])
@pytest.mark.parametrize("shape", ODD, ids=str)
def test_log_probs_and_entropies_of_logits(shape: Shape, return_raw: bool, kind: str, dtype: torch.dtype) -> None:
    case = _case(shape, dtype)
    options = {**_shaping(case, kind), "return_raw": return_raw}
    _compare(lambda z, b: kernels.logprob_entropy(z, case["target"], backend=b, **options), [case["logits"]])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["raw", "biased"])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("shape", ODD, ids=str)
def test_log_probs_and_entropies_of_hidden_states(shape: Shape, softcap: float | None, kind: str, dtype: torch.dtype) -> None:
    case = _case(shape, dtype)
    options = {**_shaping(case, kind), "return_raw": True, "softcap": softcap}

    def call(h: torch.Tensor, w: torch.Tensor, b: torch.Tensor, backend: str) -> tuple[torch.Tensor, ...]:
        return kernels.linear_logprob_entropy(h, w, case["target"], head_bias_V=b, backend=backend, **options)

    _compare(call, [case["hidden"], case["weight"], case["bias"]])


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
        _agree(found, expected, GRADIENT[dtype], "gradient")


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
    kl, alpha = kernels.linear_alignment_kl((hidden, weight), (hidden, weight), (hidden, weight), r=1.0, backend="triton")
    assert [value.shape for value in (*values, kl, alpha)] == [(0,)] * 6
    torch.cat([*values, kl]).sum().backward()
    assert weight.grad is not None and not weight.grad.any()


def _models(shape: Shape, dtype: torch.dtype) -> list[tuple[torch.Tensor, torch.Tensor]]:
    tokens, hidden, vocabulary = shape
    generator = torch.Generator().manual_seed(sum(shape))
    widths = (hidden, hidden + 8, max(hidden // 2, 1))  # hidden sizes may differ between the models
    return [
        (_normal(generator, tokens, h, dtype=dtype), _normal(generator, vocabulary, h, dtype=dtype, scale=1.5 / math.sqrt(h)))
        for h in widths
    ]


def _check_alignment_of_logits(shape: Shape, dtype: torch.dtype, r: float) -> None:
    student, dpo, reverse = [(h @ w.T) for h, w in _models(shape, dtype)]
    student[:, 1] = dpo[:, 1] = reverse[:, 1] = -math.inf

    def call(z: torch.Tensor, backend: str) -> tuple[torch.Tensor, ...]:
        frozen = [x.double() if backend == "reference" else x for x in (dpo, reverse)]
        return kernels.alignment_kl(z, *frozen, r=r, backend=backend)

    _agree(call(student, "triton")[1], call(student.double(), "reference")[1], VALUE, "alpha")
    _compare(lambda z, backend: call(z, backend)[:1], [student])


def _check_alignment_of_hidden_states(shape: Shape, dtype: torch.dtype) -> None:
    student, *frozen = _models(shape, dtype)

    def call(h: torch.Tensor, w: torch.Tensor, backend: str) -> tuple[torch.Tensor, ...]:
        dpo, reverse = [(x.double(), y.double()) if backend == "reference" else (x, y) for x, y in frozen]
        return kernels.linear_alignment_kl((h, w), dpo, reverse, r=3.0, backend=backend)[:1]

    _compare(call, student, value=ROUNDED[dtype], gradient=ROUNDED)


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
        _agree(found, expected, 1e-5, str(k))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16], ids=str)
@pytest.mark.parametrize("vocabulary", [301, 4096 + 3])
@pytest.mark.parametrize("biased", [False, True])
def test_logits_are_shaped_in_place(biased: bool, vocabulary: int, dtype: torch.dtype) -> None:
    _check_shaping(6, vocabulary, dtype, biased=biased)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocabulary", [49_152, 151_936])
def test_real_sizes_of_shaping_in_place(vocabulary: int, dtype: torch.dtype) -> None:
    _check_shaping(256, vocabulary, dtype, biased=True)


def _check_shaping(rows: int, vocabulary: int, dtype: torch.dtype, *, biased: bool) -> None:
    generator = torch.Generator().manual_seed(vocabulary)
    wide = _normal(generator, rows, vocabulary + 5, dtype=dtype, scale=2.0)
    logits = wide[:, :vocabulary]  # rows need not be next to each other
    logits[2, 7] = -math.inf
    options: dict[str, Any] = {"base": 0.7}
    if biased:
        options |= {"bias_ids": [3, vocabulary - 1], "bias_B": _normal(generator, rows)}
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
        _agree(found[finite], expected[finite], tolerance, "shaped logits")


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
    case, (student, *frozen) = _case((130, 96, 1000), dtype), _models((130, 96, 1000), dtype)
    runs = []
    for _ in range(2):
        hidden, weight = (case[name].clone().requires_grad_() for name in ("hidden", "weight"))
        values = kernels.linear_logprob_entropy(hidden, weight, case["target"], backend="triton", return_raw=True)
        kl, _ = kernels.linear_alignment_kl((student[0], weight), *frozen, r=3.0, backend="triton")
        torch.cat([*values, kl]).sum().backward()
        runs.append([*values, kl, hidden.grad, weight.grad])
    assert all(torch.equal(one, other) for one, other in zip(*runs, strict=True))


def test_a_real_matrix_of_more_than_two_to_the_31_logits_is_addressed_to_its_last_row() -> None:
    tokens, vocabulary = 16_384, 151_936
    logits = torch.zeros(tokens, vocabulary, dtype=torch.bfloat16, device=DEVICE)
    last = _normal(torch.Generator().manual_seed(0), 2, vocabulary, dtype=torch.bfloat16, scale=2.0)
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


def _peak_bytes(step: Callable[[], None]) -> int:
    """Most memory that ``step`` holds at once beyond what was there."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    return torch.cuda.max_memory_allocated() - before


def test_memory_of_a_distillation_step_stays_within_one_and_a_half_of_a_policy_step() -> None:
    tokens, width, vocabulary = 4096, 2048, 151_936
    generator = torch.Generator(DEVICE).manual_seed(0)

    def model() -> tuple[torch.Tensor, torch.Tensor]:
        hidden = torch.randn(tokens, width, generator=generator, device=DEVICE, dtype=torch.bfloat16)
        return hidden, torch.randn(vocabulary, width, generator=generator, device=DEVICE, dtype=torch.bfloat16) * 0.03

    student, dpo, reverse = model(), model(), model()
    leaves = [x.requires_grad_() for x in student]
    target = torch.randint(vocabulary, (tokens,), generator=generator, device=DEVICE)

    def policy() -> None:
        logp, entropy = kernels.linear_logprob_entropy(leaves[0], leaves[1], target, backend="triton")
        (logp.mean() + entropy.mean()).backward()

    def distillation() -> None:
        kernels.linear_alignment_kl((leaves[0], leaves[1]), dpo, reverse, r=2.0, backend="triton")[0].mean().backward()

    peaks = []
    for step in (policy, distillation):
        peaks.append(_peak_bytes(step))
        for leaf in leaves:
            leaf.grad = None
    gradients = sum(x.numel() * x.element_size() for x in leaves)
    assert peaks[0] < gradients + 0.3 * tokens * vocabulary * 2, f"the policy step holds {peaks[0] / 2**20:.0f} MiB"
    assert peaks[1] <= 1.5 * peaks[0], f"distillation {peaks[1] / 2**20:.0f} MiB, policy {peaks[0] / 2**20:.0f} MiB"
