"""What can be said of a rollout before any grader runs: cut, malformed, or an answer worth grading."""

from __future__ import annotations

from collections.abc import Sequence

from reward.extraction import extract_answer
from reward.grading import MalformedAnswer
from rl.types import FinishReason, Rollout, Verdict, VerdictStatus


def answer_or_verdict(rollout: Rollout, *, extract: str, special_tokens: Sequence[str] = ()) -> str | Verdict:
    """The extracted answer, or the verdict that needs no grader: TRUNCATED if the cap cut it, MALFORMED if there is no answer."""
    if (cut := truncated(rollout)) is not None:
        return cut
    try:
        return extract_answer(rollout.text, how=extract, special_tokens=special_tokens)
    except MalformedAnswer as error:
        return Verdict(VerdictStatus.MALFORMED, evidence=str(error))


def truncated(rollout: Rollout) -> Verdict | None:
    """TRUNCATED where the cap cut the response; None where it ended by itself."""
    if rollout.finish is not FinishReason.LENGTH:
        return None
    return Verdict(VerdictStatus.TRUNCATED, evidence=f"cut at {rollout.length} tokens")
