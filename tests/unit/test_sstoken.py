"""ssToken's scores, which tokens they keep, and the attention to the prompt that a probe measures."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from rl import sstoken
from rl.errors import ConfigError
from rl.policy import PolicyModel
from rl.sstoken import PromptAttention, keep_highest, prompt_mass, scores

HISTORY = torch.tensor([2.0, 0.5, 3.0, 1.0, 0.1, 2.5])
CURRENT = torch.tensor([1.0, 0.5, 3.2, 0.4, 0.1, 1.0])
GAIN = HISTORY - CURRENT  # negative log-likelihoods
ATTENTION = torch.tensor([0.3, 0.8, 0.2, 0.5, 0.9, 0.1])
ONE = torch.zeros(6, dtype=torch.int64)
SMALL = {
    "vocab_size": 13,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.5,  # far from uniform attention
}
WINDOW = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
MODELS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama": (LlamaForCausalLM, LlamaConfig, {}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {}),
    "qwen2-window": (Qwen2ForCausalLM, Qwen2Config, WINDOW),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {"head_dim": 8}),
    "qwen3-window": (Qwen3ForCausalLM, Qwen3Config, {"head_dim": 8, **WINDOW}),
    # its scaling is not 1 / sqrt(head size); sdpa knows no soft cap, so there is none to compare
    "gemma2": (Gemma2ForCausalLM, Gemma2Config, {"head_dim": 8, "query_pre_attn_scalar": 3, "attn_logit_softcapping": None}),
}
PROMPTS = torch.tensor([5, 1, 8])
TOKENS = torch.randint(13, (3, 11), generator=torch.Generator().manual_seed(0))


def _model(name: str, implementation: str = "sdpa") -> Any:
    torch.manual_seed(1)
    model, config, options = MODELS[name]
    return model._from_config(config(**{**SMALL, **options}), attn_implementation=implementation).eval()


@torch.no_grad()
def _probed(lm: Any, token_BS: torch.Tensor, prompt_length_B: torch.Tensor) -> torch.Tensor:
    with PromptAttention(lm, prompt_length_B) as probe:
        lm.base_model(input_ids=token_BS, use_cache=False)
    return probe.mass_BS


@torch.no_grad()
def _by_weights(lm: Any) -> torch.Tensor:
    """The same from the weights that the eager attention of the last layer gives back."""
    last_BHSS = lm(input_ids=TOKENS, use_cache=False, output_attentions=True).attentions[-1]
    prompt_BS = torch.arange(TOKENS.shape[1]) < PROMPTS[:, None]
    return (last_BHSS * prompt_BS[:, None, None]).sum(-1).mean(1)


def test_scores_are_the_worked_values() -> None:
    gained = [0.705882, 0.117647, 0.0, 0.470588, 0.117647, 1.0]
    assert scores(GAIN, None, ONE, 1, gamma=1).tolist() == pytest.approx(gained, abs=1e-5)
    assert scores(GAIN, ATTENTION, ONE, 1, gamma=0).tolist() == pytest.approx(ATTENTION.tolist(), abs=1e-5)
    both = [0.502941, 0.458824, 0.1, 0.485294, 0.508824, 0.55]
    assert scores(GAIN, ATTENTION, ONE, 1).tolist() == pytest.approx(both, abs=1e-5)


@pytest.mark.parametrize(
    ("gamma", "share", "kept", "loss"),
    [
        (0.5, 0.6, [0, 3, 4, 5], 0.625),
        (1, 0.6, [0, 1, 3, 5], 0.725),
        (0, 0.6, [0, 1, 3, 4], 0.5),
        (0.5, 0.8, [0, 1, 3, 4, 5], 0.6),
    ],
)
def test_the_kept_tokens_and_their_loss_are_the_worked_ones(gamma: float, share: float, kept: list[int], loss: float) -> None:
    """At gamma 1 tokens 1 and 4 are equal and only one fits: the earlier."""
    keep = keep_highest(scores(GAIN, ATTENTION, ONE, 1, gamma=gamma), ONE, 1, share=share)
    assert keep.nonzero().flatten().tolist() == kept
    assert float(CURRENT[keep].mean()) == pytest.approx(loss, abs=1e-5)


@given(
    lengths=st.lists(st.integers(0, 60), min_size=1, max_size=6),
    percent=st.integers(1, 100),
    levels=st.integers(1, 50),
    seed=st.integers(0, 2**20),
)
@example(lengths=[25], percent=28, levels=50, seed=0)  # 0.28 * 25 comes out above 7
def test_every_sample_keeps_exactly_its_share_and_none_below_a_dropped_one(
    lengths: list[int], percent: int, levels: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    owner = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    score = torch.randint(levels, (owner.numel(),), generator=generator).double()
    keep = keep_highest(score, owner, len(lengths), share=percent / 100)
    for sample, length in enumerate(lengths):
        here, chosen = score[owner == sample].tolist(), keep[owner == sample].tolist()
        count = math.ceil(Fraction(percent, 100) * length)
        ranked = sorted(range(length), key=lambda place: (-here[place], place))
        assert [place for place in range(length) if chosen[place]] == sorted(ranked[:count])


def test_the_order_of_samples_changes_nothing() -> None:
    generator = torch.Generator().manual_seed(3)
    lengths = [4, 1, 0, 7, 5]
    gains = [torch.randn(n, generator=generator) for n in lengths]
    masses = [torch.rand(n, generator=generator) for n in lengths]

    def selected(order: list[int]) -> list[tuple[list[float], list[bool]]]:
        sizes = torch.tensor([lengths[i] for i in order])
        owner = torch.arange(len(order)).repeat_interleave(sizes)
        score = scores(torch.cat([gains[i] for i in order]), torch.cat([masses[i] for i in order]), owner, len(order))
        keep = keep_highest(score, owner, len(order))
        parts = zip(score.split(sizes.tolist()), keep.split(sizes.tolist()), strict=True)
        return [(score.tolist(), keep.tolist()) for score, keep in parts]

    together = selected([0, 1, 2, 3, 4])
    assert selected([3, 0, 4, 2, 1]) == [together[i] for i in (3, 0, 4, 2, 1)]
    assert [selected([i])[0] for i in range(5)] == together


def test_equal_gains_leave_the_choice_to_the_attention() -> None:
    flat = torch.full((6,), -0.7)
    assert scores(flat, ATTENTION, ONE, 1, gamma=0.5).tolist() == pytest.approx((0.5 * ATTENTION).tolist())


def test_a_gain_that_is_no_number_stays_in_the_loss_and_in_its_sample() -> None:
    gain = torch.cat([torch.tensor([1.0, float("nan"), 3.0]), GAIN])
    owner = torch.tensor([0] * 3 + [1] * 6)
    score = scores(gain, torch.cat([torch.zeros(3), ATTENTION]), owner, 2)
    assert bool(score[:3].isnan().all()) and torch.equal(score[3:], scores(GAIN, ATTENTION, ONE, 1))
    assert keep_highest(torch.tensor([1.0, float("nan"), 3.0]), ONE[:3], 1, share=0.3).tolist() == [False, True, False]


def test_what_cannot_be_scored_is_refused() -> None:
    with pytest.raises(ValueError, match="set gamma to 1"):
        scores(GAIN, None, ONE, 1, gamma=0.9)
    with pytest.raises(ValueError, match="between 0 and 1"):
        scores(GAIN, ATTENTION, ONE, 1, gamma=1.1)
    with pytest.raises(ValueError, match="attention_T has shape"):
        scores(GAIN, ATTENTION[:5], ONE, 1)
    with pytest.raises(ValueError, match="owner_T has shape"):
        scores(GAIN, ATTENTION, ONE[:5], 1)
    with pytest.raises(ValueError, match="outside 0 to 0"):
        keep_highest(GAIN, ONE + 1, 1)
    with pytest.raises(ValueError, match="share"):
        keep_highest(GAIN, ONE, 1, share=0.0)


def test_the_mass_of_known_scores_is_worked_by_hand() -> None:
    """Two heads share a key; head 0 scores 0, ln 2, ln 3 and head 1 nothing; the prompt is the first key, or the first two."""
    key = torch.tensor([0.0, math.log(2), math.log(3)]).view(1, 1, 3, 1)
    query = torch.tensor([1.0, 0.0]).view(1, 2, 1, 1).expand(1, 2, 3, 1)
    one = prompt_mass(query, key, torch.tensor([1]), scaling=1.0)
    assert one[0].tolist() == pytest.approx([1, (1 / 3 + 1 / 2) / 2, (1 / 6 + 1 / 3) / 2])
    two = prompt_mass(query, key, torch.tensor([2]), scaling=1.0)
    assert two[0].tolist() == pytest.approx([1, 1, (3 / 6 + 2 / 3) / 2])
    everything = prompt_mass(query, key, torch.tensor([2]), scaling=1.0, causal=False)
    assert everything[0].tolist() == pytest.approx([(3 / 6 + 2 / 3) / 2] * 3)
    window = torch.tensor([[1, 0, 0], [1, 1, 0], [0, 1, 1]], dtype=torch.bool)[None, None]
    windowed = [1, (1 / 3 + 1 / 2) / 2, 0]
    assert prompt_mass(query, key, torch.tensor([1]), scaling=1.0, mask=window)[0].tolist() == pytest.approx(windowed)
    added = torch.zeros(1, 1, 3, 3).masked_fill(~window, torch.finfo(torch.float32).min)
    assert prompt_mass(query, key, torch.tensor([1]), scaling=1.0, mask=added)[0].tolist() == pytest.approx(windowed)
    assert prompt_mass(query, key, torch.tensor([0]))[0].tolist() == [0, 0, 0]


def test_scores_too_large_for_an_exponential_still_give_a_mass() -> None:
    key = torch.tensor([300.0, 300.0]).view(1, 1, 2, 1)
    assert prompt_mass(torch.ones(1, 1, 2, 1), key, torch.tensor([1]), scaling=1.0)[0].tolist() == pytest.approx([1, 0.5])


@pytest.mark.parametrize("name", MODELS)
def test_a_probe_finds_what_eager_attention_returns(name: str) -> None:
    expected = _by_weights(_model(name, "eager"))
    assert float(expected[:, 8:].std()) > 0.05  # or there would be nothing to compare
    assert float((_probed(_model(name), TOKENS, PROMPTS) - expected).abs().max()) < 1e-5
    assert float((_probed(_model(name, "eager"), TOKENS, PROMPTS) - expected).abs().max()) < 1e-5


@pytest.mark.parametrize("name", MODELS)
def test_queries_in_small_parts_give_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = _probed(_model(name), TOKENS, PROMPTS)
    monkeypatch.setattr(sstoken, "CHUNK_ELEMENTS", 3 * 4 * 11 * 4)  # four of eleven queries
    torch.testing.assert_close(_probed(_model(name), TOKENS, PROMPTS), whole, rtol=0, atol=1e-6)


def test_a_padded_row_is_measured_like_the_row_alone() -> None:
    lm = _model("qwen3-window")
    padded = torch.cat([TOKENS, torch.zeros(3, 6, dtype=torch.int64)], dim=1)
    together = _probed(lm, padded, PROMPTS)
    for row, prompt in enumerate(PROMPTS):
        alone = _probed(lm, TOKENS[row : row + 1], prompt[None])
        torch.testing.assert_close(together[row, :11], alone[0], rtol=0, atol=1e-6)


def test_a_prompt_has_all_the_mass_of_its_own_tokens() -> None:
    mass = _probed(_model("llama"), TOKENS, PROMPTS)
    assert mass.dtype == torch.float32 and mass.shape == TOKENS.shape
    for row, prompt in enumerate(PROMPTS.tolist()):
        assert mass[row, :prompt].tolist() == pytest.approx([1] * prompt)
        assert bool((mass[row, prompt:] < 1).all())


def test_a_policy_scores_the_same_inside_a_probe() -> None:
    policy = PolicyModel(_model("qwen3-window"))
    position, target = torch.arange(20), torch.arange(20) % 13
    with torch.no_grad():
        outside = policy(TOKENS, position, target)
        with PromptAttention(policy.lm, PROMPTS) as probe:
            inside = policy(TOKENS, position, target)
    assert torch.equal(inside.raw, outside.raw)
    assert torch.equal(probe.mass_BS, _probed(policy.lm, TOKENS, PROMPTS))


def test_mixed_precision_around_the_probe_does_not_round_the_mass() -> None:
    """A long row of equal scores: each query puts 256 / (i + 1) on the prompt, which bfloat16 holds to three digits at best."""
    query = torch.zeros(1, 1, 1000, 8, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        mass = prompt_mass(query, query, torch.tensor([256]))
    expected = (256 / torch.arange(1.0, 1001.0)).clamp(max=1)
    torch.testing.assert_close(mass[0], expected, rtol=1e-5, atol=0)
    random = torch.randn(1, 2, 40, 8, generator=torch.Generator().manual_seed(5))
    with torch.autocast("cpu", torch.bfloat16):
        cast = prompt_mass(random, random, torch.tensor([20]))
    assert torch.equal(cast, prompt_mass(random, random, torch.tensor([20])))


def test_the_configuration_is_restored_even_after_a_failure() -> None:
    lm, other = _model("llama"), _model("qwen3", "eager")
    with pytest.raises(IndexError), PromptAttention(lm, PROMPTS), PromptAttention(other, PROMPTS):
        assert lm.config._attn_implementation != "sdpa"
        lm.base_model(input_ids=TOKENS + 13, use_cache=False)
    assert (lm.config._attn_implementation, other.config._attn_implementation) == ("sdpa", "eager")
    assert all(layer.self_attn.config._attn_implementation == "sdpa" for layer in lm.model.layers)
    assert _probed(lm, TOKENS, PROMPTS).shape == TOKENS.shape  # and can be measured again


def test_two_models_of_one_configuration_are_not_mixed_up() -> None:
    lm = _model("llama")
    other = LlamaForCausalLM(lm.config)
    with torch.no_grad(), PromptAttention(lm, PROMPTS) as probe:
        lm.base_model(input_ids=TOKENS, use_cache=False)
        other.base_model(input_ids=TOKENS, use_cache=False)
    torch.testing.assert_close(probe.mass_BS, _probed(lm, TOKENS, PROMPTS))


def test_what_cannot_be_measured_is_refused() -> None:
    lm = _model("llama")
    with pytest.raises(ConfigError, match="gamma to 1"), PromptAttention(lm, PROMPTS):
        pass
    with pytest.raises(ValueError, match="do not fit 3 rows of 11"):
        _probed(lm, TOKENS, PROMPTS[:2])
    with pytest.raises(ValueError, match="do not fit 3 rows of 11"):
        _probed(lm, TOKENS, PROMPTS + 4)
    with pytest.raises(ValueError, match="already"), PromptAttention(lm, PROMPTS), PromptAttention(lm, PROMPTS):
        pass
    with pytest.raises(ValueError, match="integer vector"):
        PromptAttention(lm, PROMPTS.float())
    with pytest.raises(RuntimeError, match="after the with block"):
        _ = PromptAttention(lm, PROMPTS).mass_BS
    bloom = BloomForCausalLM(BloomConfig(vocab_size=13, hidden_size=16, n_layer=1, n_head=2))
    with pytest.raises(ConfigError, match="BloomForCausalLM"):
        _probed(bloom, TOKENS, PROMPTS)
    dropout = LlamaForCausalLM._from_config(LlamaConfig(**SMALL, attention_dropout=0.1), attn_implementation="eager")  # pyright: ignore
    with pytest.raises(ConfigError, match="dropout of 0.1"):
        _probed(dropout.train(), TOKENS, PROMPTS)
    assert lm.config._attn_implementation == "sdpa" and dropout.config._attn_implementation == "eager"
