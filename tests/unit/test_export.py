"""An exported checkpoint is a complete Hugging Face folder, made only from verified files, that gives nothing private away."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from reward.calibration import Calibration
from rl.export import ExportError, export_checkpoint, model_card
from rl.manifest import CheckpointError, begin, commit
from rl.sampling_state import SamplingState
from rl.settings import RolloutSettings, Settings
from rl.types import Manifest, Reflex, WeightVersion
from rollout.parameters import from_extra_args

WORDS = ["<eos>", "<unk>", "<think>", "</think>", "7", "+", "5", "=", "12"]
CHAT_TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama with tied embeddings and a word tokenizer, saved as the learner saves one."""
    folder = tmp_path_factory.mktemp("tiny")
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", unk_token="<unk>")
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, eos_token_id=0, bos_token_id=None, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def config_of(**changes: Any) -> dict[str, Any]:
    raw: dict[str, Any] = {
        "model": {"path": "org/base-model"},
        "data": {"source": "reasoning_gym:chain_sum"},
        "rollout": {"budgets": [32, 64, "free"], "samples_per_prompt": 6},
        "reward": {"method": "hbpo"},
        "tracking": {"mlflow": "http://user:hunter2@tracker"},
        "max_steps": 10,
    }
    return Settings.model_validate({**raw, **changes}).model_dump(mode="json")


def write_checkpoint(run: Path, step: int, model: Path, *, config: dict[str, Any], state: dict[str, Any] | None = None) -> Path:
    partial = begin(run / "checkpoints", step)
    for name, content in {p.name: p.read_bytes() for p in model.iterdir()}.items():
        (partial / "model").mkdir(exist_ok=True)
        (partial / "model" / name).write_bytes(content)
    (partial / "state.json").write_text(json.dumps(state or {}))
    manifest = Manifest(
        step=step, config=config, cursor=0, tokens_seen=98765, minutes_spent=1.0, tracker_run_id=None,
        weights=WeightVersion(step, "00"), world_size=1,
    )  # fmt: skip
    return commit(partial, manifest)


def test_an_exported_folder_loads_in_transformers_with_the_same_weights(tmp_path: Path, model_folder: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "run", 10, model_folder, config=config_of())
    target = export_checkpoint(checkpoint, tmp_path / "out" / "model")
    before = AutoModelForCausalLM.from_pretrained(model_folder).state_dict()
    loaded = AutoModelForCausalLM.from_pretrained(target)
    assert all(torch.equal(before[name], value) for name, value in loaded.state_dict().items())
    assert loaded.generation_config.eos_token_id == 0
    tokenizer = AutoTokenizer.from_pretrained(target)
    assert tokenizer.chat_template == CHAT_TEMPLATE
    assert tokenizer("7 + 5 =").input_ids == [4, 5, 6, 7]
    assert [p.name for p in target.parent.iterdir()] == ["model"]


def test_a_run_folder_exports_its_newest_checkpoint(tmp_path: Path, model_folder: Path) -> None:
    for step in (10, 20):
        write_checkpoint(tmp_path / "run", step, model_folder, config=config_of())
    begin(tmp_path / "run" / "checkpoints", 30)
    target = export_checkpoint(tmp_path / "run", tmp_path / "model")
    assert "| steps | 20 |" in (target / "README.md").read_text()


def test_the_card_states_method_budgets_base_model_and_figures(tmp_path: Path, model_folder: Path) -> None:
    state = {"metrics": {"eval/accuracy": 0.75, "eval/tokens": 41.5, "train/loss": 9.0}}
    write_checkpoint(tmp_path / "run", 10, model_folder, config=config_of(), state=state)
    card = (export_checkpoint(tmp_path / "run", tmp_path / "model") / "README.md").read_text()
    assert card.startswith("---\n") and "base_model: org/base-model\n" in card
    for line in ("| method | hbpo |", "| token budgets | 32, 64, free |", "| eval/accuracy | 0.75 |", "| eval/tokens | 41.5 |"):
        assert line in card
    assert "train/loss" not in card and "trust_remote_code" not in card


def test_the_card_says_how_budgets_were_drawn(tmp_path: Path, model_folder: Path) -> None:
    rollout = {"budgets": {"kind": "range", "low": 100, "high": 4000}, "samples_per_prompt": 6}
    write_checkpoint(tmp_path / "run", 10, model_folder, config=config_of(rollout=rollout))
    card = (export_checkpoint(tmp_path / "run", tmp_path / "model") / "README.md").read_text()
    assert "| token budgets | 100 to 4000, uniform, one per prompt |" in card


def test_a_model_asked_for_efforts_leaves_with_their_calibration(tmp_path: Path, model_folder: Path) -> None:
    points = {"x0.50": (0.5, 30.0), "x1.00": (0.6, 60.0), "x3.00": (0.8, 120.0)}
    figures = {f"eval/{r}/{what}": v for r, pair in points.items() for what, v in zip(("accuracy", "tokens"), pair, strict=True)}
    write_checkpoint(tmp_path / "run", 10, model_folder, config=config_of(), state={"metrics": figures})
    target = export_checkpoint(tmp_path / "run", tmp_path / "out")
    calibration = Calibration.from_json((target / "effort-calibration.json").read_text())
    assert calibration.efforts == (0.5, 1.0, 3.0) and calibration.effort_for_tokens(0.5) == pytest.approx(1.0)
    assert "| 0.5 | 30 | 25.0% | 50.0% | 62.5% |" in (target / "README.md").read_text()
    write_checkpoint(tmp_path / "plain", 10, model_folder, config=config_of(), state={"metrics": {"eval/accuracy": 0.5}})
    assert not (export_checkpoint(tmp_path / "plain", tmp_path / "other") / "effort-calibration.json").exists()


def test_the_card_says_how_to_decode_as_in_training(tmp_path: Path, model_folder: Path) -> None:
    reflex = {"amplitude": 2.0, "words": ["hm"]}
    rollout = {"samples_per_prompt": 6, "temperature": 0.7, "adaptive": {"tau": 0.1}, "reflex": reflex}
    sampling = SamplingState()
    sampling.learn(RolloutSettings(**rollout), [torch.tensor([0.5, 1.5, 0.01])])
    write_checkpoint(
        tmp_path / "run", 10, model_folder, config=config_of(rollout=rollout), state={"sampling": sampling.to_json()}
    )
    card = (export_checkpoint(tmp_path / "run", tmp_path / "model") / "README.md").read_text()
    assert "--logits-processors rollout.processor:ShapingProcessor --additional-config" in card and '"words": ["hm"]' in card
    assert "temperature 0.7, top_p 1, the prompt opened by `<think>`" in card
    keys = json.loads(card.split("```json")[1].split("```")[0])
    assert from_extra_args(keys).reflex == Reflex(amplitude=2.0)
    adaptive = from_extra_args(keys).adaptive
    assert adaptive is not None and sampling.statistics is not None and adaptive.tau == 0.1
    assert adaptive.statistics.pivot == pytest.approx(sampling.statistics.pivot, abs=1e-6)
    write_checkpoint(tmp_path / "plain", 10, model_folder, config=config_of())
    assert "Decoding" not in (export_checkpoint(tmp_path / "plain", tmp_path / "other") / "README.md").read_text()


def test_the_card_gives_away_no_login_and_no_local_path(tmp_path: Path, model_folder: Path) -> None:
    config = config_of(model={"path": str(model_folder)}, data={"source": "/home/someone/private/problems.jsonl"})
    write_checkpoint(tmp_path / "run", 10, model_folder, config=config)
    target = export_checkpoint(tmp_path / "run", tmp_path / "model")
    card = (target / "README.md").read_text()
    assert "problems.jsonl" in card and "/home/someone" not in card
    assert str(model_folder.parent) not in card and "base_model:" not in card
    assert "hunter2" not in card
    assert not (target / "state.json").exists()


def test_code_of_the_base_model_is_exported_and_announced_only_when_it_was_trusted(tmp_path: Path, model_folder: Path) -> None:
    custom = tmp_path / "custom"
    custom.mkdir()
    for path in model_folder.iterdir():
        (custom / path.name).write_bytes(path.read_bytes())
    (custom / "modeling_custom.py").write_text("x = 1\n")
    trusted = config_of(model={"path": "org/base-model", "trust_remote_code": True, "revision": "abc123"})
    write_checkpoint(tmp_path / "trusted", 1, custom, config=trusted)
    card = (export_checkpoint(tmp_path / "trusted", tmp_path / "a") / "README.md").read_text()
    assert "trust_remote_code=True" in card and "abc123" in card
    write_checkpoint(tmp_path / "plain", 1, custom, config=config_of())
    assert not (export_checkpoint(tmp_path / "plain", tmp_path / "b") / "modeling_custom.py").exists()


def test_papers_that_lay_beside_the_base_model_stay_behind_and_are_named(
    tmp_path: Path, model_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with_papers = tmp_path / "base"
    shutil.copytree(model_folder, with_papers)
    for name in ("README.md", "LICENSE"):
        (with_papers / name).write_text("of the base model")
    write_checkpoint(tmp_path / "run", 1, with_papers, config=config_of())
    target = export_checkpoint(tmp_path / "run", tmp_path / "model")
    assert not (target / "LICENSE").exists()
    assert (target / "README.md").read_text().startswith("---")
    assert "left out of the export, as no part of the model: LICENSE, README.md" in caplog.text


def test_a_damaged_model_file_is_not_exported(tmp_path: Path, model_folder: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "run", 10, model_folder, config=config_of())
    (checkpoint / "model" / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"config\.json was changed"):
        export_checkpoint(checkpoint, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_a_pickled_weight_file_is_not_exported(tmp_path: Path, model_folder: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "run", 10, model_folder, config=config_of())
    bad = begin(tmp_path / "run" / "checkpoints", 20)
    (bad / "model").mkdir()
    for path in (checkpoint / "model").iterdir():
        (bad / "model" / path.name).write_bytes(path.read_bytes())
    (bad / "model" / "pytorch_model.bin").write_bytes(b"pickle")
    write = Manifest(
        step=20, config=config_of(), cursor=0, tokens_seen=0, minutes_spent=0.0, tracker_run_id=None,
        weights=WeightVersion(2, "00"), world_size=1,
    )  # fmt: skip
    with pytest.raises(ExportError, match=r"pytorch_model\.bin"):
        export_checkpoint(commit(bad, write), tmp_path / "model")


def test_a_missing_generation_config_is_made_from_the_model_config(tmp_path: Path, model_folder: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for path in model_folder.iterdir():
        if path.name != "generation_config.json":
            (bare / path.name).write_bytes(path.read_bytes())
    write_checkpoint(tmp_path / "run", 1, bare, config=config_of())
    target = export_checkpoint(tmp_path / "run", tmp_path / "model")
    assert json.loads((target / "generation_config.json").read_text()) == {"eos_token_id": 0}


def test_a_target_with_files_is_refused_and_an_empty_one_is_used(tmp_path: Path, model_folder: Path) -> None:
    write_checkpoint(tmp_path / "run", 10, model_folder, config=config_of())
    target = tmp_path / "model"
    target.mkdir()
    export_checkpoint(tmp_path / "run", target)
    with pytest.raises(ExportError, match="not an empty folder"):
        export_checkpoint(tmp_path / "run", target)


def test_a_folder_without_checkpoint_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="neither a checkpoint nor a run"):
        export_checkpoint(tmp_path, tmp_path / "model")


@pytest.mark.parametrize(
    ("stage", "words"), [("rl", "reinforcement learning"), ("preference", "preference optimisation"), ("distil", "distillation")]
)
def test_a_card_says_what_kind_of_training_made_the_model(stage: str, words: str) -> None:
    config = config_of() | {"stage": stage}
    if stage == "preference":
        config["preference"] = {"form": "dpo", "reverse": True, "beta": 0.3, "pairs": {"source": "rollouts"}, "pairs_per_step": 8}
    manifest = Manifest(
        step=20, config=config, cursor=0, tokens_seen=0, minutes_spent=0.0, tracker_run_id=None, weights=WeightVersion(20, "a"),
        world_size=1,
    )
    card = model_card(manifest, {})
    assert f"Trained by {words}" in card
    assert ("| rollouts per prompt |" in card) is (stage == "rl")
    assert ("| preference loss | dpo |" in card) is (stage == "preference")
