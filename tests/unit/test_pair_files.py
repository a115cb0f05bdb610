"""Pairs from data sets: every format of TRL, the ids that generation would have, and what is wrong with a row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from transformers import PreTrainedTokenizerFast

from rl.data import DataError
from rl.embedded import tiny_tokenizer
from rl.errors import ConfigError
from rl.pair_files import read_pairs
from rl.pairs import FoundPairs
from rl.preference_settings import PairSettings
from rl.prompts import PromptEncoder
from rl.settings import DataSettings

CHAT = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}answer: {% endif %}{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}answer:{% endif %}"
)
Row = dict[str, Any]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a test's data set lies; it is converted there too."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path


def user(text: str) -> Row:
    return {"role": "user", "content": text}


def assistant(text: str) -> Row:
    return {"role": "assistant", "content": text}


def tokenizer(*, chat: bool = False) -> PreTrainedTokenizerFast:
    made = tiny_tokenizer()
    made.chat_template = CHAT if chat else None
    return made


DATA = DataSettings(source="reasoning_gym:chain_sum")
WITH_SYSTEM = DATA.model_copy(update={"system_prompt": "check the answer"})


def read(
    folder: Path, rows: list[Row], *, chat: bool = False, data: DataSettings = DATA, max_length: int = 100, **changes: Any
) -> FoundPairs:
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_pairs(PairSettings(source=str(path), **changes), data, tokenizer(chat=chat), max_length=max_length)


def spelt(found: FoundPairs) -> list[tuple[str, str, str]]:
    decode = tiny_tokenizer().decode
    return [tuple(decode(ids) for ids in (p.prompt_ids, p.chosen_ids, p.rejected_ids)) for p in found.pairs]


def test_a_prompt_and_answers_of_text(folder: Path) -> None:
    found = read(folder, [{"prompt": "2 + 3 =", "chosen": " 5", "rejected": " 6"}])
    assert spelt(found) == [("2 + 3 =", " 5<eos>", " 6<eos>")]
    assert found.pairs[0].question == "2 + 3 ="
    assert found.counts == {"rows": 1, "identical": 0, "empty": 0, "repeated": 0, "too_long": 0}


def test_a_prompt_of_text_is_read_as_a_question_is(folder: Path) -> None:
    row = {"prompt": "2 + 3 =", "chosen": "5", "rejected": "6"}
    assert spelt(read(folder, [row], chat=True)) == [("2 + 3 =\nanswer:", "5<eos>", "6<eos>")]
    plain = DATA.model_copy(update={"template": "answer {question} so"})
    assert spelt(read(folder, [row], chat=True, data=plain)) == [("answer 2 + 3 = so", "5<eos>", "6<eos>")]


@pytest.mark.parametrize(
    ("chosen", "rejected", "expected"),
    [
        ("2 + 3 = 5", "2 + 3 = 6", ("2 + 3 =", " 5<eos>", " 6<eos>")),
        ("no answer: 12", "no answer: 13", ("no answer:", " 12<eos>", " 13<eos>")),  # the 1 they share is part of a word
        ("no answer: 5", "no answer: 5 so", ("no answer:", " 5<eos>", " 5 so<eos>")),  # neither answer is empty
        ("2 + 3 =\n5", "2 + 3 =\n6", ("2 + 3 =\n", "5<eos>", "6<eos>")),
        ("so answer: no 5", "so answer: 5", ("so answer:", " no 5<eos>", " 5<eos>")),
    ],
)
def test_texts_without_a_prompt_share_it(folder: Path, chosen: str, rejected: str, expected: tuple[str, str, str]) -> None:
    found = read(folder, [{"chosen": chosen, "rejected": rejected}], chat=True)
    assert spelt(found) == [expected]
    assert found.pairs[0].question == expected[0]


def test_a_conversation_with_a_prompt_is_encoded_as_generation_would(folder: Path) -> None:
    row = {"prompt": [user("2 + 3 =")], "chosen": [assistant("5")], "rejected": [assistant("6")]}
    found = read(folder, [row], chat=True, data=WITH_SYSTEM)
    assert spelt(found) == [("check the answer\n2 + 3 =\nanswer:", "5<eos>", "6<eos>")]
    encoder = PromptEncoder(tokenizer(chat=True), WITH_SYSTEM)
    assert found.pairs[0].prompt_ids == encoder.encode("2 + 3 =") and found.pairs[0].question == "2 + 3 ="
    assert spelt(read(folder, [row])) == [("2 + 3 =", "5<eos>", "6<eos>")]


def test_conversations_without_a_prompt_share_it(folder: Path) -> None:
    turns = [user("2 + 3 ="), assistant("5"), user("so 5 + 1 =")]
    row = {"chosen": [*turns, assistant("6")], "rejected": [*turns, assistant("7")]}
    found = read(folder, [row], chat=True, data=WITH_SYSTEM)
    assert spelt(found) == [("check the answer\n2 + 3 =\nanswer: 5\nso 5 + 1 =\nanswer:", "6<eos>", "7<eos>")]
    assert found.pairs[0].question == "user: 2 + 3 =\n\nassistant: 5\n\nuser: so 5 + 1 ="


def test_a_system_message_of_the_data_set_wins_over_that_of_the_run(folder: Path) -> None:
    prompt = [{"role": "system", "content": "no"}, user("2 + 3 =")]
    row = {"prompt": prompt, "chosen": [assistant("5")], "rejected": [assistant("6")]}
    found = read(folder, [row], chat=True, data=WITH_SYSTEM)
    assert spelt(found)[0][0] == "no\n2 + 3 =\nanswer:" and found.pairs[0].question == "user: 2 + 3 ="


def test_answers_that_repeat_the_conversation_beside_a_prompt_lose_it(folder: Path) -> None:
    both = {"chosen": [user("2 + 3 ="), assistant("5")], "rejected": [user("2 + 3 ="), assistant("6")]}
    expected = [("2 + 3 =\nanswer:", "5<eos>", "6<eos>")]
    assert spelt(read(folder, [{"prompt": "2 + 3 ="} | both], chat=True)) == expected  # as ultrafeedback_binarized has it
    assert spelt(read(folder, [{"prompt": [user("2 + 3 =")]} | both], chat=True)) == expected
    alone = {"prompt": "2 + 3 =", "chosen": [assistant("5")], "rejected": [assistant("6")]}
    assert spelt(read(folder, [alone], chat=True)) == expected
    texts = {"prompt": [user("2 + 3 =")], "chosen": "5", "rejected": "6"}
    assert spelt(read(folder, [texts], chat=True)) == expected


def test_other_columns_and_files_are_read(folder: Path) -> None:
    rows = [{"question": f"2 + {i} =", "better": "5", "worse": "6", "id": i} for i in range(4)]
    Dataset.from_list(rows).to_parquet(str(folder / "pairs.parquet"))
    names = {"prompt_column": "question", "chosen_column": "better", "rejected_column": "worse"}
    settings = PairSettings(source=str(folder / "pairs.parquet"), size=3, **names)
    found = read_pairs(settings, DATA, tokenizer(), max_length=100)
    assert spelt(found) == [(f"2 + {i} =", "5<eos>", "6<eos>") for i in range(3)] and found.counts["rows"] == 3


def test_an_answer_that_ends_itself_is_not_ended_twice(folder: Path) -> None:
    assert spelt(read(folder, [{"prompt": "2 =", "chosen": " 2<eos>", "rejected": " 3"}]))[0][1] == " 2<eos>"


def test_what_teaches_nothing_is_dropped_and_counted(folder: Path) -> None:
    rows = [
        {"prompt": "2 + 3 =", "chosen": " 5", "rejected": " 6"},
        {"prompt": "2 + 3 =", "chosen": " 5", "rejected": " 6"},
        {"prompt": "2 + 3 =", "chosen": " 5", "rejected": " 5"},
        {"prompt": "2 + 3 =", "chosen": " 5", "rejected": " 5<eos>"},
        {"prompt": "2 + 3 =", "chosen": " 5", "rejected": "\n"},
        {"prompt": "2 + 3 =", "chosen": " 5", "rejected": " 6 so no"},
        {"prompt": "2 + 3 =", "chosen": " 6", "rejected": " 5"},
    ]
    found = read(folder, rows, max_length=7)  # prompt 4, " 5<eos>" 3
    assert spelt(found) == [("2 + 3 =", " 5<eos>", " 6<eos>"), ("2 + 3 =", " 6<eos>", " 5<eos>")]
    assert found.counts == {"rows": 7, "identical": 2, "empty": 1, "repeated": 1, "too_long": 1}
    with pytest.raises(DataError, match=r"of 7 rows 2 identical, 1 empty, 4 too_long were dropped\n  fix: answers may have 3 to"):
        read(folder, rows, max_length=3)


ANSWERS = {"chosen": "5", "rejected": "6"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": None} | ANSWERS, "row 0: column 'prompt' holds None"),
        ({"prompt": []} | ANSWERS, r"row 0: column 'prompt' holds \[\]"),
        ({"chosen": "5 so", "rejected": "6 so"}, "row 0: .*do not begin alike"),
        ({"prompt": "four"} | ANSWERS, "row 0: the tokenizer of model.path cannot encode 'four'"),
        ({"prompt": "2 =", "chosen": "four", "rejected": "6"}, "row 0: the tokenizer of model.path cannot encode 'four'"),
        ({"prompt": "2 =", "chosen": "5", "rejected": [assistant("6")]}, "row 0: one answer is a text and the other"),
        ({"prompt": "2 =", "chosen": [assistant("5")], "rejected": [user("6")]}, "row 0: .*and here is user"),
        (
            {"prompt": "2 =", "chosen": [assistant("5"), user("so"), assistant("5")], "rejected": [assistant("6")]},
            "row 0: .*here is assistant, user, assistant",
        ),
        (
            {"chosen": [user("2 ="), assistant("5")], "rejected": [user("2 ="), assistant("5"), user("so"), assistant("5")]},
            "row 0: .*here is assistant, user, assistant",
        ),
        ({"chosen": [assistant("5")], "rejected": [assistant("6")]}, "row 0: there is no message for the assistant"),
        ({"prompt": [user("2 ="), assistant("no")]} | ANSWERS, "row 0: there is no message for the assistant"),
        ({"prompt": [{"role": "user", "content": None}]} | ANSWERS, "row 0: column 'prompt' has a message .*'content': None"),
        ({"prompt": ["2 ="]} | ANSWERS, "row 0: column 'prompt' has a message '2 ='"),
        (
            {"prompt": [user("3 =")], "chosen": [user("2 ="), assistant("5")], "rejected": [user("2 ="), assistant("6")]},
            "row 0: the answers begin with other messages than the prompt",
        ),
    ],
)
def test_a_row_that_is_no_pair_is_named(folder: Path, row: Row, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read(folder, [row], chat="user" in str(row))


def test_the_number_of_a_bad_row_is_its_place(folder: Path) -> None:
    rows = [{"prompt": "2 + 3 =", "chosen": " 5", "rejected": answer} for answer in (" 6", " six")]
    with pytest.raises(DataError, match="pairs.jsonl, row 1: the tokenizer of model.path cannot encode ' six'"):
        read(folder, rows)


def test_a_missing_column_names_the_nearest(folder: Path) -> None:
    rows = [{"prompt": "2 + 3 =", "choosen": " 5", "rejected": " 6"}]
    with pytest.raises(DataError, match="preference.pairs.chosen_column: .* no column 'chosen'; did you mean choosen"):
        read(folder, rows)
    with pytest.raises(DataError, match="preference.pairs.prompt_column: .* no column 'promt'; did you mean prompt"):
        read(folder, rows, chosen_column="choosen", prompt_column="promt")


def test_a_missing_or_empty_file_is_named(folder: Path) -> None:
    with pytest.raises(DataError, match="preference.pairs.source: no file"):
        read_pairs(PairSettings(source=str(folder / "none.jsonl")), DATA, tokenizer(), max_length=100)
    with pytest.raises(DataError, match="holds no rows"):
        read(folder, [])


def test_a_conversation_of_several_turns_needs_a_chat_template(folder: Path) -> None:
    turns = [user("2 + 3 ="), assistant("5"), user("so 5 + 1 =")]
    with pytest.raises(DataError, match="row 0: a prompt of 3 messages needs the tokenizer's chat template"):
        read(folder, [{"prompt": turns, "chosen": [assistant("6")], "rejected": [assistant("7")]}])


def test_a_tokenizer_that_cannot_end_an_answer_is_refused(folder: Path) -> None:
    (folder / "pairs.jsonl").write_text(json.dumps({"prompt": "2 =", "chosen": "5", "rejected": "6"}))
    endless = tokenizer()
    endless.eos_token = None
    with pytest.raises(ConfigError, match="no end-of-sequence token"):
        read_pairs(PairSettings(source=str(folder / "pairs.jsonl")), DATA, endless, max_length=100)
