from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rl.embedded import EOS, REFLECTION_WORDS, VOCABULARY, build_tiny, tiny_config, tiny_tokenizer
from rl.errors import ConfigError
from rl.settings import RolloutSettings, WarmStartSettings

TEXTS = [
    "State the final answer to the following arithmetic problem: 0 - 4 - 8 + 7 =",
    "<think> I will answer the question with 128 tokens\n7 + 5 = 12\nwait check -7 - 5 = -12 ok\n</think>-7<eos>",
    "<think>\nAlternatively again\n  12*(3+4)=84, so (check)? no.\n</think>",
]


def test_the_vocabulary_is_small_and_without_repeats() -> None:
    assert len(set(VOCABULARY)) == len(VOCABULARY) <= 180


@pytest.mark.parametrize("text", TEXTS)
def test_decoding_gives_back_the_exact_text(text: str) -> None:
    tokenizer = tiny_tokenizer()
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("text", TEXTS)
def test_the_saved_tokenizer_encodes_the_same(text: str, tmp_path: Path) -> None:
    tiny_tokenizer().save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.encode(text) == tiny_tokenizer().encode(text)
    assert loaded.decode(loaded.encode(text)) == text
    assert (loaded.eos_token, loaded.pad_token) == ("<eos>", "<pad>")


def test_numbers_decode_without_spaces_inside() -> None:
    tokenizer = tiny_tokenizer()
    ids = tokenizer.encode("</think>-12")
    assert len(ids) == 2  # the mark, then the whole number with its sign
    assert tokenizer.decode(ids) == "</think>-12"


@pytest.mark.parametrize("word", REFLECTION_WORDS)
@pytest.mark.parametrize("space", ["", " "])
def test_a_reflection_word_is_a_single_token(word: str, space: str) -> None:
    assert len(tiny_tokenizer().encode(space + word)) == 1


def test_the_default_budget_sentence_is_spelt_with_one_think_token() -> None:
    tokenizer = tiny_tokenizer()
    ids = tokenizer.encode(RolloutSettings().budget_template.replace("{budget}", "64"))
    assert ids.count(tokenizer.convert_tokens_to_ids("<think>")) == 1
    assert len(ids) == 11


def test_think_stays_visible_where_special_tokens_are_skipped() -> None:
    tokenizer = tiny_tokenizer()
    assert tokenizer.decode(tokenizer.encode("<think>7</think>7<eos>"), skip_special_tokens=True) == "<think>7</think>7"


def test_an_unknown_word_raises() -> None:
    with pytest.raises(Exception, match="UNK"):
        tiny_tokenizer().encode("seven")


def test_the_same_settings_write_the_same_bytes_and_leave_the_global_generator_alone(tmp_path: Path) -> None:
    settings = WarmStartSettings(hidden_size=64, layers=1, heads=2, seed=5)
    before = torch.get_rng_state()
    for name in ("a", "b"):
        build_tiny(tmp_path / name, settings)
    assert torch.equal(torch.get_rng_state(), before)
    files = sorted(p.name for p in (tmp_path / "a").iterdir())
    assert "model.safetensors" in files
    assert all((tmp_path / "a" / f).read_bytes() == (tmp_path / "b" / f).read_bytes() for f in files)


def test_another_seed_writes_other_weights(tmp_path: Path) -> None:
    for seed in (0, 1):
        build_tiny(tmp_path / str(seed), WarmStartSettings(hidden_size=64, layers=1, heads=2, seed=seed))
    assert (tmp_path / "0/model.safetensors").read_bytes() != (tmp_path / "1/model.safetensors").read_bytes()


def test_the_default_model_loads_with_tied_heads_and_about_two_million_parameters(tmp_path: Path) -> None:
    build_tiny(tmp_path, WarmStartSettings())
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert 1.5e6 < sum(p.numel() for p in model.parameters()) < 2.5e6
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert model.generation_config.eos_token_id == VOCABULARY.index(EOS)
    assert model(torch.tensor([[4, 5, 6]])).logits.shape == (1, 3, len(VOCABULARY))


def test_the_head_size_is_one_that_the_engine_accepts() -> None:
    assert tiny_config(WarmStartSettings(hidden_size=192, heads=4)).head_dim == 64  # 48 is not accepted
    with pytest.raises(ConfigError, match="use at least 3 heads"):
        tiny_config(WarmStartSettings(hidden_size=384, heads=1))
