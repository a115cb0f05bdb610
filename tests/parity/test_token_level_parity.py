"""Distillation, pairs and HAPO in the DeepSpeed learner against plain transformers and torch's own gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from reward.heads import read_head
from rl.alignment import alignment_loss, compose_teacher
from rl.batch import select_rollouts
from rl.guidance import Guidance, HeadSources
from rl.guiding import response_places
from rl.heterogeneous import clip_widths, entropy_statistics, redistribute, signal
from rl.learner import Learner
from rl.objective_settings import HeterogeneousSettings
from rl.pairs import make_pair, to_batch
from rl.replay import Distillation, Preference, Task
from rl.settings import LossSettings
from rl.types import TrainBatch
from tests.parity.plain import Lengths, largest_gap, load_plain, loss_tokens, plain_logits, plain_logp, random_batch, write_tiny

LENGTHS: Lengths = [(5, 0, 40), (8, 0, 7), (3, 0, 1), (6, 0, 31)]
LR, TOLERANCE = 1e-3, 1e-4
R, EPS, BETA = 30.0, 1e-3, 0.1
MakeLearner = Callable[..., Learner]


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two models that disagree with the student and with one another."""
    return tuple(  # pyright: ignore[reportReturnType]
        write_tiny(tmp_path_factory.mktemp("teacher") / name, seed=seed) for name, seed in (("dpo", 21), ("reverse", 22))
    )


def _vocabulary(folder: Path) -> int:
    return load_plain(folder).get_output_embeddings().weight.shape[0]


def _guided(batch: TrainBatch, teachers: tuple[Path, Path], mode: str, *, ids: int = 8) -> TrainBatch:
    """What the teacher workers would put beside the batch, from whole logits."""
    places = response_places(batch, range(batch.rollouts))
    logits = [torch.cat([plain_logits(load_plain(t), batch, i)[0] for i in range(batch.rollouts)]).detach() for t in teachers]
    log_star_RV, alpha_R = compose_teacher(logits[0], logits[1], r=R, eps=EPS)
    weight_T = torch.zeros(batch.tokens)
    weight_T[places] = 1.0

    def column(value_R: torch.Tensor) -> torch.Tensor:
        found = torch.zeros((batch.tokens, *value_R.shape[1:]), dtype=value_R.dtype)
        found[places] = value_R
        return found

    if mode == "hidden":
        states = [torch.cat([_states(t, batch, i) for i in range(batch.rollouts)]) for t in teachers]
        guidance = Guidance(weight_T=weight_T, dpo_hidden_TH=column(states[0]), reverse_hidden_TH=column(states[1]))
    elif mode == "topk":
        id_RK = log_star_RV.topk(ids).indices
        rest_RV = log_star_RV.scatter(1, id_RK, -torch.inf)
        guidance = Guidance(
            weight_T=weight_T, alpha_T=column(alpha_R), id_TK=column(id_RK), teacher_logp_TK=column(log_star_RV.gather(1, id_RK)),
            tail_T=column(rest_RV.logsumexp(dim=1)),
        )
    else:
        target_R = batch.token_T[places]
        guidance = Guidance(
            weight_T=weight_T, alpha_T=column(alpha_R), teacher_logp_T=column(log_star_RV.gather(1, target_R[:, None])[:, 0])
        )
    return replace(batch, guidance=guidance)


def _states(folder: Path, batch: TrainBatch, i: int) -> torch.Tensor:
    token_T = batch.token_T[batch.start_N[i] : batch.start_N[i + 1]]
    with torch.no_grad():
        return load_plain(folder).base_model(input_ids=token_T[None], use_cache=False).last_hidden_state[
            0, int(batch.prompt_length_N[i]) - 1 : -1
        ]


def _distillation(mode: str, vocabulary: int, batch: TrainBatch, **changes: Any) -> Task:
    terms = Distillation(mode=mode, r=R, eps=EPS, beta0=BETA, rollouts=(batch.rollouts,), vocabulary=vocabulary)  # type: ignore
    return Task(objective="distillation", distillation=replace(terms, **changes))


def _plain_step(folder: Path, loss_of: Callable[[Any], torch.Tensor]) -> tuple[dict[str, torch.Tensor], float]:
    """Weights after one AdamW step of torch on a loss, and that loss."""
    lm = load_plain(folder)
    optimizer = torch.optim.AdamW(lm.parameters(), lr=LR, betas=(0.9, 0.999), weight_decay=0.01)
    loss = loss_of(lm)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(lm.parameters(), 1.0)
    optimizer.step()
    return {name: p.detach().clone() for name, p in lm.named_parameters()}, float(loss.detach())


def _update(learner: Learner, batch: TrainBatch, task: Task, divisors: list[int] | None = None) -> dict[str, Any]:
    return learner.update(batch, global_tokens=divisors or loss_tokens(batch), total_updates=None, task=task)


# -- distillation --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [64, 10**6])
def test_a_distillation_by_hidden_states_is_the_mean_over_answers_of_alignment_loss(
    make_learner: MakeLearner, tiny_folder: Path, teachers: tuple[Path, Path], budget: int
) -> None:
    batch, vocabulary = random_batch(LENGTHS), _vocabulary(tiny_folder)

    expected, loss = _plain_step(tiny_folder, lambda lm: _alignment_of(lm, batch, teachers))
    learner = make_learner(tokens_per_microbatch=budget, heads=HeadSources(*teachers, vocabulary=vocabulary))
    totals = _update(learner, _guided(batch, teachers, "hidden"), _distillation("hidden", vocabulary, batch))
    assert totals["sum/distil_loss"] / loss_tokens(batch)[0] == pytest.approx(loss, rel=1e-4)
    assert largest_gap(dict(learner.named_weights()), expected) < TOLERANCE
    assert sum(totals[f"sum/distil_mass_{name}"] for name in ("agree", "differ", "disagree")) == pytest.approx(
        totals["sum/distil_loss"], rel=1e-5
    )


def test_buckets_of_all_ids_distil_as_hidden_states_do_and_fewer_ids_see_less_of_the_kl(
    make_learner: MakeLearner, tiny_folder: Path, teachers: tuple[Path, Path]
) -> None:
    batch, vocabulary = random_batch(LENGTHS), _vocabulary(tiny_folder)
    whole = make_learner(heads=HeadSources(*teachers, vocabulary=vocabulary))
    seen = _update(whole, _guided(batch, teachers, "hidden"), _distillation("hidden", vocabulary, batch))
    every, few = make_learner(), make_learner()
    task = _distillation("topk", vocabulary, batch)
    all_ids = _update(every, _guided(batch, teachers, "topk", ids=vocabulary - 1), task)
    some_ids = _update(few, _guided(batch, teachers, "topk", ids=2), task)
    assert largest_gap(dict(every.named_weights()), dict(whole.named_weights())) < TOLERANCE
    assert all_ids["sum/distil_kl"] == pytest.approx(seen["sum/distil_kl"], rel=1e-4)
    assert 0 < some_ids["sum/distil_kl"] < all_ids["sum/distil_kl"]


def test_the_scalar_form_is_a_policy_gradient_of_beta_times_the_log_ratio(
    make_learner: MakeLearner, tiny_folder: Path, teachers: tuple[Path, Path]
) -> None:
    batch, vocabulary = random_batch(LENGTHS), _vocabulary(tiny_folder)
    guided = _guided(batch, teachers, "scalar")
    guide = guided.guidance
    assert guide.alpha_T is not None and guide.teacher_logp_T is not None

    def loss_of(lm: Any) -> torch.Tensor:
        losses = []
        for i in range(batch.rollouts):
            places = response_places(batch, [i])
            logp_T = plain_logp(lm, batch, i)
            reward_T = BETA / guide.alpha_T[places] * (guide.teacher_logp_T[places] - logp_T.detach())
            losses.append(-(reward_T * logp_T).mean())
        return torch.stack(losses).mean()

    expected, _ = _plain_step(tiny_folder, loss_of)
    learner = make_learner(loss=LossSettings(dual_clip=None))
    _update(learner, guided, _distillation("scalar", vocabulary, batch))
    assert largest_gap(dict(learner.named_weights()), expected) < TOLERANCE


def test_a_distillation_beside_the_policy_loss_adds_its_weighted_gradient(
    make_learner: MakeLearner, tiny_folder: Path, teachers: tuple[Path, Path]
) -> None:
    batch, vocabulary = random_batch(LENGTHS), _vocabulary(tiny_folder)
    weight = 0.05

    def loss_of(lm: Any) -> torch.Tensor:
        gains = [batch.advantage_T[response_places(batch, [i])] * plain_logp(lm, batch, i) for i in range(batch.rollouts)]
        return weight * _alignment_of(lm, batch, teachers) - torch.cat(gains).mean()

    expected, _ = _plain_step(tiny_folder, loss_of)
    terms = _distillation("hidden", vocabulary, batch, weight=weight).distillation
    learner = make_learner(heads=HeadSources(*teachers, vocabulary=vocabulary), loss=LossSettings(dual_clip=None))
    _update(learner, _guided(batch, teachers, "hidden"), Task(distillation=terms))
    assert largest_gap(dict(learner.named_weights()), expected) < TOLERANCE
    plain = make_learner()
    _update(plain, batch, Task())
    assert largest_gap(dict(learner.named_weights()), dict(plain.named_weights())) > 5 * TOLERANCE


def _alignment_of(lm: Any, batch: TrainBatch, teachers: tuple[Path, Path]) -> torch.Tensor:
    """Mean over answers of `alignment_loss` from whole logits."""
    losses = []
    for i in range(batch.rollouts):
        dpo, reverse = (plain_logits(load_plain(t), batch, i)[0].detach() for t in teachers)
        log_star, alpha_T = compose_teacher(dpo, reverse, r=R, eps=EPS)
        student = plain_logits(lm, batch, i)[0]
        losses.append(alignment_loss(student, log_star, alpha_T, torch.ones(len(student)), beta0=BETA))
    return torch.stack(losses).mean()


def test_answers_that_nobody_distils_change_nothing_and_an_entropy_share_keeps_the_unsure_tokens(
    make_learner: MakeLearner, tiny_folder: Path, teachers: tuple[Path, Path]
) -> None:
    batch, vocabulary = random_batch(LENGTHS), _vocabulary(tiny_folder)
    guided = _guided(batch, teachers, "topk")
    guide = guided.guidance
    assert guide.weight_T is not None
    left = guide.weight_T.clone()
    left[response_places(batch, [0, 3])] = 0.0
    some = make_learner()
    task = _distillation("topk", vocabulary, batch, rollouts=(2,))
    totals = _update(some, replace(guided, guidance=replace(guide, weight_T=left)), task)
    assert totals["sum/distil_tokens"] == 7 + 1
    pair = select_rollouts(guided, [1, 2])
    only = make_learner()
    _update(only, pair, _distillation("topk", vocabulary, pair))
    assert largest_gap(dict(some.named_weights()), dict(only.named_weights())) < TOLERANCE
    unsure = _update(make_learner(), guided, _distillation("topk", vocabulary, batch, entropy_share=0.25))
    assert 0.2 * batch.loss_mask_T.sum() <= unsure["sum/distil_tokens"] <= 0.3 * batch.loss_mask_T.sum() + 1


def test_a_step_in_which_no_answer_is_to_be_distilled_still_makes_its_policy_update(
    make_learner: MakeLearner, tiny_folder: Path, teachers: tuple[Path, Path]
) -> None:
    batch, vocabulary = random_batch(LENGTHS), _vocabulary(tiny_folder)
    zeros_T = torch.zeros(batch.tokens)
    nobody = replace(batch, guidance=Guidance(weight_T=zeros_T, teacher_logp_T=zeros_T, alpha_T=torch.ones(batch.tokens)))
    terms = _distillation("hidden", vocabulary, batch, rollouts=(0,)).distillation
    learner = make_learner(heads=HeadSources(*teachers, vocabulary=vocabulary))
    _update(learner, nobody, Task(distillation=terms))
    plain = make_learner()
    _update(plain, batch, Task())
    assert largest_gap(dict(learner.named_weights()), dict(plain.named_weights())) < TOLERANCE


def test_the_learner_reads_the_heads_that_the_teachers_have(teachers: tuple[Path, Path]) -> None:
    for folder in teachers:
        head_VH = load_plain(folder).get_output_embeddings().weight
        assert torch.equal(read_head(folder, vocabulary=len(head_VH)), head_VH)


# -- pairs ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [64, 10**6])
def test_a_preference_update_is_the_plain_torch_step_of_dpo_with_t_reg(
    make_learner: MakeLearner, tiny_folder: Path, budget: int
) -> None:
    batch = random_batch([(5, 0, 9), (5, 0, 31), (7, 0, 12), (7, 0, 3), (4, 0, 20), (4, 0, 22)])
    tokens = [batch.token_T[a:b].tolist() for a, b in zip(batch.start_N[:-1].tolist(), batch.start_N[1:].tolist(), strict=True)]
    cuts = batch.prompt_length_N.tolist()
    pairs = [make_pair(tokens[i][: cuts[i]], tokens[i][cuts[i] :], tokens[i + 1][cuts[i + 1] :]) for i in (0, 2, 4)]
    generator = torch.Generator().manual_seed(5)
    reference = [tuple(-torch.rand(len(s), generator=generator) for s in (p.chosen_ids, p.rejected_ids)) for p in pairs]
    credit = [tuple(torch.rand(len(s), generator=generator) - 0.5 for s in (p.chosen_ids, p.rejected_ids)) for p in pairs]
    paired = to_batch(pairs, reference=reference, credit=credit)  # type: ignore[arg-type]
    beta, alpha = 0.3, 0.5

    def loss_of(lm: Any) -> torch.Tensor:
        losses = []
        for k in range(len(pairs)):
            chosen, rejected = (plain_logp(lm, paired, 2 * k + side) for side in (0, 1))
            margin = beta * ((chosen - reference[k][0]).sum() - (rejected - reference[k][1]).sum())
            weight = torch.sigmoid(-margin).detach()
            push = -beta * ((credit[k][0] * chosen).sum() + (credit[k][1] * rejected).sum())
            losses.append(-torch.nn.functional.logsigmoid(margin) + alpha * weight * push)
        return torch.stack(losses).mean()

    expected, loss = _plain_step(tiny_folder, loss_of)
    learner = make_learner(tokens_per_microbatch=budget)
    task = Task(objective="preference", preference=Preference(beta=beta, treg_alpha=alpha))
    totals = _update(learner, paired, task, [len(pairs)])
    assert totals["sum/loss"] / totals["sum/pair_pairs"] == pytest.approx(loss, rel=1e-4)
    assert largest_gap(dict(learner.named_weights()), expected) < TOLERANCE


def test_the_scores_asked_of_the_learner_are_the_models_own_and_come_back_in_place(
    make_learner: MakeLearner, tiny_folder: Path
) -> None:
    batch, lm = random_batch(LENGTHS), load_plain(tiny_folder)
    learner = make_learner()
    rows_T, index_N = learner.score(batch)
    ids_TK, _ = learner.top_ids(batch, 3, _vocabulary(tiny_folder))
    assert index_N.tolist() == list(range(batch.rollouts))
    for i in range(batch.rollouts):
        places = response_places(batch, [i])
        with torch.no_grad():
            logits_TV, _ = plain_logits(lm, batch, i)
            torch.testing.assert_close(rows_T[places], plain_logp(lm, batch, i), atol=1e-5, rtol=0)
        assert torch.equal(ids_TK[places].sort().values, logits_TV.topk(3).indices.sort().values.int())


# -- HAPO ----------------------------------------------------------------------------------------------------------------


def test_hapos_loss_takes_its_statistics_from_the_whole_batch_at_the_sampling_weights(
    make_learner: MakeLearner, tiny_folder: Path
) -> None:
    batch = random_batch(LENGTHS)
    terms = HeterogeneousSettings()
    lm = load_plain(tiny_folder)
    with torch.no_grad():
        logits = [plain_logits(lm, batch, i)[0] for i in range(batch.rollouts)]
    entropy_R = torch.cat([-(z.log_softmax(-1).exp() * z.log_softmax(-1)).sum(-1) for z in logits])
    stats = entropy_statistics(entropy_R)
    signal_R = signal(entropy_R, stats)

    def loss_of(model: Any) -> torch.Tensor:
        advantage_R = batch.advantage_T[response_places(batch, range(batch.rollouts))]
        logp_R = torch.cat([plain_logp(model, batch, i) for i in range(batch.rollouts)])
        ratio_R = (logp_R - logp_R.detach()).exp()
        low_R, high_R = clip_widths(signal_R, low=0.2, high=0.28, kappa=1.0)
        moved_R = redistribute(advantage_R, signal_R, ratio_R.detach(), low=0.2, high=0.28, kappa=1.0)
        gain_R = torch.minimum(ratio_R * moved_R, ratio_R.clamp(1 - low_R, 1 + high_R) * moved_R)
        return -gain_R.mean()

    expected, _ = _plain_step(tiny_folder, loss_of)
    results = []
    for budget in (64, 10**6):
        learner = make_learner(tokens_per_microbatch=budget, loss=LossSettings(heterogeneous=terms, dual_clip=10.0))
        _update(learner, batch, Task())
        results.append(dict(learner.named_weights()))
    assert largest_gap(results[0], expected) < TOLERANCE
    assert largest_gap(results[0], results[1]) < TOLERANCE
    plain = make_learner()
    _update(plain, batch, Task())
    assert largest_gap(dict(plain.named_weights()), results[0]) > 5 * TOLERANCE
