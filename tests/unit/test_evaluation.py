"""What `budget-rl eval` takes for the model, and the figures of an evaluation."""

from __future__ import annotations

from pathlib import Path

import pytest

from rl.embedded import build_tiny
from rl.evaluation import EvalResult, evaluated_model
from rl.models import at_folder, local_folder
from rl.prompts import load_tokenizer
from rl.settings import ModelSettings, WarmStartSettings

TRUSTED = ModelSettings(path="someone/base", trust_remote_code=True, revision="abc123")


def test_a_hub_id_keeps_the_pinned_revision() -> None:
    model = evaluated_model(TRUSTED, Path("someone/other"))
    assert (model.path, model.revision, model.trust_remote_code) == ("someone/other", "abc123", True)


def test_a_folder_has_no_revision(tmp_path: Path) -> None:
    model = evaluated_model(TRUSTED, tmp_path)
    assert (model.path, model.revision) == (str(tmp_path), None)


def test_a_checkpoint_of_a_model_from_gguf_loads_by_itself(tmp_path: Path) -> None:
    build_tiny(tmp_path / "model", WarmStartSettings(hidden_size=32, layers=1, heads=1))
    base = ModelSettings(path="~/models/base", gguf_file="q4.gguf")
    folder = local_folder(evaluated_model(base, tmp_path))
    assert folder == tmp_path / "model"
    assert load_tokenizer(at_folder(base, folder)).eos_token == "<eos>"


def test_a_folder_with_the_configured_gguf_file_is_converted_as_for_training(tmp_path: Path) -> None:
    (tmp_path / "q4.gguf").write_bytes(b"")
    assert evaluated_model(ModelSettings(path="elsewhere", gguf_file="q4.gguf"), tmp_path).gguf_file == "q4.gguf"


@pytest.mark.parametrize(("label", "root"), [("free", "eval"), ("32", "eval/32")])
def test_answers_without_a_score_are_counted_under_every_budget(label: str, root: str) -> None:
    result = EvalResult(label, accuracy=0.5, tokens=40.0, truncated=0.1, unscored=3, scored=())
    assert result.metrics() == {
        f"{root}/accuracy": 0.5,
        f"{root}/tokens": 40.0,
        f"{root}/truncated": 0.1,
        f"{root}/unscored": 3.0,
    }
