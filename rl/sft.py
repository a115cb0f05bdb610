"""Supervised warm start on the same DeepSpeed learner as RL, and the cache that makes it a one-time cost."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from rl.batch import pack_rollouts
from rl.budget_settings import BudgetEffort
from rl.cluster import Workforce
from rl.models import MODEL_SUFFIXES
from rl.replay import Task
from rl.settings import LearnerSettings, LossSettings, Settings
from rl.traces import Trace
from rl.types import Budget, BudgetKind, FinishReason, Lease, Prompt, Rollout, Shaping, TrainBatch
from rl.updates import loss_tokens, update_learners
from rl.waiting import StopFlag, wait_for

log = logging.getLogger("budget_rl")

FORMAT = 5
"""Part of the cache key: raised whenever traces, model or training change in code."""
UPDATES_PER_CALL = 20
"""Optimiser steps sent to the learner at once: keeps Ray's share of a step below 1 %."""


GRADING = ("grader_options",)
"""Settings of the data that say how to grade, not what is asked; those older than the cache stay part of its keys."""


def cache_key(settings: Settings) -> str:
    """Hash of everything the warm-started model depends on: its settings, the data, the budget sentence."""
    if settings.warm_start is None:
        raise ValueError("no warm start is configured")
    parts = {
        "format": FORMAT,
        "warm_start": settings.warm_start.model_dump(mode="json", exclude={"cache_dir"}),
        "data": {name: value for name, value in settings.data.model_dump(mode="json").items() if name not in GRADING},
        "sentence": [settings.rollout.budget_template, settings.rollout.free_template, settings.rollout.max_length],
    }
    # Like the dtype below: what every run before had adds nothing.
    if settings.rollout.budget_place != "prefill":
        parts["place"] = settings.rollout.budget_place
    if not isinstance(settings.rollout.budgets, list):
        parts["budgets"] = settings.rollout.model_dump(mode="json")["budgets"]
    if isinstance(settings.rollout.budgets, BudgetEffort):
        parts["effort"] = settings.rollout.effort_template
    if settings.rollout.budgets_name("no_think"):
        parts["no_think"] = settings.rollout.no_think_template
    if settings.model.dtype != "float32":  # float32 adds nothing, so that models cached before this was a part keep their key
        parts["dtype"] = settings.model.dtype
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def cached_folder(settings: Settings) -> Path:
    """Where the warm-started model lies, or will lie."""
    assert settings.warm_start is not None
    root = os.environ.get("BUDGET_RL_CACHE") or settings.warm_start.cache_dir
    return Path(root).expanduser() / "warm-start" / cache_key(settings)


def to_batch(traces: Sequence[Trace], minibatch_N: Sequence[int]) -> TrainBatch:
    """Traces as training data: the response carries loss, with advantage 1."""
    rollouts = []
    for i, trace in enumerate(traces):
        prompt = Prompt(id=str(i), question="", answer="", token_ids=trace.prompt_ids)
        lease = Lease(str(i), prompt, 0, Budget(0, BudgetKind.FREE, ""), Shaping(), (), len(trace.response_ids), 0, 0)
        nothing_sampled = (float("nan"),) * len(trace.response_ids)
        rollouts.append(Rollout(lease, trace.response_ids, 0, nothing_sampled, FinishReason.STOP, 0, ""))
    return pack_rollouts(rollouts, torch.ones(len(traces)), torch.tensor(list(minibatch_N), dtype=torch.int64))


def warm_start_learner(settings: Settings) -> Settings:
    """The run's settings with the learner as the warm start wants it: one rank, cosine schedule to 0."""
    warm = settings.warm_start
    assert warm is not None
    learner = LearnerSettings(
        ranks=1,
        cpus_per_rank=settings.learner.cpus_per_rank,
        gpus_per_rank=settings.learner.gpus_per_rank,
        threads_per_rank=settings.learner.threads_per_rank,
        zero_stage=1,
        lr=warm.lr,
        lr_schedule="cosine",
        warmup_steps=warm.warmup_steps,
        weight_decay=0.0,
        betas=(0.9, 0.98),
        tokens_per_microbatch=settings.learner.tokens_per_microbatch,
        deadline_s=settings.learner.deadline_s,
    )
    return settings.model_copy(update={"learner": learner, "loss": LossSettings(kl_coef=0.0)})


def train_warm_start(
    settings: Settings,
    traces: Sequence[Trace],
    blank: Path,
    target: Path,
    *,
    advance: Callable[[int], None],
    stop: StopFlag | None = None,
) -> float:
    """Train the blank model on the traces and write it to ``target``; returns the mean loss of the last tenth (nats/token).

    ``advance(n)`` is told of every n finished optimiser steps. The target folder appears only when complete.
    """
    warm = settings.warm_start
    assert warm is not None
    workforce = Workforce(warm_start_learner(settings))
    losses: list[float] = []
    try:
        workforce.start_learners(blank, stop=stop)
        order = _batches(len(traces), warm.batch_size, warm.epochs, warm.seed)
        for start in range(0, len(order), UPDATES_PER_CALL):
            part = order[start : start + UPDATES_PER_CALL]
            chosen = [traces[i] for batch in part for i in batch]
            owner = [m for m, batch in enumerate(part) for _ in batch]
            totals = _update(workforce, to_batch(chosen, owner), len(part), total_updates=len(order), stop=stop)
            losses += [totals["sum/loss"] / max(totals["sum/tokens"], 1.0)] * len(part)
            advance(len(part))
        partial = target.with_name(target.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        seconds = settings.learner.deadline_s
        wait_for(workforce.learners.save_model(str(partial)), seconds=seconds, what="learner writes the warm start", stop=stop)
        copy_tokenizer(blank, partial)
        shutil.rmtree(target, ignore_errors=True)
        os.rename(partial, target)
    finally:
        workforce.close()
    tail = losses[-max(len(losses) // 10, 1) :]
    return sum(tail) / len(tail)


def update_count(traces: int, batch_size: int, epochs: int) -> int:
    """Optimiser steps of a warm start."""
    return epochs * (traces // batch_size)


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy what makes up a model but its weights and config.json: tokenizer, generation config, chat template, code.

    Code stays with the checkpoint, which may need it to load; an export takes it along only where it was trusted.
    """
    wanted = (MODEL_SUFFIXES | {".py"}) - {".safetensors"}
    for file in sorted(source.iterdir()):
        belongs = file.suffix in wanted and not file.name.endswith(".index.json") and not file.name.startswith(".")
        if file.is_file() and belongs and not (target / file.name).exists():
            shutil.copy2(file, target / file.name)


def _batches(count: int, batch_size: int, epochs: int, seed: int) -> list[list[int]]:
    batches = []
    for epoch in range(epochs):
        generator = torch.Generator().manual_seed(seed * 1000 + epoch)
        order = torch.randperm(count, generator=generator).tolist()
        batches += [order[i : i + batch_size] for i in range(0, count - batch_size + 1, batch_size)]
    return batches


def _update(
    workforce: Workforce, batch: TrainBatch, minibatches: int, *, total_updates: int, stop: StopFlag | None
) -> dict[str, Any]:
    (totals,) = update_learners(
        workforce.learners,
        batch,
        Task(objective="likelihood"),
        ranks=1,
        divisors=loss_tokens(batch, minibatches),
        total_updates=total_updates,
        seconds=workforce.settings.learner.deadline_s,
        what="learner updates (warm start)",
        stop=stop,
    )
    return totals
