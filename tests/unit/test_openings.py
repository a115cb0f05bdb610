"""The budget's words as tokens, in front of the response or behind the question, and the cap that is left."""

from __future__ import annotations

import pytest
from transformers import AddedToken, PreTrainedTokenizerBase

from rl.embedded import tiny_tokenizer
from rl.errors import ConfigError
from rl.prompts import PromptEncoder
from rl.settings import DataSettings, RolloutSettings
from rl.types import BudgetKind, Prompt
from rollout.openings import Opening, Openings

SUFFIX = {"budget_place": "suffix", "budget_template": " I will answer with {budget} tokens"}
EFFORT = {"budgets": {"kind": "effort"}, "effort_template": "I will answer with {effort}"}
SHORT = {"budgets": [16], "max_length": 160, "length_schedule": [[0, 150], [40, 30]]}
HARD = {"hard_budgets": True, "budget_place": "none"}
CHAT = "{% for m in messages %}({{ m['content'] }}){% endfor %}{% if add_generation_prompt %}{{ '\n' }}{% endif %}"
THINKS = "{% for m in messages %}({{ m['content'] }}){% endfor %}<think>{{ '\n' }}"


def openings(*, chat: str | None = None, template: str = "auto", **changes: object) -> Openings:
    values: dict[str, object] = {"budgets": [32, 64], "samples_per_prompt": 2, "max_length": 160} | changes
    tokenizer = tokenizer_with(chat)
    encoder = PromptEncoder(tokenizer, DataSettings(source="x.json", template=template))
    return Openings(RolloutSettings.model_validate(values), tokenizer, encoder)


def tokenizer_with(chat: str | None) -> PreTrainedTokenizerBase:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = chat
    return tokenizer


def prompt_of(question: str = "4 + 3 =", *, chat: str | None = None) -> Prompt:
    encoder = PromptEncoder(tokenizer_with(chat), DataSettings(source="x.json"))
    return Prompt(id="q", question=question, answer="7", token_ids=encoder.encode(question), entry='{"kept": 1}')


def text(opening: Opening) -> str:
    return str(tiny_tokenizer().decode([*opening.prompt.token_ids, *opening.prefill_ids]))


def characters() -> PreTrainedTokenizerBase:
    """One token per character, so that <think> is spelt in seven."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(set("</think> I will answer the question with 0123456789 tokens\n+=/"))
    speller = Tokenizer(models.WordLevel({c: i for i, c in enumerate(letters)}, unk_token="<unk>"))
    speller.pre_tokenizer = pre_tokenizers.Split("", behavior="isolated")
    speller.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=speller, clean_up_tokenization_spaces=False)


# -- what is said, and where -------------------------------------------------------------------------------------------------


def test_a_plain_prompt_is_followed_by_the_whole_sentence() -> None:
    said = openings()
    assert text(said.open(prompt_of(), said.budget(64))) == "4 + 3 =<think> I will answer the question with 64 tokens"
    assert text(said.open(prompt_of(), said.free)) == "4 + 3 =<think>"


def test_a_free_member_has_no_number_and_its_own_opening() -> None:
    free = openings(hard_budgets=True, budget_kind="exact").free
    assert (free.tokens, free.kind, free.sentence, free.hard) == (0, BudgetKind.FREE, "<think>", False)


@pytest.mark.parametrize(
    ("ending", "sentence"),
    [
        ("<think>", " I will answer the question with 64 tokens"),
        ("<think>\n", "I will answer the question with 64 tokens"),
        ("<think>\n\n", "I will answer the question with 64 tokens"),
    ],
)
def test_a_prompt_that_opens_the_thinking_itself_is_not_opened_twice(ending: str, sentence: str) -> None:
    said, prompt = openings(), prompt_of("4 + 3 =" + ending)
    assert text(said.open(prompt, said.budget(64))) == "4 + 3 =" + ending + sentence
    assert text(said.open(prompt, said.free)) == "4 + 3 =" + ending


def test_a_closed_thinking_earlier_in_the_prompt_does_not_count() -> None:
    said = openings()
    assert text(said.open(prompt_of("<think>7</think>7\n4 + 3 ="), said.free)).endswith("4 + 3 =<think>")


def test_a_tokenizer_without_a_think_token_spells_it_and_still_opens_once() -> None:
    tokenizer = characters()
    said = Openings(RolloutSettings(budgets=[64], max_length=160), tokenizer)
    for ending in ("", "<think>", "<think>\n"):
        ids = tokenizer.encode("4 + 3 =" + ending)
        written = str(tokenizer.decode([*ids, *said.prefill_ids(said.budget(64), ids)]))
        assert written.count("<think>") == 1
        assert written.endswith("I will answer the question with 64 tokens")


def test_a_suffix_ends_the_question_and_the_response_is_opened_plainly() -> None:
    said = openings(**SUFFIX)
    opening = said.open(prompt_of(), said.budget(64))
    assert text(opening) == "4 + 3 = I will answer with 64 tokens<think>"
    assert tiny_tokenizer().decode(list(opening.prefill_ids)) == "<think>"
    assert (opening.prompt.id, opening.prompt.question, opening.prompt.entry) == ("q", "4 + 3 =", '{"kept": 1}')
    assert opening.max_new_tokens == 159


def test_a_suffix_goes_into_the_users_turn_and_into_a_plain_template() -> None:
    said = openings(chat=CHAT, **SUFFIX)
    assert text(said.open(prompt_of(chat=CHAT), said.budget(64))) == "(4 + 3 = I will answer with 64 tokens)\n<think>"
    said = openings(template="{question} so", **SUFFIX)
    assert text(said.open(prompt_of(), said.budget(64))) == "4 + 3 = I will answer with 64 tokens so<think>"


def test_the_free_member_beside_a_suffix_has_the_plain_prompt_itself() -> None:
    said, prompt = openings(**SUFFIX), prompt_of()
    assert said.open(prompt, said.free).prompt is prompt


def test_no_words_at_all_leave_the_plain_opening() -> None:
    said = openings(**HARD)
    assert text(said.open(prompt_of(), said.budget(64))) == "4 + 3 =<think>"


def test_a_budget_carries_how_it_binds_and_where_it_is_said() -> None:
    soft, hard = openings(budget_kind="exact", **SUFFIX).budget(64), openings(**HARD).budget(64)
    assert (soft.tokens, soft.kind, soft.place, soft.hard) == (64, BudgetKind.EXACT, "suffix", False)
    assert (hard.tokens, hard.kind, hard.place, hard.hard) == (64, BudgetKind.AT_MOST, "prefill", True)


@pytest.mark.parametrize(
    ("ending", "opened"),
    [
        ("", "<think> I will answer with 0.50"),
        ("<think>", "<think> I will answer with 0.50"),
        ("<think>\n", "<think>\nI will answer with 0.50"),
    ],
)
def test_an_effort_is_said_behind_the_think_with_two_decimals(ending: str, opened: str) -> None:
    said = openings(**EFFORT)
    assert text(said.open(prompt_of("4 + 3 =" + ending), said.effort(0.5))) == "4 + 3 =" + opened


def test_an_effort_may_end_the_question() -> None:
    said = openings(**EFFORT, budget_place="suffix")
    opening = said.open(prompt_of(), said.effort(1.25))
    assert text(opening) == "4 + 3 = I will answer with 1.25<think>"
    assert opening.prompt.question == "4 + 3 ="


def test_words_of_an_effort_that_begin_with_a_line_of_their_own_keep_it() -> None:
    words = {**EFFORT, "effort_template": "\nI will answer with {effort}"}
    behind, front = openings(**words, budget_place="suffix"), openings(**words)
    assert text(behind.open(prompt_of(), behind.effort(2))) == "4 + 3 =\nI will answer with 2.00<think>"
    assert text(front.open(prompt_of(), front.effort(2))) == "4 + 3 =<think>\nI will answer with 2.00"


def test_an_effort_has_no_tokens_and_the_whole_response_as_its_room() -> None:
    said = openings(**EFFORT)
    budget = said.effort(0.75)
    assert (budget.tokens, budget.kind, budget.effort, budget.hard, budget.label) == (0, BudgetKind.EFFORT, 0.75, False, "x0.75")
    assert said.open(prompt_of(), budget).max_new_tokens == 160 - 10  # <think>, 4 words, a space, 0 . 7 5


@pytest.mark.parametrize(
    ("ending", "opened"),
    [("", "<think></think>"), ("<think>", "<think></think>"), ("<think>\n", "<think>\n</think>")],
)
def test_a_member_that_does_not_think_finds_its_thinking_closed(ending: str, opened: str) -> None:
    said = openings()
    opening = said.open(prompt_of("4 + 3 =" + ending), said.no_think)
    assert text(opening) == "4 + 3 =" + opened
    assert (opening.budget.is_free, opening.budget.no_think, opening.budget.label) == (True, True, "no_think")


def test_a_member_that_does_not_think_has_the_plain_question_beside_a_suffix() -> None:
    said, prompt = openings(**SUFFIX), prompt_of()
    assert said.open(prompt, said.no_think).prompt is prompt
    assert text(said.open(prompt, said.no_think)) == "4 + 3 =<think></think>"


def test_exit_words_are_the_template_as_tokens_with_the_end_of_the_thinking_among_them() -> None:
    words = openings(exit_template=" so</think>\n").exit_words()
    assert tiny_tokenizer().decode(list(words.ids)) == " so</think>\n"
    assert words.end == tiny_tokenizer().convert_tokens_to_ids("</think>")


def test_exits_need_the_end_of_the_thinking_as_one_token() -> None:
    with pytest.raises(ConfigError, match="rollout.exits needs </think> as one token; this vocabulary spells it in 8"):
        Openings(RolloutSettings(), characters()).exit_words()
    with pytest.raises(ConfigError, match="cannot encode the exit words 'hurry up</think>'"):
        openings(exit_template="hurry up</think>").exit_words()
    merging = tiny_tokenizer()
    merging.add_tokens([AddedToken("</think>\n", normalized=False)])
    with pytest.raises(ConfigError, match=r"merges </think> with its neighbours"):
        Openings(RolloutSettings(exit_template="</think>\n"), merging).exit_words()


def test_words_the_tokenizer_lacks_are_named_with_their_place() -> None:
    said = openings(budget_template="<think> hurry up, {budget}")
    with pytest.raises(ConfigError, match="cannot encode the opening sentence '<think> hurry up, 32'(?s:.*)budget_template"):
        said.prefill_ids(said.budget(32), ())
    said = openings(budget_place="suffix", budget_template=" hurry up, {budget}")
    with pytest.raises(ConfigError, match="cannot encode the end of the question ' hurry up, 32'"):
        said.suffix_ids(said.budget(32))


# -- the cap -----------------------------------------------------------------------------------------------------------------


def test_the_opening_counts_in_the_length() -> None:
    said = openings()
    opening = said.open(prompt_of(), said.budget(64))
    assert len(opening.prefill_ids) == 11  # <think>, 7 words, a space, and 64 in its two digits
    assert opening.max_new_tokens == 149
    assert said.open(prompt_of(), said.free).max_new_tokens == 159


@pytest.mark.parametrize(("step", "room"), [(None, 160), (0, 150), (39, 150), (40, 30)])
def test_the_cap_of_the_step_is_what_a_response_has_in_training(step: int | None, room: int) -> None:
    said = openings(**SHORT)
    assert said.open(prompt_of(), said.free, step=step).max_new_tokens == room - 1
    assert said.open(prompt_of(), said.budget(16), step=step).max_new_tokens == room - 10


def test_a_cap_of_the_schedule_that_leaves_no_room_is_named() -> None:
    said = openings(**{**SHORT, "length_schedule": [[0, 150], [40, 10]], "budgets": [8]})
    told = r"rollout\.length_schedule \(a cap of 10 at step 40\) leaves no room after an opening sentence of 10 tokens"
    with pytest.raises(ConfigError, match=told):
        said.open(prompt_of(), said.budget(16), step=40)
    hard = openings(**{**SHORT, **HARD})
    with pytest.raises(ConfigError, match=r"a cap of 30 at step 40\) leaves no room(?s:.*)raise the caps of .* to 31 or more"):
        hard.open(prompt_of(), hard.budget(28), step=40)


def test_an_opening_that_leaves_no_room_is_refused() -> None:
    said = openings(max_length=11, budgets=[8])
    with pytest.raises(ConfigError, match=r"rollout\.max_length=11 leaves no room after an opening sentence of 11 tokens"):
        said.open(prompt_of(), said.budget(64))


@pytest.mark.parametrize(
    ("changes", "tokens", "cap"),
    [
        ({"answer_tokens": 8}, 64, 73),  # 64 of thinking, </think>, 8 of answer
        ({"answer_tokens": 8}, 150, 159),  # 150 + 1 + 8, just what max_length leaves
        ({"answer_tokens": 8}, 151, 159),  # the answer gets 7
        ({"answer_tokens": 8}, 157, 159),  # and here 1
        ({}, 64, 159),
        ({"budget_place": "prefill", "answer_tokens": 8}, 64, 63),  # 10 of the 64 are the sentence behind <think>
        ({"budget_place": "prefill"}, 64, 149),
        ({**SUFFIX, "answer_tokens": 8}, 64, 73),
    ],
)
def test_a_hard_budgets_cap_is_thinking_left_marker_and_answer_within_the_longest_response(
    changes: dict[str, object], tokens: int, cap: int
) -> None:
    said = openings(**{**HARD, **changes})
    assert said.open(prompt_of(), said.budget(tokens)).max_new_tokens == cap


def test_tokens_behind_the_think_of_a_chat_template_are_thinking_too() -> None:
    said = openings(chat=THINKS, answer_tokens=8, **HARD)
    opening = said.open(prompt_of(chat=THINKS), said.budget(64))
    assert opening.prefill_ids == ()
    assert opening.max_new_tokens == 63 + 1 + 8  # the newline is one of the 64


def test_markers_of_several_tokens_are_refused_for_a_hard_budget_which_the_engine_would_miscount() -> None:
    settings = RolloutSettings.model_validate({"budgets": [64], "max_length": 160, "answer_tokens": 5, **HARD})
    said = Openings(settings, characters())
    with pytest.raises(ConfigError, match="as one token each; this vocabulary spells them in 7 and 8"):
        said.max_new_tokens(said.budget(64), (), said.prefill_ids(said.budget(64), ()))


def test_a_hard_budget_that_its_own_sentence_uses_up_is_refused() -> None:
    said = openings(**{**HARD, "budget_place": "prefill"})
    assert said.open(prompt_of(), said.budget(10)).max_new_tokens == 150  # 10 is one token, so 9 of the 10 are used
    with pytest.raises(ConfigError, match="hard budget of 9 tokens is used up by the 9 tokens(?s:.*)be 10 or more"):
        said.open(prompt_of(), said.budget(9))


def test_a_hard_budget_leaves_at_least_one_token_for_the_answer() -> None:
    said = openings(**HARD)
    assert said.open(prompt_of(), said.budget(157)).max_new_tokens == 159
    with pytest.raises(ConfigError, match=r"after a hard budget of 158 tokens(?s:.*)raise rollout\.max_length to 161"):
        said.open(prompt_of(), said.budget(158))


def test_a_hard_budget_needs_its_think_where_the_engine_looks_for_it() -> None:
    said = openings(**HARD)
    with pytest.raises(ConfigError, match="there is none that </think> does not follow"):
        said.max_new_tokens(said.budget(64), prompt_of().token_ids, ())
    think, end = tiny_tokenizer().convert_tokens_to_ids(["<think>", "</think>"])
    with pytest.raises(ConfigError, match="does not follow"):
        said.max_new_tokens(said.budget(64), (think,), (end,))


def test_words_behind_a_question_without_an_encoder_are_a_programming_error() -> None:
    said = Openings(RolloutSettings.model_validate({"budgets": [64], **SUFFIX}), tiny_tokenizer())
    with pytest.raises(ValueError, match="need the PromptEncoder"):
        said.open(prompt_of(), said.budget(64))
