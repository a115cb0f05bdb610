"""Pure rules of a step: what goes into the batch, when to refuse, what is written down."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import torch

from reward.answers import budget_tokens
from reward.budget import budget_ceiling
from reward.scoring import length_parts
from rl.advantage import ScoredBatch, compute, loss_tokens
from rl.batch import pack_rollouts
from rl.behaviour import Vocabulary
from rl.budget_settings import describe_budgets
from rl.collection import Collected
from rl.comparison import advantage_groups
from rl.correction import Correction
from rl.errors import BudgetRLError
from rl.preflight import derived_plan
from rl.process_reward import reward_to_go
from rl.reward_settings import OPTIONS
from rl.settings import Settings
from rl.types import Group, Reward, Scored, TrainBatch

NO_ANSWER_SHARE = 0.9
"""Share of answers cut or without a readable answer from which a step of equal rewards shows a wrong setting, not a hard task."""


def effective_correction(settings: Settings) -> Literal["none", "truncated", "replay"]:
    """`auto` is `replay` when sampling is shaped, else `none`; where it is not shaped the two are equal."""
    if settings.correction != "auto":
        return settings.correction
    return "replay" if settings.rollout.is_shaped else "none"


def chosen_correction(settings: Settings) -> Correction:
    """The settings of the correction, with `auto` decided."""
    return Correction(
        effective_correction(settings), settings.correction_cap, settings.correction_mask, settings.correction_bounds
    )


def build_batch(
    groups: tuple[Group, ...], settings: Settings, vocabulary: Vocabulary | None = None
) -> tuple[TrainBatch, torch.Tensor, list[Scored]]:
    """Advantages and packed training data of a step's members that have a reward (others are left out of all statistics).

    ``vocabulary`` is needed where sampling has a reflection bias. Raises BudgetRLError when no member has a reward.
    """
    found = [(g, m, m.reward) for g, group in enumerate(groups) for m in group.members if m.reward is not None]
    if not found:
        raise BudgetRLError(
            "no answer of this step has a reward: each is left out by its verdict's policy",
            fix="set reward.policies.truncated (or the policy that masks most) to shape, or raise rollout.max_length",
        )
    members, rewards = [m for _, m, _ in found], [reward for _, _, reward in found]
    prompt_N = torch.tensor([g for g, _, _ in found], dtype=torch.int64)
    group_N = torch.tensor(advantage_groups(prompt_N.tolist(), [m.rollout.lease.budget for m in members]))
    advantage_N = compute(scored_batch(members, rewards, group_N, settings), settings.advantage).float()
    batch = pack_rollouts(
        [m.rollout for m in members],
        advantage_N,
        prompt_N * settings.learner.minibatches // max(len(groups), 1),
        token_advantages=reward_to_go([r.per_token for r in rewards], group_N, std_floor=settings.advantage.std_floor),
        train_prefix=settings.learner.train_prefix,
        vocabulary=vocabulary,
    )
    return batch, advantage_N, members


def scored_batch(members: Sequence[Scored], rewards: Sequence[Reward], group_N: torch.Tensor, settings: Settings) -> ScoredBatch:
    """The columns that an advantage is computed from."""
    budget_N = torch.tensor([budget_tokens(m) for m in members], dtype=torch.float64)
    reward = settings.reward
    beta = reward.option("beta") if reward.method == "hbpo" else OPTIONS["hbpo"]["beta"]
    ceiling_N = reward.method_weight * budget_ceiling(budget_N, max_length=settings.rollout.max_length, beta=beta).double()
    about_length = length_parts(reward)
    return ScoredBatch(
        reward_N=torch.tensor([reward.total for reward in rewards], dtype=torch.float64),
        group_N=group_N,
        budget_N=budget_N,
        ceiling_N=ceiling_N,
        length_reward_N=torch.tensor(
            [math.fsum(v for name, v in r.parts.items() if name in about_length) for r in rewards], dtype=torch.float64
        ),
        correct_N=torch.tensor([m.verdict.is_correct for m in members], dtype=torch.bool),
        length_N=torch.tensor([m.rollout.length for m in members], dtype=torch.float64),
        max_length=settings.rollout.max_length,
        loss_tokens_N=torch.tensor(
            [loss_tokens(m.rollout, train_prefix=settings.learner.train_prefix) for m in members], dtype=torch.float64
        ),
    )


def sample_record(member: Scored, advantage: float) -> dict[str, object]:
    """One line of samples.jsonl."""
    lease = member.rollout.lease
    return {
        "ticket": lease.ticket,
        "prompt": lease.prompt.question,
        "gold": lease.prompt.answer,
        "answer": member.rollout.text,
        "budget": lease.budget.label,
        "budget_kind": lease.budget.kind.value,
        "length": member.rollout.length,
        "verdict": member.verdict.status.value,
        "evidence": member.verdict.evidence,
        "extracted": member.verdict.extracted,
        "reward": None if member.reward is None else dict(member.reward.parts),
        "advantage": advantage,
        "finish": member.rollout.finish.value,
    }


def unscored_error(collected: Collected, limit: float) -> BudgetRLError | None:
    """What to raise when more than ``limit`` of a step's answers got no verdict: learning from the rest would be biased."""
    members = [m for group in collected.groups for m in group.members]
    unscored = unscored_members(collected)
    total = len(members) + len(collected.lost)
    if len(unscored) < len(members) and len(unscored) + len(collected.lost) <= limit * total:
        return None
    example = unscored[0].verdict.evidence if unscored else collected.lost[0]
    return BudgetRLError(
        f"{len(unscored) + len(collected.lost)} of {total} answers could not be scored (limit {limit:.0%}); first: {example}",
        fix="look at unscored.jsonl in the run's folder; raise reward.grade_deadline_s or reward.function_deadline_s if graders "
        "or functions are slow, or reward.max_unscored to go on regardless",
    )


def unscored_members(collected: Collected) -> list[Scored]:
    """The answers that no grader could judge, the longest first: these are the likeliest to have upset it."""
    members = [m for group in collected.groups for m in group.members if not m.verdict.is_scored]
    return sorted(members, key=lambda m: -m.rollout.length)


def idle_error(metrics: Mapping[str, float], settings: Settings) -> BudgetRLError | None:
    """What to raise after the first rollouts when they carry nothing to learn from; None when they do.

    An advantage against a budget's ceiling (the paper's form, not centred) is not zero even where every answer of a group got the
    same reward. Where nearly all answers have no answer in them, it only pushes them all one way.
    """
    if settings.allow_idle:
        return None
    cut, malformed = metrics["verdict/truncated"], metrics["verdict/malformed"]
    if metrics["adv/nonzero_tokens"] == 0:
        found = "every advantage is zero"
    elif metrics["group/flat"] == 1 and cut + malformed >= NO_ANSWER_SHARE:
        found = f"{cut + malformed:.0%} of answers are cut or unreadable, and no group has two different rewards"
    else:
        return None
    if cut + malformed > 0.5 and cut >= malformed:
        fix = f"{cut:.0%} of answers are cut at rollout.max_length={settings.rollout.max_length}: raise it"
    elif cut + malformed > 0.5:
        fix = f"{malformed:.0%} of answers have no readable answer: compare data.extract={settings.data.extract} with samples"
    elif metrics["train/accuracy"] > 0.99:
        fix = "every answer is right: use harder data"
    else:
        fix = (
            "no group has both right and wrong answers: use easier data, or raise rollout.samples_per_prompt or prompts_per_step"
        )
    return BudgetRLError(f"nothing can be learnt from the first step: {found}", fix=f"{fix} (allow_idle=true goes on)")


def chosen_params(settings: Settings) -> dict[str, object]:
    """The few settings shown as MLflow parameters; the whole configuration is an artifact."""
    plan = derived_plan(settings)
    preference, distil = settings.preference, settings.distil
    of_stage: dict[str, object] = {}
    if preference is not None:
        of_stage |= {f"preference.{name}": getattr(preference, name) for name in ("form", "reverse", "beta")}
    if distil is not None:
        of_stage |= {f"distil.teacher.{name}": getattr(distil.teacher, name) for name in ("mode", "r")}
        of_stage["distil.beta0"] = distil.scale
    return {
        "stage": settings.stage,
        **of_stage,
        "model.path": settings.model.path,
        "model.dtype": settings.model.dtype,
        "data.source": settings.data.source,
        "reward.method": settings.reward.method,
        "advantage.estimator": settings.advantage.estimator,
        "rollout.budgets": describe_budgets(settings.rollout.budgets),
        "rollout.max_length": settings.rollout.max_length,
        "learner.lr": settings.learner.lr,
        "learner.ranks": settings.learner.ranks,
        "learner.zero_stage": settings.learner.zero_stage,
        "rollouts_per_step": plan.rollouts_per_step,
        "correction": effective_correction(settings),
        "seed": settings.seed,
    }
