"""T-REG's two prompts, the credit they give, and the self-test of its sign."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from rl.contrast import (
    ContrastEncoder,
    SignTest,
    check_sign,
    corrupt,
    number_ids,
    sign_test,
)
from rl.embedded import EOS, VOCABULARY, tiny_tokenizer
from rl.errors import BudgetRLError, ConfigError
from rl.preference_settings import ContrastSettings, PairSettings, PreferenceSettings, RlTregSettings, TregSettings
from rl.prompts import PromptEncoder
from rl.settings import DataSettings

QUESTION = "State the final answer to the following arithmetic problem: 7 + 5 - 3 ="
BARE = ContrastSettings(better="{question}", worse="State the final answer to the following arithmetic problem: =")
REVISE = ContrastSettings(better="{question}\n{draft}\nanswer: ok", worse="{question}\n{draft}\nanswer: no")
DATA = DataSettings(source="reasoning_gym:chain_sum")
CHAT = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}answer:{% endif %}"


def ids(text: str) -> tuple[int, ...]:
    return tuple(tiny_tokenizer().encode(text))


def encoder(contrast: ContrastSettings = REVISE, *, max_length: int = 512, **changes: Any) -> ContrastEncoder:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = changes.pop("chat_template", None)
    prompts = PromptEncoder(tokenizer, DATA)
    return ContrastEncoder(contrast, prompts, tokenizer, max_length=max_length, **changes)


def prompts_and_answers(request: Any) -> list[tuple[str, tuple[int, ...]]]:
    found = []
    for i, prompt in enumerate(request.prompt_length_N.tolist()):
        row = request.token_T[request.start_N[i] : request.start_N[i + 1]].tolist()
        found.append((tiny_tokenizer().decode(row[:prompt]), tuple(row[prompt:])))
    return found


# ---- prompts ---------------------------------------------------------------------------------------------------------


def test_answers_stand_unchanged_behind_both_prompts() -> None:
    answers = [ids(f"7 + 5 = 12 so 9{EOS}"), ids(" 8")]
    asked = encoder().requests([QUESTION, "2 ="], answers)
    assert prompts_and_answers(asked.better) == [
        (f"{QUESTION}\n7 + 5 = 12 so 9\nanswer: ok", answers[0]),
        ("2 =\n8\nanswer: ok", answers[1]),
    ]
    assert prompts_and_answers(asked.worse) == [
        (f"{QUESTION}\n7 + 5 = 12 so 9\nanswer: no", answers[0]),
        ("2 =\n8\nanswer: no", answers[1]),
    ]
    assert asked.too_long == 0 and asked.kept_N.tolist() == [True, True]


def test_the_templates_go_through_the_chat_template() -> None:
    asked = encoder(chat_template=CHAT).requests(["2 ="], [ids("8")])
    assert prompts_and_answers(asked.better) == [("2 =\n8\nanswer: ok\nanswer:", ids("8"))]


def test_the_default_prompts_differ_only_behind_what_they_share() -> None:
    contrast = ContrastSettings()
    shared = len("{question}\n\nDraft of an answer:\n{draft}\n\n")
    assert contrast.better[:shared] == contrast.worse[:shared] == "{question}\n\nDraft of an answer:\n{draft}\n\n"
    for good, bad in (("helpful", "unhelpful"), ("correct", "incorrect"), ("coherent", "incoherent"), ("concise", "verbose")):
        assert f" {good}" in contrast.better and f" {bad}" in contrast.worse and f" {bad}" not in contrast.better


def test_braces_in_a_question_are_not_filled_in() -> None:
    """{draft} inside the question is text of the question; what the tokenizer cannot spell is named in full."""
    with pytest.raises(ConfigError, match=r"cannot encode '2 \{draft\} =\\n8\\nanswer: ok'"):
        encoder().requests(["2 {draft} ="], [ids("8")])


def test_an_answer_without_room_is_left_out_and_counted() -> None:
    answers = [ids(f"7 + 5 = 12{EOS}"), ids(f"9{EOS}")]
    longest = len(ids("2 =\n7 + 5 = 12\nanswer: ok")) + len(answers[0])
    assert encoder(max_length=longest).requests(["2 =", "2 ="], answers).too_long == 0
    asked = encoder(max_length=longest - 1).requests(["2 =", "2 ="], answers)
    assert (asked.too_long, asked.kept_N.tolist()) == (1, [False, True])
    assert [answer for _, answer in prompts_and_answers(asked.better)] == [answers[1]]
    credit = asked.credits(torch.tensor([-1.0, -1.0]), torch.tensor([-2.0, -1.0]))
    assert credit[0] is None and credit[1] is not None and credit[1].tolist() == pytest.approx([0.231059, 0.0], abs=1e-6)
    nothing = encoder(max_length=3).requests(["2 ="], [answers[0]])
    assert nothing.too_long == 1 and nothing.credits(torch.zeros(0), torch.zeros(0)) == [None]


def test_credit_is_the_token_reward_and_none_for_special_tokens_and_the_prefill() -> None:
    answers = [ids(f"<think> 7{EOS}"), ids("12 so9")]
    better, worse = torch.tensor([-1.0, -1, -1, -1, -3, -1, -1]), torch.tensor([-3.0, -3, -3, -3, -1, -1, -1.5])
    assert len(answers[0]) == 4
    first, second = encoder(eos_ids=ids(" so")).requests(["2 ="] * 2, answers, prefill_N=[2, 0]).credits(better, worse)
    assert first is not None and first.tolist() == pytest.approx([0.0, 0.0, 0.380797, 0.0], abs=1e-6)
    assert second is not None and second.tolist() == pytest.approx([-0.380797, 0.0, 0.122459], abs=1e-6)


def test_log_probs_and_answers_that_do_not_fit_are_refused() -> None:
    asked = encoder().requests(["2 ="], [ids("8")])
    with pytest.raises(ValueError, match="1 log-probs were asked for"):
        asked.credits(torch.zeros(2), torch.zeros(2))
    with pytest.raises(ValueError, match="NaN"):
        asked.credits(torch.tensor([math.nan]), torch.zeros(1))
    with pytest.raises(ValueError, match="1 questions, 2 answers"):
        encoder().requests(["2 ="], [ids("8")] * 2)


# ---- what is refused before anything starts --------------------------------------------------------------------------


def test_the_prompts_of_the_embedded_model_can_be_spelt() -> None:
    encoder(BARE).check(QUESTION, ids(f"<think> 7 + 5 = 12 so 9</think> 9{EOS}"))
    (better, _), *_ = prompts_and_answers(encoder(BARE).requests([QUESTION], [ids("9")]).better)
    assert better == QUESTION


def test_words_that_the_tokenizer_cannot_spell_are_refused() -> None:
    with pytest.raises(ConfigError, match="preference.treg.contrast.better: the tokenizer of model.path cannot encode"):
        encoder(ContrastSettings(), section="preference.treg.contrast").check(QUESTION, ids("9"))


def test_words_that_become_unknown_tokens_are_refused() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.unk_token = "?"  # a word-level tokenizer with an unknown token says nothing when it meets a new word
    backend = tokenizer.backend_tokenizer
    backend.model.unk_token = "?"
    contrast = ContrastSettings(better="{question} four", worse="{question}")
    guarded = ContrastEncoder(contrast, PromptEncoder(tokenizer, DATA), tokenizer, max_length=512)
    with pytest.raises(ConfigError, match="treg.contrast.better has words that the tokenizer of model.path does not know"):
        guarded.check("2 =", ids("9"))
    guarded.check("2 four =", ids("9"))  # here it is the question that the tokenizer does not know


def test_prompts_that_leave_no_room_or_read_alike_are_refused() -> None:
    with pytest.raises(ConfigError, match="makes a prompt of .* tokens, and the model reads at most 20"):
        encoder(max_length=20).check(QUESTION, ids("9"))
    with pytest.raises(ConfigError, match="read alike"):
        encoder(ContrastSettings(better="{question}", worse="2 =")).check("2 =", ids("9"))


@pytest.mark.parametrize(
    ("contrast", "message"),
    [
        ({"better": "answer"}, "does not say where the question goes"),
        ({"better": "{question}", "worse": "{question}"}, "are the same"),
        ({"better": "{questions} {question}"}, "did you mean {question}"),
        ({"worse": "{drafts}"}, "did you mean {draft}"),
    ],
)
def test_templates_that_cannot_work_are_refused(contrast: dict[str, str], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ContrastSettings(**contrast)
    ContrastSettings(better=r"{question} \boxed{number}", worse="answer")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"margin": 1.0}, "belongs to simpo"),
        ({"reverse": True, "treg": {}}, "leave one out"),
        ({"treg": {"alpha": 2.0}}, "less than 2"),
        ({"treg": {"alpha": 0.0}}, "greater than 0"),
        ({"beta": 0.0}, "greater than 0"),
        ({"pairs": {"samples": 1}}, "greater than or equal to 2"),
        ({"form": "ipo"}, "'dpo' or 'simpo'"),
    ],
)
def test_a_preference_stage_that_contradicts_itself_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        PreferenceSettings(**settings)


def test_the_settings_stand_as_documented() -> None:
    plain = PreferenceSettings()
    assert (plain.form, plain.beta, plain.margin, plain.reverse, plain.treg) == ("dpo", 0.1, 0.0, False, None)
    assert plain.pairs.from_rollouts and not PairSettings(source="owner/name").from_rollouts
    assert (TregSettings().alpha, RlTregSettings().weight) == (0.25, 0.25)
    PreferenceSettings(form="simpo", beta=10.0, margin=3.0, treg=TregSettings())


# ---- the self-test ---------------------------------------------------------------------------------------------------


def test_numbers_are_found_by_their_digits() -> None:
    answers = [ids(f"<think> 7 + -12 = 5{EOS}"), ids("wait no")]
    assert {VOCABULARY[i] for i in number_ids(tiny_tokenizer(), answers)} == {"7", "-12", "5"}


def test_numbers_become_other_numbers_of_the_answers() -> None:
    answers = [ids("7 + 5 = 12 so 12"), ids("3 + 4 = 7"), ids("wait no 9")]
    numbers = number_ids(tiny_tokenizer(), answers)
    for answer, corruption in zip(answers, corrupt(answers, number_ids=numbers, share=0.5), strict=True):
        assert len(corruption.ids) == len(answer) and corruption.places
        changed = [place for place, (a, b) in enumerate(zip(answer, corruption.ids, strict=True)) if a != b]
        assert tuple(changed) == corruption.places
        assert all(answer[place] in numbers and corruption.ids[place] in numbers for place in changed)
    assert [len(c.places) for c in corrupt(answers, number_ids=numbers, share=0.5)] == [2, 2, 1]
    assert [len(c.places) for c in corrupt(answers, number_ids=numbers, share=1.0)] == [4, 3, 1]


def test_without_numbers_other_tokens_are_exchanged() -> None:
    answers = [ids("wait no so"), ids("7 + 5 =")]
    wordy, _ = corrupt(answers, number_ids=number_ids(tiny_tokenizer(), answers))
    assert len(wordy.places) == 1 and wordy.ids[wordy.places[0]] in {*answers[0], *answers[1]}
    same_number, _ = corrupt([ids("so 7"), ids("no 7")], number_ids=set(ids("7")), share=1.0)
    assert same_number.places == (0, 1, 2)
    assert corrupt([ids("7"), ids("7")], number_ids=set(ids("7")))[0].places == ()


def test_special_tokens_and_the_prefill_stay() -> None:
    answers = [(*ids("7 + 5"), 1, 1), (*ids("3 - 4"), 1)]
    for seed in range(20):
        first, second = corrupt(answers, number_ids=(), fixed_ids=[1], prefill_N=[2, 0], share=1.0, seed=seed)
        assert first.places == (2,) and first.ids[:2] == answers[0][:2] and first.ids[3:] == (1, 1)
        assert second.places == (0, 1, 2) and 1 not in second.ids[:3]


def test_the_same_seed_corrupts_alike_and_another_otherwise() -> None:
    answers = [ids("7 + 5 = 12 so 9 - 3 = 6")] * 3
    numbers = number_ids(tiny_tokenizer(), answers)
    first = corrupt(answers, number_ids=numbers)
    assert first == corrupt(answers, number_ids=set(numbers)) and len(set(first)) == 3
    assert first != corrupt(answers, number_ids=numbers, seed=1)
    with pytest.raises(ValueError, match="share must lie in"):
        corrupt(answers, number_ids=numbers, share=0.0)


def test_the_sign_test_counts_places_where_the_right_token_earned_more() -> None:
    right = [torch.tensor([0.1, 0.4, 0.2]), torch.tensor([0.3]), None, torch.tensor([0.5])]
    wrong = [torch.tensor([0.9, 0.1, 0.2]), torch.tensor([-0.3]), torch.tensor([0.0]), None]
    found = sign_test(right, wrong, [(1, 2), (0,), (0,), (0,)])
    assert (found.places, found.share) == (3, pytest.approx(2 / 3))
    assert found.lower == pytest.approx(0.207660, abs=1e-6)


@pytest.mark.parametrize(
    ("above", "places", "lower"), [(10, 10, 0.722467), (60, 100, 0.502003), (59, 100, 0.492014), (0, 10, 0.0), (5, 10, 0.236593)]
)
def test_the_lower_bound_is_wilsons(above: int, places: int, lower: float) -> None:
    right = [torch.tensor([0.1] * above + [0.0] * (places - above))]
    found = sign_test(right, [torch.zeros(places)], [range(places)])
    assert found.lower == pytest.approx(lower, abs=1e-6)
    if lower > 0.5:
        check_sign(found)
    else:
        with pytest.raises(BudgetRLError, match=f"at {above / places:.0%} of {places} places"):
            check_sign(found)


def test_a_test_without_places_shows_nothing() -> None:
    found = sign_test([torch.zeros(2)], [torch.zeros(2)], [()])
    assert found.places == 0 and math.isnan(found.share)
    with pytest.raises(BudgetRLError, match=r"nothing\n  fix: change reward.treg.contrast.better .* reward.treg.self_test=false"):
        check_sign(SignTest(math.nan, 0, 0.0), section="reward.treg")
