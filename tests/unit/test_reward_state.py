"""What rewards remember: running means, the start policy, the controllers; and their way through a checkpoint."""

from __future__ import annotations

import json

import pytest

from rl.measuring import monitor_is_due, prompts_ahead, targets_of
from rl.prompts import PromptStream
from rl.reward_settings import MonitorSettings, RewardSettings
from rl.reward_state import Reference, RewardState
from rl.settings import Settings
from rl.types import Group, VerdictStatus
from tests.builders import make_lease, make_prompt, make_rollout, make_scored

CORRECT, WRONG, CRASHED = VerdictStatus.CORRECT, VerdictStatus.WRONG, VerdictStatus.CRASHED


def group(index: int, *answers: tuple[int, VerdictStatus]) -> Group:
    """Answers of so many tokens."""
    members = [
        make_scored(make_rollout(make_lease(group=index, member=m), generated=[7] * length), status=status)
        for m, (length, status) in enumerate(answers)
    ]
    return Group(make_prompt(index), tuple(members))


def test_the_running_mean_follows_all_scored_answers_and_starts_with_the_first_group() -> None:
    settings, state = RewardSettings(method="aec", average="ema"), RewardState()
    state.observe([group(0, (1000, CORRECT), (2000, WRONG), (9, CRASHED))], settings)
    assert state.averages == {"q0": 1500.0}
    state.observe([group(0, (1125, CORRECT)), group(1, (9, CRASHED))], settings)
    assert state.averages == {"q0": pytest.approx(1462.5)}
    state.observe([group(0, (1, CORRECT))], RewardSettings(method="aec"))
    assert state.averages == {"q0": pytest.approx(1462.5)}


def test_the_weight_of_a_token_rises_while_the_accuracy_is_above_its_target_and_never_below_zero() -> None:
    settings, state = RewardSettings(method="adlp"), RewardState()
    assert state.weight_of_a_token(settings) == 1e-3
    state.observe([group(0, (5, CORRECT), (5, CORRECT))], settings)
    assert state.length_weight == pytest.approx(1e-3 + 1e-3 * 0.38)
    for _ in range(9):
        state.observe([group(0, (5, WRONG))], settings)
    assert state.length_weight == 0.0
    assert state.figures(settings) == {"reward/length_weight": 0.0}


def test_the_shortest_correct_answer_is_remembered_where_the_method_asks_for_it() -> None:
    state = RewardState()
    state.observe([group(0, (50, CORRECT), (20, WRONG))], RewardSettings(method="history_min"))
    seen = state.memory.of("q0")
    assert seen is not None and seen.shortest == 50
    other = RewardState()
    other.observe([group(0, (50, CORRECT))], RewardSettings())
    assert len(other.memory) == 0


def test_the_start_policy_is_its_mean_length_and_accuracy_per_prompt() -> None:
    state = RewardState()
    state.refer([group(0, (1000, CORRECT), (1200, WRONG), (5, CRASHED)), group(1, (5, CRASHED))])
    assert state.reference == {"q0": Reference(1100.0, 0.5)}


def test_a_prompt_that_could_not_be_measured_counts_as_the_mean_of_the_others() -> None:
    state = RewardState(reference={"a": Reference(10.0, 1.0), "b": Reference(30.0, 0.0)})
    state.refer_to_mean(["c"])
    assert state.reference["c"] == Reference(20.0, 0.5)
    with pytest.raises(ValueError, match="measured on no prompt"):
        RewardState().refer_to_mean(["c"])


def test_a_checkpoint_brings_all_of_it_back() -> None:
    state = RewardState(
        averages={"b": 2.5, "a": 0.1}, reference={"q": Reference(7.25, 0.5)}, length_weight=2e-3, targets=(9, 8, 7)
    )
    state.memory.observe([group(0, (50, CORRECT))])
    back = RewardState.from_json(json.loads(json.dumps(state.to_json())))
    assert back.to_json() == state.to_json() and back.averages == state.averages and back.reference == state.reference
    assert RewardState.from_json({}).to_json() == RewardState().to_json()


@pytest.mark.parametrize("targets", [[1, 2], [1, 2, 0], [1, 2, "3"]])
def test_targets_that_are_no_lengths_are_refused(targets: list[object]) -> None:
    with pytest.raises(ValueError, match="not three lengths"):
        RewardState.from_json({"targets": targets})


def test_targets_are_the_shortest_length_that_covers_enough_of_each_difficulty() -> None:
    # High (all right): a fifth of the answers must fit; medium (half right): half of them; low (none right): all.
    groups = [
        group(0, *[(n, CORRECT) for n in (10, 20, 30, 40, 50)]),
        group(1, (10, CORRECT), (30, CORRECT), (40, WRONG), (50, WRONG)),
        group(2, (20, WRONG), (40, WRONG)),
    ]
    grid = MonitorSettings(first=10, last=50, by=10)
    assert targets_of(groups, grid, max_length=64) == (40, 30, 10)
    # The longest target is tried also where the steps do not meet it: 10, 35 and 42.
    assert targets_of(groups, MonitorSettings(first=10, last=42, by=25), max_length=64) == (42, 35, 10)


def test_the_monitor_runs_before_the_first_step_and_then_every_so_many() -> None:
    base = {
        "model": {"path": "m"},
        "data": {"source": "x.json"},
        "max_steps": 3,
        "prompts_per_step": 2,
        "rollout": {"max_length": 64},
    }
    grid = {"first": 8, "last": 64, "by": 8, "every": 5}
    settings = Settings.model_validate({**base, "reward": {"method": "laser_d", "monitor": grid}})
    fresh, measured = RewardState(), RewardState(targets=(3, 2, 1))
    assert [monitor_is_due(settings, fresh, step) for step in (0, 3)] == [True, True]
    assert [monitor_is_due(settings, measured, step) for step in (4, 5, 6)] == [False, True, False]
    assert not monitor_is_due(Settings.model_validate(base), fresh, 0)


def test_the_prompts_ahead_are_those_of_the_runs_steps_each_once() -> None:
    stream = PromptStream([make_prompt(i) for i in range(8)], seed=1)
    base = {"model": {"path": "m"}, "data": {"source": "x.json"}, "prompts_per_step": 2}
    ahead = prompts_ahead(stream, Settings.model_validate({**base, "max_steps": 3}))
    assert ahead == stream.take(0, 6)[0]
    refilled = prompts_ahead(stream, Settings.model_validate({**base, "max_steps": 1, "rollout": {"refill": 2}}))
    assert refilled == stream.take(0, 6)[0]
    for stop in ({"max_steps": 100}, {"max_tokens": 5}):
        assert {prompt.id for prompt in prompts_ahead(stream, Settings.model_validate(base | stop))} == {
            f"q{i}" for i in range(8)
        }
