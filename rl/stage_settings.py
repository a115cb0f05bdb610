"""What a run's stage asks of its other settings: the rules between sections, each with what to do about it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the settings call these rules while they are being made
    from rl.settings import Settings


def check_stage(settings: Settings) -> None:
    """Raise ValueError where a section is missing that the stage needs, or set and never read."""
    preference, distil = settings.preference, settings.distil
    if settings.stage == "preference" and preference is None:
        raise ValueError("stage=preference learns from pairs, and there is no section preference; add `preference: {}` for DPO")
    if settings.stage == "distil" and distil is None:
        raise ValueError("stage=distil learns from a teacher, and there is no section distil; add one (docs/distillation.md)")
    if settings.stage == "preference" and distil is not None:
        raise ValueError("stage=preference has no teacher to distil from; leave distil out, or set stage=distil")
    makes_teachers = makes_its_teachers(settings)
    if preference is not None and settings.stage != "preference" and not makes_teachers and not _reads_pairs(settings):
        raise ValueError(
            f"the section preference is never used in stage={settings.stage}: set stage=preference, or preference=null; "
            "a distillation uses it where distil.teacher.dpo and reverse are not given"
        )
    if distil is not None and (distil.teacher.dpo is None) != (distil.teacher.reverse is None):
        missing = "dpo" if distil.teacher.dpo is None else "reverse"
        raise ValueError(f"distil.teacher.{missing} is not given, and the teacher is made of two models; name both or neither")
    if makes_teachers and preference is None:
        raise ValueError(
            "distil.teacher names no models: give distil.teacher.dpo and distil.teacher.reverse, or a section preference that "
            "says how to train them"
        )
    if preference is not None and makes_teachers:
        _check_teachers_runs(settings)
    if preference is not None and preference.reverse and settings.stage != "preference":
        raise ValueError(
            f"preference.reverse is for stage=preference; leave it out in stage={settings.stage}, which trains both kinds of "
            "model itself and learns from the chosen answers"
        )
    if distil is not None and distil.data == "pairs":
        if settings.stage != "distil":
            raise ValueError("distil.data=pairs has no rollouts to reward; set stage=distil, or distil.data=rollouts")
        if preference is None:
            raise ValueError("distil.data=pairs learns the chosen answers of preference.pairs; add a section preference")
    if settings.treg is not None and settings.stage != "rl":
        raise ValueError(f"treg reshapes advantages, which stage={settings.stage} has none of; use preference.treg, or stage=rl")
    if settings.stage == "preference" and settings.loss.kl_coef > 0:
        raise ValueError(
            "loss.kl_coef adds a KL on sampled answers, and stage=preference samples none (its beta is what holds the policy); "
            "set it to 0"
        )
    if distil is not None and distil.teacher.mode == "scalar":
        _check_scalar(settings)
    _check_updates(settings)
    _check_samples(settings)


def makes_its_teachers(settings: Settings) -> bool:
    """Whether the preference stage is to make the two models of the teacher first."""
    return settings.distil is not None and settings.distil.teacher.dpo is None and settings.distil.teacher.reverse is None


def learns_from_pairs(settings: Settings) -> bool:
    """Whether a step is a batch of pairs rather than of rollouts."""
    return settings.stage == "preference" or _reads_pairs(settings)


def _reads_pairs(settings: Settings) -> bool:
    return settings.distil is not None and settings.distil.data == "pairs"


def _check_teachers_runs(settings: Settings) -> None:
    """The runs that make a teacher stop by steps or minutes: tokens and rollouts are counted where rollouts are learned from."""
    preference = settings.preference
    assert preference is not None
    if not any((preference.steps, settings.max_steps, settings.max_minutes)):
        raise ValueError("the runs that make the teacher's two models would never stop; set preference.steps")
    if preference.treg is not None:
        raise ValueError(
            "preference.treg favours the tokens of better answers, and one of the teacher's two models learns the worse ones; "
            "leave it out, or train the models by themselves and name them in distil.teacher.dpo and distil.teacher.reverse"
        )


def _check_scalar(settings: Settings) -> None:
    """The token reward of mode scalar is an expectation over the policy itself, at temperature 1 and unshaped."""
    if settings.rollout.is_shaped or settings.correction in ("truncated", "replay") or settings.rollout.temperature != 1:
        raise ValueError(
            "distil.teacher.mode=scalar takes sampled tokens for the policy's own, and rollout or correction draw or weigh them "
            "otherwise; use mode=hidden or topk, or plain sampling at temperature 1 with correction=none"
        )


def _check_updates(settings: Settings) -> None:
    learner = settings.learner
    supervised = learns_from_pairs(settings)
    if supervised and (learner.minibatches != 1 or learner.epochs != 1):
        raise ValueError(
            f"learner.minibatches={learner.minibatches} and learner.epochs={learner.epochs} repeat updates on rollouts; "
            "pairs are taken preference.pairs_per_step at a time: set both to 1"
        )
    for name in ("max_tokens", "max_rollouts"):
        if supervised and getattr(settings, name) is not None:
            raise ValueError(f"{name} counts what the steps sample, and this stage samples none; set max_steps")
    if supervised and settings.rollout.refill:
        raise ValueError("rollout.refill replaces groups of rollouts, and this stage has none; set it to 0")


def _check_samples(settings: Settings) -> None:
    """Answers to make pairs of are dealt over the budgets as in training."""
    preference, budgets = settings.preference, settings.rollout.budgets
    if preference is None or not preference.pairs.from_rollouts or not isinstance(budgets, list):
        return
    if preference.pairs.samples % len(budgets):
        raise ValueError(
            f"preference.pairs.samples={preference.pairs.samples} cannot be dealt evenly over the {len(budgets)} budgets of "
            f"rollout.budgets; use {len(budgets) * -(-preference.pairs.samples // len(budgets))}"
        )
