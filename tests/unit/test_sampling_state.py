"""What the next step's sampling depends on: learnt from a step, kept in a checkpoint, used in the next."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from rl.manifest import CheckpointError
from rl.rollout_settings import AdaptiveSettings, ReflexSettings, RolloutSettings
from rl.sampling_state import STATE_NAME, SamplingState, evaluation_shaping, read_sampling
from rl.types import Reflex, Shaping
from tests.builders import make_group

HOT = AdaptiveSettings(form="literal", tau=0.1)
ADAPTIVE = RolloutSettings(temperature=0.9, adaptive=HOT, reflex=ReflexSettings(amplitude=3.0, period=40.0))


def _learnt() -> SamplingState:
    state = SamplingState()
    state.learn(ADAPTIVE, [torch.tensor([0.5, 1.5]), torch.tensor([0.01])])
    state.memory.observe([make_group(3, [1.0, 0.0])])
    return state


def test_the_first_step_has_no_statistics_and_the_next_those_of_all_ranks() -> None:
    state = SamplingState()
    assert state.shaping(ADAPTIVE) == Shaping(0.9, None, Reflex(period=40.0))
    metrics = state.learn(ADAPTIVE, [torch.tensor([0.5, 1.5]), torch.tensor([0.01])])
    adaptive = state.shaping(ADAPTIVE).adaptive
    assert adaptive is not None and (adaptive.form, adaptive.tau, adaptive.statistics.tokens) == ("literal", 0.1, 3)
    assert metrics["entropy/pivot"] == adaptive.statistics.pivot
    assert SamplingState().shaping(RolloutSettings()) == Shaping()


def test_a_step_without_sampled_tokens_keeps_the_statistics_it_had() -> None:
    state = _learnt()
    before = state.statistics
    assert state.learn(ADAPTIVE, []) == state.learn(ADAPTIVE, [torch.zeros(0)]) == {}
    assert state.statistics == before


def test_a_checkpoint_gives_back_exactly_what_it_was_given(tmp_path: Path) -> None:
    state = _learnt()
    (tmp_path / STATE_NAME).write_text(json.dumps({"metrics": {}, "sampling": state.to_json()}))
    found = read_sampling(tmp_path)
    assert found.statistics == state.statistics
    assert found.memory.to_json() == state.memory.to_json() != {}


def test_an_older_checkpoint_knows_nothing_and_a_damaged_one_is_refused(tmp_path: Path) -> None:
    assert read_sampling(tmp_path).statistics is None
    (tmp_path / STATE_NAME).write_text('{"metrics": {}}')
    assert read_sampling(tmp_path).statistics is None
    (tmp_path / STATE_NAME).write_text('{"sampling": {"entropy_statistics": {"pivot": 1}}}')
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_sampling(tmp_path)


def test_an_evaluation_draws_plainly_unless_it_is_asked_to_draw_as_in_training() -> None:
    state = _learnt()
    assert evaluation_shaping(ADAPTIVE, state, temperature=0.6, shaped=False) == Shaping(0.6)
    shaped = evaluation_shaping(ADAPTIVE, state, temperature=0.6, shaped=True)
    assert shaped == Shaping(0.6, state.shaping(ADAPTIVE).adaptive, Reflex(period=40.0))
