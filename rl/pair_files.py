"""Pairs of answers from data sets, in the preference formats of TRL; token ids as generation would make them.

A row has a preferred and a rejected answer, and their prompt in a column of its own or at the start of both::

    {"prompt": "2 + 3 =", "chosen": " 5", "rejected": " 6"}
    {"chosen": "2 + 3 = 5", "rejected": "2 + 3 = 6"}
    {"prompt": [{"role": "user", "content": "2 + 3 ="}], "chosen": [{"role": "assistant", "content": "5"}], "rejected": [...]}
    {"chosen": [{"role": "user", "content": "2 + 3 ="}, {"role": "assistant", "content": "5"}], "rejected": [...]}
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from typing import Any, cast

from transformers import PreTrainedTokenizerBase

from rl.data import DataError, nearest, read_rows
from rl.errors import ConfigError
from rl.guidance import Pair
from rl.pairs import FoundPairs, is_too_long, make_pair
from rl.preference_settings import PairSettings
from rl.prompts import PromptEncoder, uses_chat_template
from rl.settings import DataSettings

KEY = "preference.pairs"
Message = Mapping[str, Any]


def read_pairs(pairs: PairSettings, data: DataSettings, tokenizer: PreTrainedTokenizerBase, *, max_length: int) -> FoundPairs:
    """The pairs of a data set, in its order.

    A prompt of plain text, and one that is a single message of a user, is encoded as a question is (`data.template`,
    `data.system_prompt`); a longer conversation by the tokenizer's chat template, with the generation prompt. Without a column,
    the prompt is what both answers begin with: of two texts up to the last whole word, taken as it stands; of two
    conversations the messages they share. An answer is one text, or one message of the assistant: its content, then the
    tokenizer's end-of-sequence token.

    max_length: longest prompt + answer in tokens. Counts: ``rows``; what was dropped for being ``identical`` (the two answers),
    ``empty`` (an answer without text), ``repeated`` (a pair that was there before) or ``too_long``.

    Raises:
        DataError: no such data set or column; a row that is none of the formats, which is named; no pair left.
        ConfigError: a tokenizer without an end-of-sequence token.
    """
    dataset = read_rows(pairs.source, pairs.split, key=KEY)
    has_prompt = pairs.prompt_column in dataset.column_names
    named = {"chosen_column": pairs.chosen_column, "rejected_column": pairs.rejected_column}
    if pairs.prompt_column != "prompt":
        named["prompt_column"] = pairs.prompt_column
    for key, column in named.items():
        if column not in dataset.column_names:
            raise DataError(f"{KEY}.{key}: {pairs.source} has no column {column!r}{nearest(column, dataset.column_names)}")
    reader = _Reader(pairs, data, tokenizer, has_prompt=has_prompt)
    wanted = len(dataset) if pairs.size is None else min(pairs.size, len(dataset))
    counts = {"rows": wanted, "identical": 0, "empty": 0, "repeated": 0, "too_long": 0}
    kept: dict[str, Pair] = {}
    for index in range(wanted):
        found = reader.read(index, cast(Mapping[str, Any], dataset[index]))
        if isinstance(found, str):
            counts[found] += 1
        elif is_too_long(found, max_length):
            counts["too_long"] += 1
        elif found.id in kept:
            counts["repeated"] += 1
        else:
            kept[found.id] = found
    if not kept:
        dropped = ", ".join(f"{count} {reason}" for reason, count in counts.items() if reason != "rows" and count)
        raise DataError(
            f"{pairs.source} has no pair to learn from: of {wanted} rows {dropped} were dropped",
            fix=f"answers may have {max_length} tokens with their prompt ({KEY}.max_length), and have to differ",
        )
    return FoundPairs(tuple(kept.values()), counts)


class _Reader:
    def __init__(
        self, pairs: PairSettings, data: DataSettings, tokenizer: PreTrainedTokenizerBase, *, has_prompt: bool
    ) -> None:
        if tokenizer.eos_token_id is None:
            raise ConfigError(
                "the tokenizer of model.path has no end-of-sequence token, with which an answer ends",
                fix="set eos_token in its tokenizer_config.json",
            )
        self._pairs = pairs
        self._prompt_column = pairs.prompt_column if has_prompt else None
        self._tokenizer = tokenizer
        self._encoder = PromptEncoder(tokenizer, data)
        self._system = data.system_prompt
        self._chat = uses_chat_template(tokenizer, data)
        self._eos = cast(int, tokenizer.eos_token_id)

    def read(self, index: int, row: Mapping[str, Any]) -> Pair | str:
        """The pair of a row, or why there is none."""
        try:
            return self._read(row)
        except DataError as error:
            raise DataError(f"{self._pairs.source}, row {index}: {error.cause}", fix=error.fix) from error

    def _read(self, row: Mapping[str, Any]) -> Pair | str:
        chosen, rejected = (_value(row, column) for column in (self._pairs.chosen_column, self._pairs.rejected_column))
        prompt = None if self._prompt_column is None else _value(row, self._prompt_column)
        if chosen == rejected:
            return "identical"
        if isinstance(chosen, str) != isinstance(rejected, str):
            raise DataError("one answer is a text and the other a list of messages", fix="write both in one way")
        if isinstance(chosen, str):
            assert isinstance(rejected, str)
            if prompt is None:
                text, chosen, rejected = _common_text(chosen, rejected)
                prompt_ids, question = self._encode(text, special=True), text
            else:
                prompt_ids, question = self._encode_prompt(prompt)
        else:
            assert not isinstance(rejected, str)
            messages, chosen, rejected = _conversations(prompt, chosen, rejected)
            prompt_ids, question = self._encode_prompt(messages)
        if not chosen.strip() or not rejected.strip():
            return "empty"
        pair = make_pair(prompt_ids, self._answer(chosen), self._answer(rejected), question)
        return "identical" if pair.chosen_ids == pair.rejected_ids else pair

    def _encode_prompt(self, prompt: str | Sequence[Message]) -> tuple[tuple[int, ...], str]:
        """Token ids, and the text as a person reads it."""
        if isinstance(prompt, str):
            return self._encoder.encode(prompt), prompt
        if not prompt or prompt[-1]["role"] == "assistant":
            raise DataError("there is no message for the assistant to answer", fix="begin with a message of a user")
        if len(prompt) == 1 and prompt[0]["role"] == "user":
            return self._encoder.encode(prompt[0]["content"]), prompt[0]["content"]
        if not self._chat:
            raise DataError(
                f"a prompt of {len(prompt)} messages needs the tokenizer's chat template, which is missing or not used",
                fix="use a model with a chat template and data.template=auto, or prompts of one message of a user",
            )
        if self._system is not None and prompt[0]["role"] != "system":
            prompt = [{"role": "system", "content": self._system}, *prompt]
        try:
            ids = self._tokenizer.apply_chat_template(
                [dict(message) for message in prompt], add_generation_prompt=True, tokenize=True, return_dict=False
            )
        except Exception as error:  # a template refuses what it has no place for, in its own way
            raise DataError(f"the chat template of model.path refuses the messages: {error}") from error
        return tuple(cast(list[int], ids)), "\n\n".join(f"{m['role']}: {m['content']}" for m in prompt if m["role"] != "system")

    def _answer(self, text: str) -> tuple[int, ...]:
        ids = self._encode(text, special=False)
        return ids if ids[-1:] == (self._eos,) else (*ids, self._eos)

    def _encode(self, text: str, *, special: bool) -> tuple[int, ...]:
        try:
            ids = self._tokenizer.encode(text, add_special_tokens=special)
        except Exception as error:  # the tokenizers library raises plain Exception, for example on a word it does not know
            raise DataError(
                f"the tokenizer of model.path cannot encode {text!r} ({error})",
                fix="the embedded model only spells its own task; for other data use another model",
            ) from error
        return tuple(ids)


def _value(row: Mapping[str, Any], column: str) -> str | list[Message]:
    """A text, or messages without what data sets put where a key is missing: None."""
    value = row[column]
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not value:
        raise DataError(
            f"column {column!r} holds {_shown(value)}",
            fix="write a text, or a list of messages such as [{role: user, content: ...}]",
        )
    messages = []
    for item in value:
        message = {key: part for key, part in item.items() if part is not None} if isinstance(item, Mapping) else {}
        if not isinstance(message.get("role"), str) or not isinstance(message.get("content"), str):
            raise DataError(
                f"column {column!r} has a message {_shown(item)}", fix="give every message a `role` and a `content`, both texts"
            )
        messages.append(message)
    return messages


def _shown(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 80 else f"{shown[:80]}..."


def _common_text(chosen: str, rejected: str) -> tuple[str, str, str]:
    """The prompt that two texts begin with, and what follows it in each.

    The prompt ends with a whole word, at least one of which is left to each answer; the space behind it belongs to the answer, as
    tokenizers have it.
    """
    common = os.path.commonprefix([chosen, rejected])
    following = [text[len(common) : len(common) + 1] for text in (chosen, rejected)]
    if not all(character.isspace() for character in following):  # inside a word, or at the end of one text
        found = re.match(r"(?s)(.*\s)?", common)
        common = found[0] if found else ""
    common = common.rstrip(" ")
    if not common.strip():
        raise DataError(
            f"there is no column {'prompt'!r}, and the answers do not begin alike, so that there is no prompt",
            fix=f"add such a column, or name the one there is in {KEY}.prompt_column",
        )
    return common, chosen[len(common) :], rejected[len(common) :]


def _conversations(
    prompt: str | Sequence[Message] | None, chosen: Sequence[Message], rejected: Sequence[Message]
) -> tuple[Sequence[Message], str, str]:
    """The messages before the answers, and the two answers; answers that repeat the prompt lose it."""
    shared = 0
    while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
        shared += 1
    answers = (chosen[shared:], rejected[shared:])
    for answer in answers:
        if len(answer) != 1 or answer[0]["role"] != "assistant":
            roles = ", ".join(str(message["role"]) for message in answer)
            raise DataError(
                f"an answer has to be one message of the assistant, and here is {roles}",
                fix="end both conversations with one message each, that of the assistant; what comes before has to be the same",
            )
    messages: Sequence[Message] = chosen[:shared]
    if not messages:
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else (prompt or ())
    elif isinstance(prompt, list) and list(messages) != prompt:
        raise DataError("the answers begin with other messages than the prompt", fix="leave the prompt out of the answers")
    return messages, answers[0][0]["content"], answers[1][0]["content"]
