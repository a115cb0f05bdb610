"""The driver's side of frozen models: dealing sequences to workers, putting answers in place, traffic; no worker is needed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rl.batch import pack_rollouts, select_rollouts
from rl.guidance import TeacherAnswer
from rl.guiding import FrozenModels, _portions, request_of, response_places, shared_by_tokens, spread
from rl.pairs import make_pair, to_batch
from rl.settings import Settings
from rl.types import TrainBatch
from tests.builders import make_lease, make_prompt, make_rollout


def _batch() -> TrainBatch:
    """Prompts of 2, 3, 1 tokens; responses of 3, 1, 4."""
    rollouts = [
        make_rollout(make_lease(prompt=make_prompt(i, token_ids=tuple(range(10 * i, 10 * i + prompt))), group=i),
                     generated=list(range(100 * (i + 1), 100 * (i + 1) + length)), logp_T=[-1.0] * length)
        for i, (prompt, length) in enumerate([(2, 3), (3, 1), (1, 4)])
    ]
    return pack_rollouts(rollouts, torch.ones(3), torch.zeros(3))


def _settings(mode: str = "scalar", **teacher: Any) -> Settings:
    return Settings.model_validate(
        {
            "model": {"path": "m"},
            "data": {"source": "p.jsonl"},
            "max_steps": 1,
            "stage": "distil",
            "distil": {"teacher": {"dpo": "a", "reverse": "b", "mode": mode, **teacher}},
        }
    )


def test_sequences_go_to_the_worker_with_the_fewest_tokens_and_nobody_gets_an_empty_share() -> None:
    assert shared_by_tokens([5, 9, 4, 2], 2) == [[1, 3], [0, 2]]
    assert shared_by_tokens([7], 3) == [[0]]
    assert shared_by_tokens([], 2) == []


def test_response_places_are_the_response_tokens_in_order() -> None:
    batch = _batch()
    assert batch.token_T[response_places(batch, [0, 2])].tolist() == [100, 101, 102, 300, 301, 302, 303]
    assert response_places(batch, []).tolist() == []


def test_a_request_holds_the_chosen_rollouts_and_the_ids_asked_about_at_their_response_tokens() -> None:
    batch = _batch()
    ids_TK = torch.arange(batch.tokens)[:, None].int()
    request = request_of(batch, [2, 1], ids_TK)
    assert request.token_T.tolist() == [20, 300, 301, 302, 303, 10, 11, 12, 200]
    assert request.start_N.tolist() == [0, 5, 9] and request.prompt_length_N.tolist() == [1, 3]
    assert request.id_RK is not None
    assert batch.token_T[request.id_RK[:, 0].long()].tolist() == [300, 301, 302, 303, 200]


def test_rows_of_several_workers_come_back_to_their_tokens() -> None:
    batch = _batch()
    parts = [[2, 1], [0]]
    places = [response_places(batch, part) for part in parts]
    found_T = spread([batch.token_T[p].float() for p in places], places, batch.tokens)
    expected_T = torch.zeros(batch.tokens)
    every = response_places(batch, [0, 1, 2])
    expected_T[every] = batch.token_T[every].float()
    assert torch.equal(found_T, expected_T)


class _Teacher:
    """A worker whose finding about a token is the token itself."""

    def __init__(self, mode: str) -> None:
        self.score = self
        self.mode = mode

    def remote(self, request: Any) -> TeacherAnswer:
        places = torch.cat(
            [
                torch.arange(int(a + p), int(b))
                for a, b, p in zip(request.start_N[:-1], request.start_N[1:], request.prompt_length_N, strict=True)
            ]
        )
        token_R = request.token_T[places].float()
        if self.mode == "topk":
            ids = torch.stack([places, places + 1], dim=1).int()
            return TeacherAnswer(alpha_R=token_R, id_RK=ids, teacher_logp_RK=-ids.float(), tail_R=token_R)
        return TeacherAnswer(teacher_logp_R=-token_R, alpha_R=token_R, dpo_logp_R=-token_R, reverse_logp_R=-token_R - 10)


def test_a_teachers_words_stand_beside_the_tokens_they_are_about(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rl.guiding.wait_for", lambda refs, **_: refs)
    batch = _batch()
    models = FrozenModels(_settings(), None, [_Teacher("scalar"), _Teacher("scalar")], [])
    taught, figures = models.teach(batch, torch.tensor([True, False, True]))
    every = response_places(batch, [0, 2])
    guide = taught.guidance
    assert guide.weight_T is not None and guide.teacher_logp_T is not None
    assert guide.weight_T.nonzero().squeeze(1).tolist() == sorted(every.tolist())
    assert torch.equal(guide.teacher_logp_T[every], -batch.token_T[every].float())
    assert float(guide.teacher_logp_T[response_places(batch, [1])]) == 0
    # four float32 of seven tokens; beta_0 (log pi_d - log pi_r) = 0.1 * 10 per token
    assert figures["distil/traffic_bytes"] == 4 * 4 * 7 and figures["distil/traffic_bytes_per_token"] == 16
    assert figures["distil/contrastive_reward_per_token"] == pytest.approx(1.0)
    assert figures["distil/contrastive_reward"] == pytest.approx(3.5)


def test_ids_of_a_row_are_distinct_also_where_nobody_was_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rl.guiding.wait_for", lambda refs, **_: refs)
    models = FrozenModels(_settings("topk", student_k=0, top_k=2), None, [_Teacher("topk")], [])
    taught, _ = models.teach(_batch(), torch.tensor([True, False, False]))
    ids_TK = taught.guidance.id_TK
    assert ids_TK is not None and ids_TK.dtype == torch.int64
    assert bool((ids_TK[:, 0] != ids_TK[:, 1]).all())


def test_a_step_without_anything_to_distil_asks_nobody() -> None:
    taught, figures = FrozenModels(_settings(), None, [], []).teach(_batch(), torch.zeros(3, dtype=torch.bool))
    assert taught.guidance.weight_T is not None and not taught.guidance.weight_T.any()
    assert figures == {"distil/rollouts": 0.0}


class _Learners:
    """Two ranks that answer with the token ids of the rows they were dealt."""

    def score(self, data: Any) -> list[Any]:
        from rl.learner_worker import from_data_proto

        half = len(data) // 2
        shares = [from_data_proto(data[:half]), from_data_proto(data[half:])]
        return [(share.token_T.float(), share.index_N) for share in shares]


def test_scores_of_the_learner_ranks_come_back_to_their_rollouts_whatever_the_dealing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rl.guiding.wait_for", lambda refs, **_: refs)
    monkeypatch.setattr("rl.guiding.PORTION_TOKENS", 6)
    batch = _batch()
    settings = _settings()
    settings = settings.model_copy(update={"learner": settings.learner.model_copy(update={"ranks": 2})})
    assert torch.equal(FrozenModels(settings, _Learners(), [], []).learner_logp(batch), batch.token_T.float())


def test_scores_of_a_part_of_a_batch_come_back_to_the_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rl.guiding.wait_for", lambda refs, **_: refs)
    pairs = [make_pair((1,), (2, 3), (4, 5, 6)), make_pair((7,), (8,), (9,)), make_pair((7,), (10,), (11, 12))]
    chosen = select_rollouts(to_batch(pairs), [0, 2, 4])  # numbered 0, 2, 4 in the whole
    settings = _settings()
    settings = settings.model_copy(update={"learner": settings.learner.model_copy(update={"ranks": 2})})
    assert torch.equal(FrozenModels(settings, _Learners(), [], []).learner_logp(chosen), chosen.token_T.float())


def test_a_portion_ends_between_pairs_never_inside_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rl.guiding.PORTION_TOKENS", 5)
    batch = to_batch([make_pair((1,), (2, 3), (4, 5, 6)), make_pair((1,), (7,), (8,)), make_pair((9,), (7, 7, 7, 7), (8,))])
    portions = _portions(batch)
    assert [i for portion in portions for i in portion] == list(range(6))
    assert all(len(portion) % 2 == 0 for portion in portions) and len(portions) > 1
    assert select_rollouts(batch, portions[0]).pair_N.tolist()[:2] == [0, 0]  # type: ignore[union-attr]
