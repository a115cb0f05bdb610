"""Argument checks shared by the kernels: every error names the argument, what it is and what it should be.

Checks that read values run only on CPU tensors: on an accelerator they would wait for the device in every call.
"""

from __future__ import annotations

import torch

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def check_matrix(name: str, value: torch.Tensor) -> None:
    """Require a floating point matrix."""
    if value.dim() != 2:
        raise ValueError(f"{name} must have two dimensions, got shape {tuple(value.shape)}")
    if not value.is_floating_point():
        raise TypeError(f"{name} must be floating point, got {value.dtype}")


def check_vector(name: str, value: torch.Tensor, *, length: int, like: torch.Tensor) -> None:
    """Require one value per entry, on the device of ``like``."""
    if value.shape != (length,):
        raise ValueError(f"{name} must have shape ({length},), got {tuple(value.shape)}")
    if value.device != like.device:
        raise ValueError(f"{name} is on {value.device}, the other inputs are on {like.device}; move it there")


def check_target(target_T: torch.Tensor, *, tokens: int, vocabulary: int, like: torch.Tensor) -> None:
    """Require integer token ids in [0, vocabulary)."""
    check_vector("target_T", target_T, length=tokens, like=like)
    if target_T.dtype not in INTEGERS:
        raise TypeError(f"target_T must be integer, got {target_T.dtype}")
    _check_ids("target_T", target_T, vocabulary=vocabulary)


def check_shaping(
    temperature_T: torch.Tensor | None,
    bias_ids: torch.Tensor | None,
    bias_T: torch.Tensor | None,
    *,
    rows: int,
    vocabulary: int,
    like: torch.Tensor,
    names: tuple[str, str] = ("temperature_T", "bias_T"),
) -> None:
    """Require positive temperatures, and a bias given as both distinct ids and one value per row or not at all."""
    temperature_name, bias_name = names
    if temperature_T is not None:
        check_vector(temperature_name, temperature_T, length=rows, like=like)
        if temperature_T.device.type == "cpu" and not bool((temperature_T > 0).all()):
            raise ValueError(f"{temperature_name} must be above 0 everywhere, smallest is {float(temperature_T.min())}")
    if (bias_ids is None) != (bias_T is None):
        missing = "bias_ids" if bias_ids is None else bias_name
        raise ValueError(f"{missing} is missing: bias_ids and {bias_name} must be given together")
    if bias_ids is None or bias_T is None:
        return
    check_vector(bias_name, bias_T, length=rows, like=like)
    if bias_ids.dim() != 1 or bias_ids.dtype not in INTEGERS:
        raise TypeError(f"bias_ids must be a vector of integers, got {bias_ids.dtype} of shape {tuple(bias_ids.shape)}")
    _check_ids("bias_ids", bias_ids, vocabulary=vocabulary)
    if bias_ids.device.type == "cpu" and bias_ids.unique().numel() != bias_ids.numel():
        raise ValueError(f"bias_ids must be distinct, got {bias_ids.tolist()}")


def _check_ids(name: str, ids: torch.Tensor, *, vocabulary: int) -> None:
    if ids.device.type != "cpu" or ids.numel() == 0:
        return
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocabulary:
        raise ValueError(f"{name} holds {low if low < 0 else high}, outside the vocabulary [0, {vocabulary})")
