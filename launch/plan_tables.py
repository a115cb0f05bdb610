"""Shows what a run would do without starting it: the resolved settings, the batch sizes, the placement of actors."""

from __future__ import annotations

import os
import sys

import yaml
from rich.console import Console
from rich.table import Table

from launch.config import resolved_yaml
from launch.zoo_recipes import ZooPlan
from rl.budget_settings import describe_budgets
from rl.preflight import Plan, check_resources, derived_plan
from rl.redaction import redact_tree
from rl.settings import Settings
from rl.stage_settings import makes_its_teachers


def show_plan(settings: Settings, console: Console | None = None) -> None:
    """Print settings (secrets taken out), batch sizes and placement; no Ray is started, so only this machine is compared with."""
    console = console or Console(soft_wrap=True, highlight=False)
    shown = redact_tree(yaml.safe_load(resolved_yaml(settings)))
    console.print(yaml.safe_dump(shown, sort_keys=False, allow_unicode=True, width=120), markup=False)
    plan = derived_plan(settings)
    console.print(batch_table(plan))
    console.print(placement_table(plan))
    if makes_its_teachers(settings):
        console.print("first two runs of the preference stage make the teacher's models, in folders ending in -dpo and -reverse")
    # Whole and fractional shares that Ray cannot give are wrong on any cluster.
    check_resources(settings, cpus=float("inf"), gpus=float("inf"))
    cores = os.cpu_count() or 1
    if plan.cpus > cores + 1e-6:
        console.print(f"this machine has {cores} cores: the plan needs a larger Ray cluster or lower shares")


def show_zoo(zoo: ZooPlan, console: Console | None = None) -> None:
    """Print what a zoo would train: the folder, the allowance and one row per recipe."""
    console = console or Console(width=None if sys.stdout.isatty() else 130, highlight=False)
    console.print(f"{zoo.output}: each recipe {zoo.allowance:,} response tokens", markup=False, soft_wrap=True)
    table = Table("recipe", "reward", "advantage", "budgets", "rollouts per step", "steps at most", "evaluated every")
    for name, settings in ((recipe.name, recipe.settings) for recipe in zoo.recipes):
        method = (settings.reward.method, settings.advantage.estimator, describe_budgets(settings.rollout.budgets))
        rollouts = derived_plan(settings).rollouts_per_step
        table.add_row(name, *method, str(rollouts), str(settings.max_steps), f"{settings.eval.every} steps")
    console.print(table)
    for note in zoo.notes:
        console.print(f"note: {note}", markup=False, soft_wrap=True)


def batch_table(plan: Plan) -> Table:
    """The derived sizes of one step, one per row."""
    table = Table("derived", "value", title="One step", title_justify="left")
    table.columns[1].justify = "right"
    if plan.pairs_per_step:
        table.add_row("pairs", f"{plan.pairs_per_step:,}")
        table.add_row("optimiser updates", "1")
        return table
    rows = {
        "rollouts": plan.rollouts_per_step,
        **{f"rollouts with budget {label}": count for label, count in plan.rollouts_per_budget.items()},
        "rollouts per mini-batch": plan.rollouts_per_minibatch,
        "rollouts per mini-batch and rank, at most": plan.rollouts_per_rank,
        "optimiser updates": plan.updates_per_step,
        "tokens, at most (prompts and responses)": plan.tokens_per_step,
    }
    for name, value in rows.items():
        table.add_row(name, f"{value:,}")
    return table


def placement_table(plan: Plan) -> Table:
    """The Ray actors and what they reserve."""
    table = Table("actor", "count", "CPUs each", "GPUs each", "CPUs", "GPUs", title="Ray placement", title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
    for p in plan.placements:
        table.add_row(p.actor, str(p.count), f"{p.cpus:g}", f"{p.gpus:g}", f"{p.total_cpus:g}", f"{p.total_gpus:g}")
    table.add_section()
    table.add_row("all", "", "", "", f"{plan.cpus:g}", f"{plan.gpus:g}")
    return table
