"""Every reward method by its name: from a step's answers to the named parts of its reward.

What depends on the length has a part of its own, by which advantage.length_guard finds it. Formulas live in reward/budget.py and
reward/relative.py; here each gets its columns and constants.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch

from reward import budget, relative
from reward.answers import Answers
from rl.reward_settings import RewardSettings

Parts = dict[str, torch.Tensor]
BUDGETTHINKER_CORRECT = 0.7
"""Of its three parts the one for a correct answer."""
RewardMethod = Callable[[Answers, RewardSettings], Parts]

LENGTH_PARTS = frozenset({"length", "budget", "overlong"})
"""Parts that depend on how long an answer is."""


def split(total_N: torch.Tensor, answers: Answers) -> Parts:
    """``correct`` 1 or 0, and ``length`` for the rest of the total."""
    correct_N = answers.correct_N.double()
    return {"correct": correct_N, "length": total_N.double() - correct_N}


def correct(answers: Answers, settings: RewardSettings) -> Parts:
    return {"correct": answers.correct_N.double()}


def classic(answers: Answers, settings: RewardSettings) -> Parts:
    return {"correct": budget.classic(answers.correct_N, answers.length_N, max_length=answers.max_length)}


def cosine(answers: Answers, settings: RewardSettings) -> Parts:
    beta = settings.option("beta")
    return {"length": budget.cosine(answers.correct_N, answers.length_N, max_length=answers.max_length, beta=beta)}


def hbpo(answers: Answers, settings: RewardSettings) -> Parts:
    chosen = {name: settings.option(name) for name in ("beta", "alpha", "form")}
    reward_N = budget.hbpo(answers.correct_N, answers.length_N, answers.budget_N, max_length=answers.max_length, **chosen)
    return {"budget": reward_N}


def aec(answers: Answers, settings: RewardSettings) -> Parts:
    averages = {"group": "prompt_average_N", "ema": "running_average_N", "frozen": "reference_length_N"}
    average_N = getattr(answers, averages[settings.option("average")])
    soft = settings.option("soft_delta")
    return split(budget.aec(answers.correct_N, answers.length_N, answers.effort_N, average_N, soft_delta=soft), answers)


def lcpo_exact(answers: Answers, settings: RewardSettings) -> Parts:
    alpha = settings.option("alpha")
    return split(budget.lcpo_exact(answers.correct_N, answers.length_N, answers.budget_N, alpha=alpha), answers)


def lcpo_max(answers: Answers, settings: RewardSettings) -> Parts:
    chosen = {name: settings.option(name) for name in ("alpha", "delta")}
    return split(budget.lcpo_max(answers.correct_N, answers.length_N, answers.budget_N, **chosen), answers)


def laser(answers: Answers, settings: RewardSettings) -> Parts:
    target_N = torch.full_like(answers.length_N, float(settings.target or 0))
    return split(budget.laser(answers.correct_N, answers.length_N, target_N, **_laser(settings)), answers)


def laser_d(answers: Answers, settings: RewardSettings) -> Parts:
    return split(budget.laser(answers.correct_N, answers.length_N, answers.band_target_N, **_laser(settings)), answers)


def laser_de(answers: Answers, settings: RewardSettings) -> Parts:
    columns = answers.correct_N, answers.length_N, answers.band_target_N
    parts = split(budget.laser(*columns, **_laser(settings)), answers)
    # Its point is to reward exploring where all are wrong: no length signal that a guard may take away.
    total_N = budget.laser_de(*columns, answers.repetitive_N, **_laser(settings)).double()
    return parts | {"explore": total_N - parts["correct"] - parts["length"]}


def _laser(settings: RewardSettings) -> dict[str, float]:
    return {name: settings.option(name) for name in ("bonus", "wrong")}


def alp(answers: Answers, settings: RewardSettings) -> Parts:
    columns, beta = (answers.correct_N, answers.length_N, answers.group_N), settings.option("beta")
    return split(budget.alp(*columns, max_length=answers.max_length, beta=beta), answers)


def efficient(answers: Answers, settings: RewardSettings) -> Parts:
    alpha = settings.option("alpha")
    return split(budget.efficient(answers.correct_N, answers.length_N, answers.group_N, alpha=alpha), answers)


def kimi(answers: Answers, settings: RewardSettings) -> Parts:
    weight = settings.option("weight") if answers.step >= settings.option("warmup") else 0.0
    return split(budget.kimi(answers.correct_N, answers.length_N, answers.group_N, weight=weight), answers)


def triangle(answers: Answers, settings: RewardSettings) -> Parts:
    columns = answers.correct_N, answers.length_N, answers.budget_N
    return split(budget.triangle_mix(*columns, weight=settings.option("weight"), r_max=settings.option("height")), answers)


def history_min(answers: Answers, settings: RewardSettings) -> Parts:
    return split(relative.history_min(answers.correct_N, answers.length_N, answers.shortest_N), answers)


def shorterbetter(answers: Answers, settings: RewardSettings) -> Parts:
    alpha, columns = settings.option("alpha"), (answers.correct_N, answers.length_N, answers.group_N)
    total_N = relative.shorterbetter(*columns, alpha=alpha, beta=settings.option("beta")).double()
    correct_N = alpha * answers.correct_N.double()
    return {"correct": correct_N, "length": total_N - correct_N}


def dast(answers: Answers, settings: RewardSettings) -> Parts:
    columns = answers.correct_N, answers.length_N, answers.group_N
    budget_N = relative.dast_budget(*columns, max_length=answers.max_length)
    return split(relative.dast(answers.correct_N, answers.length_N, budget_N), answers)


def grpo_lead(answers: Answers, settings: RewardSettings) -> Parts:
    columns = answers.correct_N, answers.length_N, answers.group_N
    return split(relative.grpo_lead(*columns, alpha=settings.option("alpha")), answers)


def o1_pruner(answers: Answers, settings: RewardSettings) -> Parts:
    columns = answers.correct_N, answers.length_N, answers.reference_length_N, answers.reference_accuracy_N
    return split(relative.o1_pruner(*columns, weight=settings.option("weight")), answers)


def budgetthinker(answers: Answers, settings: RewardSettings) -> Parts:
    columns, well_formed_N = (answers.correct_N, answers.length_N, answers.budget_N), ~answers.malformed_N
    total_N = budget.budgetthinker(*columns, well_formed_N).double()
    without_form_N = budget.budgetthinker(*columns, torch.zeros_like(well_formed_N)).double()
    correct_N = BUDGETTHINKER_CORRECT * answers.correct_N.double()
    return {"correct": correct_N, "form": total_N - without_form_N, "length": without_form_N - correct_N}


def s_grpo(answers: Answers, settings: RewardSettings) -> Parts:
    return split(relative.s_grpo(answers.correct_N, answers.exit_N, answers.group_N), answers)


def adaptthink(answers: Answers, settings: RewardSettings) -> Parts:
    columns, delta = (answers.correct_N, answers.no_think_N, answers.reference_accuracy_N), settings.option("delta")
    bonus_N = delta * answers.no_think_N.double()
    return {"correct": relative.adaptthink(*columns, delta=delta).double() - bonus_N, "no_think": bonus_N}


def adlp(answers: Answers, settings: RewardSettings) -> Parts:
    weight = answers.state.weight_of_a_token(settings)
    return split(relative.adlp(answers.correct_N, answers.length_N, weight=weight), answers)


def nothing(answers: Answers, settings: RewardSettings) -> Parts:
    return {}


METHODS: Mapping[str, RewardMethod] = MappingProxyType(
    {
        "correct": correct,
        "classic": classic,
        "cosine": cosine,
        "hbpo": hbpo,
        "dapo": correct,
        "aec": aec,
        "lcpo_exact": lcpo_exact,
        "lcpo_max": lcpo_max,
        "laser": laser,
        "laser_d": laser_d,
        "laser_de": laser_de,
        "alp": alp,
        "efficient": efficient,
        "kimi": kimi,
        "triangle": triangle,
        "history_min": history_min,
        "shorterbetter": shorterbetter,
        "dast": dast,
        "grpo_lead": grpo_lead,
        "o1_pruner": o1_pruner,
        "budgetthinker": budgetthinker,
        "s_grpo": s_grpo,
        "adaptthink": adaptthink,
        "adlp": adlp,
        "none": nothing,
    }
)
"""``reward.method`` -> method; `dapo` is `correct` with the overlong penalty, which is added to any method."""
