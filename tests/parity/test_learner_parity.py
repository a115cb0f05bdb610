"""The DeepSpeed learner against plain torch on the same rollouts: log-probs, updates, skipped steps."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rl.batch import pad_rows, select_rollouts
from rl.correction import Correction
from rl.learner import Learner
from rl.replay import Task
from rl.settings import LossSettings
from rl.types import TrainBatch
from tests.parity.plain import Lengths, PlainLearner, largest_gap, load_plain, loss_tokens, plain_logp, random_batch

LENGTHS: Lengths = [(5, 3, 40), (8, 0, 7), (3, 2, 1), (6, 4, 31), (4, 0, 22), (7, 3, 13), (5, 1, 60), (6, 2, 9)]
LR = 1e-3
TOLERANCE = 1e-4
"""Largest difference of a weight after a few AdamW steps of 1e-3, a tenth of one step: AdamW divides by the gradient's own size,
so rounding in a gradient near 0 moves its weight visibly. Measured: at most 2e-5; with a wrong ratio or no KL 1e-3 and more."""
MakeLearner = Callable[..., Learner]


def _weights(learner: Learner) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in learner.named_weights()}


def _update(learner: Learner, batch: TrainBatch, **options: Any) -> dict[str, float]:
    return learner.update(batch, **{"global_tokens": loss_tokens(batch), "total_updates": None, **options})


def _log_probs(learner: Learner, batch: TrainBatch, index: list[int], *, shaped: bool = False) -> dict[int, torch.Tensor]:
    """Log-probs of each rollout's response from one padded micro-batch."""
    micro = pad_rows(batch, index)
    with torch.no_grad():
        out = learner.engine(micro.token_BS, micro.position_T, micro.target_T, micro.temperature_T if shaped else None)
    logp_T = torch.full((batch.tokens,), math.nan)
    logp_T[micro.source_T] = out[0]
    first_N = batch.start_N[:-1] + batch.prompt_length_N
    return {i: logp_T[first_N[i] : batch.start_N[i + 1]] for i in index}


# -- log-probs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.7, 1.6])
def test_log_probs_are_those_of_log_softmax_over_transformers_logits(
    make_learner: MakeLearner, tiny_folder: Path, temperature: float
) -> None:
    batch = random_batch(LENGTHS, temperatures=[temperature])
    lm = load_plain(tiny_folder)
    learnt = _log_probs(make_learner(), batch, list(range(batch.rollouts)), shaped=temperature != 1.0)
    for i in range(batch.rollouts):
        with torch.no_grad():
            torch.testing.assert_close(learnt[i], plain_logp(lm, batch, i, temperature=temperature), atol=1e-5, rtol=0)


def test_no_sequence_sees_its_neighbour(make_learner: MakeLearner) -> None:
    learner, batch = make_learner(), random_batch(LENGTHS)
    everything = list(range(batch.rollouts))
    together = _log_probs(learner, batch, everything)
    for i in everything:
        torch.testing.assert_close(together[i], _log_probs(learner, batch, [i])[i], atol=1e-5, rtol=0)
    # Other neighbours of the same lengths: the same grid, so not even rounding may differ.
    others = random_batch(LENGTHS, seed=9)
    for i in everything:
        own_T = torch.arange(int(batch.start_N[i]), int(batch.start_N[i + 1]))
        mixed = replace(others, token_T=others.token_T.index_copy(0, own_T, batch.token_T[own_T]))
        assert torch.equal(_log_probs(learner, mixed, everything)[i], together[i])


def test_a_token_changes_only_log_probs_from_its_own_place_on(make_learner: MakeLearner) -> None:
    learner, batch = make_learner(), random_batch(LENGTHS[:2])
    before = _log_probs(learner, batch, [0, 1])
    place = 20  # in rollout 0, whose response starts at 5
    changed = batch.token_T.clone()
    changed[place] = changed[place] - 1 if changed[place] > 4 else changed[place] + 1
    after = _log_probs(learner, replace(batch, token_T=changed), [0, 1])
    assert torch.equal(before[1], after[1])
    assert torch.equal(before[0][: place - 5], after[0][: place - 5])
    assert bool((before[0][place - 5 :] != after[0][place - 5 :]).all())


# -- updates -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_an_update_is_the_plain_torch_step_of_the_token_mean(make_learner: MakeLearner, tiny_folder: Path, stage: int) -> None:
    plain, learner = PlainLearner(tiny_folder, lr=LR), make_learner(zero_stage=stage)
    for seed in range(2):
        batch = random_batch(LENGTHS, seed=seed)
        plain.update(batch)
        totals = _update(learner, batch)
    assert totals["sum/tokens"] == loss_tokens(batch)[0] and totals["same/skipped"] == 0
    assert largest_gap(_weights(learner), plain.weights()) < TOLERANCE


def test_the_micro_batch_split_does_not_change_the_update(make_learner: MakeLearner) -> None:
    results, metrics = [], []
    for budget in (256, 2048, 10**6):
        learner = make_learner(tokens_per_microbatch=budget)
        for seed in range(2):
            metrics.append(_update(learner, random_batch(LENGTHS, seed=seed)))
        results.append(_weights(learner))
    assert max(largest_gap(results[0], other) for other in results[1:]) < TOLERANCE
    for name in ("sum/loss", "sum/entropy", "sum/tokens", "same/grad_norm"):
        assert metrics[1][name] == pytest.approx(metrics[3][name], rel=1e-4, abs=1e-4) == metrics[5][name]
    assert metrics[0]["sum/grid"] < metrics[4]["sum/grid"]  # the splits did differ


def test_mini_batches_and_epochs_use_the_log_probs_before_the_first_step(make_learner: MakeLearner, tiny_folder: Path) -> None:
    batch = random_batch(LENGTHS, minibatches=2)
    plain, learner = PlainLearner(tiny_folder, lr=LR), make_learner(minibatches=2, epochs=2)
    plain.update(batch, epochs=2)
    totals = _update(learner, batch)
    assert learner.updates == 4
    assert totals["sum/clipped"] > 0  # so the clip was compared too
    assert largest_gap(_weights(learner), plain.weights()) < TOLERANCE


def test_the_ratio_starts_at_one(make_learner: MakeLearner) -> None:
    batch = random_batch(LENGTHS, minibatches=2)
    first = select_rollouts(batch, [i for i, owner in enumerate(batch.minibatch_N.tolist()) if owner == 0])
    with_pass, without = make_learner(minibatches=2), make_learner()
    totals = _update(with_pass, batch, global_tokens=[loss_tokens(batch)[0], 0])
    _update(without, first)
    assert abs(totals["sum/approx_kl"]) < 1e-3 and totals["sum/clipped"] == 0
    assert largest_gap(_weights(with_pass), _weights(without)) < TOLERANCE


def test_replay_forms_the_ratio_of_the_tempered_probabilities(make_learner: MakeLearner, tiny_folder: Path) -> None:
    batch = random_batch(LENGTHS, temperatures=[0.6, 1.0, 1.5], minibatches=2)
    replayed, raw = PlainLearner(tiny_folder, lr=LR, shaped=True), PlainLearner(tiny_folder, lr=LR)
    learner = make_learner(minibatches=2)
    replayed.update(batch)
    raw.update(batch)
    _update(learner, batch, task=Task(correction=Correction("replay")))
    assert largest_gap(_weights(learner), replayed.weights()) < TOLERANCE
    assert largest_gap(_weights(learner), raw.weights()) > 5 * TOLERANCE
    unshaped = make_learner(minibatches=2)
    _update(unshaped, batch)
    assert largest_gap(_weights(unshaped), raw.weights()) < TOLERANCE


def test_truncated_correction_weighs_each_token_by_learner_over_engine(make_learner: MakeLearner, tiny_folder: Path) -> None:
    batch = random_batch(LENGTHS)
    plain, learner = PlainLearner(tiny_folder, lr=LR, cap=1.5), make_learner()
    plain.update(batch)
    totals = _update(learner, batch, task=Task(correction=Correction("truncated", cap=1.5)))
    assert largest_gap(_weights(learner), plain.weights()) < TOLERANCE
    mean = totals["sum/correction_weight"] / totals["sum/tokens"]
    assert 0 < mean < 1.5


def test_correction_weights_are_one_where_engine_and_learner_agree(make_learner: MakeLearner) -> None:
    batch, learner = random_batch(LENGTHS), make_learner()
    known = _log_probs(learner, batch, list(range(batch.rollouts)))
    first_N = batch.start_N[:-1] + batch.prompt_length_N
    logp_T = torch.full((batch.tokens,), math.nan)
    for i, values in known.items():
        logp_T[first_N[i] : batch.start_N[i + 1]] = values
    agreed = replace(batch, sampled_logp_T=torch.where(batch.sampled_logp_T.isnan(), math.nan, logp_T))
    totals = _update(learner, agreed, task=Task(correction=Correction("truncated")))
    assert totals["sum/correction_weight"] == pytest.approx(totals["sum/tokens"], rel=1e-5)
    assert totals["max/mismatch"] < 1e-5


@pytest.mark.parametrize("form", ["k1", "k2", "k3"])
def test_the_kl_to_the_frozen_reference_is_zero_at_the_start_and_then_part_of_the_step(
    make_learner: MakeLearner, tiny_folder: Path, form: str
) -> None:
    loss = LossSettings(kl_coef=0.5, kl_form=form)  # pyright: ignore[reportArgumentType]
    learner, plain = make_learner(loss=loss), PlainLearner(tiny_folder, lr=LR, kl_coef=0.5, kl_form=form)
    without = PlainLearner(tiny_folder, lr=LR)
    means = []
    for seed in range(2):
        batch = random_batch(LENGTHS, seed=seed)
        totals = _update(learner, batch)
        means.append(totals["sum/kl"] / totals["sum/tokens"])
        plain.update(batch)
        without.update(batch)
    assert abs(means[0]) < 1e-6 and abs(means[1]) > 1e-5
    assert largest_gap(_weights(learner), plain.weights()) < TOLERANCE
    assert largest_gap(_weights(learner), without.weights()) > 5 * TOLERANCE


# -- steps that must not happen ------------------------------------------------------------------------------------------


def _spoilt(batch: TrainBatch, value: float) -> TrainBatch:
    advantage_T = batch.advantage_T.clone()
    advantage_T[int(batch.loss_mask_T.nonzero()[3])] = value
    return replace(batch, advantage_T=advantage_T)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_step_that_is_not_finite_leaves_weights_and_optimiser_untouched(
    make_learner: MakeLearner, stage: int, dtype: str
) -> None:
    good = [random_batch(LENGTHS, seed=seed) for seed in range(2)]
    learner, undisturbed = (make_learner(zero_stage=stage, dtype=dtype) for _ in range(2))
    _update(learner, good[0])
    before = _weights(learner)
    for count, value in enumerate((math.nan, math.inf, -math.inf), start=1):
        totals = _update(learner, _spoilt(good[0], value))
        assert (totals["same/skipped"], learner.skipped) == (1, count)
        assert "same/grad_norm" not in totals
        after = _weights(learner)
        assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    totals = _update(learner, good[1])
    assert totals["same/skipped"] == 0 and math.isfinite(totals["same/grad_norm"])
    for batch in good:
        _update(undisturbed, batch)
    expected, found = _weights(undisturbed), _weights(learner)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert largest_gap(found, before) > 0


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_gradient_that_is_not_finite_is_skipped_although_the_loss_is(make_learner: MakeLearner, stage: int) -> None:
    learner, batch = make_learner(zero_stage=stage), random_batch(LENGTHS)
    before = _weights(learner)
    parameter = learner.lm.get_parameter("model.layers.0.mlp.up_proj.weight")
    hook = parameter.register_hook(lambda gradient: gradient * math.inf)
    totals = _update(learner, batch)
    hook.remove()
    assert math.isfinite(totals["sum/loss"]) and totals["same/skipped"] == 1
    after = _weights(learner)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert _update(learner, batch)["same/skipped"] == 0
    assert largest_gap(_weights(learner), before) > 0


def test_only_the_bad_mini_batch_is_skipped(make_learner: MakeLearner) -> None:
    batch = random_batch(LENGTHS, minibatches=2)
    bad = _spoilt(batch, math.nan)  # the token belongs to mini-batch 0
    second = select_rollouts(batch, [i for i, owner in enumerate(batch.minibatch_N.tolist()) if owner == 1])
    learner, plain = make_learner(minibatches=2), make_learner()
    totals = _update(learner, bad)
    _update(plain, second)
    assert (totals["same/skipped"], learner.updates, learner.skipped) == (1, 2, 1)
    assert largest_gap(_weights(learner), _weights(plain)) < TOLERANCE


def test_a_mini_batch_without_loss_tokens_makes_no_step(make_learner: MakeLearner) -> None:
    batch, learner = random_batch(LENGTHS), make_learner()
    before = _weights(learner)
    silent = replace(batch, loss_mask_T=torch.zeros_like(batch.loss_mask_T))
    assert "same/lr" not in _update(learner, silent)
    assert learner.updates == 0 and largest_gap(_weights(learner), before) == 0


# -- weights and state ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", [1, 3])
def test_a_tied_head_is_named_with_the_embedding(make_learner: MakeLearner, tiny_folder: Path, stage: int) -> None:
    weights = dict(make_learner(zero_stage=stage).named_weights())
    assert torch.equal(weights["lm_head.weight"], weights["model.embed_tokens.weight"])
    assert weights.keys() - {"lm_head.weight"} == dict(load_plain(tiny_folder).named_parameters()).keys()


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_a_saved_learner_goes_on_exactly_where_it_stopped(make_learner: MakeLearner, tmp_path: Path, stage: int) -> None:
    batches = [random_batch(LENGTHS, seed=seed) for seed in range(3)]
    whole, resumed = make_learner(zero_stage=stage), make_learner(zero_stage=stage)
    for batch in batches[:2]:
        _update(whole, batch)
    whole.save(tmp_path)
    _update(whole, batches[2])
    resumed.load(tmp_path)
    assert resumed.updates == 2
    _update(resumed, batches[2])
    expected, found = _weights(whole), _weights(resumed)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_supervised_loss_is_the_mean_negative_log_prob(make_learner: MakeLearner, tiny_folder: Path) -> None:
    batch, learner, lm = random_batch(LENGTHS), make_learner(), load_plain(tiny_folder)
    totals = _update(learner, batch, task=Task(objective="likelihood"))
    with torch.no_grad():
        expected = -sum(float(plain_logp(lm, batch, i).sum()) for i in range(batch.rollouts))
    assert totals["sum/loss"] == pytest.approx(expected, rel=1e-5)
    assert _update(learner, batch, task=Task(objective="likelihood"))["sum/loss"] < totals["sum/loss"]
