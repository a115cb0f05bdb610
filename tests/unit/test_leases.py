"""Leases: their names, seeds and caps, and that a second attempt at a step gets the same ones."""

from __future__ import annotations

import random

import pytest

from rl.coordinator import CloseStep, Coordinator, Generate, RolloutsArrived, Score, ScoresArrived, StepBegan
from rl.embedded import tiny_tokenizer
from rl.leases import Ticket, make_leases, step_leases, ticket_seed
from rl.memory import PromptMemory
from rl.prompts import PromptEncoder
from rl.settings import DataSettings, RolloutSettings
from rl.types import Lease, Prompt, Shaping
from rollout.budgets import BudgetPlan
from tests.builders import make_budget, make_opening, make_rollout, make_scored

SUFFIX = {"budget_place": "suffix", "budget_template": " I will answer with {budget} tokens"}


def leases_of(budgets: object, *, samples: int = 4, step: int = 7, run_seed: int = 3, **changes: object) -> tuple[Lease, ...]:
    """The leases of a step over the prompts `4 + 3 =`, `5 + 3 =` and, once more, `4 + 3 =`."""
    values = {"budgets": budgets, "samples_per_prompt": samples, "max_length": 160} | changes
    tokenizer = tiny_tokenizer()
    encoder = PromptEncoder(tokenizer, DataSettings(source="x.json"))
    plan = BudgetPlan(RolloutSettings.model_validate(values), tokenizer, encoder=encoder, max_steps=10)
    prompts = [Prompt(id=q, question=q, answer="7", token_ids=encoder.encode(q)) for q in ("4 + 3 =", "5 + 3 =", "4 + 3 =")]
    return step_leases(
        prompts,
        plan,
        samples=samples,
        step=step,
        run_seed=run_seed,
        shaping=Shaping(0.5),
        min_version=step,
        memory=PromptMemory(),
    )


def text(ids: tuple[int, ...]) -> str:
    return str(tiny_tokenizer().decode(list(ids)))


def test_leases_name_step_prompt_and_member_and_carry_what_they_start_from() -> None:
    groups = [[make_opening(p, make_budget(16), prefill_ids=(7, 8, 9)), make_opening(p, prefill_ids=(7,))] for p in range(2)]
    leases = make_leases(groups, step=12, run_seed=0, shaping=Shaping(0.5), min_version=12)
    assert [lease.ticket for lease in leases] == ["000012.0000.000", "000012.0000.001", "000012.0001.000", "000012.0001.001"]
    assert [(lease.prompt.id, lease.member) for lease in leases] == [("q0", 0), ("q0", 1), ("q1", 0), ("q1", 1)]
    assert [lease.budget.label for lease in leases] == ["16", "free", "16", "free"]
    assert [(lease.prefill_ids, lease.max_new_tokens) for lease in leases] == [((7, 8, 9), 61), ((7,), 63)] * 2
    assert {(lease.min_version, lease.shaping.temperature, lease.attempt) for lease in leases} == {(12, 0.5, 0)}


def test_members_may_be_counted_from_another_number_than_zero() -> None:
    leases = make_leases([[make_opening(0)]], step=12, run_seed=5, shaping=Shaping(), min_version=12, first_member=7)
    assert [(lease.ticket, lease.member, lease.seed) for lease in leases] == [
        ("000012.0000.007", 7, ticket_seed(5, 12, "0:q0", 7))
    ]


def test_a_ticket_says_step_place_and_member_and_is_read_back() -> None:
    assert Ticket.read("000012.0003.007") == Ticket(step=12, position=3, member=7)
    assert Ticket(12, 3, 7).name == "000012.0003.007"
    assert Ticket.read(Ticket(999_999, 12_345, 6).name) == Ticket(999_999, 12_345, 6)  # evaluations need more digits
    assert Ticket(2, 3, 4).seed(1, "q") == ticket_seed(1, 2, "3:q", 4)


def test_the_seed_of_a_rollout_is_a_31_bit_number_that_each_part_of_its_name_changes() -> None:
    seeds = [ticket_seed(1, 2, "q", 3), ticket_seed(0, 2, "q", 3), ticket_seed(1, 0, "q", 3), ticket_seed(1, 2, "r", 3)]
    seeds.append(ticket_seed(1, 2, "q", 0))
    assert len(set(seeds)) == 5
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert seeds[0] == 0x11B8F0BB  # hashlib.sha256(b"1|2|q|3").hexdigest()[:8], top bit cleared: runs repeat over versions


def test_a_list_gives_the_leases_it_always_gave() -> None:
    leases = leases_of([32, "free"])
    assert [lease.budget.label for lease in leases] == ["32", "32", "free", "free"] * 3
    assert [lease.max_new_tokens for lease in leases] == [150, 150, 159, 159] * 3
    assert [lease.seed for lease in leases[:2]] == [ticket_seed(3, 7, "0:4 + 3 =", m) for m in range(2)]
    assert text(leases[4].prefill_ids) == "<think> I will answer the question with 32 tokens"


@pytest.mark.parametrize(
    "budgets",
    [
        [16, 64],
        {"kind": "range", "low": 16, "high": 128},
        {"kind": "range", "low": 16, "high": 128, "scale": "log_uniform", "per": "member"},
        {"kind": "schedule", "start": 100},
        {"kind": "memory", "start": 64},
        {"kind": "effort"},
        {"kind": "effort", "levels": [0.5, 1]},
    ],
)
def test_a_step_that_is_tried_again_gets_the_same_leases_whatever_was_drawn_meanwhile(budgets: object) -> None:
    words = {"effort_template": "I will answer with {effort}"}
    first = leases_of(budgets, **words)
    random.seed(99)
    random.random()
    assert leases_of(budgets, **words) == first
    assert leases_of(budgets, run_seed=4, **words) != first


def test_drawn_budgets_differ_by_step_by_prompt_and_by_its_place() -> None:
    source = {"kind": "range", "low": 16, "high": 9000}
    drawn = [[lease.budget.tokens for lease in leases_of(source, step=step, max_length=9000)[::4]] for step in range(3)]
    assert len({budget for step in drawn for budget in step}) == 9  # three prompts, one of them twice, in three steps


def test_the_cap_of_a_lease_is_that_of_its_step() -> None:
    falling = {"length_schedule": [[0, 150], [7, 40]]}
    assert {lease.max_new_tokens for lease in leases_of(["free"], step=6, **falling)} == {149}
    assert {lease.max_new_tokens for lease in leases_of(["free"], step=7, **falling)} == {39}


def test_a_suffix_is_in_the_prompt_of_its_lease_and_in_no_others() -> None:
    leases = leases_of([16, "free"], **SUFFIX)[:4]
    assert [text(lease.prompt.token_ids) for lease in leases] == ["4 + 3 = I will answer with 16 tokens"] * 2 + ["4 + 3 ="] * 2
    assert {text(lease.prefill_ids) for lease in leases} == {"<think>"}
    assert {(lease.prompt.id, lease.prompt.question, lease.prompt.answer) for lease in leases} == {("4 + 3 =", "4 + 3 =", "7")}


def test_a_closed_group_has_the_prompt_of_its_first_member_whichever_were_lost_or_late() -> None:
    leases = leases_of([16, "free"], samples=2, **SUFFIX)[:2]
    for order in (leases, leases[::-1]):
        coordinator = Coordinator()
        (generate,) = coordinator.step(StepBegan(tuple(order), (0,)))
        assert isinstance(generate, Generate)
        (score,) = coordinator.step(RolloutsArrived(tuple(make_rollout(lease) for lease in order)))
        assert isinstance(score, Score)
        (close,) = coordinator.step(ScoresArrived(tuple(make_scored(rollout) for rollout in score.rollouts)))
        assert isinstance(close, CloseStep)
        assert close.groups[0].prompt == leases[0].prompt
