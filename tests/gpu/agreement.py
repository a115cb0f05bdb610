"""What the GPU tests of kernels share: random inputs, and what it means that two backends agree. Needs torch only."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

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


def normal(generator: torch.Generator, *shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> torch.Tensor:
    """Normal numbers, the same on every machine: drawn on the CPU, rounded to the dtype, moved to the device."""
    return (torch.randn(*shape, generator=generator) * scale).to(dtype).to(DEVICE)


def agree(found: torch.Tensor, expected: torch.Tensor, tolerance: float, name: str) -> None:
    """Relative error in the 2-norm, and no entry off by more than twenty times that share of the largest."""
    assert found.shape == expected.shape, name
    difference = found.double() - expected.double()
    assert bool(torch.isfinite(found).all()), f"{name} is not finite everywhere"
    error = float(difference.norm() / expected.double().norm().clamp(min=1e-3))
    worst = float(difference.abs().max() / expected.double().abs().max().clamp(min=1e-3)) if found.numel() else 0.0
    assert error <= tolerance and worst <= 20 * tolerance, f"{name}: relative error {error:.2e}, worst {worst:.2e}"


def compare(
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
        agree(found.detach(), expected.detach(), value, f"value {k}")
    for k, (found, expected) in enumerate(zip(results[0][1], results[1][1], strict=True)):
        assert found is not None and expected is not None and found.dtype == leaves[k].dtype
        agree(found, expected, gradient[found.dtype], f"gradient {k}")
