"""Early exits (S-GRPO, arXiv 2505.07686): a group is one full path and answers that leave its thinking at places drawn in it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import zip_longest

from rl.budget_draws import Turn, distinct
from rl.collection import Collected
from rl.leases import Ticket, make_leases
from rl.memory import PromptMemory
from rl.schedule import group_of
from rl.types import FinishReason, Group, Lease, Prompt, Rollout, Shaping
from rollout.budgets import BudgetPlan
from rollout.openings import ExitWords
from rollout.progress import total


def path_leases(
    prompts: Sequence[Prompt],
    plan: BudgetPlan,
    *,
    exits: int,
    step: int,
    run_seed: int,
    shaping: Shaping,
    min_version: int,
    memory: PromptMemory,
) -> tuple[Lease, ...]:
    """One lease per prompt: the full path that its group's exits will leave, and the last member of that group, number ``exits``.

    step: finished steps. A function of the arguments alone, like :func:`rl.leases.step_leases`.
    """
    groups = []
    for position, prompt in enumerate(prompts):
        (budget,) = plan.budgets(1, Turn(run_seed, step, position, prompt.id), memory)
        groups.append([plan.open(prompt, budget, step=step)])
    return make_leases(groups, step=step, run_seed=run_seed, shaping=shaping, min_version=min_version, first_member=exits)


def exit_leases(paths: Iterable[Rollout], words: ExitWords | None, *, exits: int, run_seed: int) -> tuple[Lease, ...]:
    """At most ``exits`` leases per path, which leave its thinking at different places, earliest first: members 0, 1, and so on.

    The prefill of a lease is the path's response up to its place and then the exit words, so later exits have longer prefills.
    Prompt, budget, shaping and cap on the response are the path's. :func:`exit_places` says which paths have fewer exits or none.
    A function of the paths' tokens and the run seed alone. Raises ValueError without exit words (`BudgetPlan.exit_words`).
    """
    if words is None:
        raise ValueError("exits need the words with which to leave: build the BudgetPlan from settings with rollout.exits")
    return tuple(lease for path in paths for lease in _exits_of(path, words, exits=exits, run_seed=run_seed))


def _exits_of(path: Rollout, words: ExitWords, *, exits: int, run_seed: int) -> list[Lease]:
    lease, ticket = path.lease, Ticket.read(path.lease.ticket)
    turn = Turn(run_seed, ticket.step, ticket.position, lease.prompt.id)
    first, last = exit_places(path, words)
    places = distinct(first, last, [turn.bits(member, what="exit") for member in range(exits)])
    leases = []
    for member, place in enumerate(places):
        name = replace(ticket, member=member)
        prefill = (*path.response_ids[:place], *words.ids)
        leases.append(
            replace(
                lease,
                ticket=name.name,
                member=member,
                prefill_ids=prefill,
                max_new_tokens=longest_response(lease) - len(prefill),
                seed=name.seed(run_seed, lease.prompt.id),
                attempt=0,
            )
        )
    return leases


def exit_places(path: Rollout, words: ExitWords) -> tuple[int, int]:
    """First and last number of response tokens after which the path's thinking can be left; an empty range where it cannot.

    The thinking is what the path generated before its first ``</think>``, or all of it where the cap cut it inside. At least one
    token of it is kept and at least one is left out, and room remains for the exit words and one token of answer. A path that
    stopped by itself without ``</think>`` shows no thinking to leave: it has no exits.
    """
    generated = path.response_ids[path.prefill_length :]
    if words.end in generated:
        thinking = generated.index(words.end)
    else:
        thinking = len(generated) if path.finish is FinishReason.LENGTH else 0
    room = longest_response(path.lease) - len(words.ids) - 1
    return path.prefill_length + 1, min(path.prefill_length + thinking - 1, room)


def longest_response(lease: Lease) -> int:
    """Cap on the response in tokens, prefill included, under which a lease without a hard budget was made."""
    return len(lease.prefill_ids) + lease.max_new_tokens


def merge(path_groups: Sequence[Group], exit_groups: Sequence[Group]) -> tuple[Group, ...]:
    """The groups of the paths, in their order, each with its exits in front: members by index, the full path last.

    A path that was lost has no exits, and its group stays empty; exits that were lost are simply missing.
    Raises ValueError for exits of a group that no path belongs to, and for a member that both have.
    """
    exits = {group_of(group.members[0].rollout.lease.ticket): group for group in exit_groups if group.members}
    merged = []
    for group in path_groups:
        members = list(group.members)
        if members and (found := exits.pop(group_of(members[0].rollout.lease.ticket), None)) is not None:
            members += found.members
        members.sort(key=lambda member: member.rollout.lease.member)
        if len({member.rollout.lease.member for member in members}) < len(members):
            raise ValueError(f"two members of group {group_of(members[0].rollout.lease.ticket)} have one index")
        merged.append(Group(group.prompt, tuple(members)))
    if exits:
        raise ValueError(f"exits of group {next(iter(exits))} leave a path that is not there")
    return tuple(merged)


def join(paths: Collected, exits: Collected) -> Collected:
    """The two collections of a step as one: groups by :func:`merge`, times and losses of both, engines put together by place."""
    pairs = zip_longest(paths.stats, exits.stats)
    return Collected(
        groups=merge(paths.groups, exits.groups),
        lost=(*paths.lost, *exits.lost),
        generate_s=paths.generate_s + exits.generate_s,
        score_s=paths.score_s + exits.score_s,
        stats=tuple(total([one for one in pair if one is not None]) for pair in pairs),
    )
