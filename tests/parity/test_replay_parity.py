"""The learner's replay of shaped sampling against plain torch: temperatures by entropy that stay frozen, biases, corrections."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rl.correction import Correction
from rl.learner import Learner
from rl.replay import Task
from rl.types import TrainBatch
from tests.parity.plain import (
    HEATED,
    WORDS,
    Lengths,
    PlainLearner,
    largest_gap,
    load_plain,
    loss_tokens,
    plain_entropy,
    plain_logp,
    plain_temperature,
    response_of,
    shaped_batch,
    write_tiny,
)

LENGTHS: Lengths = [(5, 3, 40), (8, 0, 7), (3, 2, 1), (6, 4, 31), (4, 0, 22), (7, 3, 13), (5, 1, 50), (6, 3, 9)]
LR = 1e-3
TOLERANCE = 1e-4
"""Largest difference of a weight after a few AdamW steps of 1e-3, as in test_learner_parity."""
BOUNDS = (0.5, 2.0)
CAP = 1.5
GAPS = [math.log(1.8), 0.1, -0.1, math.log(3.0), math.log(0.4), 0.0, None, math.log(2.5)]
"""Learner's minus engine's log-prob at every sampled token of each rollout; None: ln 3 and -ln 3 in turn.

By hand: 0, 3, 7 and half of 6 are over the cap; the means of 3, 4 and 7 are out of bounds. The product of 0's ratios would be,
too, and the mean of 7's would not if its 3 prefill and 2 forced tokens counted: 2.5 ** (7 / 12) < 2."""
CAPPED = [38, 0, 0, 29, 0, 0, 24, 7]
REJECTED = [3, 4, 7]
PASSES = [(1, 1), (2, 2)]
"""Mini-batches and epochs."""
MakeLearner = Callable[..., Learner]


@pytest.fixture(scope="module")
def sharp_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of about 2.8 nats of entropy, which differs from token to token."""
    return write_tiny(tmp_path_factory.mktemp("sharp"), noise=0.3)


class Thawed(PlainLearner):
    """As if temperatures followed the entropies of the weights that move."""

    def logp(self, batch: TrainBatch, rollout: int) -> torch.Tensor:
        self.temperature[rollout] = plain_temperature(self.lm, batch, rollout, self.adaptive)
        return super().logp(batch, rollout)


def _batch(minibatches: int) -> tuple[TrainBatch, Task]:
    batch, behaviour = shaped_batch(LENGTHS)
    if minibatches == 1:
        batch = replace(batch, minibatch_N=torch.zeros_like(batch.minibatch_N))
    return batch, Task(behaviour=behaviour, entropies=True)


def _update(learner: Learner, batch: TrainBatch, task: Task) -> dict[str, Any]:
    return learner.update(batch, global_tokens=loss_tokens(batch), total_updates=None, task=task)


def _weights(learner: Learner) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in learner.named_weights()}


def _with_gaps(batch: TrainBatch, folder: Path) -> TrainBatch:
    """The batch as if the engines' log-probs had been `GAPS` below the learner's at temperature 1."""
    lm, sampled_T = load_plain(folder), batch.sampled_logp_T.clone()
    for i, gap in enumerate(GAPS):
        response = response_of(batch, i)
        with torch.no_grad():
            old_T = plain_logp(lm, batch, i)
        known_T = ~sampled_T[response].isnan()
        turn_T = 1.0 - 2.0 * ((known_T.cumsum(0) - 1) % 2)
        gap_T = turn_T * math.log(3.0) if gap is None else torch.full_like(old_T, gap)
        sampled_T[response] = torch.where(known_T, old_T - gap_T, math.nan)
    return replace(batch, sampled_logp_T=sampled_T)


def _rows(totals: dict[str, Any]) -> list[tuple[int, ...]]:
    return sorted(tuple(int(value) for value in row) for row in totals["rollout_N5"].tolist())


# -- replay --------------------------------------------------------------------------------------------------------------


def test_the_batch_has_all_that_shapes_a_token(sharp_folder: Path) -> None:
    batch, task = _batch(2)
    assert task.behaviour.rule is not None and task.behaviour.bias_ids == WORDS
    assert batch.temperature_N.tolist() == pytest.approx([0.7, 1.3] * 4)
    first = batch.bias_T[response_of(batch, 0)].tolist()  # 3 tokens of prefill, 40 generated: lifted from the 3rd to the 20th
    assert first == [0.0] * 5 + [2.0] * 18 + [0.0] * 20
    lifted = batch.token_T[batch.bias_T != 0].tolist()
    assert {*WORDS} < {*lifted}  # words and others were drawn under a bias
    with torch.no_grad():
        factors = [plain_temperature(load_plain(sharp_folder), batch, i, HEATED) / batch.temperature_N[i] for i in range(8)]
    assert float(torch.cat(factors).std()) > 0.1


@pytest.mark.parametrize(("minibatches", "epochs"), PASSES)
def test_replay_keeps_the_temperature_and_bias_of_the_old_policy(
    make_learner: MakeLearner, sharp_folder: Path, minibatches: int, epochs: int
) -> None:
    batch, task = _batch(minibatches)
    options: dict[str, Any] = {"lr": LR, "shaped": True, "adaptive": HEATED, "bias_ids": WORDS}
    plain = PlainLearner(sharp_folder, **options)
    plain.update(batch, epochs=epochs)
    learner = make_learner(folder=sharp_folder, minibatches=minibatches, epochs=epochs)
    totals = _update(learner, batch, replace(task, correction=Correction("replay")))
    assert learner.updates == minibatches * epochs and totals["same/grad_norm"] == pytest.approx(plain.norm, rel=1e-3)
    assert largest_gap(_weights(learner), plain.weights()) < TOLERANCE
    assert _rows(totals) == sorted(plain.rows)
    others = [PlainLearner(sharp_folder, **{**options, **wrong}) for wrong in ({"adaptive": None}, {"bias_ids": ()})]
    if epochs > 1:
        assert totals["sum/clipped"] > 0
        others.append(Thawed(sharp_folder, **options))
    for other in others:  # each of them shows, or the comparison above would hold nothing
        other.update(batch, epochs=epochs)
        assert largest_gap(other.weights(), plain.weights()) > 5 * TOLERANCE


def _truncated(folder: Path, minibatches: int, epochs: int) -> tuple[TrainBatch, Task, PlainLearner]:
    """A batch with gaps between engine and learner, the truncated and masked task, and the obvious form after its update."""
    batch, task = _batch(minibatches)
    batch = _with_gaps(batch, folder)
    plain = PlainLearner(folder, lr=LR, cap=CAP, bounds=BOUNDS)
    plain.update(batch, epochs=epochs)
    return batch, replace(task, correction=Correction("truncated", cap=CAP, mask="geometric", bounds=BOUNDS)), plain


# -- truncated -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("minibatches", "epochs"), PASSES)
def test_a_rejected_rollout_has_no_gradient_but_counts_in_the_token_mean(
    make_learner: MakeLearner, sharp_folder: Path, minibatches: int, epochs: int
) -> None:
    batch, task, plain = _truncated(sharp_folder, minibatches, epochs)
    learner = make_learner(folder=sharp_folder, minibatches=minibatches, epochs=epochs)
    totals = _update(learner, batch, task)
    assert totals["sum/tokens"] == epochs * sum(loss_tokens(batch))
    # AdamW hardly sees the scale of a gradient, so the denominator is held by the gradient's own size.
    assert totals["same/grad_norm"] == pytest.approx(plain.norm, rel=1e-3)
    assert largest_gap(_weights(learner), plain.weights()) < TOLERANCE
    # Whatever a rejected rollout was rewarded with, the weights are the same to the last bit.
    owner_T = torch.arange(batch.rollouts).repeat_interleave(batch.start_N.diff())
    rejected_T = (owner_T[:, None] == torch.tensor(REJECTED)).any(dim=1)
    otherwise = replace(batch, advantage_T=torch.where(rejected_T, -3 * batch.advantage_T, batch.advantage_T))
    again = make_learner(folder=sharp_folder, minibatches=minibatches, epochs=epochs)
    _update(again, otherwise, task)
    assert largest_gap(_weights(again), _weights(learner)) == 0


@pytest.mark.parametrize(("minibatches", "epochs"), PASSES)
def test_each_pass_counts_what_was_clipped_capped_and_rejected_of_each_rollout(
    make_learner: MakeLearner, sharp_folder: Path, minibatches: int, epochs: int
) -> None:
    batch, task, plain = _truncated(sharp_folder, minibatches, epochs)
    learner = make_learner(folder=sharp_folder, minibatches=minibatches, epochs=epochs)
    totals = _update(learner, batch, task)
    rows = _rows(totals)
    assert rows == sorted(plain.rows)
    assert sum(row[2] for row in rows) == totals["sum/clipped"] and (totals["sum/clipped"] > 0) == (epochs > 1)
    # By hand: prefill and generated tokens carry loss, less the forced ones; caps and rejections do not change with the weights.
    forced = [sum(place < generated for place in (1, 4)) for _, _, generated in LENGTHS]
    tokens = [prefill + generated - f for (_, prefill, generated), f in zip(LENGTHS, forced, strict=True)]
    for i in range(batch.rollouts):
        own = [row for row in rows if row[0] == i]
        assert len(own) == epochs
        assert {(row[1], row[3], row[4]) for row in own} == {(tokens[i], CAPPED[i], int(i in REJECTED))}


# -- without correction, and entropies -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("minibatches", "epochs"), PASSES)
def test_without_correction_the_ratio_is_unshaped_but_the_mismatch_is_not(
    make_learner: MakeLearner, sharp_folder: Path, minibatches: int, epochs: int
) -> None:
    batch, task = _batch(minibatches)
    plain = PlainLearner(sharp_folder, lr=LR)
    plain.update(batch, epochs=epochs)
    learner = make_learner(folder=sharp_folder, minibatches=minibatches, epochs=epochs)
    totals = _update(learner, batch, task)
    assert largest_gap(_weights(learner), plain.weights()) < TOLERANCE
    lm, gaps, unshaped = load_plain(sharp_folder), [], []
    for i in range(batch.rollouts):
        sampled_T = batch.sampled_logp_T[response_of(batch, i)]
        with torch.no_grad():
            temperature = plain_temperature(lm, batch, i, HEATED)
            gaps.append(plain_logp(lm, batch, i, temperature=temperature, bias_ids=WORDS) - sampled_T)
            unshaped.append(plain_logp(lm, batch, i) - sampled_T)
    gap_T = torch.cat(gaps)
    assert totals["sum/mismatch_tokens"] == int((~gap_T.isnan()).sum())
    assert totals["sum/mismatch"] == pytest.approx(float(gap_T.abs().nansum()), rel=1e-4)
    assert totals["sum/mismatch"] != pytest.approx(float(torch.cat(unshaped).abs().nansum()), rel=1e-2)


@pytest.mark.parametrize("mode", ["none", "truncated", "replay"])
@pytest.mark.parametrize(("minibatches", "epochs"), PASSES)
def test_entropies_are_the_raw_ones_of_sampled_tokens_at_the_sampling_weights(
    make_learner: MakeLearner, sharp_folder: Path, minibatches: int, epochs: int, mode: Any
) -> None:
    batch, task = _batch(minibatches)
    learner = make_learner(folder=sharp_folder, minibatches=minibatches, epochs=epochs)
    totals = _update(learner, batch, replace(task, correction=Correction(mode)))
    lm, sampled = load_plain(sharp_folder), []
    for (_, prefill, generated), i in zip(LENGTHS, range(batch.rollouts), strict=True):
        with torch.no_grad():
            entropies = plain_entropy(lm, batch, i)[prefill:].tolist()
        assert len(entropies) == generated
        sampled += [entropy for place, entropy in enumerate(entropies) if place not in (1, 4)]  # these two were forced
    # Micro-batches come longest first, so the order is not the batch's.
    assert totals["entropy_T"].dtype == torch.float32
    assert sorted(totals["entropy_T"].tolist()) == pytest.approx(sorted(sampled), abs=1e-5)
    assert "entropy_T" not in _update(learner, batch, replace(task, entropies=False))
