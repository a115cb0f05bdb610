"""The warm start's data, cache key and batches; the training itself is part of the quickstart's end-to-end test."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from rl.batch import unpack_tokens
from rl.settings import DataSettings, ModelSettings, RolloutSettings, Settings, WarmStartSettings
from rl.sft import _batches, cache_key, cached_folder, copy_tokenizer, to_batch, update_count, warm_start_learner
from rl.traces import Trace


def _settings(**changes: Any) -> Settings:
    warm = changes.pop("warm_start", WarmStartSettings())
    data = DataSettings(source="reasoning_gym:chain_sum", **changes.pop("data", {}))
    return Settings(model=ModelSettings(path="embedded"), data=data, warm_start=warm, max_steps=1, **changes)


def _trace(prompt_ids: tuple[int, ...], response_ids: tuple[int, ...]) -> Trace:
    return Trace(prompt_ids=prompt_ids, response_ids=response_ids, budget=0, correct=True)


def test_every_response_token_carries_loss_and_no_prompt_token_does() -> None:
    traces = [_trace((5, 6), (7, 8, 1)), _trace((9,), (10, 1))]
    batch = to_batch(traces, [0, 1])
    assert unpack_tokens(batch) == [[5, 6, 7, 8, 1], [9, 10, 1]]
    assert batch.loss_mask_T.tolist() == [False, False, True, True, True, False, True, True]
    assert batch.advantage_T.tolist() == [0, 0, 1, 1, 1, 0, 1, 1]
    assert batch.minibatch_N.tolist() == [0, 1]
    assert bool(batch.sampled_logp_T.isnan().all())  # nothing was sampled, so no gap to an engine is ever reported


def test_an_epoch_visits_every_trace_at_most_once_in_whole_batches() -> None:
    batches = _batches(10, 3, 2, seed=0)
    assert len(batches) == update_count(10, 3, 2) == 6
    assert {len(batch) for batch in batches} == {3}
    for epoch in (batches[:3], batches[3:]):
        assert max(Counter(i for batch in epoch for i in batch).values()) == 1
    assert batches[:3] != batches[3:]


def test_the_order_depends_on_the_seed_alone() -> None:
    assert _batches(50, 5, 1, seed=3) == _batches(50, 5, 1, seed=3) != _batches(50, 5, 1, seed=4)


@pytest.mark.parametrize(
    "changes",
    [
        {"warm_start": WarmStartSettings(error_rate=0.2)},
        {"warm_start": WarmStartSettings(seed=1)},
        {"data": {"seed": 1}},
        {"data": {"task": {"min_terms": 2}}},
        {"rollout": RolloutSettings(budget_template="<think> at most {budget} tokens")},
        {"rollout": RolloutSettings(max_length=128)},
        {"rollout": RolloutSettings.model_validate({"budgets": {"kind": "range", "low": 16, "high": 128}})},
        {"rollout": RolloutSettings(budgets=[64], budget_place="none", hard_budgets=True)},
    ],
)
def test_whatever_the_model_depends_on_gives_another_cache_entry(changes: dict[str, Any]) -> None:
    assert cache_key(_settings(**changes)) != cache_key(_settings())


@pytest.mark.parametrize(
    "changes",
    [
        {"rollout": RolloutSettings(budgets=[64])},
        {"seed": 5},
        {"prompts_per_step": 4},
        {"warm_start": WarmStartSettings(cache_dir="elsewhere")},
        {"max_minutes": 1.0},
    ],
)
def test_what_only_the_run_depends_on_finds_the_same_entry(changes: dict[str, Any]) -> None:
    assert cache_key(_settings(**changes)) == cache_key(_settings())


def test_a_bfloat16_model_is_not_taken_for_a_float32_one() -> None:
    half = _settings().model_copy(update={"model": ModelSettings(path="embedded", dtype="bfloat16")})
    assert cache_key(half) != cache_key(_settings())


def test_a_run_without_warm_start_has_no_cache_entry() -> None:
    with pytest.raises(ValueError, match="no warm start"):
        cache_key(_settings(warm_start=None))


def test_the_environment_moves_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("BUDGET_RL_CACHE", str(tmp_path))
    assert cached_folder(_settings()) == tmp_path / "warm-start" / cache_key(_settings())
    monkeypatch.delenv("BUDGET_RL_CACHE")
    own = _settings(warm_start=WarmStartSettings(cache_dir=str(tmp_path / "own")))
    assert cached_folder(own).parent.parent == tmp_path / "own"


def test_the_warm_start_has_its_own_learner_on_one_rank_without_a_reference() -> None:
    settings = _settings(learner={"ranks": 2, "minibatches": 2, "tokens_per_microbatch": 999}, loss={"kl_coef": 0.1})
    own = warm_start_learner(settings)
    assert (own.learner.ranks, own.learner.minibatches, own.learner.epochs) == (1, 1, 1)
    assert (own.learner.lr, own.learner.lr_schedule, own.learner.weight_decay) == (2e-3, "cosine", 0.0)
    assert own.learner.tokens_per_microbatch == 999
    assert own.loss.kl_coef == 0.0


def test_copying_the_tokenizer_takes_the_model_along_without_weights_papers_and_existing_files(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    weights = ("model.safetensors", "model.safetensors.index.json", "a.gguf", "tf_model.h5", "model.pth", "flax_model.msgpack")
    papers = ("README.md", "LICENSE", "figure.png")
    for name in ("tokenizer.json", "chat_template.jinja", "modeling_own.py", ".hidden.json", *weights, *papers):
        (source / name).write_text("source")
    (source / "config.json").write_text("source")
    (target / "config.json").write_text("target")
    copy_tokenizer(source, target)
    copied = ["chat_template.jinja", "config.json", "modeling_own.py", "tokenizer.json"]
    assert sorted(p.name for p in target.iterdir()) == copied
    assert (target / "config.json").read_text() == "target"


def test_the_mask_counts_are_the_tokens_the_loss_is_divided_by() -> None:
    traces = [_trace((5,) * p, (7,) * r) for p, r in ((1, 4), (2, 3), (3, 2))]
    assert int(to_batch(traces, [0, 0, 1]).loss_mask_T.sum()) == 9
    assert torch.equal(to_batch(traces, [0, 0, 1]).prompt_length_N, torch.tensor([1, 2, 3]))
