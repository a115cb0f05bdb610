"""From problems to token ids, once; from then on the ids are the truth."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from rl.data import DataError, Problem
from rl.errors import ConfigError, ModelError
from rl.models import TOKENIZER_FILES, has_tokenizer
from rl.settings import DataSettings, ModelSettings
from rl.types import Prompt


class PromptEncoder:
    """Encodes questions the way the model was trained to read them.

    With `data.template == "auto"` the tokenizer's chat template is used if it has one (optional system message, generation
    prompt added), else the question alone; any other template is plain text with `{question}`.

    Raises:
        ConfigError: a template without `{question}`; a system prompt where no chat template would carry it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, data: DataSettings) -> None:
        self._tokenizer = tokenizer
        self._data = data
        self._chat = uses_chat_template(tokenizer, data)
        self._template = "{question}" if data.template == "auto" else data.template
        if "{question}" not in self._template:
            raise ConfigError(
                f"data.template={data.template!r} does not say where the question goes", fix="put {question} into it, or use auto"
            )
        if data.system_prompt is not None and not self._chat:
            raise ConfigError(
                "data.system_prompt needs the tokenizer's chat template, which is missing or not used",
                fix="write the text into data.template instead",
            )

    def encode(self, question: str) -> tuple[int, ...]:
        """Token ids of the whole prompt, special tokens of the tokenizer included.

        Raises:
            DataError: the chat template refuses the messages, or a plain prompt holds text that the tokenizer cannot spell.
        """
        if not self._chat:
            return self._encode_plain(self._template.replace("{question}", question))
        messages = [{"role": "user", "content": question}]
        if self._data.system_prompt is not None:
            messages.insert(0, {"role": "system", "content": self._data.system_prompt})
        try:
            ids = self._tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
        except Exception as error:  # a template refuses what it has no place for, often a system message, in its own way
            raise DataError(
                f"the chat template of model.path refuses a prompt: {error}",
                fix="remove data.system_prompt if it is set, or write the whole prompt into data.template",
            ) from error
        return tuple(cast(list[int], ids))  # tokenize=True with return_dict=False is a flat list of ids

    def _encode_plain(self, text: str) -> tuple[int, ...]:
        try:
            return tuple(self._tokenizer.encode(text))
        except Exception as error:  # the tokenizers library raises plain Exception, for example on a word it does not know
            raise DataError(
                f"the tokenizer of model.path cannot encode {text!r} ({error})",
                fix="the embedded model only spells its own task; for other data use another model",
            ) from error

    def encode_all(self, problems: Sequence[Problem], *, suffix: str = "") -> tuple[list[Prompt], int]:
        """Prompts in the order of `problems`, and how many were dropped for having more than `data.max_prompt_length` tokens.

        suffix: the longest words that a budget may put behind a question later. A prompt that only fits without them is dropped.

        Raises:
            DataError: no prompt is short enough.
        """
        prompts = [
            Prompt(p.id, p.question, p.answer, self.encode(p.question), p.entry_json, other_answers=p.other_answers)
            for p in problems
        ]
        lengths = [len(self.encode(p.question + suffix) if suffix else p.token_ids) for p in prompts]
        kept = [p for p, length in zip(prompts, lengths, strict=True) if length <= self._data.max_prompt_length]
        if prompts and not kept:
            shortest = min(lengths)
            words = " with its budget" if suffix else ""
            raise DataError(
                f"every prompt{words} is longer than data.max_prompt_length={self._data.max_prompt_length} tokens",
                fix=f"raise it: the shortest has {shortest}",
            )
        return kept, len(prompts) - len(kept)


class PromptStream:
    """An endless stream of prompts: epoch e is a permutation seeded by (seed, e), so a position is a single number.

    Raises:
        DataError: no prompts.
    """

    def __init__(self, prompts: Sequence[Prompt], seed: int) -> None:
        if not prompts:
            raise DataError("there are no prompts to stream", fix="check data.source and data.max_prompt_length")
        self._prompts = tuple(prompts)
        self._seed = seed
        self._cached: tuple[int, list[int]] = (-1, [])

    def __len__(self) -> int:
        """Prompts of one epoch."""
        return len(self._prompts)

    def take(self, cursor: int, n: int) -> tuple[list[Prompt], int]:
        """The `n` prompts from position `cursor` (0-based, counted over all epochs), and the next position.

        A pure function of (prompts, seed, cursor, n): no prompt is dropped or repeated within an epoch; a request that
        crosses the end of one goes on into the next.
        """
        if cursor < 0 or n < 0:
            raise ValueError(f"cursor={cursor} and n={n} must not be negative")
        taken = []
        for position in range(cursor, cursor + n):
            epoch, index = divmod(position, len(self._prompts))
            taken.append(self._prompts[self._order(epoch)[index]])
        return taken, cursor + n

    def _order(self, epoch: int) -> list[int]:
        if self._cached[0] != epoch:
            order = list(range(len(self._prompts)))
            random.Random(f"prompts/{self._seed}/{epoch}").shuffle(order)
            self._cached = (epoch, order)
        return self._cached[1]


def load_tokenizer(model: ModelSettings) -> PreTrainedTokenizerBase:
    """The tokenizer of `model.path`, a hub id or a local folder (read from the GGUF file if one is named).

    Raises:
        ModelError: the folder has no tokenizer files, or nothing can be loaded under that name.
    """
    folder = Path(model.path).expanduser()
    local = folder.is_dir()
    if not local and model.path.startswith(("/", ".", "~")):
        raise ModelError(f"model.path: there is no folder {folder}", fix="name a Hugging Face model folder")
    if local and model.gguf_file is None and not has_tokenizer(folder):
        raise ModelError(
            f"model.path: {folder} has no tokenizer (none of {', '.join(TOKENIZER_FILES)})",
            fix="save one there with `tokenizer.save_pretrained`, or name model.gguf_file",
        )
    extra = {} if model.gguf_file is None else {"gguf_file": model.gguf_file}
    try:
        return AutoTokenizer.from_pretrained(
            str(folder) if local else model.path, revision=model.revision, trust_remote_code=model.trust_remote_code, **extra
        )
    except Exception as error:  # a damaged file, a missing package, the network: each its own kind, some of them plain Exception
        raise ModelError(
            f"model.path: no tokenizer could be loaded from {model.path} ({error})",
            fix="check the files there, or the spelling and the network, or give another local folder",
        ) from error


def special_tokens(tokenizer: Any) -> list[str]:
    """Special tokens a grader strips from an answer (the thinking marks are content, not decoration)."""
    return [token for token in tokenizer.all_special_tokens if token not in ("<think>", "</think>")]


def uses_chat_template(tokenizer: Any, data: DataSettings) -> bool:
    """Whether questions are put into the tokenizer's chat template."""
    return data.template == "auto" and bool(tokenizer.chat_template)
