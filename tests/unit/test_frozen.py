"""Frozen models against transformers itself: layout, heads, adapters, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaForCausalLM,
    PhiConfig,
    PhiForCausalLM,
)

from reward.contrast_actor import ContrastActor
from reward.frozen import FrozenModel, in_order, plan_passes, response_positions
from reward.heads import Head, head_names, read_head
from rl.embedded import tiny_tokenizer
from rl.errors import BudgetRLError, ConfigError
from rl.guidance import TeacherRequest
from tests.small_models import RAGGED, SIZES, V, batch, merged, one_by_one, save_adapter, save_model


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "base")


@pytest.mark.parametrize("tokens_per_pass", [1, 14, 8192])
def test_a_ragged_batch_is_scored_as_if_its_sequences_came_one_by_one(base: Path, tokens_per_pass: int) -> None:
    token_T, start_N, prompt_length_N = batch(RAGGED)
    model = FrozenModel.load(base, tokens_per_pass=tokens_per_pass)
    logp_R = model.logp(token_T, start_N, prompt_length_N)
    expected = one_by_one(base, RAGGED, token_T)
    torch.testing.assert_close(logp_R, expected, atol=1e-5, rtol=0)
    assert logp_R.dtype == torch.float32 and not logp_R.is_inference()
    hidden_RH = model.hidden(token_T, start_N, prompt_length_N)
    target_R = token_T[response_positions(start_N, prompt_length_N)]
    from_hidden = (hidden_RH @ model.head.T).log_softmax(dim=-1).gather(1, target_R[:, None])[:, 0]
    torch.testing.assert_close(from_hidden, expected, atol=1e-5, rtol=0)
    assert hidden_RH.shape == (18, 16)
    # A learner in the same process can take them for a loss.
    states = [model.states(part) for part in plan_passes(token_T, start_N, prompt_length_N, tokens_per_pass)]
    assert not any(state.is_inference() for state in states)


def test_the_rows_that_count_are_those_that_predict_response_tokens_one_to_the_last() -> None:
    """Prompt 10 11 12, response 21 22 23: the rows of 12, 21 and 22, neither the one of 11 nor the one of 23."""
    token_T = torch.tensor([10, 11, 12, 21, 22, 23, 13, 24])
    start_N, prompt_length_N = torch.tensor([0, 6, 8]), torch.tensor([3, 1])
    (part,) = plan_passes(token_T, start_N, prompt_length_N, 100)
    assert part.token_BS.tolist() == [[10, 11, 12, 21, 22, 23], [13, 24, 0, 0, 0, 0]]
    assert part.token_BS.flatten()[part.position_P].tolist() == [12, 21, 22, 13]
    assert part.index_P.tolist() == [0, 1, 2, 3]
    assert token_T[response_positions(start_N, prompt_length_N)].tolist() == [21, 22, 23, 24]


def test_passes_keep_to_their_tokens_and_cover_every_response_token_once() -> None:
    token_T, start_N, prompt_length_N = batch([(2, 9), (3, 1), (1, 5), (4, 7), (1, 1)])
    parts = list(plan_passes(token_T, start_N, prompt_length_N, 14))
    assert len(parts) > 1 and all(part.token_BS.numel() <= 14 or part.token_BS.shape[0] == 1 for part in parts)
    assert sorted(torch.cat([part.index_P for part in parts]).tolist()) == list(range(23))
    target_R = token_T[response_positions(start_N, prompt_length_N)]
    # The grid, one place further, holds the tokens themselves.
    found = [part.token_BS.flatten()[part.position_P + 1] for part in parts]
    assert torch.equal(in_order(found, [part.index_P for part in parts]), target_R)


def test_no_sequences_give_no_rows(base: Path) -> None:
    model = FrozenModel.load(base)
    empty = torch.zeros(0, dtype=torch.int64)
    assert model.hidden(empty, torch.zeros(1, dtype=torch.int64), empty).shape == (0, 16)
    assert model.logp(empty, torch.zeros(1, dtype=torch.int64), empty).shape == (0,)


def test_rows_that_pad_the_head_get_no_probability(base: Path, tmp_path: Path) -> None:
    """The same weights under a head of 64 more rows, huge ones: log-probs stay what they were."""
    lm: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    lm.resize_token_embeddings(V + 64, mean_resizing=False)
    lm.get_output_embeddings().weight.data[V:] = 50.0
    lm.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    padded = FrozenModel.load(tmp_path)
    assert padded.vocab == V == padded.head.shape[0]
    arguments = batch(RAGGED)
    torch.testing.assert_close(padded.logp(*arguments), FrozenModel.load(base).logp(*arguments), atol=1e-6, rtol=0)
    with pytest.raises(BudgetRLError, match=f"token id {V}, and the tokenizer's ids end at {V - 1}"):
        padded.logp(torch.tensor([1, V]), torch.tensor([0, 2]), torch.tensor([1]))


def test_bfloat16_heads_give_logits_that_only_the_inputs_rounded() -> None:
    """The product of bfloat16 numbers is exact in float32; left in bfloat16 it would be off by up to 2^-8 of itself."""
    generator = torch.Generator().manual_seed(0)
    hidden_RH, weight_VH = (torch.randn(n, 32, generator=generator).to(torch.bfloat16) for n in (5, 9000))
    logits = Head(weight_VH).logits(hidden_RH)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, (hidden_RH.double() @ weight_VH.double().T).float(), atol=1e-5, rtol=1e-6)


def test_biases_and_softcaps_of_a_head_are_part_of_it(tmp_path: Path) -> None:
    phi: Any = PhiForCausalLM(PhiConfig(**SIZES, vocab_size=V, bos_token_id=None, eos_token_id=1, max_position_embeddings=64))
    torch.nn.init.normal_(phi.lm_head.bias)
    capped = Gemma2Config(**SIZES, vocab_size=V, head_dim=8, num_key_value_heads=2, final_logit_softcapping=2.0)
    gemma: Any = Gemma2ForCausalLM(capped)
    for name, lm, message in (("phi", phi, "the head has a bias"), ("gemma", gemma, "caps its logits")):
        folder = save_model(tmp_path / name, model=lm)
        arguments = batch(RAGGED)
        model = FrozenModel.load(folder)
        torch.testing.assert_close(model.logp(*arguments), one_by_one(folder, RAGGED, arguments[0]), atol=1e-5, rtol=0)
        torch.testing.assert_close(
            model.output.logits(model.hidden(*arguments)).log_softmax(dim=-1).gather(1, _targets(arguments))[:, 0],
            model.logp(*arguments),
            atol=1e-5,
            rtol=0,
        )
        with pytest.raises(ConfigError, match=message):
            FrozenModel.load(folder, plain=True)


def _targets(arguments: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return arguments[0][response_positions(*arguments[1:])][:, None]


def test_logits_that_are_not_head_times_hidden_state_are_refused(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cohere: Any = CohereForCausalLM(CohereConfig(**SIZES, vocab_size=V, logit_scale=0.0625))
    with pytest.raises(ConfigError, match="scales its logits .logit_scale=0.0625"):
        FrozenModel.load(save_model(tmp_path, model=cohere))
    original: Any = LlamaForCausalLM.forward

    def scaled(*arguments: Any, **options: Any) -> Any:
        """What no configuration tells."""
        output = original(*arguments, **options)
        output.logits = 0.5 * output.logits
        return output

    monkeypatch.setattr(LlamaForCausalLM, "forward", scaled)
    with pytest.raises(ConfigError, match="not its output embedding times its hidden states"):
        FrozenModel.load(base)


def test_sequences_longer_than_the_context_and_prompts_of_nothing_are_refused(base: Path) -> None:
    model = FrozenModel.load(base)
    with pytest.raises(BudgetRLError, match="65 tokens is longer than the 64"):
        model.hidden(*batch([(5, 60)]))
    with pytest.raises(ValueError, match="sequence 1 has 3 tokens, its prompt 0"):
        model.hidden(*batch([(1, 2), (0, 3)]))


def test_a_folder_without_safetensors_or_with_too_small_a_head_is_refused(base: Path, tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((base / name).read_bytes())
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="no causal language model that can be read"):
        FrozenModel.load(tmp_path)
    small = save_model(tmp_path / "small", vocab_size=V - 1)
    with pytest.raises(ConfigError, match=f"the head has {V - 1} rows and the tokenizer {V} tokens"):
        FrozenModel.load(small)
    with pytest.raises(ConfigError, match=f"the head has {V - 1} rows and the tokenizer {V} tokens"):
        read_head(small, vocabulary=V)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("sharded", [False, True])
def test_the_head_alone_is_read_as_the_loaded_model_has_it(tied: bool, sharded: bool, tmp_path: Path) -> None:
    folder = save_model(tmp_path, tie_word_embeddings=tied, vocab_size=V + 8)
    lm: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if sharded:
        (folder / "model.safetensors").unlink()
        lm.save_pretrained(folder, max_shard_size="8KB")
        assert (folder / "model.safetensors.index.json").is_file()
    head_VH = read_head(folder, vocabulary=V)
    assert torch.equal(head_VH, lm.get_output_embeddings().weight[:V]) and head_VH.dtype == torch.float32
    assert torch.equal(head_VH, FrozenModel.load(folder).head)
    assert read_head(folder, vocabulary=V, dtype="bfloat16").dtype == torch.bfloat16
    assert head_names(folder)[0] == "lm_head.weight"


def test_a_head_is_found_under_its_base_models_name_and_its_absence_is_told(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = save_model(tmp_path, tie_word_embeddings=True)
    weights = load_file(folder / "model.safetensors")
    save_file({name.removeprefix("model."): value for name, value in weights.items()}, folder / "model.safetensors")
    assert torch.equal(read_head(folder, vocabulary=V), weights["model.embed_tokens.weight"])
    save_file({"model.norm.weight": weights["model.norm.weight"]}, folder / "model.safetensors")
    with pytest.raises(ConfigError, match="none of its tensors is called lm_head.weight or model.embed_tokens.weight"):
        read_head(folder, vocabulary=V)


def test_two_adapters_on_one_base_score_as_their_merged_models(base: Path, tmp_path: Path) -> None:
    arguments = batch(RAGGED)
    adapters = [save_adapter(base, tmp_path / name, seed=seed) for name, seed in (("a", 1), ("b", 2))]
    first = FrozenModel.load(base, adapter=adapters[0])
    second = first.beside(adapters[1])
    found = [model.logp(*arguments) for model in (first, second, first)]
    assert torch.equal(found[0], found[2])  # switching there and back
    for adapter, logp_R in zip(adapters, found, strict=False):
        expected = FrozenModel.load(merged(base, adapter, tmp_path / "merged")).logp(*arguments)
        assert (logp_R - expected).abs().max() < 1e-5
    assert (found[0] - found[1]).abs().max() > 0.1
    assert first.head.data_ptr() == second.head.data_ptr()
    assert first.parameters == second.parameters < 1.5 * FrozenModel.load(base).parameters


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_modules": ["q_proj", "lm_head"]}, "changes more than inner layers: .*lm_head"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "changes more than inner layers: .*embed_tokens"),
        ({"modules_to_save": ["lm_head"]}, "brings whole modules along .lm_head"),
        ({"bias": "lora_only", "target_modules": ["q_proj"]}, None),
    ],
)
def test_adapters_that_reach_beyond_inner_layers_are_refused(
    base: Path, tmp_path: Path, options: dict[str, Any], message: str | None
) -> None:
    adapter = save_adapter(base, tmp_path, **options)
    if message is None:  # layers of this model have no bias, so nothing was saved beyond LoRA
        FrozenModel.load(base, adapter=adapter)
        return
    with pytest.raises(ConfigError, match=message):
        FrozenModel.load(base, adapter=adapter)


def test_adapters_of_other_kinds_formats_and_bases_are_refused(base: Path, tmp_path: Path) -> None:
    adapter = save_adapter(base, tmp_path / "lora")
    config = json.loads((adapter / "adapter_config.json").read_text())
    for change, message in (({"peft_type": "IA3"}, "of type IA3"), ({"init_lora_weights": "pissa"}, "started by pissa")):
        (adapter / "adapter_config.json").write_text(json.dumps(config | change))
        with pytest.raises(ConfigError, match=message):
            FrozenModel.load(base, adapter=adapter)
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    wider = save_model(tmp_path / "wider", hidden_size=32)
    with pytest.raises(ConfigError, match="does not fit the base model"):
        FrozenModel.load(wider, adapter=adapter)
    deeper = save_adapter(save_model(tmp_path / "deeper", num_hidden_layers=3), tmp_path / "deep")
    with pytest.raises(ConfigError, match="does not fit the base model: .*layers.2.* has no counterpart"):
        FrozenModel.load(base, adapter=deeper)
    with pytest.raises(ConfigError, match="does not fit the base model: .*layers.2.* has no counterpart"):
        FrozenModel.load(tmp_path / "deeper", adapter=adapter)
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(ConfigError, match="has no adapter_model.safetensors"):
        FrozenModel.load(base, adapter=adapter)


def test_the_same_answer_is_scored_under_two_prompts(base: Path) -> None:
    """The answers 5 6 7 and 8 9 after a prompt for a better one and a longer prompt for a worse one."""
    actor = ContrastActor(dtype="float32")
    assert actor.start(str(base)) == sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(base).parameters())
    better = TeacherRequest(torch.tensor([1, 2, 5, 6, 7, 3, 8, 9]), torch.tensor([0, 5, 8]), torch.tensor([2, 1]))
    worse = TeacherRequest(torch.tensor([4, 4, 2, 5, 6, 7, 4, 3, 8, 9]), torch.tensor([0, 6, 10]), torch.tensor([3, 2]))
    found = [actor.score(request) for request in (better, worse)]
    for logp_R, request, lengths in zip(found, (better, worse), ([(2, 3), (1, 2)], [(3, 3), (2, 2)]), strict=True):
        torch.testing.assert_close(logp_R, one_by_one(base, lengths, request.token_T), atol=1e-5, rtol=0)
    assert (found[0] - found[1]).abs().min() > 1e-3


def test_an_actor_that_was_not_started_says_so() -> None:
    empty = torch.zeros(0, dtype=torch.int64)
    with pytest.raises(RuntimeError, match="start must come first"):
        ContrastActor(dtype="float32").score(TeacherRequest(empty, torch.zeros(1, dtype=torch.int64), empty))
