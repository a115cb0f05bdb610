"""What an engine hands back while it works: the rollouts of finished groups and figures of its own; pure, without vLLM."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rl.schedule import group_of
from rl.types import Lease, Rollout


@dataclass(frozen=True)
class EngineStats:
    """What one engine did since its last report; None is what an engine spread over processes does not tell."""

    seconds: float = 0.0
    """Time in engine steps."""
    steps: int = 0
    generated: int = 0
    """Tokens of the requests that finished."""
    prompt_tokens: int = 0
    """Prompt tokens, prefill included, of the requests that finished."""
    cached_tokens: int = 0
    """Those of them taken from the prefix cache."""
    aborted: int = 0
    """Requests stopped before their end."""
    running: float | None = None
    """Requests decoded at once, mean over the steps."""
    waiting: int | None = None
    """Most requests that waited for a place after a step."""
    preemptions: int | None = None
    """Times a request that finished or was stopped had lost its cache blocks to another and was computed again."""
    weight_version: int = 0

    @property
    def tokens_per_s(self) -> float:
        """Generated tokens over the time in engine steps; 0 without a step."""
        return self.generated / self.seconds if self.seconds else 0.0


@dataclass(frozen=True)
class Progress:
    """The answer to one call of `Engine.advance`; also the engine's sign of life."""

    rollouts: tuple[Rollout, ...]
    """Rollouts of groups that are whole: the engine has no more open lease of their prompts."""
    stats: EngineStats
    open: int
    """Leases not handed back yet."""


class OpenGroups:
    """The leases an engine holds and the rollouts it keeps until their group is whole."""

    def __init__(self) -> None:
        self.leases: dict[str, Lease] = {}
        """Ticket -> lease of every request under way."""
        self._kept: dict[str, list[Rollout]] = {}
        """Group -> finished rollouts not handed out."""
        self._left: dict[str, int] = {}
        """Group -> requests under way."""

    def __len__(self) -> int:
        return len(self.leases) + sum(len(kept) for kept in self._kept.values())

    @property
    def has_whole(self) -> bool:
        """Whether a finished group waits to be taken."""
        return any(not self._left[group] for group in self._kept)

    def add(self, lease: Lease) -> None:
        """A request began. Raises ValueError for a ticket that is held already."""
        group = group_of(lease.ticket)
        if lease.ticket in self.leases or any(r.lease.ticket == lease.ticket for r in self._kept.get(group, ())):
            raise ValueError(f"ticket {lease.ticket} is already open in this engine")
        self.leases[lease.ticket] = lease
        self._left[group] = self._left.get(group, 0) + 1

    def finish(self, rollout: Rollout) -> None:
        """A request ended; its rollout is kept until its group is whole."""
        group = group_of(rollout.lease.ticket)
        del self.leases[rollout.lease.ticket]
        self._left[group] -= 1
        self._kept.setdefault(group, []).append(rollout)

    def take(self) -> tuple[Rollout, ...]:
        """The rollouts of all whole groups, which are forgotten here."""
        whole = [group for group in self._kept if not self._left[group]]
        for group in whole:
            del self._left[group]
        return tuple(rollout for group in whole for rollout in self._kept.pop(group))

    def drop(self, tickets: Iterable[str]) -> tuple[str, ...]:
        """Forget these tickets, whether under way or finished and kept; returns those that were held."""
        dropped = []
        for ticket in tickets:
            group = group_of(ticket)
            kept = self._kept.get(group, [])
            if ticket in self.leases:
                del self.leases[ticket]
                self._left[group] -= 1
            elif found := [rollout for rollout in kept if rollout.lease.ticket == ticket]:
                kept.remove(found[0])
            else:
                continue
            dropped.append(ticket)
            if not kept:
                self._kept.pop(group, None)
                if not self._left[group]:
                    del self._left[group]
        return tuple(dropped)

    def tickets(self) -> tuple[str, ...]:
        """Every ticket held: those under way in the order they began, then those kept."""
        return (*self.leases, *(rollout.lease.ticket for kept in self._kept.values() for rollout in kept))


def total(reports: Sequence[EngineStats]) -> EngineStats:
    """The reports of one engine, in order, as one."""
    steps = sum(report.steps for report in reports)
    told = [report for report in reports if report.running is not None]
    told_steps = sum(report.steps for report in told)
    waiting = [report.waiting for report in reports if report.waiting is not None]
    preemptions = [report.preemptions for report in reports if report.preemptions is not None]
    return EngineStats(
        seconds=sum(report.seconds for report in reports),
        steps=steps,
        generated=sum(report.generated for report in reports),
        prompt_tokens=sum(report.prompt_tokens for report in reports),
        cached_tokens=sum(report.cached_tokens for report in reports),
        aborted=sum(report.aborted for report in reports),
        running=sum((report.running or 0.0) * report.steps for report in told) / told_steps if told_steps else None,
        waiting=max(waiting) if waiting else None,
        preemptions=sum(preemptions) if preemptions else None,
        weight_version=reports[-1].weight_version if reports else 0,
    )


def engine_metrics(stats: Sequence[EngineStats]) -> dict[str, float]:
    """``engine/*`` of a step from one `EngineStats` per engine; what no engine tells is absent, and so is all without a step."""
    worked = [one for one in stats if one.steps]
    if not worked:
        return {}
    together = total(worked)
    metrics = {"engine/tokens_per_s": sum(one.tokens_per_s for one in worked), "engine/aborted": float(together.aborted)}
    if together.running is not None:
        metrics["engine/running_mean"] = together.running
    if together.waiting is not None:
        metrics["engine/waiting_max"] = float(together.waiting)
    if together.preemptions is not None:
        metrics["engine/preemptions"] = float(together.preemptions)
    if together.prompt_tokens:
        metrics["engine/cache_hit"] = together.cached_tokens / together.prompt_tokens
    return metrics
