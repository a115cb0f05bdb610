"""From `model.path` to a folder: a wrong path says what is wrong with it and what to write instead."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from launch.fetching import cache_root
from rl.errors import ModelError
from rl.models import TOKENIZER_FILES, local_folder, longest_context
from rl.settings import ModelSettings


def _folder(root: Path, *names: str) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    for name in names:
        (root / name).write_text("{}")
    return root


def _error(settings: ModelSettings) -> ModelError:
    with pytest.raises(ModelError) as caught:
        local_folder(settings)
    assert caught.value.fix
    return caught.value


@pytest.mark.parametrize("tokenizer", TOKENIZER_FILES)
def test_a_model_folder_is_used_as_it_is(tmp_path: Path, tokenizer: str) -> None:
    folder = _folder(tmp_path / "model", "config.json", tokenizer)
    assert local_folder(ModelSettings(path=str(folder))) == folder.resolve()


def test_a_path_from_the_home_folder_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = _folder(tmp_path / "model", "config.json", "tokenizer.json")
    assert local_folder(ModelSettings(path="~/model")) == folder.resolve()


def test_a_folder_that_does_not_exist_is_not_looked_up_on_the_hub(tmp_path: Path) -> None:
    error = _error(ModelSettings(path=str(tmp_path / "missing")))
    assert error.cause == f"model.path: there is no folder {tmp_path / 'missing'}"


def test_a_folder_without_a_configuration_is_no_model(tmp_path: Path) -> None:
    error = _error(ModelSettings(path=str(_folder(tmp_path / "model", "tokenizer.json"))))
    assert "has no config.json" in error.cause


def test_a_folder_without_a_tokenizer_says_how_to_save_one(tmp_path: Path) -> None:
    error = _error(ModelSettings(path=str(_folder(tmp_path / "model", "config.json"))))
    assert error.cause.endswith("has no tokenizer")
    assert "save_pretrained" in error.fix


def test_a_missing_gguf_file_is_answered_with_those_that_are_there(tmp_path: Path) -> None:
    folder = _folder(tmp_path / "model", "b.gguf", "a.gguf")
    error = _error(ModelSettings(path=str(folder), gguf_file="c.gguf"))
    assert str(folder / "c.gguf") in error.cause
    assert error.fix == "GGUF files there: a.gguf, b.gguf"


def test_an_interrupted_conversion_is_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BUDGET_RL_CACHE", str(tmp_path / "cache"))
    folder = _folder(tmp_path / "model", "a.gguf")
    calls: list[str] = []

    def convert(gguf: Path, target: Path) -> Path:
        _folder(target, "config.json")
        calls.append(gguf.name)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return _folder(target, "tokenizer.json")

    monkeypatch.setattr("launch.fetching.convert_gguf", convert)
    settings = ModelSettings(path=str(folder), gguf_file="a.gguf")
    with pytest.raises(KeyboardInterrupt):
        local_folder(settings)
    assert list((cache_root() / "models").iterdir()) == []
    assert local_folder(settings) == local_folder(settings)
    assert calls == ["a.gguf", "a.gguf"]
    assert len(list((cache_root() / "models").iterdir())) == 1


def test_a_folder_without_any_gguf_file_says_so(tmp_path: Path) -> None:
    error = _error(ModelSettings(path=str(_folder(tmp_path / "model", "config.json")), gguf_file="c.gguf"))
    assert error.fix == "GGUF files there: none"


def test_a_gguf_file_of_a_hub_model_is_refused_rather_than_ignored() -> None:
    error = _error(ModelSettings(path="someone/some-model", gguf_file="q4.gguf"))
    assert "model.gguf_file" in error.cause and "someone/some-model" in error.cause


def test_a_model_made_by_fetch_is_found_without_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BUDGET_RL_CACHE", str(tmp_path))
    folder = _folder(cache_root() / "models" / "smollm2", "config.json", "tokenizer.json")
    assert folder.is_relative_to(tmp_path)
    assert local_folder(ModelSettings(path="HuggingFaceTB/SmolLM2-135M-Instruct")) == folder


def test_a_pinned_revision_is_asked_of_the_hub_and_not_replaced_by_the_fetched_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BUDGET_RL_CACHE", str(tmp_path))
    _folder(cache_root() / "models" / "smollm2", "config.json", "tokenizer.json")
    pinned = _folder(tmp_path / "pinned", "config.json", "tokenizer.json")
    asked: dict[str, Any] = {}

    def download(path: str, **options: Any) -> str:
        asked.update(options)
        return str(pinned)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert local_folder(ModelSettings(path="HuggingFaceTB/SmolLM2-135M-Instruct", revision="abc123")) == pinned
    assert asked["revision"] == "abc123"
    assert "*.safetensors" in asked["allow_patterns"] and "*.py" not in asked["allow_patterns"]
    local_folder(ModelSettings(path="someone/some-model", revision="abc123", trust_remote_code=True))
    assert "*.py" in asked["allow_patterns"]


@pytest.mark.parametrize(
    ("config", "longest"),
    [
        ({"max_position_embeddings": 2048}, 2048),
        ({"n_positions": 1024, "n_ctx": 1024}, 1024),
        ({"text_config": {"max_position_embeddings": 512}}, 512),
        ({"max_position_embeddings": 512, "rope_scaling": {"type": "linear", "factor": 4.0}}, 2048),
        ({"max_position_embeddings": 512, "rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, 512),
        ({"max_position_embeddings": 512, "rope_scaling": None, "model_max_length": 4096}, 4096),
        ({"model_type": "mamba"}, None),
    ],
)
def test_the_longest_context_is_read_as_the_engine_reads_it(tmp_path: Path, config: dict[str, Any], longest: int | None) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert longest_context(tmp_path) == longest


def test_a_damaged_configuration_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"config\.json is not valid JSON"):
        longest_context(tmp_path)


@pytest.mark.parametrize(
    ("path", "fix"),
    [("someone/some-model", "check the name"), ("HuggingFaceTB/SmolLM2-135M-Instruct", "budget-rl fetch smollm2")],
)
def test_a_hub_model_that_cannot_be_had_says_what_to_do(
    path: str, fix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BUDGET_RL_CACHE", str(tmp_path))
    # The hub client reads these at import, so that environment variables would come too late.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    error = _error(ModelSettings(path=path))
    assert error.cause.startswith(f"model {path} cannot be had from the hub: ")
    assert "\n" not in error.cause
    assert fix in error.fix
