"""Accuracy and tokens on held-out problems: inside a run, and as `budget-rl eval`."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rl.cluster import Workforce, check_cluster, connect, disconnect
from rl.collection import Collector
from rl.errors import BudgetRLError
from rl.leases import MEASURING_FROM, make_leases
from rl.manifest import MANIFEST_NAME, read_manifest
from rl.run_folder import replace_text
from rl.sampling_state import SamplingState, evaluation_shaping, read_sampling
from rl.settings import ModelSettings, Settings
from rl.step_metrics import accuracy_and_tokens
from rl.types import Prompt, Scored, VerdictStatus
from rl.waiting import StopFlag, wait_for
from rollout.budgets import BudgetPlan

log = logging.getLogger("budget_rl")

EVAL_STEP = MEASURING_FROM + 3
"""Stands for the step in evaluation seeds, so that they differ from training's and are the same at every evaluation."""


@dataclass(frozen=True)
class EvalResult:
    """One way of prompting: without a budget (`free`) or under one."""

    label: str
    accuracy: float
    tokens: float
    truncated: float
    unscored: int
    """Answers that were lost or that no grader could judge; the other figures leave them out."""
    scored: tuple[Scored, ...]

    def metrics(self, prefix: str = "eval") -> dict[str, float]:
        """``eval/accuracy`` and so on; under a budget ``eval/<label>/accuracy``."""
        root = prefix if self.label == "free" else f"{prefix}/{self.label}"
        return {
            f"{root}/accuracy": self.accuracy,
            f"{root}/tokens": self.tokens,
            f"{root}/truncated": self.truncated,
            f"{root}/unscored": float(self.unscored),
        }


def evaluate(
    collector: Collector,
    plan: BudgetPlan,
    prompts: Sequence[Prompt],
    settings: Settings,
    *,
    version: int,
    step: int | None = None,
    sampling: SamplingState | None = None,
    stop: StopFlag | None = None,
) -> list[EvalResult]:
    """Sample ``eval.samples`` answers to each held-out prompt, without a budget and, if asked, under each budget of the plan.

    ``step`` chooses the budget of a schedule; see `BudgetPlan.levels`. With ``eval.shaped`` tokens are drawn as in training, from
    the statistics in ``sampling``. Seeds do not depend on the model, so evaluations before and after training share their random
    numbers.
    """
    shaping = evaluation_shaping(
        settings.rollout, sampling or SamplingState(), temperature=settings.eval.temperature, shaped=settings.eval.shaped
    )
    if settings.eval.shaped and settings.rollout.adaptive is not None and shaping.adaptive is None:
        log.warning("eval.shaped: there are no entropy statistics yet, so this evaluation draws at the base temperature")
    budgets = [plan.free, *(b for b in plan.levels(step) if b != plan.free)] if settings.eval.with_budgets else [plan.free]
    results = []
    for budget in budgets:
        leases = make_leases(
            [[plan.open(prompt, budget)] * settings.eval.samples for prompt in prompts],
            step=EVAL_STEP,
            run_seed=settings.data.seed,
            shaping=shaping,
            min_version=version,
        )
        collected = collector.collect(leases, top_p=settings.eval.top_p, stop=stop)
        members_scored = [m for group in collected.groups for m in group.members]
        scored = [m for m in members_scored if m.verdict.is_scored]
        if not scored:
            raise BudgetRLError(f"evaluation ({budget.label}): not one of {len(leases)} answers could be scored")
        values = accuracy_and_tokens(scored)
        cut = sum(m.verdict.status is VerdictStatus.TRUNCATED for m in scored) / len(scored)
        results.append(
            EvalResult(budget.label, values["accuracy"], values["tokens"], cut, len(leases) - len(scored), tuple(scored))
        )
    return results


def per_problem(result: EvalResult) -> dict[str, dict[str, Any]]:
    """By prompt id: accuracy and mean tokens, as a paired bootstrap needs; of each answer whether it is right and how long."""
    by_prompt: dict[str, list[Scored]] = {}
    for member in result.scored:
        by_prompt.setdefault(member.rollout.lease.prompt.id, []).append(member)
    return {
        prompt: {
            **accuracy_and_tokens(members),
            "correct": [int(m.verdict.is_correct) for m in members],
            "lengths": [m.rollout.length for m in members],
        }
        for prompt, members in sorted(by_prompt.items())
    }


def write_per_problem(path: Path, results: Sequence[EvalResult], *, step: int) -> None:
    """Write ``{"step", "results": {label: {prompt id: figures}}}`` as JSON, whole or not at all.

    figures: ``accuracy`` and ``tokens``, means over the problem's answers; ``correct`` (1 or 0) and ``lengths`` (tokens), one
    entry per answer.
    """
    content = {"step": step, "results": {result.label: per_problem(result) for result in results}}
    replace_text(path, json.dumps(content) + "\n")


def run_evaluation(settings: Settings, *, target: Path) -> int:
    """`budget-rl eval`: evaluate a checkpoint or model folder and print a table; returns the exit status."""
    from rich.console import Console
    from rich.table import Table

    from rl.data import load_problems
    from rl.models import at_folder, local_folder, longest_context
    from rl.preparation import check_context
    from rl.prompts import PromptEncoder, load_tokenizer

    model = local_folder(evaluated_model(settings.model, target))
    check_context(settings, longest_context(model))
    tokenizer = load_tokenizer(at_folder(settings.model, model))
    encoder = PromptEncoder(tokenizer, settings.data)
    plan = BudgetPlan(settings.rollout, tokenizer, encoder=encoder, max_steps=settings.max_steps)
    held_out = load_problems(settings.data).held_out[: settings.eval.problems]
    prompts, dropped = encoder.encode_all(held_out, suffix=plan.longest_suffix())
    plan.check(prompts[0])
    resources = connect()
    workforce = Workforce(settings)
    try:
        check_cluster(settings, resources)
        with StopFlag() as stop:
            refs = [*workforce.launch_engines(model), *workforce.launch_scorers(tokenizer)]
            wait_for(refs, seconds=settings.rollout.start_deadline_s, what="engines and graders start", stop=stop)
            collector = Collector(workforce.engines, workforce.scorers, settings)
            with_budgets = settings.model_copy(update={"eval": settings.eval.model_copy(update={"with_budgets": True})})
            results = evaluate(
                collector,
                plan,
                prompts,
                with_budgets,
                version=0,
                step=trained_steps(target),
                sampling=read_sampling(target),
                stop=stop,
            )
    finally:
        workforce.close()
        disconnect()
    table = Table(
        "budget",
        "accuracy",
        "tokens",
        "cut",
        "unscored",
        title=f"{target}: {len(prompts)} held-out problems x {settings.eval.samples}",
    )
    for result in results:
        table.add_row(
            result.label, f"{result.accuracy:.3f}", f"{result.tokens:.1f}", f"{result.truncated:.1%}", str(result.unscored)
        )
    Console().print(table)
    if dropped:
        print(f"{dropped} problems were longer than data.max_prompt_length={settings.data.max_prompt_length} and left out")
    print(json.dumps({name: round(value, 6) for result in results for name, value in result.metrics().items()}))
    return 0


def evaluated_model(model: ModelSettings, target: Path) -> ModelSettings:
    """The settings of the model meant by ``target``: a checkpoint, a model folder, or a hub id, whose pinned revision stays.

    A folder is what it is: it has no revision, and a GGUF file only if the one that is configured lies there.
    """
    inner = target / "model"
    folder = inner if inner.is_dir() else target
    if not folder.is_dir():
        return model.model_copy(update={"path": str(target)})
    has_gguf = model.gguf_file is not None and (folder / model.gguf_file).is_file()
    return model.model_copy(update={"path": str(folder), "revision": None, "gguf_file": model.gguf_file if has_gguf else None})


def trained_steps(target: Path) -> int | None:
    """The step of the checkpoint ``target``; None for a model that says nothing of its training."""
    return read_manifest(target).step if (target / MANIFEST_NAME).is_file() else None
