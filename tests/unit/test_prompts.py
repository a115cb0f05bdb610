from __future__ import annotations

from pathlib import Path

import pytest

from rl.data import DataError, Problem
from rl.embedded import build_tiny, tiny_tokenizer
from rl.errors import ConfigError, ModelError
from rl.prompts import PromptEncoder, PromptStream, load_tokenizer
from rl.settings import DataSettings, ModelSettings, WarmStartSettings
from rl.types import Prompt

CHAT = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}answer:<think>\n{% endif %}"


def problem(question: str) -> Problem:
    return Problem(question=question, answer="1", entry_json='{"kept": true}')


def prompts(count: int) -> list[Prompt]:
    return [Prompt(id=str(i), question=str(i), answer="", token_ids=(i,)) for i in range(count)]


def data(**changes: object) -> DataSettings:
    return DataSettings.model_validate({"source": "reasoning_gym:chain_sum"} | changes)


def test_without_a_chat_template_the_question_is_the_prompt() -> None:
    tokenizer = tiny_tokenizer()
    ids = PromptEncoder(tokenizer, data()).encode("4 + 3 =")
    assert tokenizer.decode(ids) == "4 + 3 ="


def test_a_plain_template_wraps_the_question_even_beside_a_chat_template() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHAT
    ids = PromptEncoder(tokenizer, data(template="({question}) so")).encode("4 + 3 =")
    assert tokenizer.decode(ids) == "(4 + 3 =) so"


def test_a_chat_template_carries_the_system_prompt_and_opens_the_answer() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHAT
    ids = PromptEncoder(tokenizer, data(system_prompt="check the answer")).encode("4 + 3 =")
    assert tokenizer.decode(ids) == "check the answer\n4 + 3 =\nanswer:<think>\n"


def test_a_system_prompt_that_nothing_would_carry_is_refused() -> None:
    with pytest.raises(ConfigError, match="needs the tokenizer's chat template"):
        PromptEncoder(tiny_tokenizer(), data(system_prompt="check the answer"))


def test_a_template_without_a_question_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"fix: put \{question\} into it"):
        PromptEncoder(tiny_tokenizer(), data(template="the question"))


def test_all_reference_answers_and_the_row_travel_with_the_prompt() -> None:
    several = Problem(question="4 + 3 =", answer="7", entry_json='{"kept": true}', other_answers=("7.0", "14/2"))
    (prompt,), _ = PromptEncoder(tiny_tokenizer(), data()).encode_all([several])
    assert (prompt.answer, prompt.other_answers, prompt.entry) == ("7", ("7.0", "14/2"), '{"kept": true}')


def test_a_question_outside_the_vocabulary_raises_and_names_itself() -> None:
    with pytest.raises(DataError, match="cannot encode 'four plus three'"):
        PromptEncoder(tiny_tokenizer(), data()).encode("four plus three")


def test_a_chat_template_without_a_place_for_the_system_prompt_is_named() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    with pytest.raises(DataError, match=r"refuses a prompt: no system role(?s:.*)remove data\.system_prompt"):
        PromptEncoder(tokenizer, data(system_prompt="check the answer")).encode("4 + 3 =")


def test_long_prompts_are_dropped_and_counted() -> None:
    encoder = PromptEncoder(tiny_tokenizer(), data(max_prompt_length=4))  # "4 + 3 =" is 4 tokens: 4, " + ", 3, " ="
    kept, dropped = encoder.encode_all([problem("4 + 3 ="), problem("4 + 3 + 1 ="), problem("5 - 3 =")])
    assert [p.question for p in kept] == ["4 + 3 =", "5 - 3 ="]
    assert dropped == 1
    assert kept[0].id == problem("4 + 3 =").id
    assert kept[0].entry == '{"kept": true}'


def test_when_every_prompt_is_too_long_the_shortest_is_named() -> None:
    encoder = PromptEncoder(tiny_tokenizer(), data(max_prompt_length=3))
    with pytest.raises(DataError, match="the shortest has 4"):
        encoder.encode_all([problem("4 + 3 ="), problem("4 + 3 + 1 =")])


def test_an_epoch_holds_every_prompt_once_and_the_next_is_ordered_anew() -> None:
    stream = PromptStream(prompts(20), 7)
    first, cursor = stream.take(0, 20)
    second, cursor = stream.take(cursor, 20)
    assert cursor == 40
    assert sorted(p.token_ids for p in first) == sorted(p.token_ids for p in second) == [(i,) for i in range(20)]
    assert first != second


def test_the_stream_does_not_depend_on_how_it_is_cut() -> None:
    whole, _ = PromptStream(prompts(7), 1).take(0, 30)
    stream, cursor, pieces = PromptStream(prompts(7), 1), 0, []
    while cursor < 30:
        piece, cursor = stream.take(cursor, 3)
        pieces += piece
    assert pieces == whole


def test_a_resumed_stream_goes_on_where_it_stopped() -> None:
    whole, _ = PromptStream(prompts(7), 1).take(0, 30)
    assert PromptStream(prompts(7), 1).take(17, 13) == (whole[17:], 30)


def test_another_seed_gives_another_order() -> None:
    assert PromptStream(prompts(50), 1).take(0, 50) != PromptStream(prompts(50), 2).take(0, 50)


def test_a_stream_of_nothing_is_refused() -> None:
    with pytest.raises(DataError, match="no prompts"):
        PromptStream([], 0)


def test_a_folder_without_a_tokenizer_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="has no tokenizer"):
        load_tokenizer(ModelSettings(path=str(tmp_path)))


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="there is no folder"):
        load_tokenizer(ModelSettings(path=str(tmp_path / "absent")))


def test_a_damaged_tokenizer_is_named(tmp_path: Path) -> None:
    build_tiny(tmp_path, WarmStartSettings(hidden_size=32, layers=1, heads=1))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match=f"no tokenizer could be loaded from {tmp_path}"):
        load_tokenizer(ModelSettings(path=str(tmp_path)))


def test_the_tokenizer_of_a_saved_model_is_loaded(tmp_path: Path) -> None:
    build_tiny(tmp_path, WarmStartSettings(hidden_size=32, layers=1, heads=1))
    tokenizer = load_tokenizer(ModelSettings(path=str(tmp_path)))
    assert tokenizer.get_vocab() == tiny_tokenizer().get_vocab()
