"""One call to the learner: what the losses are divided by, and the ranks' totals back."""

from __future__ import annotations

from typing import Any

import torch

from rl.learner_worker import to_data_proto
from rl.replay import Distillation, Task
from rl.settings import Settings
from rl.types import TrainBatch
from rl.waiting import StopFlag, wait_for


def loss_tokens(batch: TrainBatch, minibatches: int) -> list[int]:
    """Tokens with loss of each mini-batch."""
    owner_T = batch.minibatch_N.repeat_interleave(batch.start_N.diff())
    return torch.bincount(owner_T[batch.loss_mask_T], minlength=minibatches).tolist()


def pair_counts(batch: TrainBatch, minibatches: int) -> list[int]:
    """Pairs of each mini-batch: half of its rollouts."""
    return (torch.bincount(batch.minibatch_N, minlength=minibatches) // 2).tolist()


def distilled_rollouts(batch: TrainBatch, minibatches: int) -> tuple[int, ...]:
    """Rollouts of each mini-batch that have a token to distil."""
    weight_T = batch.guidance.weight_T
    assert weight_T is not None
    owner_T = torch.repeat_interleave(torch.arange(batch.rollouts), batch.start_N.diff())
    has_N = torch.zeros(batch.rollouts, dtype=torch.bool)
    has_N[owner_T[(weight_T > 0) & batch.loss_mask_T]] = True
    return tuple(torch.bincount(batch.minibatch_N[has_N], minlength=minibatches).tolist())


def distillation_of(settings: Settings, batch: TrainBatch, vocabulary: int) -> Distillation | None:
    """The distillation's terms for this batch; None where the run has none."""
    distil = settings.distil
    if distil is None:
        return None
    teacher, sstoken = distil.teacher, distil.sstoken
    return Distillation(
        mode=teacher.mode,
        r=teacher.r,
        eps=teacher.eps,
        beta0=distil.scale,
        beta_max=distil.beta_max,
        weight=distil.weight if settings.stage == "rl" else 1.0,
        length_norm=distil.length_norm,
        rollouts=distilled_rollouts(batch, settings.learner.minibatches),
        vocabulary=vocabulary,
        entropy_share=distil.entropy_share,
        sstoken=None if sstoken is None else (sstoken.gamma, sstoken.share),
    )


def planned_updates(settings: Settings) -> int | None:
    """Optimiser steps of the whole run, which a learning rate falls over; None where no number of steps is set."""
    per_step = settings.learner.minibatches * settings.learner.epochs
    return settings.max_steps * per_step if settings.max_steps else None


def update_learners(
    learners: Any,
    batch: TrainBatch,
    task: Task,
    *,
    ranks: int,
    divisors: list[int],
    total_updates: int | None,
    seconds: float,
    what: str,
    stop: StopFlag | None = None,
) -> list[dict[str, Any]]:
    """Optimise on a batch; one dictionary of totals per rank, see `rl.learner.Learner.update`.

    ``divisors``: what the loss of each mini-batch is divided by. ``stop``: only where weights of half a step do no harm.
    """
    data = to_data_proto(batch, ranks)
    data.meta_info["update"] = {"global_tokens": divisors, "total_updates": total_updates, "task": task}
    return wait_for(learners.update(data), seconds=seconds, what=what, stop=stop)
