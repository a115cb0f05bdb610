"""What vLLM is told for a run's settings, and which tokens a hard budget forced."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from rl.errors import BudgetRLError
from rl.rollout_settings import AdaptiveSettings, ReflexSettings, RolloutSettings
from rl.settings import Settings
from rl.types import Budget, BudgetKind, Lease, Reflex
from rollout.sampling import Markers, engine_options, forced_positions, sampling_params
from tests.builders import make_lease, make_prompt

THINK, END = 90, 91
MARKERS = Markers((THINK,), (END,))


def _lease(budget: int, *, prompt: Sequence[int] = (1, 2), prefill: Sequence[int] = (THINK, 5)) -> Lease:
    hard = Budget(budget, BudgetKind.AT_MOST, "", hard=True)
    return replace(make_lease(prompt=make_prompt(token_ids=prompt), prefill_ids=prefill), budget=hard)


def _forced(lease: Lease, generated: list[int], *, certain: Sequence[int] = ()) -> tuple[int, ...]:
    logp = [0.0 if k in certain else -1.0 for k in range(len(generated))]
    return forced_positions(lease, generated, logp, MARKERS)


def test_the_end_of_thinking_is_forced_after_the_budget_prefill_included() -> None:
    # One token of the prefill stands after <think>, so a budget of 3 leaves two to sample.
    assert _forced(_lease(3), [7, 8, END, 9], certain=[2]) == (4,)
    assert _forced(_lease(3), [7, END, 8, 9]) == ()  # ended by itself
    assert _forced(_lease(3), [7, 8]) == ()  # over before the budget was
    assert _forced(_lease(1), [END, 9], certain=[0]) == (2,)  # nothing left to think
    assert _forced(_lease(1, prefill=(THINK, 5, 6, 7)), [END, 9], certain=[0]) == (4,)  # the prefill is over the budget


def test_thinking_that_the_prompt_or_the_model_opens_is_counted_from_there() -> None:
    assert _forced(_lease(2, prompt=(1, THINK), prefill=()), [7, 8, END], certain=[2]) == (2,)
    assert _forced(_lease(2, prefill=()), [7, THINK, 8, 9, END], certain=[4]) == (4,)
    assert _forced(_lease(2, prefill=()), [7, 8, 9, END]) == ()  # never opened
    assert _forced(_lease(2, prompt=(THINK, END), prefill=()), [7, THINK, 8, 9, END], certain=[4]) == (4,)


def test_a_second_thinking_that_was_cut_is_seen_by_its_certain_mark() -> None:
    generated = [7, 8, END, THINK, 7, 8, END, 5]
    assert _forced(_lease(3), generated, certain=[2, 6]) == (4, 8)
    assert _forced(_lease(3), generated, certain=[2]) == (4,)


def test_a_think_inside_the_thinking_is_left_to_certain_marks_for_model_runners_count_it_differently() -> None:
    assert _forced(_lease(3), [THINK, 8, END, 9], certain=[2]) == (4,)  # counted from the first
    assert _forced(_lease(3), [THINK, 8, 9, 7, END], certain=[4]) == (6,)  # counted from the second


def test_a_mark_of_several_tokens_is_forced_as_a_whole_and_may_be_cut_by_the_cap() -> None:
    markers = Markers((THINK,), (91, 92))
    assert forced_positions(_lease(2), [7, 91, 92, 5], [-1.0, 0.0, 0.0, -1.0], markers) == (3, 4)
    assert forced_positions(_lease(2), [7, 91], [-1.0, 0.0], markers) == (3,)


def test_an_engine_that_did_not_force_where_the_budget_says_is_an_error() -> None:
    with pytest.raises(BudgetRLError, match="did not end the thinking after 3 tokens"):
        _forced(_lease(3), [7, 8, 9, END], certain=[3])
    with pytest.raises(BudgetRLError, match="did not end the thinking"):
        _forced(_lease(3), [7, 8, END, 9])  # there, but sampled


def test_a_soft_budget_forces_nothing() -> None:
    assert forced_positions(make_lease(budget=3), [7, 8, END], [0.0] * 3, MARKERS) == ()
    assert forced_positions(_lease(3), [7, 8, 9], [0.0] * 3, None) == ()


def test_a_request_carries_its_seed_cap_shaping_and_hard_budget() -> None:
    lease = _lease(3)
    lease = replace(lease, shaping=replace(lease.shaping, temperature=0.7, reflex=Reflex(amplitude=2.0)))
    params = sampling_params(lease, stop_ids=[4], top_p=0.9)
    assert (params.seed, params.max_tokens, params.temperature, params.top_p) == (7, lease.max_new_tokens, 0.7, 0.9)
    assert params.thinking_token_budget == 3 and params.stop_token_ids == [4]
    assert params.extra_args["reflex_amplitude"] == 2.0
    plain = sampling_params(make_lease(), stop_ids=[])
    assert plain.extra_args is None and plain.thinking_token_budget is None


def test_an_engine_is_given_only_what_the_settings_use() -> None:
    assert engine_options(RolloutSettings()) == {}
    heated = engine_options(RolloutSettings(adaptive=AdaptiveSettings()))
    assert heated == {"logits_processors": ["rollout.processor:TemperatureProcessor"]}
    lifted = engine_options(RolloutSettings(adaptive=AdaptiveSettings(), reflex=ReflexSettings(words=["hm"])))
    assert lifted["logits_processors"] == ["rollout.processor:ShapingProcessor"]
    assert lifted["additional_config"] == {"budget_rl": {"words": ["hm"], "leading_space": False, "end": "</think>"}}
    hard = engine_options(RolloutSettings(budgets=[64], hard_budgets=True))
    assert hard == {"reasoning_config": {"reasoning_start_str": "<think>", "reasoning_end_str": "</think>"}}


NGRAM = {"method": "ngram", "num_speculative_tokens": 3}
REFLEX = {"reflex": {}}
GPU: dict[str, Any] = {"gpus_per_worker": 1}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"speculative": {**NGRAM, "rejection_sample_method": "synthetic"}, **GPU}, "would not have drawn"),
        ({"speculative": {**NGRAM, "rejection_sample_method": "fly"}}, "would not have drawn"),
        ({"speculative": NGRAM}, "needs a GPU"),
        ({"speculative": NGRAM, **REFLEX, **GPU}, "with ngram makes vLLM 0.31 use its V1 model runner"),
        ({"speculative": {"method": "suffix"}, "adaptive": {}, **GPU}, "with suffix makes"),
        ({"speculative": {"model": "ngram"}, "adaptive": {}, **GPU}, "with ngram makes"),
        ({"speculative": {"method": "medusa"}, "adaptive": {}, **GPU}, "with medusa makes"),
        ({"speculative": {"method": "eagle3", "parallel_drafting": True}, "adaptive": {}, **GPU}, "parallel_drafting makes"),
    ],
)
def test_speculation_that_cannot_work_or_is_lossy_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RolloutSettings(**settings)


def test_speculation_that_works_is_passed_through() -> None:
    assert engine_options(RolloutSettings(speculative=NGRAM, **GPU)) == {"speculative_config": NGRAM}
    eagle = {"method": "eagle3", "rejection_sample_method": "block"}
    RolloutSettings(speculative=eagle, **GPU, reflex=ReflexSettings())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"reflex": {"first": 160}, "max_length": 160}, "first=160 is not below rollout.max_length=160"),
        ({"reflex": {}, "max_length": 160}, "period=600: inside rollout.max_length=160 such a wave only ever lifts"),
        ({"free_template": "<think> {budget}"}, "leave {budget} out"),
        ({"budgets": [64, 32, "free"]}, r"write \[32, 64, 'free'\]"),
        ({"reflex": {"amplitude": -1.0}}, "use shift=0.5"),
        ({"reflex": {"first": 9, "last": 9}}, "nothing would be biased"),
        ({"budgets": [64], "budget_place": "none"}, "tells nobody the budget"),
        ({"answer_tokens": 9}, "comes after a hard budget"),
        ({"hard_budgets": True}, "no budget to enforce"),
        ({"budgets": [4096], "hard_budgets": True}, "leaves no answer"),
    ],
)
def test_settings_that_could_not_do_what_they_say_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RolloutSettings(**settings)


def test_evaluating_as_in_training_needs_a_shaping() -> None:
    minimal = {"model": {"path": "m"}, "data": {"source": "d.jsonl"}, "max_steps": 1}
    with pytest.raises(ValueError, match="eval.shaped draws with"):
        Settings.model_validate({**minimal, "eval": {"shaped": True}})
    with pytest.raises(ValueError, match="only correction=truncated uses"):
        Settings.model_validate({**minimal, "correction_mask": "sequence"})
    with pytest.raises(ValueError, match="must lie around 1"):
        Settings.model_validate({**minimal, "correction": "truncated", "correction_bounds": [1.5, 2.0]})
