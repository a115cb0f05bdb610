"""Argument checks shared by the reward formulas: every error names the argument, what it is and what it should be."""

from __future__ import annotations

import torch


def check_flags(name: str, flag_N: torch.Tensor) -> None:
    """Require bool: 0.5 or -1 must not pass for an answer that is right."""
    if flag_N.dtype != torch.bool:
        raise TypeError(f"{name} must be bool, got {flag_N.dtype}")


def check_like(name: str, value_N: torch.Tensor, other: str, other_N: torch.Tensor) -> None:
    """Require the shape of another argument."""
    if value_N.shape != other_N.shape:
        shapes = f"{name} has shape {tuple(value_N.shape)}, {other} has shape {tuple(other_N.shape)}"
        raise ValueError(f"{shapes}; give one value per rollout in each")


def check_max_length(max_length: int) -> None:
    if max_length <= 0:
        raise ValueError(f"max_length must be above 0, got {max_length}")


def real(name: str, value_N: torch.Tensor) -> torch.Tensor:
    """The values as float64, after checking that they are real numbers."""
    if value_N.dtype == torch.bool or value_N.is_complex():
        raise TypeError(f"{name} must hold real numbers, got {value_N.dtype}")
    return value_N.double()


def checked_lengths(name: str, length_N: torch.Tensor) -> torch.Tensor:
    """Lengths in tokens as float64, after checking that each is a number, finite and not negative."""
    value_N = real(name, length_N)
    if not bool((torch.isfinite(value_N) & (value_N >= 0)).all()):
        raise ValueError(f"{name} must be finite and at least 0 everywhere; leave out rollouts whose length is unknown")
    return value_N


def checked_positive(name: str, value_N: torch.Tensor, *, endless: str = "") -> torch.Tensor:
    """Budgets and other quantities above 0 as float64; ``endless`` says what inf means, where it means something."""
    value_N = real(name, value_N)
    if not bool((value_N > 0).all()):
        hint = f"; write inf for {endless}" if endless else ""
        raise ValueError(f"{name} must be above 0 everywhere{hint}")
    if not endless and bool(torch.isinf(value_N).any()):
        raise ValueError(f"{name} must be finite everywhere: the formula needs a value for every rollout")
    return value_N


def checked_shares(name: str, value_N: torch.Tensor) -> torch.Tensor:
    """Accuracies and pass rates as float64, after checking that each lies in [0, 1]."""
    value_N = real(name, value_N)
    if not bool(((value_N >= 0) & (value_N <= 1)).all()):
        raise ValueError(f"{name} must be in [0, 1] everywhere")
    return value_N


def checked_answers(correct_N: torch.Tensor, length_N: torch.Tensor) -> torch.Tensor:
    """The lengths as float64, after checking them and that each belongs to one bool of ``correct_N``."""
    check_flags("correct_N", correct_N)
    check_like("length_N", length_N, "correct_N", correct_N)
    return checked_lengths("length_N", length_N)
