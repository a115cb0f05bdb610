"""The embedded default model: a tiny Llama and a tokenizer that just covers one arithmetic task.

Words are single tokens, most of them with their leading space, digits are single tokens, and decoding joins tokens
without adding anything: `decode(encode(text)) == text` for every text the vocabulary can spell.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AddedToken, GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rl.errors import ConfigError
from rl.settings import WarmStartSettings

PAD, EOS, THINK, END_THINK = "<pad>", "<eos>", "<think>", "</think>"
REFLECTION_WORDS = ("wait", "Wait", "but", "But", "Alternatively")
MAX_POSITION = 512
HEAD_SIZES = (32, 64, 80, 96, 112, 128)  # attention head sizes that vLLM's CPU backend accepts (0.31)

_QUESTION = ("State", " the", " final", " answer", " to", " following", " arithmetic", " problem")
_SENTENCE = ("I", " I", " will", " question", " with", " tokens", " minimal")
_WORKING = ("check", " check", "ok", " ok", "no", " no", "so", " so", " again", "answer")
_OPERATORS = (" + ", " - ", " * ", " = ", " =")
_CHARACTERS = tuple("0123456789") + tuple("+-*=().?:,") + (" ", "\n")
_REFLECTION = tuple(space + word for word in REFLECTION_WORDS for space in ("", " "))
# Whole numbers as single tokens: spelt in digits, the same warm start gets 29 % of its sums right instead of most of them.
LARGEST_NUMBER = 60
_NUMBERS = tuple(str(n) for n in range(-LARGEST_NUMBER, LARGEST_NUMBER + 1) if not 0 <= n <= 9)
PERIODS = (2, 3, 4, 5, 7, 9, 10, 12, 16, 20, 30, 45, 60, 90, 120)
"""Of the waves that spell a number: the short ones tell neighbours apart, the long ones give its size."""
WAVE_SCALE = 0.06  # three times the standard deviation of the other embeddings
VOCABULARY = (
    *(PAD, EOS, THINK, END_THINK),
    *(*_CHARACTERS, *_NUMBERS, *_OPERATORS),
    *(*_QUESTION, *_SENTENCE, *_WORKING, *_REFLECTION),
)

# An operator with both its spaces, then a word with its leading space, then " =" at the end of a question, then any character.
_PIECES = r" [-+*=] | ?[A-Za-z]+| =|(?<![0-9])-?(?:[1-5]?[0-9]|60)(?![0-9])|[\s\S]"


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """The word-level tokenizer of the embedded model.

    It has no unknown token on purpose: text that it cannot spell raises instead of training on a placeholder.
    """
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(VOCABULARY)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(_PIECES), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    # As in real reasoning models, <think> is a plain token: decoding with skip_special_tokens keeps it visible.
    tokenizer.add_tokens(
        [AddedToken(THINK, special=False, normalized=False), AddedToken(END_THINK, special=False, normalized=False)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        clean_up_tokenization_spaces=False,
        model_max_length=MAX_POSITION,
    )


def tiny_config(settings: WarmStartSettings) -> LlamaConfig:
    """Architecture of the embedded model: tied embeddings, no key-value sharing, about 2 million parameters by default.

    Raises:
        ConfigError: more width per head than any engine accepts.
    """
    wanted = -(-settings.hidden_size // settings.heads)
    head_dim = next((size for size in HEAD_SIZES if size >= wanted), None)
    if head_dim is None:
        raise ConfigError(
            f"warm_start.hidden_size={settings.hidden_size} over warm_start.heads={settings.heads} is {wanted} per head, "
            f"and the engine takes at most {HEAD_SIZES[-1]}",
            fix=f"use at least {-(-settings.hidden_size // HEAD_SIZES[-1])} heads",
        )
    return LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=settings.hidden_size,
        intermediate_size=settings.hidden_size * 8 // 3,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.heads,
        head_dim=head_dim,
        max_position_embeddings=MAX_POSITION,
        tie_word_embeddings=True,  # so that the default run exercises the weight transfer of tied heads
        bos_token_id=None,
        eos_token_id=VOCABULARY.index(EOS),
        pad_token_id=VOCABULARY.index(PAD),
        dtype="float32",
    )


def build_tiny(folder: Path, settings: WarmStartSettings) -> None:
    """Write the untrained model as a Hugging Face folder (float32 safetensors); the same bytes for the same settings."""
    folder.mkdir(parents=True, exist_ok=True)
    config = tiny_config(settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        model = LlamaForCausalLM(config)
    _spell_values(model.model.embed_tokens.weight.data)
    model.generation_config = GenerationConfig(
        bos_token_id=None, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id, do_sample=True
    )
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)


def _spell_values(embedding_VH: torch.Tensor) -> None:
    """Start every number's embedding as waves of its value: ``(cos 2 pi n / p, sin 2 pi n / p)`` for each period p.

    Networks that learn to add find such features by themselves, but slowly: with the same 50 s of training, 95 % of sums come out
    right from this start and 4 % from random embeddings.
    """
    spelt = min(2 * len(PERIODS), embedding_VH.shape[1])
    periods = torch.tensor(PERIODS, dtype=torch.float64)
    for token, text in enumerate(VOCABULARY):
        if text.lstrip("-").isdigit():
            angles = 2 * math.pi * int(text) / periods
            waves = torch.stack([angles.cos(), angles.sin()], dim=1).flatten()[:spelt]
            embedding_VH[token, :spelt] = (WAVE_SCALE * waves).to(embedding_VH.dtype)
