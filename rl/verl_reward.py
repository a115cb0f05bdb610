"""The budget rewards as a verl reward manager: one answer in, its reward and what the advantage stage needs of it out."""

from __future__ import annotations

import asyncio
import inspect
import math
from collections.abc import Mapping
from typing import Any

import torch
from verl.experimental.reward_loop.reward_manager.base import RewardManagerBase

from reward.budget import budget_ceiling
from reward.extraction import extract_answer
from reward.grading import GradeTask, MalformedAnswer
from rl.errors import BudgetRLError
from rl.types import Verdict, VerdictStatus
from rl.verl_columns import BUDGET, CEILING, GROUP
from rl.verl_grading import GradingQueue
from rl.verl_reward_settings import BY_VERL, ManagerSettings, manager_settings, reward_parts


class UnscoredError(BudgetRLError):
    """No verdict on an answer. verl counts the session as failed and trains without it."""


class BudgetRewardManager(RewardManagerBase):
    """`reward.reward_manager.name=budget_rl`: a method of reward/budget.py over our graders' verdict, or verl's compute_score.

    Options: `reward.reward_kwargs`, see `ManagerSettings`. Raises ConfigError for options that cannot be used.
    """

    def __init__(
        self,
        config: Any,
        tokenizer: Any,
        compute_score: Any,
        reward_router_address: str | None = None,
        reward_model_tokenizer: Any = None,
    ) -> None:
        super().__init__(config, tokenizer, compute_score)
        self._tokenizer, self._compute_score = tokenizer, compute_score
        self._settings: ManagerSettings = manager_settings(config)
        router = {"reward_router_address": reward_router_address, "reward_model_tokenizer": reward_model_tokenizer}
        self._router = router if reward_router_address is not None else {}
        self._longest = int(config.actor_rollout_ref.rollout.response_length)
        reward = self._settings.reward
        by_us = self._settings.grader != BY_VERL
        self._queue = GradingQueue(self._settings.grader, reward.processes, reward.grade_deadline_s) if by_us else None

    async def run_single(self, data: Any) -> dict[str, Any]:
        """verl's ``reward_score`` and ``reward_extra_info`` of one answer (of a session with several outputs, the last).

        The latter holds ``correct`` (0 or 1), ``verdict``, ``length`` and ``budget`` in tokens (None: no budget), ``ceiling`` in
        reward units (None: no budget, or another method than hbpo), ``group`` (None: verl's uid), ``reward_<part>``.
        Raises UnscoredError where there is no verdict: the grader timed out or crashed; compute_score raised or gave no number.
        """
        item, settings = data[-1:][0], self._settings
        row = item.non_tensor_batch
        response = item.batch["responses"]
        length = int(item.batch["attention_mask"][-response.shape[-1] :].sum())
        response_ids: list[int] = response[:length].tolist()
        budget = budget_of(row, settings.budget)
        verdict = await self._verdict(row, response_ids)
        is_malformed = verdict.status is VerdictStatus.MALFORMED
        parts = reward_parts(settings, correct=verdict.is_correct, malformed=is_malformed, length=length, budget=budget)
        is_hbpo = settings.reward.method == "hbpo" and math.isfinite(budget)
        group = _extra(row).get(settings.group)
        return {
            "reward_score": math.fsum(parts.values()),
            "reward_extra_info": {
                "correct": float(verdict.is_correct),
                "verdict": verdict.status.value,
                "length": length,
                BUDGET: budget if math.isfinite(budget) else None,
                CEILING: _ceiling(settings, budget) if is_hbpo else None,
                GROUP: None if group is None else str(group),
                **{f"reward_{name}": value for name, value in parts.items()},
            },
        }

    def close(self) -> None:
        """End the grader processes."""
        if self._queue is not None:
            self._queue.close()

    async def _verdict(self, row: Mapping[str, Any], response_ids: list[int]) -> Verdict:
        """CORRECT, WRONG, MALFORMED or TRUNCATED."""
        if len(response_ids) >= self._longest and response_ids[-1] != self._tokenizer.eos_token_id:
            return Verdict(VerdictStatus.TRUNCATED, evidence=f"cut at {len(response_ids)} tokens")
        gold = row["reward_model"]["ground_truth"]
        if self._queue is None:
            return await self._verls_verdict(row, response_ids, gold)
        text = self._tokenizer.decode(response_ids, skip_special_tokens=False)
        try:
            answer = extract_answer(text, how=self._settings.extract, special_tokens=self._tokenizer.all_special_tokens)
        except MalformedAnswer as error:
            return Verdict(VerdictStatus.MALFORMED, evidence=str(error))
        golds = (gold,) if isinstance(gold, str | int | float) else tuple(gold)
        task = GradeTask(self._settings.grader, answer, tuple(str(gold) for gold in golds), options=self._settings.options_json)
        verdict = await self._queue.grade(task)
        if not verdict.is_scored:
            raise UnscoredError(
                f"no verdict on an answer ({verdict.status.value}): {verdict.evidence}",
                fix="raise reward.reward_kwargs.grade_deadline_s, or choose another grader",
            )
        return verdict

    async def _verls_verdict(self, row: Mapping[str, Any], response_ids: list[int], gold: Any) -> Verdict:
        """By verl's compute_score, which runs in this process: a call that hangs is given up, not killed."""
        deadline_s = self._settings.reward.grade_deadline_s
        arguments = {
            "data_source": row["data_source"],
            "solution_str": self._tokenizer.decode(response_ids, skip_special_tokens=True),
            "ground_truth": gold,
            "extra_info": dict(_extra(row)),
            **self._router,
        }
        compute = self._compute_score
        if inspect.iscoroutinefunction(compute):
            waiting = compute(**arguments)
        else:
            waiting = asyncio.get_running_loop().run_in_executor(None, lambda: compute(**arguments))
        try:
            said = await asyncio.wait_for(waiting, deadline_s)
        except TimeoutError as error:
            raise UnscoredError(
                f"compute_score gave no score within {deadline_s:g} s",
                fix="raise reward.reward_kwargs.grade_deadline_s, or use one of our graders, which are killed at their deadline",
            ) from error
        except Exception as error:
            raise UnscoredError(f"compute_score raised {type(error).__name__}: {error}", fix="repair it") from error
        score = said.get("score") if isinstance(said, Mapping) else said
        if not isinstance(score, int | float) or not math.isfinite(score):
            raise UnscoredError(f"compute_score gave {score!r}, which is no score", fix="let it return a finite number")
        status = VerdictStatus.CORRECT if score >= self._settings.reward.correct_from else VerdictStatus.WRONG
        return Verdict(status, evidence=f"score {score:g}")


def budget_of(row: Mapping[str, Any], key: str) -> float:
    """The budget of an answer in tokens: from what the agent loop set for it, else `extra_info`, else a column of the data set.

    inf where it is nowhere, None or inf. Raises BudgetRLError for anything that is no number above 0.
    """
    places = (row.get("tool_extra_fields") or {}, _extra(row), row)
    found: Any = next((place[key] for place in places if place.get(key) is not None), math.inf)
    found = found.item() if hasattr(found, "item") else found
    if isinstance(found, bool) or not isinstance(found, int | float) or not found > 0:
        raise BudgetRLError(
            f"the budget of an answer is {found!r}",
            fix=f"let extra_info.{key} of every row be a number of tokens above 0, or leave it out where there is none",
        )
    return float(found)


def _extra(row: Mapping[str, Any]) -> Mapping[str, Any]:
    return row.get("extra_info") or {}


def _ceiling(settings: ManagerSettings, budget: float) -> float:
    beta = settings.reward.option("beta")
    return float(budget_ceiling(torch.tensor([budget], dtype=torch.float64), max_length=settings.max_length, beta=beta))
