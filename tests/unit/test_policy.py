"""The policy's head and forward by hand on models of a few numbers."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from transformers import GemmaConfig, LlamaConfig, LlamaForCausalLM

from kernels import TemperatureRule
from rl.behaviour import Behaviour
from rl.embedded import build_tiny
from rl.errors import ConfigError
from rl.policy import LogProbHead, PolicyModel, load_policy
from rl.settings import WarmStartSettings

LN2 = math.log(2.0)


def _linear(rows: list[list[float]], bias: list[float] | None = None) -> torch.nn.Linear:
    head = torch.nn.Linear(len(rows[0]), len(rows), bias=bias is not None)
    head.weight.data = torch.tensor(rows)
    if bias is not None:
        head.bias.data = torch.tensor(bias)
    return head


def _tiny(folder: Path) -> Path:
    build_tiny(folder, WarmStartSettings(hidden_size=64, layers=1, heads=2))
    return folder


def _llama(**config: object) -> LlamaForCausalLM:
    small = {"vocab_size": 11, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**{**small, "num_key_value_heads": 2, **config}))  # pyright: ignore[reportArgumentType]


def test_the_head_gives_log_prob_and_entropy_of_a_known_distribution() -> None:
    """Logits ln 1, ln 1, ln 2: probabilities 1/4, 1/4, 1/2, entropy 1.5 ln 2."""
    head = LogProbHead(_linear([[0.0], [0.0], [LN2]]), softcap=None)
    scores = head(torch.ones(2, 1), torch.tensor([0, 2]), None)
    assert scores.raw.tolist() == pytest.approx([-2 * LN2, -LN2])
    assert scores.entropy.tolist() == pytest.approx([1.5 * LN2] * 2)
    assert torch.equal(scores.shaped, scores.raw) and scores.temperature is None


def test_a_temperature_shapes_the_first_pair_and_leaves_the_raw_pair() -> None:
    """At temperature 1/2 the logits ln 2 become ln 4: probabilities 1/6, 1/6, 2/3."""
    head = LogProbHead(_linear([[0.0], [0.0], [LN2]]), softcap=None)
    scores = head(torch.ones(2, 1), torch.tensor([0, 2]), torch.full((2,), 0.5))
    assert scores.shaped.tolist() == pytest.approx([math.log(1 / 6), math.log(2 / 3)])
    assert scores.raw.tolist() == pytest.approx([-2 * LN2, -LN2])
    assert scores.entropy.tolist() == pytest.approx([1.5 * LN2] * 2)


def test_a_rule_heats_by_the_entropy_of_the_raw_distribution_and_passes_no_gradient() -> None:
    """Entropy 1.5 ln 2; a rule of slope 1 about pivot 0 gives 1 + 0.5 ln(1.5 ln 2), on top of a base temperature of 2."""
    head = LogProbHead(_linear([[0.0], [0.0], [LN2]]), softcap=None)
    rule = TemperatureRule(0.0, 1.0, 1.0, tau=0.5)
    hidden = torch.ones(1, 1, requires_grad=True)
    scores = head(hidden, torch.tensor([2]), torch.tensor([2.0]), None, Behaviour(rule))
    expected = 2.0 * (1.0 + 0.5 * math.log(1.5 * LN2))
    assert scores.temperature is not None and scores.temperature.tolist() == pytest.approx([expected])
    fixed = torch.ones(1, 1, requires_grad=True)
    same = head(fixed, torch.tensor([2]), torch.tensor([expected]))
    assert scores.shaped.tolist() == pytest.approx(same.shaped.tolist())
    scores.shaped.sum().backward()
    same.shaped.sum().backward()
    assert hidden.grad is not None and fixed.grad is not None
    torch.testing.assert_close(hidden.grad, fixed.grad)


def test_a_reflection_bias_lifts_its_words_before_the_temperature() -> None:
    """Logits 0, 0 and a bias of ln 3 on the second at temperature 1/2: 1 to 9."""
    head = LogProbHead(_linear([[0.0], [0.0]]), softcap=None)
    bias = torch.tensor([math.log(3.0)])
    scores = head(torch.ones(1, 1), torch.tensor([1]), torch.tensor([0.5]), bias, Behaviour(bias_ids=(1,)))
    assert scores.shaped.tolist() == pytest.approx([math.log(0.9)])
    assert scores.raw.tolist() == pytest.approx([-LN2])


def test_a_bias_and_a_softcap_act_on_the_logits() -> None:
    biased = LogProbHead(_linear([[0.0], [0.0]], bias=[0.0, math.log(3.0)]), softcap=None)
    assert biased(torch.ones(1, 1), torch.tensor([1]), None).raw.tolist() == pytest.approx([math.log(0.75)])
    capped = LogProbHead(_linear([[0.0], [1000.0]]), softcap=LN2)  # tanh(inf) = 1, so the logit is the cap
    assert capped(torch.ones(1, 1), torch.tensor([1]), None).raw.tolist() == pytest.approx([math.log(2 / 3)])


def test_the_head_trains_the_weight_it_shares_with_the_embedding(tmp_path: Path) -> None:
    policy = load_policy(_tiny(tmp_path), dtype="float32")
    assert policy.head.weight is policy.lm.get_input_embeddings().weight
    ids = [id(parameter) for parameter in policy.parameters()]
    assert len(ids) == len(set(ids)) == len(list(policy.lm.parameters()))


def test_a_forward_scores_the_positions_asked_for(tmp_path: Path) -> None:
    policy = load_policy(_tiny(tmp_path), dtype="float32")
    token_BS = torch.tensor([[5, 6, 7, 8], [9, 10, 0, 0]])
    with torch.no_grad():
        logp_T = policy(token_BS, torch.tensor([2, 4]), torch.tensor([8, 10]))[0]
        rows = [policy.lm(token_BS[:1]).logits[0, 2], policy.lm(token_BS[1:, :2]).logits[0, 0]]
    expected = [float(torch.log_softmax(rows[0], -1)[8]), float(torch.log_softmax(rows[1], -1)[10])]
    assert logp_T.tolist() == pytest.approx(expected, abs=1e-5)


def test_a_bfloat16_policy_still_answers_in_float32(tmp_path: Path) -> None:
    policy = load_policy(_tiny(tmp_path), dtype="bfloat16")
    assert {p.dtype for p in policy.parameters()} == {torch.bfloat16}
    out = policy(torch.tensor([[5, 6, 7]]), torch.tensor([0, 1]), torch.tensor([6, 7]))
    assert {tensor.dtype for tensor in out if tensor is not None} == {torch.float32}


def test_gradient_checkpointing_gives_the_same_gradient(tmp_path: Path) -> None:
    folder, gradients = _tiny(tmp_path), []
    for checkpointing in (False, True):
        policy = load_policy(folder, dtype="float32", gradient_checkpointing=checkpointing).train()
        policy(torch.tensor([[5, 6, 7, 8]]), torch.tensor([0, 1, 2]), torch.tensor([6, 7, 8]))[0].sum().backward()
        gradients.append(policy.head.weight.grad)
    assert gradients[0] is not None
    torch.testing.assert_close(gradients[1], gradients[0])


@pytest.mark.parametrize("name", ["logit_scale", "logits_scaling"])
def test_a_model_that_scales_its_logits_is_refused_by_name(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"{name}=0.5.*use a model without {name}"):
        PolicyModel(_llama(**{name: 0.5}))
    PolicyModel(_llama(**{name: 1.0}))


def test_a_final_softcap_of_the_model_reaches_the_head() -> None:
    assert PolicyModel(_llama(final_logit_softcapping=30.0)).head.softcap == 30.0
    assert PolicyModel(_llama()).head.softcap is None
    assert not hasattr(GemmaConfig(), "logit_scale")  # a family without the field is no reason to refuse


def test_a_model_is_loaded_without_its_dropout(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 20, "num_attention_heads": 2, "num_hidden_layers": 1}
    llama = LlamaConfig(**sizes, hidden_size=8, intermediate_size=8, attention_dropout=0.5)
    gpt = GPT2Config(vocab_size=20, n_embd=8, n_layer=1, n_head=2, resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)
    for name, lm in (("llama", LlamaForCausalLM(llama)), ("gpt", GPT2LMHeadModel(gpt))):
        lm.save_pretrained(tmp_path / name)
        policy = load_policy(tmp_path / name, dtype="float32").train()
        token_BS, place_T = torch.arange(6)[None], torch.arange(5)
        first, second = (policy(token_BS, place_T, token_BS[0, 1:]).raw for _ in range(2))
        assert torch.equal(first, second)
