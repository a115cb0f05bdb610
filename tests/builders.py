"""Small values of the types that flow through a run, for tests: every field has a plain default."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rl.types import (
    Budget,
    BudgetKind,
    FinishReason,
    Group,
    Lease,
    Prompt,
    Reward,
    Rollout,
    Scored,
    Shaping,
    Verdict,
    VerdictStatus,
)
from rollout.openings import Opening

TEMPLATE = "<think> I will answer the question with {budget} tokens"


def make_prompt(index: int = 0, *, token_ids: Sequence[int] = (1, 2, 3)) -> Prompt:
    """Prompt ``q<index>``."""
    return Prompt(id=f"q{index}", question=f"question {index}", answer=str(index), token_ids=tuple(token_ids))


def make_budget(tokens: int | None = None) -> Budget:
    """A budget to be met exactly, or none."""
    if tokens is None:
        return Budget(tokens=0, kind=BudgetKind.FREE, template="<think>")
    return Budget(tokens=tokens, kind=BudgetKind.EXACT, template=TEMPLATE)


def make_effort(effort: float) -> Budget:
    """A budget relative to the usual length."""
    return Budget(tokens=0, kind=BudgetKind.EFFORT, template="<think> effort {effort}", effort=effort)


NO_THINK = Budget(tokens=0, kind=BudgetKind.FREE, template="<think></think>", no_think=True)


def make_opening(index: int = 0, budget: Budget | None = None, *, prefill_ids: Sequence[int] = (), room: int = 64) -> Opening:
    """What a member of prompt ``q<index>`` starts from, with ``room`` tokens for prefill and answer."""
    chosen = make_budget() if budget is None else budget
    return Opening(chosen, make_prompt(index), tuple(prefill_ids), room - len(prefill_ids))


def make_lease(
    *,
    prompt: Prompt | None = None,
    group: int = 0,
    member: int = 0,
    step: int = 0,
    budget: int | Budget | None = None,
    prefill_ids: Sequence[int] = (),
    temperature: float = 1.0,
    attempt: int = 0,
) -> Lease:
    """The lease of one member of the group number ``group``."""
    return Lease(
        ticket=f"{step:06d}.{group:04d}.{member:03d}",
        prompt=make_prompt(group) if prompt is None else prompt,
        member=member,
        budget=budget if isinstance(budget, Budget) else make_budget(budget),
        shaping=Shaping(temperature),
        prefill_ids=tuple(prefill_ids),
        max_new_tokens=64 - len(prefill_ids),
        seed=7,
        min_version=0,
        attempt=attempt,
    )


def make_rollout(
    lease: Lease | None = None,
    *,
    generated: Sequence[int] = (8, 9),
    logp_T: Sequence[float] | None = None,
    finish: FinishReason = FinishReason.STOP,
    text: str = "",
) -> Rollout:
    """The answer to a lease: its prefill, then the generated ids (log-prob -1 each unless given)."""
    lease = make_lease() if lease is None else lease
    return Rollout(
        lease=lease,
        response_ids=(*lease.prefill_ids, *generated),
        prefill_length=len(lease.prefill_ids),
        logp_T=tuple(-1.0 for _ in generated) if logp_T is None else tuple(logp_T),
        finish=finish,
        weight_version=0,
        text=text,
    )


def make_scored(
    rollout: Rollout | None = None,
    *,
    status: VerdictStatus = VerdictStatus.CORRECT,
    reward: float = 1.0,
    parts: Mapping[str, float] | None = None,
    evidence: str = "",
    extracted: str | None = None,
) -> Scored:
    """A rollout with its verdict; a verdict that is not scored carries no reward, whatever ``reward`` says."""
    verdict = Verdict(status, extracted=extracted, evidence=evidence)
    given = Reward(reward, {"correct": reward} if parts is None else parts) if verdict.is_scored else None
    return Scored(make_rollout() if rollout is None else rollout, verdict, given)


def make_group(index: int, rewards: Sequence[float | None], *, budgets: Sequence[int | Budget | None] | None = None) -> Group:
    """Group number ``index`` with one member per reward: None is an answer that was not scored, 0 a wrong one."""
    members = []
    for m, reward in enumerate(rewards):
        lease = make_lease(group=index, member=m, budget=None if budgets is None else budgets[m])
        if reward is None:
            evidence = "grader needed more than 10 s"
            members.append(make_scored(make_rollout(lease), status=VerdictStatus.TIMED_OUT, evidence=evidence))
        else:
            status = VerdictStatus.CORRECT if reward > 0 else VerdictStatus.WRONG
            members.append(make_scored(make_rollout(lease), status=status, reward=reward))
    return Group(make_prompt(index), tuple(members))
