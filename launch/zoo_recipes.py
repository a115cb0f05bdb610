"""What a zoo trains: each recipe's own keys laid over one configuration, made comparable, and checked before anything runs."""

from __future__ import annotations

import difflib
import math
import os
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf

from launch.config import PACKAGED, find_config, leaves, load_settings, resolved_yaml, settings_from_mapping
from rl.budget_settings import BudgetSchedule, budget_bounds
from rl.errors import ConfigError
from rl.preflight import derived_plan
from rl.settings import Settings
from rl.stage_settings import makes_its_teachers

ALL = "all"
BASE = "base"
"""In place of a recipe: the configuration as it is."""
EVALUATIONS = 4
"""Evaluations of a recipe, about, where eval.every does not say."""
SHORTEST_MEAN = 8
"""A recipe stops for max_steps only if its answers come to have, on average, less than this part of max_length."""
RESERVED = ("start", "zoo", "quickstart")
"""Names that folders, rows or files of a zoo have."""
SAME = ("model", "data", "eval", "tracking", "seed", "rollout.max_length")
"""What has to be the same for all recipes, or their figures could not be compared."""
FREE = ("eval.shaped", "eval.with_budgets", "eval.before", "data.size")
"""Of these, what a recipe decides: how its answers are decoded, on how many problems it trains, and what the zoo itself sets."""
OWN = ("output.dir", "output.name", "resume")
"""Settings that a zoo needs for itself."""
WORDS = ("budget_template", "free_template", "budget_place")
_NAME = re.compile(r"\w[\w.-]*")


@dataclass(frozen=True)
class Recipe:
    """One method, ready to be trained."""

    name: str
    settings: Settings


@dataclass(frozen=True)
class ZooPlan:
    """All that is known before anything runs."""

    base: Settings
    """The configuration with the overrides; the start is made from it."""
    output: Path
    """Absolute folder of the zoo."""
    allowance: int
    """Response tokens that each recipe may spend on training."""
    recipes: tuple[Recipe, ...]
    notes: tuple[str, ...]
    """What a reader of the table should know."""

    @property
    def start_folder(self) -> Path:
        """Where the model lies that a warm start makes; recipes on a model of the user's own do not need it."""
        return self.output / "start"

    def config_of(self, name: str) -> Path:
        """The resolved settings of a recipe, or of the start."""
        return self.output / "configs" / f"{name}.yaml"

    def run_of(self, name: str) -> Path:
        """The run folder of a recipe; their parent holds the MLflow store."""
        return self.output / "runs" / name


def plan_zoo(
    config: Path, names: str, overrides: Sequence[str], *, output: Path | None = None, max_tokens: int | None = None
) -> ZooPlan:
    """Settings of all recipes in ``names`` (with commas between; see `find_recipes`) over ``config``.

    ``overrides`` hold for every recipe and come last; ``max_tokens`` is the allowance, see `token_allowance`; ``output`` defaults
    to ``~/budget-rl/zoo-<name of the configuration>``. Raises ConfigError naming the recipe that cannot be trained or compared.
    """
    for text in overrides:
        if (key := text.lstrip("+~").partition("=")[0]) in OWN:
            raise ConfigError(
                f"{key} belongs to the zoo, which gives each recipe its own", fix="leave it out; --output moves all"
            )
    base = load_settings(config, overrides)
    sources = find_recipes(names)
    folder = (output or Path("~/budget-rl") / f"zoo-{find_config(config).stem}").expanduser()
    empty = ZooPlan(base, Path(os.path.abspath(folder)), token_allowance(base, max_tokens), (), ())
    recipes = tuple(_recipes(sources, empty, overrides, skip=ALL in [text.strip() for text in names.split(",")]))
    notes = [note for recipe in recipes for note in _notes(recipe, base)]
    return ZooPlan(base, empty.output, empty.allowance, recipes, tuple(notes))


class NotCompared(ConfigError):
    """A recipe that learns from something else than rewarded rollouts: equal tokens of these would compare nothing."""


def _recipes(
    sources: Mapping[str, Path | None], plan: ZooPlan, overrides: Sequence[str], *, skip: bool
) -> Iterator[Recipe]:
    """The recipes with their settings; ``skip``: those that cannot be compared are left out instead of refused."""
    for name, source in sources.items():
        try:
            yield Recipe(name, _settings(name, source, plan, overrides))
        except NotCompared:
            if not skip:
                raise


def find_recipes(names: str) -> dict[str, Path | None]:
    """Name -> file, in the order asked for: packaged recipes by name, others by their path ending in .yaml.

    ``all`` is every packaged one (those that a zoo cannot compare are left out later); ``base``, without a file, the
    configuration itself. Raises ConfigError for a name that is unknown or comes twice.
    """
    packaged = {file.stem: file for file in sorted((PACKAGED / "recipes").glob("*.yaml"))}
    found: dict[str, Path | None] = {}
    asked = [text.strip() for text in names.split(",") if text.strip()]
    for each in [name for text in asked for name in (packaged if text == ALL else [text])]:
        name, source = _found(each, packaged)
        if name in found:
            raise ConfigError(f"--recipes names {name} twice", fix="leave one out, or rename your file")
        found[name] = source
    if not found:
        raise ConfigError("--recipes names no recipe", fix=f"write names with commas between, or {ALL}: {', '.join(packaged)}")
    return found


def _found(text: str, packaged: Mapping[str, Path]) -> tuple[str, Path | None]:
    if text == BASE:
        return BASE, None
    if text in packaged:
        return text, packaged[text]
    if not text.endswith((".yaml", ".yml")):
        near = difflib.get_close_matches(text, [*packaged, BASE, ALL], n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(
            f"there is no recipe {text}{hint}", fix=f"use {', '.join(packaged)}, {BASE}, {ALL}, or the path of a .yaml file"
        )
    file = find_config(Path(text))
    if not _NAME.fullmatch(file.stem) or file.stem in (*RESERVED, BASE, ALL):
        raise ConfigError(f"{text}: a recipe cannot be called {file.stem!r} here", fix="rename the file")
    return file.stem, file


def token_allowance(base: Settings, max_tokens: int | None) -> int:
    """Response tokens for each recipe: as asked, else max_tokens of the configuration, else what its max_steps would take.

        max_steps * rollouts per step * max_length / 2

    Raises ConfigError where none of them is there, both are, or nothing is allowed.
    """
    if max_tokens is not None and base.max_tokens not in (None, max_tokens):
        raise ConfigError(f"--max-tokens {max_tokens} and max_tokens={base.max_tokens} contradict each other", fix="give one")
    if max_tokens is not None and max_tokens < 1:
        raise ConfigError(f"--max-tokens {max_tokens} lets no recipe train", fix="give a number above 0")
    if (given := max_tokens or base.max_tokens) is not None:
        return given
    if base.max_steps is None:
        raise ConfigError("nothing says how many tokens each recipe may spend", fix="add --max-tokens N")
    return max(1, base.max_steps * derived_plan(base).rollouts_per_step * base.rollout.max_length // 2)


# -- one recipe --------------------------------------------------------------------------------------------------------------


def _settings(name: str, source: Path | None, plan: ZooPlan, overrides: Sequence[str]) -> Settings:
    """The recipe over the base, then what the comparison needs; ConfigError naming the recipe."""
    shown = str(source or name)
    try:
        composed = _composed(name, source, plan, overrides, shown=shown)
        if composed.stage != "rl" or makes_its_teachers(composed):
            raise NotCompared(
                f"recipe {name} learns from pairs or from a teacher, and a zoo compares what rewards do with equal tokens",
                fix="leave it out, and train it by itself: budget-rl train",
            )
        _check_comparable(composed, plan.base, warm=plan.base.warm_start is not None)
        return settings_from_mapping(_comparable(name, composed, plan), origin=shown)
    except NotCompared:
        raise
    except ConfigError as error:
        raise ConfigError(f"recipe {name}: {error.cause}", fix=error.fix) from None


def _composed(name: str, source: Path | None, plan: ZooPlan, overrides: Sequence[str], *, shown: str) -> Settings:
    """Hydra composes a copy of the recipe beside a file called quickstart.yaml, which is the base: files beside it come first."""
    with tempfile.TemporaryDirectory(prefix="budget-rl-zoo-") as scratch:
        file = Path(scratch).resolve() / f"{name}.yaml"
        (file.parent / "quickstart.yaml").write_text(_base_yaml(plan), encoding="utf-8")
        file.write_text(_recipe_yaml(source), encoding="utf-8")
        try:
            # The start is there, or will be: a recipe never makes one of its own.
            return load_settings(file, [*overrides, "warm_start=null", *_model_override(plan)])
        except ConfigError as error:
            raise ConfigError(error.cause.replace(str(file), shown), fix=error.fix) from None


def _base_yaml(plan: ZooPlan) -> str:
    tree = plan.base.model_dump(mode="json")
    if plan.base.warm_start is not None:
        tree["model"]["path"] = str(plan.start_folder)
    tree["warm_start"] = None
    budgets = tree["rollout"]["budgets"]
    # In brackets a section can be replaced by a recipe's list, and the reverse; see rl.budget_settings.only_section.
    tree["rollout"]["budgets"] = budgets if isinstance(budgets, list) else [budgets]
    return OmegaConf.to_yaml(OmegaConf.create(tree))


def _recipe_yaml(source: Path | None) -> str:
    """The recipe's text; one without `defaults:` is taken to build on the configuration, too."""
    head = "defaults: [/quickstart, _self_]\n"
    if source is None:
        return head
    try:
        text = source.read_text(encoding="utf-8")
        content = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{source} cannot be read: {error}") from None
    return text if isinstance(content, dict) and "defaults" in content else head + text


def _model_override(plan: ZooPlan) -> list[str]:
    """Behind the user's `model=embedded`, which names what the start is made from."""
    if plan.base.warm_start is None:
        return []
    path = str(plan.start_folder).replace("\\", "\\\\").replace('"', '\\"')
    return [f'model.path="{path}"']


def _check_comparable(composed: Settings, base: Settings, *, warm: bool) -> None:
    old, new = (dict(leaves(settings.model_dump(mode="json"))) for settings in (base, composed))
    made = {"model.path"} if warm else set()
    for key in sorted(old.keys() | new.keys()):
        held = any(key == name or key.startswith(f"{name}.") for name in SAME)
        if held and key not in FREE and key not in made and old.get(key) != new.get(key):
            raise ConfigError(
                f"{key}={new.get(key)}, where the configuration has {old.get(key)}: figures could not be compared",
                fix=f"take it out of the recipe, or add {key}=VALUE to the command, which holds for all",
            )


def _comparable(name: str, composed: Settings, plan: ZooPlan) -> dict[str, Any]:
    """The settings with the zoo's own: allowance, evaluations, folder."""
    tree = composed.model_dump(mode="json")
    rollouts, longest = derived_plan(composed).rollouts_per_step, composed.rollout.max_length
    tree["max_tokens"] = plan.allowance
    if composed.max_steps is None or not _needs_its_steps(composed):
        tree["max_steps"] = math.ceil(SHORTEST_MEAN * plan.allowance / (rollouts * longest))
    if isinstance(composed.rollout.budgets, BudgetSchedule) and composed.rollout.budgets.steps is None:
        tree["rollout"]["budgets"]["steps"] = composed.max_steps
    expected_steps = 2 * plan.allowance // (rollouts * longest)
    tree["eval"]["every"] = composed.eval.every or max(1, expected_steps // EVALUATIONS)
    if "with_budgets" not in plan.base.eval.model_fields_set:
        tree["eval"]["with_budgets"] = composed.eval.with_budgets or has_budgets(composed)
    tree["eval"]["after"] = True
    tree["output"] |= {"dir": str(plan.run_of(name)), "name": None}
    tree["resume"] = "auto"
    return tree


def _needs_its_steps(settings: Settings) -> bool:
    """Whether max_steps means more than the end of the run: a learning rate falls until then, or prompts are measured ahead."""
    return settings.learner.lr_schedule != "constant" or settings.reward.needs_reference


def has_budgets(settings: Settings) -> bool:
    """Whether members are asked for numbers of tokens."""
    return budget_bounds(settings.rollout.budgets, room=settings.rollout.max_length) is not None


def _notes(recipe: Recipe, base: Settings) -> list[str]:
    settings, name = recipe.settings, recipe.name
    changed = [f"rollout.{key}" for key in WORDS if getattr(settings.rollout, key) != getattr(base.rollout, key)]
    notes = []
    if base.warm_start is not None and changed:
        notes.append(f"{name} changes {', '.join(changed)}: words that the warm-started model has not learnt from")
    if base.warm_start is not None and not isinstance(settings.rollout.budgets, list):
        notes.append(f"{name} asks for budgets that the warm-started model may not have learnt from")
    if _needs_its_steps(settings):
        notes.append(f"{name} ends at max_steps={settings.max_steps}, which its method needs, or when the tokens are spent")
    if settings.data.size != base.data.size:
        notes.append(f"{name} trains on data.size={settings.data.size} problems, the configuration says {base.data.size}")
    if settings.eval.shaped:
        notes.append(f"{name} is evaluated with its shaped sampling, the start plainly")
    return notes


# -- on disk -----------------------------------------------------------------------------------------------------------------


def write_configs(plan: ZooPlan) -> None:
    """Write the settings of the start and of every recipe into the folder; ConfigError where it holds others of a name.

    What may change is what a resumed run may change of placement, deadlines and tracking. The files are readable by their owner
    alone, for a tracking address may hold a password.
    """
    wanted = {"start": plan.base, **{recipe.name: recipe.settings for recipe in plan.recipes}}
    changes = [line for name, settings in wanted.items() for line in _changes(name, plan.config_of(name), settings)]
    if changes:
        raise ConfigError(
            f"{plan.output} holds a zoo of other settings (of the start, or of a recipe):\n" + "\n".join(changes),
            fix="set them back to go on, or give another --output",
        )
    for name, settings in wanted.items():
        file = plan.config_of(name)
        file.parent.mkdir(parents=True, exist_ok=True)
        draft = file.with_suffix(".partial")
        draft.touch(mode=0o600)
        draft.write_text(resolved_yaml(settings), encoding="utf-8")
        draft.replace(file)


def _changes(name: str, file: Path, settings: Settings) -> list[str]:
    """``name: key: old -> new`` for each setting that differs from the file and decides what the figures are."""
    from rl.manifest import incompatible_keys
    from rl.redaction import redact

    if not file.is_file():
        return []
    old, new = yaml.safe_load(file.read_text(encoding="utf-8")), settings.model_dump(mode="json")
    was, now = dict(leaves(old)), dict(leaves(new))
    # A resumed run may be evaluated otherwise and go on for longer; recipes that are compared may not.
    strict = [key for key in was.keys() | now.keys() if key.startswith(("eval.", "max_")) and was.get(key) != now.get(key)]
    keys = sorted({*incompatible_keys(old, new), *strict})
    return [redact(f"  {name}: {key}: {_value(old, key)} -> {_value(new, key)}") for key in keys]


def _value(tree: Mapping[str, Any], key: str) -> Any:
    """The value under a dotted key; None where there is none."""
    value: Any = tree
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value
