"""From a step's groups, advantages and learner totals to the flat figures of its StepReport; pure."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from rl.types import Budget, BudgetKind, Group, Scored, TrainBatch, VerdictStatus

BUDGETS_SHOWN = 8
"""Most budgets of a step that are shown one by one."""


def rollout_metrics(groups: Sequence[Group], *, drawn: bool = False) -> dict[str, float]:
    """Accuracy, tokens, rewards and verdict shares over the members of all groups (unscored ones only in their own share).

    drawn: budgets are no fixed list but differ from step to step; see :func:`budget_labels`. Their mean is shown, too.
    """
    members = [member for group in groups for member in group.members]
    scored = [member for member in members if member.verdict.is_scored]
    metrics = {"train/" + name: value for name, value in accuracy_and_tokens(scored).items()}
    metrics["train/reward"] = _mean([m.reward.total for m in scored if m.reward is not None])
    parts: dict[str, list[float]] = defaultdict(list)
    budgets: dict[str, list[Scored]] = defaultdict(list)
    labels = budget_labels((member.rollout.lease.budget for member in scored), binned=drawn)
    for member in scored:
        budgets[labels[member.rollout.lease.budget]].append(member)
        if member.reward is not None:
            for name, value in member.reward.parts.items():
                parts[name].append(value)
    metrics |= {f"reward/{name}": _mean(values) for name, values in parts.items()}
    asked = [float(m.rollout.lease.budget.tokens) for m in scored if not m.rollout.lease.budget.is_free]
    metrics |= {"train/budget": _mean(asked)} if drawn and asked else {}
    for label, chosen in budgets.items():
        metrics |= {f"budget/{label}/{name}": value for name, value in (accuracy_and_tokens(chosen) | kept(chosen)).items()}
    for status in VerdictStatus:
        metrics[f"verdict/{status.value}"] = sum(m.verdict.status is status for m in members) / max(len(members), 1)
    rewards = [[m.reward.total for m in group.members if m.reward is not None] for group in groups]
    metrics["group/flat"] = sum(len(set(values)) < 2 for values in rewards) / max(len(rewards), 1)
    return metrics


def kept(members: Sequence[Scored]) -> dict[str, float]:
    """How soft budgets were kept: share within an AT_MOST one, mean distance in tokens from an EXACT one; absent for others.

    A hard budget counts the thinking alone, and the engine keeps it.
    """
    soft = [(m.rollout.length, m.rollout.lease.budget) for m in members if not m.rollout.lease.budget.hard]
    within = [float(length <= budget.tokens) for length, budget in soft if budget.kind is BudgetKind.AT_MOST]
    distance = [float(abs(length - budget.tokens)) for length, budget in soft if budget.kind is BudgetKind.EXACT]
    return ({"kept": _mean(within)} if within else {}) | ({"distance": _mean(distance)} if distance else {})


def budget_labels(budgets: Iterable[Budget], *, binned: bool = False) -> dict[Budget, str]:
    """What each budget is called in metric names: its own label, or that of its power of two, such as ``64-127``.

    By powers of two where asked for (so that names stay the same from step to step), or for more than 8 different numbers.
    """
    distinct = set(budgets)
    binned = binned or len({budget.tokens for budget in distinct if not budget.is_free}) > BUDGETS_SHOWN
    return {budget: budget.label if budget.is_free or not binned else octave(budget.tokens) for budget in distinct}


def octave(tokens: int) -> str:
    """``2^k-(2^(k+1) - 1)`` for 2^k <= tokens < 2^(k+1), for example ``64-127``; ``1`` by itself. tokens: above 0."""
    if tokens < 1:
        raise ValueError(f"octave needs a number above 0, got {tokens}")
    low = 1 << (tokens.bit_length() - 1)
    return f"{low}-{2 * low - 1}" if low > 1 else "1"


def accuracy_and_tokens(members: Sequence[Scored]) -> dict[str, float]:
    """Share of CORRECT answers and mean response length of scored members."""
    return {
        "accuracy": _mean([float(m.verdict.is_correct) for m in members]),
        "tokens": _mean([float(m.rollout.length) for m in members]),
    }


def advantage_metrics(advantage_N: torch.Tensor, batch: TrainBatch) -> dict[str, float]:
    """Mean and spread over rollouts, and the share of loss tokens that carry any signal."""
    tokens = max(int(batch.loss_mask_T.sum()), 1)
    return {
        "adv/mean": float(advantage_N.mean()) if advantage_N.numel() else 0.0,
        "adv/std": float(advantage_N.std()) if advantage_N.numel() > 1 else 0.0,
        "adv/nonzero_tokens": float((batch.advantage_T[batch.loss_mask_T] != 0).sum()) / tokens,
    }


def learner_metrics(ranks: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Merge the ranks' totals (`sum/*` added, `max/*` maximised, `same/*` equal everywhere) into per-token means.

    What is no number (entropies, rows per rollout) is for others.
    """
    totals: dict[str, float] = {}
    for rank in ranks:
        for name, value in rank.items():
            if isinstance(value, torch.Tensor):
                continue
            kind = name.split("/")[0]
            if kind == "sum":
                totals[name] = totals.get(name, 0.0) + value
            elif kind == "max":
                totals[name] = max(totals.get(name, value), value)
            else:
                totals[name] = value
    tokens = max(totals.get("sum/tokens", 0.0), 1.0)
    metrics = {
        "policy/loss": totals.get("sum/loss", 0.0) / tokens,
        "policy/entropy": totals.get("sum/entropy", 0.0) / tokens,
        "policy/clip_fraction": totals.get("sum/clipped", 0.0) / tokens,
        "policy/dual_clip_fraction": totals.get("sum/dual_clipped", 0.0) / tokens,
        "policy/approx_kl": totals.get("sum/approx_kl", 0.0) / tokens,
        "learn/lr": totals["same/lr"],
        "learn/skipped": totals["same/skipped"],
        "learn/padding": totals.get("sum/padding", 0.0) / max(totals.get("sum/grid", 0.0), 1.0),
        "mismatch/mean": totals.get("sum/mismatch", 0.0) / max(totals.get("sum/mismatch_tokens", 0.0), 1.0),
        "mismatch/max": totals.get("max/mismatch", 0.0),
    }
    optional = {
        "learn/grad_norm": totals.get("same/grad_norm"),
        "policy/kl": totals["sum/kl"] / tokens if "sum/kl" in totals else None,
        "policy/correction_weight": totals["sum/correction_weight"] / tokens if "sum/correction_weight" in totals else None,
    }
    return metrics | {name: value for name, value in optional.items() if value is not None}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else float("nan")
