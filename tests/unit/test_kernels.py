"""The log-probability kernels: backends against each other and against numerical gradients, chunking, and clear refusals."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

import kernels
from kernels import eager, eager_linear
from kernels.shaping import LogitShaping

TOKENS, HIDDEN, VOCABULARY = 7, 5, 11
BACKENDS = ("reference", "eager")


def _inputs(dtype: torch.dtype = torch.float64, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    return {
        "hidden": normal(TOKENS, HIDDEN),
        "weight": normal(VOCABULARY, HIDDEN),
        "head_bias": normal(VOCABULARY),
        "target": torch.randint(VOCABULARY, (TOKENS,), generator=generator),
        "temperature": torch.rand(TOKENS, generator=generator) + 0.5,
        "bias_ids": torch.tensor([3, 0, 8]),
        "bias": torch.randn(TOKENS, generator=generator),
    }


def _shaping(inputs: dict[str, torch.Tensor], shaped: bool) -> dict[str, torch.Tensor]:
    if not shaped:
        return {}
    return {"temperature_T": inputs["temperature"], "bias_ids": inputs["bias_ids"], "bias_T": inputs["bias"]}


def _linear(inputs: dict[str, torch.Tensor], backend: str, **options: Any) -> tuple[torch.Tensor, ...]:
    return kernels.linear_logprob_entropy(inputs["hidden"], inputs["weight"], inputs["target"], backend=backend, **options)


def _with_gradients(
    inputs: dict[str, torch.Tensor], call: Callable[[dict[str, torch.Tensor]], tuple[torch.Tensor, ...]], names: tuple[str, ...]
) -> tuple[tuple[torch.Tensor, ...], list[torch.Tensor]]:
    """Values and gradients of an arbitrary fixed mixture of all returned values."""
    leaves = {name: inputs[name].clone().requires_grad_() for name in names}
    values = call({**inputs, **leaves})
    mixture = [torch.linspace(-1.0, 2.0, TOKENS).roll(k) for k in range(len(values))]
    sum((m * v).sum() for m, v in zip(mixture, values, strict=True)).backward()  # pyright: ignore
    gradients = [leaf.grad for leaf in leaves.values() if leaf.grad is not None]
    assert len(gradients) == len(names)
    return tuple(value.detach() for value in values), gradients


def test_two_equal_logits_give_log_half_and_log_two() -> None:
    for backend in BACKENDS:
        logp, entropy = kernels.logprob_entropy(torch.zeros(1, 2), torch.tensor([1]), backend=backend)
        torch.testing.assert_close(torch.stack([logp, entropy]), torch.tensor([[-math.log(2)], [math.log(2)]]))


def test_the_entropy_of_a_known_row_has_its_worked_value() -> None:
    for backend in BACKENDS:
        logits = torch.tensor([[2.0, 1.0, 0.0, -1.0], [6.0, 0.0, 0.0, 0.0]])
        _, entropy = kernels.logprob_entropy(logits, torch.tensor([0, 0]), backend=backend)
        torch.testing.assert_close(entropy, torch.tensor([0.947537, 0.051697]), atol=1e-6, rtol=0)


@pytest.mark.parametrize("shaped", [False, True])
@pytest.mark.parametrize("return_raw", [False, True])
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_eager_equals_the_reference_in_values_and_gradients(
    shaped: bool, return_raw: bool, softcap: float | None, dtype: torch.dtype
) -> None:
    inputs = _inputs(dtype)
    names = ("hidden", "weight", "head_bias")

    def call(backend: str) -> tuple[tuple[torch.Tensor, ...], list[torch.Tensor]]:
        options = {"return_raw": return_raw, "softcap": softcap, **_shaping(inputs, shaped)}
        return _with_gradients(inputs, lambda i: _linear(i, backend, head_bias_V=i["head_bias"], **options), names)

    (expected, expected_gradients), (values, gradients) = call("reference"), call("eager")
    assert len(values) == (4 if return_raw else 2)
    for value, other in zip(values, expected, strict=True):
        torch.testing.assert_close(value, other.float(), atol=2e-6, rtol=1e-5)
    for value, other in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(value, other, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("tokens", "hidden", "vocabulary"), [(121, 56, 2376), (135, 14, 2374), (95, 32, 504), (86, 64, 1600), (512, 64, 1600)]
)
def test_the_shapes_of_verls_own_test_scaled_down(tokens: int, hidden: int, vocabulary: int) -> None:
    generator = torch.Generator().manual_seed(tokens)
    h, w = (torch.randn(n, hidden, generator=generator) for n in (tokens, vocabulary))
    target = torch.randint(vocabulary, (tokens,), generator=generator)
    results = []
    for backend in BACKENDS:
        leaves = [h.clone().requires_grad_(), w.clone().requires_grad_()]
        logp, entropy = kernels.linear_logprob_entropy(*leaves, target, backend=backend)
        (logp + 0.1 * entropy).sum().backward()
        results.append([logp.detach(), entropy.detach(), *(leaf.grad for leaf in leaves)])
    for value, other in zip(*results, strict=True):
        torch.testing.assert_close(value, other, atol=5e-4, rtol=1e-3)


@pytest.mark.parametrize("shaped", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_logits_and_hidden_states_give_the_same_values_and_gradients(shaped: bool, backend: str) -> None:
    inputs = _inputs(torch.float32)
    options = {"return_raw": True, "backend": backend, **_shaping(inputs, shaped)}
    by_logits, by_logits_gradient = _with_gradients(
        inputs, lambda i: kernels.logprob_entropy(i["hidden"] @ i["weight"].T, i["target"], **options), ("hidden", "weight")
    )
    by_hidden, by_hidden_gradient = _with_gradients(
        inputs, lambda i: kernels.linear_logprob_entropy(i["hidden"], i["weight"], i["target"], **options), ("hidden", "weight")
    )
    for value, other in zip((*by_hidden, *by_hidden_gradient), (*by_logits, *by_logits_gradient), strict=True):
        torch.testing.assert_close(value, other, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize(("tokens", "block"), [(3, 2), (100, 100)])
@pytest.mark.parametrize("both", [False, True])
def test_the_hand_written_gradients_pass_the_numerical_check(
    softcap: float | None, tokens: int, block: int, both: bool
) -> None:
    inputs = _inputs()
    shaping = LogitShaping(inputs["temperature"].double(), inputs["bias_ids"], inputs["bias"].double())
    plan = eager_linear._Plan(inputs["target"], shaping, both, softcap, tokens, 4 * min(tokens, TOKENS) * block)
    leaves = tuple(inputs[name].requires_grad_() for name in ("hidden", "weight", "head_bias"))
    for wanted in (slice(None), slice(0, 1), slice(1, 2), slice(2, 3) if both else slice(0, 1)):  # every value's own gradient too
        assert torch.autograd.gradcheck(lambda *x, w=wanted: eager_linear._FromHidden.apply(*x, plan)[w], leaves)  # pyright: ignore
    logits = (inputs["hidden"] @ inputs["weight"].T).detach().requires_grad_()
    plan = eager._Plan(inputs["target"], shaping, both, tokens)
    assert torch.autograd.gradcheck(lambda x: eager._FromLogits.apply(x, plan), (logits,))


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_result_is_float32_unless_the_reference_gets_float64(backend: str) -> None:
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        expected = torch.float64 if dtype == torch.float64 and backend == "reference" else torch.float32
        assert {value.dtype for value in _linear(_inputs(dtype), backend, return_raw=True)} == {expected}


def test_chunks_of_any_size_give_the_same_values_and_gradients() -> None:
    inputs = _inputs(torch.float32)
    shaping = LogitShaping(inputs["temperature"], inputs["bias_ids"], inputs["bias"])

    def call(tokens: int, block: int) -> tuple[tuple[torch.Tensor, ...], list[torch.Tensor]]:
        sizes = {"max_tokens": tokens, "block_bytes": 4 * tokens * block}
        options = {"return_raw": True, "head_bias_V": None, "softcap": None, **sizes}
        names = ("hidden", "weight")
        return _with_gradients(
            inputs, lambda i: eager_linear.from_hidden(i["hidden"], i["weight"], i["target"], shaping, **options), names
        )

    whole_values, whole_gradients = call(TOKENS, VOCABULARY)
    for tokens, block in ((1, 1), (2, 3), (3, VOCABULARY), (TOKENS, 4), (50, 50)):
        values, gradients = call(tokens, block)
        for value, other in zip((*values, *gradients), (*whole_values, *whole_gradients), strict=True):
            torch.testing.assert_close(value, other, atol=1e-6, rtol=1e-5)


def test_chunks_and_blocks_keep_the_logits_in_memory_small() -> None:
    identity = LogitShaping(None, None, None)
    target = torch.zeros(1, dtype=torch.int64)
    chunk = eager._plan(target, identity, False, None, False, vocabulary=150_000).chunk_tokens
    assert 48 * 2**20 < chunk * 150_000 * 4 <= 64 * 2**20
    plan = eager_linear._Plan(target, identity, False, None, eager_linear.MAX_TOKENS, eager_linear.BLOCK_BYTES)
    for tokens in (1, 100, eager_linear.MAX_TOKENS):
        assert 4 * tokens * plan.block(tokens, 10**9) <= eager_linear.BLOCK_BYTES < 4 * tokens * (plan.block(tokens, 10**9) + 1)


def test_bfloat16_inputs_are_close_to_float32_and_get_bfloat16_gradients() -> None:
    rounded = {name: value.bfloat16() if value.is_floating_point() else value for name, value in _inputs().items()}
    rounded["temperature"], rounded["bias"] = rounded["temperature"].float(), rounded["bias"].float()
    exact = {name: value.float() if value.is_floating_point() else value for name, value in rounded.items()}
    names = ("hidden", "weight")
    values, gradients = _with_gradients(rounded, lambda i: _linear(i, "eager", **_shaping(i, True)), names)
    expected, expected_gradients = _with_gradients(exact, lambda i: _linear(i, "reference", **_shaping(i, True)), names)
    for value, other in zip(values, expected, strict=True):
        torch.testing.assert_close(value, other, atol=0.05, rtol=0)
    for value, other in zip(gradients, expected_gradients, strict=True):
        assert value.dtype == torch.bfloat16
        torch.testing.assert_close(value.float(), other, atol=0.1, rtol=0.05)


def test_the_weight_gradient_of_bfloat16_adds_up_chunks_in_float32() -> None:
    tokens = 1024  # equal small contributions: added up in bfloat16 the sum would stop growing after a few hundred
    hidden, weight = torch.ones(tokens, 1, dtype=torch.bfloat16), torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    target, identity = torch.zeros(tokens, dtype=torch.int64), LogitShaping(None, None, None)
    options = {"return_raw": False, "head_bias_V": None, "softcap": None}
    eager_linear.from_hidden(hidden, weight, target, identity, **options, max_tokens=1)[0].sum().backward()
    assert weight.grad is not None
    assert weight.grad.flatten().tolist() == [tokens / 2, -tokens / 2]


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_the_gradients_asked_for_are_computed(backend: str) -> None:
    for wanted in ("hidden", "weight"):
        inputs = _inputs(torch.float32)
        inputs[wanted].requires_grad_()
        logp, entropy = _linear(inputs, backend)
        (logp.sum() + entropy.sum()).backward()
        other = "weight" if wanted == "hidden" else "hidden"
        assert inputs[wanted].grad is not None and inputs[other].grad is None


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_tokens_give_empty_values_and_zero_gradients(backend: str) -> None:
    hidden, weight = torch.zeros(0, HIDDEN, requires_grad=True), torch.ones(VOCABULARY, HIDDEN, requires_grad=True)
    values = kernels.linear_logprob_entropy(
        hidden, weight, torch.zeros(0, dtype=torch.int64), temperature_T=torch.ones(0), return_raw=True, backend=backend
    )
    assert [value.shape for value in values] == [(0,)] * 4
    torch.cat(values).sum().backward()
    assert weight.grad is not None and not weight.grad.any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_impossible_tokens_have_no_share_and_no_gradient(backend: str) -> None:
    logits = torch.tensor([[0.0, -math.inf, 0.0, -math.inf]], requires_grad=True)
    logp, entropy = kernels.logprob_entropy(logits, torch.tensor([2]), backend=backend)
    torch.testing.assert_close(torch.cat([logp, entropy]).detach(), torch.tensor([-math.log(2), math.log(2)]))
    (logp + entropy).sum().backward()
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad, torch.tensor([[-0.5, 0.0, 0.5, 0.0]]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_inputs_are_left_as_they_were(backend: str) -> None:
    inputs = _inputs(torch.float32)
    logits = inputs["hidden"] @ inputs["weight"].T
    before = logits.clone()
    kernels.logprob_entropy(logits, inputs["target"], return_raw=True, backend=backend, **_shaping(inputs, True))  # pyright: ignore
    torch.testing.assert_close(logits, before, atol=0, rtol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_raw_values_ignore_the_shaping(backend: str) -> None:
    inputs = _inputs(torch.float32)
    plain = _linear(inputs, backend)
    shaped = _linear(inputs, backend, return_raw=True, **_shaping(inputs, True))
    torch.testing.assert_close(shaped[2:], plain)
    assert not torch.allclose(shaped[0], plain[0])


def test_a_backend_that_does_not_exist_names_those_that_do() -> None:
    with pytest.raises(kernels.NotAvailable, match="'triton' needs tensors on a GPU"):
        _linear(_inputs(), "triton")
    with pytest.raises(ValueError, match="'cuda' is unknown.*eager, reference"):
        kernels.logprob_entropy(torch.zeros(1, 2), torch.tensor([0]), backend="cuda")


def test_bad_arguments_are_named() -> None:
    logits, target = torch.zeros(2, 3), torch.tensor([0, 2])
    call = kernels.logprob_entropy
    with pytest.raises(ValueError, match="logits_TV must have two dimensions"):
        call(torch.zeros(3), target)
    with pytest.raises(TypeError, match="logits_TV must be floating point"):
        call(torch.zeros(2, 3, dtype=torch.int64), target)
    with pytest.raises(ValueError, match=r"target_T must have shape \(2,\)"):
        call(logits, target[:1])
    with pytest.raises(TypeError, match="target_T must be integer"):
        call(logits, target.float())
    with pytest.raises(ValueError, match=r"target_T holds 3, outside the vocabulary \[0, 3\)"):
        call(logits, torch.tensor([0, 3]))
    with pytest.raises(ValueError, match="target_T holds -100"):
        call(logits, torch.tensor([0, -100]))
    with pytest.raises(ValueError, match="target_T is on cpu"):
        call(logits.to("meta"), target)
    with pytest.raises(ValueError, match="temperature_T must be above 0"):
        call(logits, target, temperature_T=torch.tensor([1.0, 0.0]))
    with pytest.raises(ValueError, match="bias_T is missing"):
        call(logits, target, bias_ids=[0])
    with pytest.raises(ValueError, match="bias_ids must be distinct"):
        call(logits, target, bias_ids=[0, 0], bias_T=torch.zeros(2))
    with pytest.raises(ValueError, match="bias_ids holds 7"):
        call(logits, target, bias_ids=[7], bias_T=torch.zeros(2))


def test_bad_heads_are_named() -> None:
    hidden, weight, target = torch.zeros(2, 4), torch.zeros(3, 4), torch.tensor([0, 2])
    call = kernels.linear_logprob_entropy
    with pytest.raises(ValueError, match="weight_VH has 5 columns"):
        call(hidden, torch.zeros(3, 5), target)
    with pytest.raises(TypeError, match="weight_VH is torch.bfloat16"):
        call(hidden, weight.bfloat16(), target)
    with pytest.raises(ValueError, match="weight_VH must have two dimensions"):
        call(hidden, torch.zeros(0), target)
    with pytest.raises(ValueError, match=r"head_bias_V must have shape \(3,\)"):
        call(hidden, weight, target, head_bias_V=torch.zeros(4))
    with pytest.raises(ValueError, match="softcap must be above 0"):
        call(hidden, weight, target, softcap=0.0)


def test_logits_are_shaped_in_place_like_the_log_prob_kernels_shape_them() -> None:
    torch.manual_seed(0)
    logits, ids, bias = torch.randn(4, 6), [1, 4], torch.randn(4)
    expected = logits.clone()
    expected[:, ids] += bias[:, None]
    expected /= 0.7
    out = kernels.shape_logits_(logits, bias_ids=ids, bias_B=bias, base=0.7)
    assert out is logits
    torch.testing.assert_close(logits, expected)
    per_row = torch.tensor([0.5, 1.0, 2.0, 4.0])
    torch.testing.assert_close(kernels.shape_logits_(logits.clone(), base=per_row), logits / per_row[:, None])


def test_hapos_temperature_of_two_known_rows_has_its_worked_value() -> None:
    # Statistics of fifteen entropies: pivot ln 0.9, spread 5.812970, largest signal 0.161410, smallest -3.150768.
    spread, largest, smallest = 5.812970, 0.161410, -3.150768
    rule = kernels.TemperatureRule(math.log(0.9), 1 / (largest * spread), 1 / (-smallest * spread), tau=0.05)
    raw = torch.tensor([[2.0, 1.0, 0.0, -1.0], [6.0, 0.0, 0.0, 0.0]])
    shaped = kernels.shape_logits_(raw.clone(), temperature_rule=rule)
    torch.testing.assert_close(raw[:, 0] / shaped[:, 0], torch.tensor([1.002743, 0.992201]), atol=2e-6, rtol=0)
    entropies = torch.tensor([1e-4, 0.04, 0.35, 0.9, 1.9, 2.3, 3.0])
    expected = torch.tensor([0.975144, 0.991500, 0.997422, 1.0, 1.039819, 1.05, 1.05])
    torch.testing.assert_close(rule(entropies), expected, atol=2e-6, rtol=0)


def test_the_entropy_behind_a_temperature_is_that_of_the_raw_row_and_bears_banned_tokens() -> None:
    logits = torch.tensor([[0.0, 0.0, -math.inf]])
    seen: list[torch.Tensor] = []

    def rule(entropy: torch.Tensor) -> torch.Tensor:
        seen.append(entropy)
        return torch.full_like(entropy, 2.0)

    shaped = kernels.shape_logits_(logits, temperature_rule=rule, bias_ids=[0], bias_B=torch.tensor([3.0]), base=0.5)
    assert shaped.tolist() == [[3.0, 0.0, -math.inf]]
    torch.testing.assert_close(seen[0], torch.tensor([math.log(2.0)]))


def test_logit_shaping_refuses_what_it_cannot_do() -> None:
    logits = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="base must be above 0"):
        kernels.shape_logits_(logits, base=0.0)
    with pytest.raises(ValueError, match="bias_B is missing"):
        kernels.shape_logits_(logits, bias_ids=[0])


def test_the_version_keeps_transformers_from_taking_us_for_the_hub_package() -> None:
    from transformers.utils.import_utils import is_kernels_available

    assert kernels.__version__ == "0.0.0"
    assert is_kernels_available() is False


def test_every_row_may_have_a_rule_of_its_own_and_one_of_tau_0_is_left_alone() -> None:
    """Blocks of rows and the reference agree, whatever the row a block begins with."""
    torch.manual_seed(0)
    logits = torch.randn(7, 50_000) * 4
    tau = torch.tensor([0.3, 0.0, 0.05, 0.3, 0.0, 0.2, 0.1])
    rule = kernels.TemperatureRule(torch.linspace(-1, 1, 7), 0.8, torch.full((7,), 0.3), tau=tau)
    bias = torch.tensor([0.0, 0.0, 1.0, -1.0, 0.0, 2.0, 0.0])
    options: dict[str, Any] = {"temperature_rule": rule, "bias_ids": [3, 40_000], "bias_B": bias}
    shaped = kernels.shape_logits_(logits.clone(), backend="eager", **options)
    expected = kernels.shape_logits_(logits.clone(), backend="reference", **options)
    torch.testing.assert_close(shaped, expected)
    assert torch.equal(shaped[[1, 4]], logits[[1, 4]]) and not torch.equal(shaped[0], logits[0])
    one = kernels.TemperatureRule(float(rule.rows(slice(2, 3)).pivot), 0.8, 0.3, tau=0.05)  # pyright: ignore
    alone = kernels.shape_logits_(logits[2:3].clone(), temperature_rule=one, bias_ids=[3, 40_000], bias_B=bias[2:3])
    torch.testing.assert_close(alone[0], shaped[2])
