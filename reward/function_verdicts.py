"""What the scores of the run's own reward functions mean for a verdict: pure rules."""

from __future__ import annotations

from collections.abc import Sequence

from rl.reward_settings import RewardSettings
from rl.types import FunctionScore, Verdict, VerdictStatus

_FAILED = {"timed_out": VerdictStatus.TIMED_OUT, "crashed": VerdictStatus.CRASHED}


def decided(verdict: Verdict | None, scores: Sequence[FunctionScore], settings: RewardSettings) -> Verdict:
    """The verdict of an answer after all functions scored it; ``verdict`` is the grader's, None where the first function decides.

    A function that failed on the answer and counts in the reward leaves it without a number: TIMED_OUT or CRASHED, whatever the
    grader said. The first function decides by its own word on correctness (`acc`), else by `reward.correct_from`. ``scores`` may
    hold fewer than all functions: those that were asked, in order.
    """
    for place, (score, function) in enumerate(zip(scores, settings.functions, strict=False)):
        counts = function.weight != 0 or (place == 0 and verdict is None)
        if counts and score.status in _FAILED:
            extracted = None if verdict is None else verdict.extracted
            return Verdict(_FAILED[score.status], extracted, f"reward function {score.name}: {score.evidence}")
    if verdict is None:
        verdict = _by_function(scores[0], settings.correct_from)
    if settings.method == "none" and scores and verdict.is_scored and all(score.status == "none" for score in scores):
        return Verdict(VerdictStatus.CRASHED, verdict.extracted, "no reward function applies to this answer")
    return verdict


def _by_function(score: FunctionScore, correct_from: float) -> Verdict:
    if score.value is None:
        return Verdict(VerdictStatus.CRASHED, None, f"reward function {score.name} says nothing of this answer, and it decides")
    right = score.value >= correct_from if score.correct is None else score.correct
    return Verdict(VerdictStatus.CORRECT if right else VerdictStatus.WRONG, None, f"{score.name} gave {score.value:.4g}")
