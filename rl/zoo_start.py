"""The one model that all recipes of a zoo begin with, and whether each recipe can begin with it."""

from __future__ import annotations

import importlib
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from rl.cluster import check_cluster, connect, disconnect
from rl.console import Console, redirect_library_chatter
from rl.data import load_problems
from rl.errors import BudgetRLError, ConfigError
from rl.models import at_folder, local_folder, longest_context
from rl.preparation import check_context, find_inputs, prepare_run, reflection_vocabulary
from rl.prompts import PromptEncoder, load_tokenizer
from rl.settings import Settings
from rl.waiting import StopFlag
from rollout.budgets import BudgetPlan


def make_start(base: Settings, folder: Path, console: Console, stop: StopFlag, *, log: Path) -> None:
    """Put the warm-started model of ``base`` into ``folder``, a copy, so that emptying the cache later changes nothing.

    Does nothing where it lies there already. Budget sentences and lists are part of what a warm start learns from, so a recipe
    with others would make, and begin with, another model. What libraries say goes to ``log``.
    """
    if (folder / "config.json").is_file():
        return
    inputs = find_inputs(base)
    importlib.import_module("ray")  # puts a console handler of its own in place, which the next line takes away
    redirect_library_chatter(log)
    model = inputs.model
    if model is None:
        try:
            resources = connect()
            stop.arm()
            check_cluster(base, resources)
            model = prepare_run(base, inputs, console, stop).model
        finally:
            disconnect()
            stop.arm()
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(model, partial)
    os.rename(partial, folder)


def check_on_start(recipes: Mapping[str, Settings]) -> None:
    """Raise BudgetRLError naming the recipe that does not fit its model: words it cannot spell, or no room for them.

    Every recipe has the same model and data.
    """
    first = next(iter(recipes.values()))
    model = local_folder(first.model)
    tokenizer = load_tokenizer(at_folder(first.model, model))
    # One problem is enough to see how prompts end, and is there at once.
    problem = load_problems(first.data.model_copy(update={"size": 1, "held_out": 1})).held_out[0]
    for name, settings in recipes.items():
        try:
            check_context(settings, longest_context(model))
            encoder = PromptEncoder(tokenizer, settings.data)
            plan = BudgetPlan(settings.rollout, tokenizer, encoder=encoder, max_steps=settings.max_steps)
            prompts, _ = encoder.encode_all([problem], suffix=plan.longest_suffix())
            plan.check(prompts[0])
            reflection_vocabulary(settings.rollout.reflex, tokenizer)
        except BudgetRLError as error:
            raise ConfigError(f"recipe {name}: {error.cause}", fix=error.fix) from None
