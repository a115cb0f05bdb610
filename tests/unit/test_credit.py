"""T-REG's token rewards from the frozen start policy's workers: dealing, placing, the self-test; no model is needed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from rl.batch import pack_rollouts
from rl.contrast import ContrastEncoder
from rl.credit import Credits
from rl.embedded import tiny_tokenizer
from rl.errors import BudgetRLError
from rl.pairs import make_pair
from rl.preference_settings import ContrastSettings
from rl.prompts import PromptEncoder
from rl.settings import Settings
from tests.builders import make_lease, make_prompt, make_rollout

QUESTION = "State the final answer to the following arithmetic problem: 7 + 5 ="
CONTRAST = ContrastSettings(better="{question}", worse="State the final answer to the following arithmetic problem: =")
SETTINGS = Settings.model_validate({"model": {"path": "m"}, "data": {"source": "p.jsonl"}, "max_steps": 1})
LN_3 = 1.0986122886681098


class _Worker:
    """Finds the tokens of ``likely`` e^gap times likelier behind the longer prompt, the question's, than behind the other."""

    def __init__(self, likely: set[int], *, gap: float = LN_3) -> None:
        self.score, self.likely, self.gap = self, likely, gap
        self.sequences = 0

    def remote(self, request: Any) -> torch.Tensor:
        self.sequences += len(request.prompt_length_N)
        found = []
        rows = zip(request.start_N.tolist(), request.start_N.tolist()[1:], request.prompt_length_N.tolist(), strict=False)
        for start, end, prompt in rows:
            gain = self.gap if prompt > 14 else 0.0
            found += [gain - 2.0 if token in self.likely else -2.0 for token in request.token_T[start + prompt : end].tolist()]
        return torch.tensor(found)


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rl.credit.wait_for", lambda refs, **_: refs)


def _credits(*workers: _Worker, max_length: int = 512) -> Credits:
    tokenizer = tiny_tokenizer()
    encoder = ContrastEncoder(CONTRAST, PromptEncoder(tokenizer, SETTINGS.data), tokenizer, max_length=max_length)
    return Credits(SETTINGS, encoder, tokenizer, list(workers))


def test_the_two_prompts_of_this_test_differ_in_length_as_its_worker_supposes() -> None:
    encoder = PromptEncoder(tiny_tokenizer(), SETTINGS.data)
    assert len(encoder.encode(CONTRAST.worse)) <= 14 < len(encoder.encode(QUESTION))


def _ids(text: str) -> list[int]:
    return tiny_tokenizer().encode(text)


def test_an_advantage_grows_where_the_token_is_likelier_behind_the_better_prompt_and_flat_groups_are_not_asked_about() -> None:
    likely, other = _ids("1")[0], _ids("2")[0]
    worker = _Worker({likely})
    prompts = [replace(make_prompt(i, token_ids=(1, 2)), question=QUESTION) for i in range(3)]
    rollouts = [
        make_rollout(make_lease(prompt=prompt, group=i), generated=[likely, other], logp_T=[-1.0] * 2)
        for i, prompt in enumerate(prompts)
    ]
    batch = pack_rollouts(rollouts, torch.tensor([1.0, -2.0, 0.0]), torch.zeros(3))
    found, figures = _credits(worker).reshaped(batch, rollouts, weight=0.4)
    # sigmoid(ln 3) - 1/2 = 1/4: A + 0.4 |A| / 4
    assert found.advantage_T.tolist() == pytest.approx([0, 0, 1.1, 1.0, 0, 0, -1.8, -2.0, 0, 0, 0, 0])
    assert figures["treg/rollouts"] == 2 and figures["treg/credit_mean"] == pytest.approx(0.125)
    assert worker.sequences == 2 * 2  # two answers behind two prompts; the third has no advantage


def test_the_workers_share_the_answers_and_each_gets_its_own_back() -> None:
    likely = _ids("1")[0]
    answers = [[likely], [likely, _ids("2")[0], likely], _ids("3"), [_ids("4")[0], likely]]
    one, _ = _credits(_Worker({likely})).of_answers([QUESTION] * 4, answers, [0] * 4)
    workers = _Worker({likely}), _Worker({likely})
    two, _ = _credits(*workers).of_answers([QUESTION] * 4, answers, [0] * 4)
    assert [c.tolist() for c in two if c is not None] == [c.tolist() for c in one if c is not None]
    assert [[round(v, 2) for v in c.tolist()] for c in one if c is not None] == [[0.25], [0.25, 0.0, 0.25], [0.0], [0.0, 0.25]]
    assert all(worker.sequences for worker in workers)


def test_an_answer_without_room_behind_the_prompts_gets_no_credit_and_is_counted() -> None:
    likely = _ids("1")[0]
    room = len(PromptEncoder(tiny_tokenizer(), SETTINGS.data).encode(QUESTION)) + 2
    said: list[str] = []
    pair = make_pair((1,), (likely, likely), (likely, likely, likely), QUESTION)
    found = _credits(_Worker({likely}), max_length=room).of_pairs([pair], say=said.append)
    assert [side.tolist() for side in found[pair.id]] == [pytest.approx([0.25, 0.25]), [0.0, 0.0, 0.0]]
    assert "1 of 2 answers are too long" in said[0]


class _Knowing(_Worker):
    """Finds the tokens of answers that it knows likelier behind the question, and those of others not."""

    def remote(self, request: Any) -> torch.Tensor:
        found = []
        rows = zip(request.start_N.tolist(), request.start_N.tolist()[1:], request.prompt_length_N.tolist(), strict=False)
        for start, end, prompt in rows:
            answer = request.token_T[start + prompt : end].tolist()
            gain = self.gap if prompt > 14 and answer in KNOWN else 0.0
            found += [gain - 2.0] * len(answer)
        return torch.tensor(found)


KNOWN = [_ids("1 + 2 = 3"), _ids("7 + 9 = 16")]


def test_the_self_test_passes_a_judge_of_right_answers_and_refuses_one_that_has_it_the_wrong_way_round() -> None:
    answers = KNOWN * 12
    questions, none = [QUESTION] * len(answers), [0] * len(answers)
    good = _credits(_Knowing(set())).self_test(questions, answers, none, section="treg")
    assert good.places == 24 and good.share == 1.0
    for gap in (-LN_3, 0.0):
        with pytest.raises(BudgetRLError, match="do not tell right from wrong"):
            _credits(_Knowing(set(), gap=gap)).self_test(questions, answers, none, section="treg")
