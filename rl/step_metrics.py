"""From a step's groups, advantages and learner totals to the flat figures of its StepReport; pure."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from rl.budget_settings import HUNDRED, hundredths
from rl.comparison import advantage_groups
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
    metrics["group/flat"] = _flat_share(groups)
    return metrics


def _flat_share(groups: Sequence[Group]) -> float:
    """Share of those compared with one another whose rewards are all equal; a group without any reward is one of them."""
    rewarded = [(g, m) for g, group in enumerate(groups) for m in group.members if m.reward is not None]
    ids = advantage_groups([g for g, _ in rewarded], [m.rollout.lease.budget for _, m in rewarded])
    rewards: dict[int, set[float]] = defaultdict(set)
    for place, (_, member) in zip(ids, rewarded, strict=True):
        assert member.reward is not None
        rewards[place].add(member.reward.total)
    empty = len(groups) - len({g for g, _ in rewarded})
    return (empty + sum(len(values) < 2 for values in rewards.values())) / max(empty + len(rewards), 1)


def exit_metrics(groups: Sequence[Group], *, exits: int) -> dict[str, float]:
    """Accuracy and tokens of the early exits and of the full paths they leave, and the share of exits that are missing.

    An exit is missing where the path had no place for it, or where it or its path was lost. Empty for ``exits`` 0.
    """
    if not exits:
        return {}
    members = [m for group in groups for m in group.members]
    left = [m for m in members if m.rollout.lease.member < exits]
    paths = [m for m in members if m.rollout.lease.member == exits]
    metrics = {"exits/missing": 1 - len(left) / max(len(groups) * exits, 1)}
    for name, chosen in (("exits", left), ("path", paths)):
        figures = accuracy_and_tokens([m for m in chosen if m.verdict.is_scored])
        metrics |= {f"{name}/{what}": value for what, value in figures.items()}
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

    By powers of two, and efforts by powers of sqrt(2), where asked for, so that names stay the same from step to step, or for
    more than 8 different numbers.
    """
    distinct = set(budgets)
    numbers = {budget.tokens or budget.effort for budget in distinct} - {None}
    binned = binned or len(numbers) > BUDGETS_SHOWN
    return {budget: _bin(budget) if binned else budget.label for budget in distinct}


def _bin(budget: Budget) -> str:
    if budget.effort is not None:
        return half_octave(budget.effort)
    return budget.label if budget.is_free else octave(budget.tokens)


def octave(tokens: int) -> str:
    """``2^k-(2^(k+1) - 1)`` for 2^k <= tokens < 2^(k+1), for example ``64-127``; ``1`` by itself. tokens: above 0."""
    if tokens < 1:
        raise ValueError(f"octave needs a number above 0, got {tokens}")
    low = 1 << (tokens.bit_length() - 1)
    return f"{low}-{2 * low - 1}" if low > 1 else "1"


def half_octave(effort: float) -> str:
    """The whole hundredths r with ``2^(k/2) <= r < 2^((k+1)/2)`` around an effort of at least 0.01, such as ``x0.71-0.99``."""
    if hundredths(effort) < 1:
        raise ValueError(f"half_octave needs an effort of 0.01 or more, got {effort}")
    k = math.floor(2 * math.log2(effort))  # 2^(k/2) is irrational or exact, so no effort lies within a rounding of it
    low, high = math.ceil(HUNDRED * 2 ** (k / 2)), math.ceil(HUNDRED * 2 ** ((k + 1) / 2)) - 1
    return f"x{low / HUNDRED:.2f}-{high / HUNDRED:.2f}"


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


def merged_totals(ranks: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The ranks' totals as one: `sum/*` added, `max/*` maximised, `same/*` equal everywhere.

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
    return totals


def learner_metrics(ranks: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Means per token of an update's totals over all ranks, and what was the same on all of them."""
    totals = merged_totals(ranks)
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
        "policy/kl": _per(totals, "sum/kl", tokens),
        "policy/correction_weight": _per(totals, "sum/correction_weight", tokens),
        "policy/signal": _per(totals, "sum/signal", tokens),
        "policy/signal_size": _per(totals, "sum/signal_size", tokens),
    }
    found = {name: value for name, value in optional.items() if value is not None}
    return metrics | found | distillation_metrics(totals)


def distillation_metrics(totals: Mapping[str, float]) -> dict[str, float]:
    """Means per distilled token, and which share of the loss comes from tokens the two models of the teacher agree on; or {}."""
    tokens = totals.get("sum/distil_tokens", 0.0)
    if not tokens:
        return {}
    mass = {name: totals[f"sum/distil_mass_{name}"] for name in ("agree", "differ", "disagree")}
    whole = max(sum(mass.values()), 1e-30)
    return {
        "distil/kl": totals["sum/distil_kl"] / tokens,
        "distil/alpha": totals["sum/distil_alpha"] / tokens,
        "distil/tvd": totals["sum/distil_tvd"] / tokens,
        "distil/tokens": tokens / max(totals.get("sum/tokens", 0.0), 1.0),
        "distil/loss": totals["sum/distil_loss"] / max(totals.get("sum/tokens", 0.0), 1.0),
    } | {f"distil/mass/{name}": value / whole for name, value in mass.items()}


def pair_metrics(ranks: Sequence[Mapping[str, Any]], *, prefix: str = "pair") -> dict[str, float]:
    """Means per pair of an update's totals."""
    totals = merged_totals(ranks)
    pairs = max(totals.get("sum/pair_pairs", 0.0), 1.0)
    names = ("accuracy", "margin", "chosen_reward", "rejected_reward", "regulariser")
    means = {f"{prefix}/{name}": totals.get(f"sum/pair_{name}", 0.0) / pairs for name in names}
    return {f"{prefix}/loss": totals.get("sum/loss", 0.0) / pairs, **means}


def _per(totals: Mapping[str, float], name: str, count: float) -> float | None:
    return totals[name] / count if name in totals else None


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else float("nan")
