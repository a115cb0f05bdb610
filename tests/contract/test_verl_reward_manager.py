"""The reward manager in verl's own worker of the reward loop, and what is checked before a run with verl starts."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from omegaconf import DictConfig, open_dict
from tensordict import TensorDict
from verl import DataProto
from verl.experimental.reward_loop.reward_loop import RewardLoopWorker
from verl.experimental.reward_loop.reward_manager import get_reward_manager_cls
from verl.trainer.ppo.core_algos import get_adv_estimator_fn
from verl.utils.config import omega_conf_to_dataclass

from reward import budget
from rl.advantage import hierarchical
from rl.embedded import EOS, tiny_tokenizer
from rl.errors import BudgetRLError, ConfigError
from rl.reward_settings import RewardSettings
from rl.verl_checks import check_config, check_keys, check_row, told_columns
from rl.verl_columns import columns
from rl.verl_loss import HapoLossConfig
from rl.verl_reward import BudgetRewardManager, UnscoredError
from rl.verl_reward_settings import ALONE, manager_settings, reward_parts


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny_tokenizer().save_pretrained(folder)
    return folder


def rewarded(
    config: DictConfig,
    folder: Path,
    answers: Sequence[tuple[str, int]],
    row: Mapping[str, Any],
    options: Mapping[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """The answers, padded to their lengths by line breaks and ended, scored by verl's own worker of the reward loop."""
    config.actor_rollout_ref.model.path = str(folder)
    with open_dict(config):
        config.reward.reward_kwargs.update(dict(options or {}))
    tokenizer = tiny_tokenizer()
    batches = []
    for text, length in answers:
        ids = tokenizer.encode(text, add_special_tokens=False)
        ids = [*tokenizer.encode("\n") * (length - 1 - len(ids)), *ids, tokenizer.convert_tokens_to_ids(EOS)]
        batches.append(sample(ids, row))
    worker = RewardLoopWorker(config)
    manager = worker.reward_manager
    assert isinstance(manager, BudgetRewardManager)

    async def scored() -> list[dict[str, Any]]:
        return list(await asyncio.gather(*(worker.compute_score(data) for data in batches)))

    try:
        return asyncio.run(scored())
    finally:
        manager.close()


def sample(ids: Sequence[int], row: Mapping[str, Any]) -> DataProto:
    """One answer as verl's agent loop hands it to the reward loop."""
    prompts, responses = torch.ones(1, 4, dtype=torch.long), torch.tensor([list(ids)])
    batch = TensorDict(
        {"prompts": prompts, "responses": responses, "attention_mask": torch.ones(1, 4 + len(ids), dtype=torch.long)},
        batch_size=1,
    )
    return DataProto(batch=batch, non_tensor_batch={name: np.array([value], dtype=object) for name, value in row.items()})


def row_of(**extra: Any) -> dict[str, Any]:
    return {"data_source": "sums", "reward_model": {"ground_truth": "7"}, "extra_info": extra}


def test_hbpo_rewards_through_verls_worker_have_the_values_worked_by_hand(config: DictConfig, model_folder: Path) -> None:
    found = rewarded(config, model_folder, [("7", 300), ("7", 600), ("7", 1500), ("8", 600)], row_of(budget=512))
    assert [answer["reward_score"] for answer in found] == pytest.approx([3.923141, 3.873093, 3.115030, 0.0], abs=1e-5)
    told = [answer["reward_extra_info"] for answer in found]
    assert [info["correct"] for info in told] == [1.0, 1.0, 1.0, 0.0]
    assert [info["length"] for info in told] == [300, 600, 1500, 600]
    assert {info["budget"] for info in told} == {512.0}
    assert [info["ceiling"] for info in told] == pytest.approx([3.923141] * 4, abs=1e-5)
    assert [info["verdict"] for info in told] == ["correct", "correct", "correct", "wrong"]


def test_what_the_manager_says_of_answers_is_what_the_estimator_needs(config: DictConfig, model_folder: Path) -> None:
    rows = [row_of(budget=budget_tokens, group="q1") for budget_tokens in (512, 1024)]
    told = [rewarded(config, model_folder, [("7", 300)], row)[0]["reward_extra_info"] for row in rows]
    told.append(rewarded(config, model_folder, [("7", 300)], row_of(group="q2"))[0]["reward_extra_info"])
    found = told_columns(told)
    torch.testing.assert_close(found["budget"], torch.tensor([512.0, 1024.0, math.inf], dtype=torch.float64))
    expected = torch.tensor([3.923141, 3.695518, math.nan], dtype=torch.float64)
    torch.testing.assert_close(found["ceiling"], expected, atol=1e-5, rtol=0, equal_nan=True)
    assert found["group"] == ["q1", "q1", "q2"]
    estimator = get_adv_estimator_fn("budget_rl_hierarchical")
    with columns(**found):
        advantage_BT, _ = estimator(torch.tensor([[1.0], [2.0], [3.0]]), torch.ones(3, 1), index=list("abc"))
    # The first two are compared, each with its own ceiling; the third is alone and has none.
    ours = hierarchical(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0, 0, 1]), found["budget"], found["ceiling"])
    torch.testing.assert_close(advantage_BT[:, 0], ours)


def test_what_rewards_do_not_say_is_left_out_and_so_refused() -> None:
    assert told_columns([{"acc": 1.0, "budget": 5.0}, {"acc": 0.0}]) == {}


def test_an_answer_that_was_cut_counts_as_wrong_and_says_so(config: DictConfig, model_folder: Path) -> None:
    config.actor_rollout_ref.rollout.response_length = 3
    config.actor_rollout_ref.model.path = str(model_folder)
    worker, ids = RewardLoopWorker(config), tiny_tokenizer().encode("7 = 7", add_special_tokens=False)
    found = asyncio.run(worker.compute_score(sample(ids, row_of(budget=2))))
    assert (found["reward_score"], found["reward_extra_info"]["verdict"]) == (0.0, "truncated")


def test_an_answer_without_the_part_to_judge_is_malformed(config: DictConfig, model_folder: Path) -> None:
    found = rewarded(config, model_folder, [("7", 30)], row_of(budget=512), {"extract": "after_think"})
    assert (found[0]["reward_score"], found[0]["reward_extra_info"]["verdict"]) == (0.0, "malformed")


def test_a_grader_that_overruns_gives_no_number(config: DictConfig, model_folder: Path) -> None:
    with pytest.raises(UnscoredError, match="timed_out"):
        rewarded(config, model_folder, [("7", 30)], row_of(budget=512), {"grade_deadline_s": 1e-9})


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("async def compute_score(**_):\n    await __import__('asyncio').Event().wait()", "no score within 0.05 s"),
        ("def compute_score(**_):\n    raise KeyError('judge')", "compute_score raised KeyError: 'judge'"),
        ("def compute_score(**_):\n    return float('nan')", "compute_score gave nan, which is no score"),
        ("def compute_score(**_):\n    return {'acc': 1.0}", "compute_score gave None"),
    ],
)
def test_a_reward_function_that_fails_gives_no_number(
    source: str, says: str, config: DictConfig, model_folder: Path, tmp_path: Path
) -> None:
    function = tmp_path / "judge.py"
    function.write_text(source)
    config.reward.custom_reward_function.path = str(function)
    options = {"grader": "compute_score", "grade_deadline_s": 0.05}
    with pytest.raises(UnscoredError, match=says):
        rewarded(config, model_folder, [("7", 30)], row_of(budget=512), options)


def test_verls_own_functions_may_say_what_is_correct(config: DictConfig, model_folder: Path) -> None:
    row = row_of(budget=512) | {"data_source": "math_dapo"}
    found = rewarded(config, model_folder, [("answer: 7", 30), ("answer: 8", 30), ("7", 30)], row, {"grader": "compute_score"})
    assert [answer["reward_extra_info"]["verdict"] for answer in found] == ["correct", "wrong", "wrong"]
    assert [answer["reward_score"] for answer in found] == pytest.approx([3.923141, 0.0, 0.0], abs=1e-5)


def test_a_score_counts_as_correct_from_a_threshold(config: DictConfig, model_folder: Path, tmp_path: Path) -> None:
    function = tmp_path / "judge.py"
    function.write_text("def compute_score(data_source, solution_str, ground_truth, extra_info): return {'score': 0.5}")
    config.reward.custom_reward_function.path = str(function)
    for correct_from, expected in ((0.5, 1.0), (0.6, 0.0)):
        options = {"grader": "compute_score", "correct_from": correct_from, "method": "correct"}
        assert rewarded(config, model_folder, [("7", 30)], row_of(), options)[0]["reward_score"] == expected


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (row_of(budget=np.int64(64)), 64.0),
        (row_of() | {"budget": 64}, 64.0),
        (row_of(budget=128) | {"tool_extra_fields": {"budget": 64}}, 64.0),
        (row_of(budget=None), None),
        (row_of(budget=math.inf), None),
    ],
)
def test_the_budget_is_data(row: Mapping[str, Any], expected: float | None, config: DictConfig, model_folder: Path) -> None:
    text = "I will answer the question with 9 9 tokens 7"  # words that no budget is read from
    info = rewarded(config, model_folder, [(text, 30)], row)[0]["reward_extra_info"]
    assert info["budget"] == expected
    assert (info["ceiling"] is None) == (expected is None)


@pytest.mark.parametrize("value", [0, -5, "64", True, math.nan])
def test_a_budget_that_is_no_number_of_tokens_is_refused(value: Any, config: DictConfig, model_folder: Path) -> None:
    with pytest.raises(BudgetRLError, match="the budget of an answer is"):
        rewarded(config, model_folder, [("7", 30)], row_of(budget=value))


@pytest.mark.parametrize("method", ["lcpo_exact", "lcpo_max", "triangle", "budgetthinker"])
def test_a_method_that_needs_a_budget_names_the_column(method: str, config: DictConfig, model_folder: Path) -> None:
    with pytest.raises(ConfigError, match="needs a budget for every answer.*\n.*extra_info.budget"):
        rewarded(config, model_folder, [("7", 30)], row_of(), {"method": method})


def test_each_method_is_the_function_of_its_name(config: DictConfig) -> None:
    correct_N, length_N, budget_N = torch.tensor([True]), torch.tensor([700.0]), torch.tensor([512.0])
    columns_N = correct_N, length_N, budget_N
    expected = {
        "correct": torch.ones(1),
        "dapo": torch.ones(1),
        "classic": budget.classic(correct_N, length_N, max_length=4096),
        "cosine": budget.cosine(correct_N, length_N, max_length=4096),
        "hbpo": budget.hbpo(*columns_N, max_length=4096),
        "lcpo_exact": budget.lcpo_exact(*columns_N),
        "lcpo_max": budget.lcpo_max(*columns_N),
        "laser": budget.laser(correct_N, length_N, torch.tensor([800.0])),
        "triangle": budget.triangle_mix(*columns_N),
        "budgetthinker": budget.budgetthinker(*columns_N),
    }
    assert set(expected) == set(ALONE) <= set(get_args(RewardSettings.model_fields["method"].annotation))
    for method, reward_N in expected.items():
        with open_dict(config):
            config.reward.reward_kwargs = {"method": method} | ({"target": 800} if method == "laser" else {})
        parts = reward_parts(manager_settings(config), correct=True, malformed=False, length=700, budget=512.0)
        assert math.fsum(parts.values()) == pytest.approx(float(reward_N), abs=1e-5), method


def test_a_buffer_adds_dapos_penalty_to_any_method(config: DictConfig) -> None:
    with open_dict(config):
        config.reward.reward_kwargs = {"method": "dapo", "max_length": 10240, "overlong_buffer": 4096}
    for length, expected in ((6144, 1.0), (7168, 0.75), (8192, 0.5), (10240, 0.0)):
        parts = reward_parts(manager_settings(config), correct=True, malformed=False, length=length, budget=math.inf)
        assert math.fsum(parts.values()) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"method": "alp"}, "reads one answer at a time, and this method compares answers"),
        ({"method": "history_min"}, "reads one answer at a time"),
        ({"method": "hbop"}, "does not know"),
        ({"method": None}, "does not know"),
        ({"metod": "hbpo"}, r"unknown option reward.reward_kwargs.metod; did you mean method\?"),
        ({"method": "hbpo", "delta": 0.5}, "delta has no effect with reward.method=hbpo"),
        ({"method": "laser"}, "needs reward.target"),
        ({"method": "hbpo", "grader": "gusess"}, "reward.reward_kwargs.grader: Input should be"),
        ({"method": "hbpo", "grader": "format"}, "needs reward.reward_kwargs.grader_options.pattern"),
        ({"method": "hbpo", "grader": "compute_score", "grader_options": {"letters": "AB"}}, "reads no grader_options"),
    ],
)
def test_options_of_the_reward_manager_are_checked(options: Mapping[str, Any], says: str, config: DictConfig) -> None:
    with open_dict(config):
        config.reward.reward_kwargs = dict(options)
    with pytest.raises(ConfigError, match=says):
        manager_settings(config)


def test_a_reward_function_that_nobody_would_ask_is_refused(config: DictConfig) -> None:
    config.reward.custom_reward_function.path = "judge.py"
    with pytest.raises(ConfigError, match="grader=math decides what is correct"):
        manager_settings(config)


def test_verl_finds_the_manager_by_its_name() -> None:
    assert get_reward_manager_cls("budget_rl") is BudgetRewardManager


# ---- what is checked before a run --------------------------------------------------------------------------------------


def test_a_configuration_that_fits_together_passes(config: DictConfig) -> None:
    config.algorithm.adv_estimator = "budget_rl_hierarchical"
    check_config(config)
    check_row(row_of(budget=512), config)
    assert isinstance(omega_conf_to_dataclass(config.actor_rollout_ref.actor).policy_loss, HapoLossConfig)


def test_ceilings_that_the_reward_method_lacks_are_missed_before_the_run(config: DictConfig) -> None:
    config.algorithm.adv_estimator = "budget_rl_hierarchical"
    with open_dict(config):
        config.reward.reward_kwargs = {"method": "lcpo_exact"}
    with pytest.raises(ConfigError, match="compares with HBPO's ceilings, which reward method lcpo_exact has not"):
        check_config(config)


def test_a_data_set_without_budgets_is_refused_before_the_run(config: DictConfig) -> None:
    config.algorithm.adv_estimator = "budget_rl_hierarchical"
    with pytest.raises(ConfigError, match="no column extra_info.budget"):
        check_row(row_of(index=3), config)


def test_hapo_needs_the_entropies_that_a_bypass_leaves_out(config: DictConfig) -> None:
    config.algorithm.rollout_correction.bypass_mode = True
    with pytest.raises(ConfigError, match="bypass_mode"):
        check_config(config)


def test_hapo_and_distillation_cannot_be_combined(config: DictConfig) -> None:
    config.distillation.enabled = True
    with pytest.raises(ConfigError, match="distillation"):
        check_config(config)


def test_sessions_of_several_outputs_are_refused() -> None:
    check_keys(["a_0_0", "a_1_0"])
    with pytest.raises(BudgetRLError, match="several outputs"):
        check_keys(["a_0_0", "a_0_1"])
