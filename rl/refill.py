"""Dynamic sampling: which groups of a step teach something, and how many prompts are to take the place of the others; pure."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

from reward.scoring import length_parts
from rl.comparison import advantage_groups
from rl.settings import Settings
from rl.types import Group, Scored


@dataclass(frozen=True)
class Refill:
    """The groups of a step so far, round by round: the step's own prompts, then those that replace groups without a difference.

    Source: DAPO (arXiv 2503.14476, section 3.2), which samples until the batch is full; here the rounds have an end.
    """

    wanted: int
    """Groups of a full step."""
    rounds: int
    """Most further rounds, `rollout.refill`; 0: every group is trained on, whatever its rewards."""
    groups: tuple[Group, ...] = ()
    """All groups generated, with their rewards, in the order of their tickets."""
    teaching: tuple[bool, ...] = ()
    """Of each group, whether its rewards differ; see :func:`teaches`."""
    done: int = 0
    """Rounds so far, the first included."""

    @property
    def missing(self) -> int:
        """Prompts to take for the next round; 0 when there is none."""
        if self.done == 0:
            return self.wanted
        return self.wanted - sum(self.teaching) if self.done <= self.rounds else 0

    def with_round(self, groups: Sequence[Group], settings: Settings) -> Refill:
        """With the groups of one more round."""
        found = tuple(teaches(group, settings) for group in groups)
        return replace(self, groups=(*self.groups, *groups), teaching=(*self.teaching, *found), done=self.done + 1)

    @property
    def kept(self) -> tuple[Group, ...]:
        """What is trained on: the groups whose rewards differ.

        Where no group's do, as many as a step has, those with a reward first: their advantages are 0, as without refilling.
        """
        if self.rounds == 0:
            return self.groups
        chosen = tuple(group for group, keep in zip(self.groups, self.teaching, strict=True) if keep)
        return chosen or tuple(sorted(self.groups, key=lambda group: not _rewarded(group)))[: self.wanted]

    @property
    def short_by(self) -> int:
        """Groups that a full step would have beside those whose rewards differ; 0 without refilling."""
        return self.wanted - sum(self.teaching) if self.rounds else 0

    def shortage(self, settings: Settings) -> str:
        """What to say of a step that is short of groups."""
        return (
            f"rewards differ in {sum(self.teaching)} groups of {len(self.groups)} after rollout.refill={self.rounds} further "
            f"rounds, and a step wants {self.wanted}; it trains on fewer. Raise rollout.refill or rollout.samples_per_prompt "
            f"(now {settings.rollout.samples_per_prompt}), or use problems that are neither too hard nor too easy"
        )

    def figures(self) -> dict[str, float]:
        """Counts for the step's report: members generated, groups in place of others, groups nobody trains on."""
        found = {"rollouts/generated": float(sum(len(group.members) for group in self.groups))}
        if self.rounds:
            found["rollouts/refilled_groups"] = float(len(self.groups) - self.wanted)
            found["rollouts/discarded_groups"] = float(len(self.groups) - len(self.kept))
        return found


def teaches(group: Group, settings: Settings) -> bool:
    """Whether rewards differ, by more than `advantage.std_floor`, between members that are compared with one another.

    Members compared: `rl.comparison.advantage_groups`. A group with fewer than two rewards teaches nothing. Where
    `advantage.length_guard` leaves the length out, of answers all wrong, so does this. Rewards of single tokens count, too.
    """
    members = _rewarded(group)
    places = advantage_groups([0] * len(members), [m.rollout.lease.budget for m in members])
    compared: dict[int, list[Scored]] = defaultdict(list)
    for place, member in zip(places, members, strict=True):
        compared[place].append(member)
    return any(_differ(siblings, settings) for siblings in compared.values())


def _differ(members: Sequence[Scored], settings: Settings) -> bool:
    floor = settings.advantage.std_floor
    if len(members) < 2:
        return False
    per_token = [v for m in members if m.reward is not None for v in m.reward.per_token or () if v is not None]
    return _spread(_compared_rewards(members, settings)) > floor or _spread(per_token) > floor


def _compared_rewards(members: Sequence[Scored], settings: Settings) -> list[float]:
    """Each member's reward, without the part of its length where the guard takes it out."""
    guarded = settings.advantage.estimator == "group_normalised" and settings.advantage.length_guard
    left_out = length_parts(settings.reward) if guarded and not any(m.verdict.is_correct for m in members) else frozenset()
    rewards = [m.reward for m in members if m.reward is not None]
    return [reward.total - sum(v for name, v in reward.parts.items() if name in left_out) for reward in rewards]


def _rewarded(group: Group) -> list[Scored]:
    return [member for member in group.members if member.reward is not None]


def _spread(values: Sequence[float]) -> float:
    return max(values) - min(values) if values else 0.0
