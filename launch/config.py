"""From a YAML file and ``a.b=c`` overrides to checked :class:`rl.settings.Settings`; imports neither torch nor Ray.

Three steps, each by the library that owns it: Hydra composes the files (``defaults:`` lists), its own grammar reads the
overrides and OmegaConf applies them, pydantic checks the result. Nothing named by a configuration is ever imported or called.
"""

from __future__ import annotations

import json
import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir, version
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, QuotedString
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError

from launch.config_errors import explain_validation
from rl.budget_settings import only_section
from rl.errors import ConfigError
from rl.settings import Settings

PACKAGED = Path(__file__).resolve().parent.parent / "configs"
"""The configurations that ship with the project: a sibling of this package in a checkout and in a wheel."""

SHORTHANDS = {"model": "path", "data": "source"}
"""``model=NAME`` means ``model.path=NAME`` and ``data=NAME`` means ``data.source=NAME``."""

PROFILE = "hardware"
"""``hardware=NAME`` lays configs/hardware/NAME.yaml over the file, below the other overrides."""

EMBEDDED_MODEL = "embedded"
"""``model.path`` of the model that the warm start makes."""

_MIXED = "Cannot merge DictConfig with ListConfig"
_PLAIN_INTERPOLATION = re.compile(r"\$\{[A-Za-z_]\w*(\.\w+)*\}")


def load_settings(path: Path, overrides: Sequence[str] = ()) -> Settings:
    """Compose the YAML file ``path``, apply ``a.b=c`` overrides in order and check the result.

    ``model=NAME`` and ``data=NAME`` set ``model.path`` and ``data.source``; a new source drops the inherited ``data.task``,
    whose parameters belong to the old one. Raises ConfigError with every problem found, one per line.
    """
    file = find_config(path)
    # Overrides first: a mistake on the command line is the likelier one.
    parsed = [_parse_override(text) for text in overrides]
    return _settings_from_tree(_compose(file), parsed, origin=str(path))


def settings_from_mapping(mapping: Mapping[str, Any], overrides: Sequence[str] = (), *, origin: str) -> Settings:
    """Check settings that were saved as a mapping (a checkpoint's), with overrides; ``origin`` names them in errors."""
    parsed = [_parse_override(text) for text in overrides]
    return _settings_from_tree(OmegaConf.create(dict(mapping)), parsed, origin=origin)


def resolved_yaml(settings: Settings) -> str:
    """All settings, defaults included, as YAML that :func:`load_settings` reads back to an equal value."""
    return OmegaConf.to_yaml(OmegaConf.create(settings.model_dump(mode="json")))


def find_config(path: Path) -> Path:
    """The absolute path of an existing configuration file; ConfigError with what there is otherwise."""
    file = path.expanduser()
    if file.suffix == ".yml" and file.exists():
        raise ConfigError(f"{path}: configuration files end in .yaml", fix=f"mv {path} {path.with_suffix('.yaml')}")
    if file.is_file() and file.suffix == ".yaml":
        return file.resolve()
    if file.exists():
        raise ConfigError(f"{path} is not a .yaml file", fix="name a configuration file, such as configs/quickstart.yaml")
    available = "\n".join(f"    {shown}" for shown in _available())
    raise ConfigError(
        f"there is no configuration file {path} (looked from {Path.cwd()})\n  available:\n{available}",
        fix="use one of these or an absolute path. Under `ray job submit` the directory is the one where `ray start` ran; "
        "submit with `--working-dir .` to take the current one along",
    )


def _available() -> list[str]:
    local = sorted(Path("configs").glob("*.yaml"))
    found = local or sorted(PACKAGED.glob("*.yaml"))
    return [str(file) for file in found] or ["(none)"]


def _parse_override(text: str) -> Override:
    try:
        override = OverridesParser.create().parse_override(text)
    except (HydraException, ValueError) as error:
        raise ConfigError(
            f"cannot read the override {text!r}: {str(error).splitlines()[0]}",
            fix="write key=value; quote text with spaces or signs twice, for the shell and for the value: "
            "'rollout.free_template=\"<think> \"'; lists are [1,2], nothing is null",
        ) from None
    if override.is_sweep_override():
        raise ConfigError(f"the override {text!r} is a sweep over several values", fix="give one value; run once per value")
    if override.package is not None:
        raise ConfigError(f"the override {text!r} names a package with @", fix="write the full key, such as learner.lr=1e-5")
    return override


def _profile(override: Override) -> Path:
    profiles = {file.stem: file for file in sorted((PACKAGED / PROFILE).glob("*.yaml"))}
    name = str(override.value())
    if name not in profiles:
        raise ConfigError(f"there is no {PROFILE} profile {name!r}", fix=f"use one of {', '.join(profiles)}")
    return profiles[name]


def _compose(file: Path) -> DictConfig:
    """Hydra composition of one file; the process's own Hydra state, if it has one, is put back afterwards."""
    _check_file(file)
    outer, outer_base = GlobalHydra.instance().hydra, version.getbase()
    GlobalHydra.instance().clear()
    searchpath = json.dumps(f"file://{PACKAGED}")
    try:
        with warnings.catch_warnings(), initialize_config_dir(str(file.parent), job_name="budget-rl", version_base="1.3"):
            # Without `_self_` the file's own keys win, which is what people mean; Hydra warns about a past change of that rule.
            warnings.filterwarnings("ignore", message=".*missing `_self_`", category=UserWarning)
            return compose(file.name, overrides=[f"hydra.searchpath=[{searchpath}]"])
    except yaml.YAMLError as error:
        raise ConfigError(f"{file} or a file it composes is not valid YAML: {_first_lines(error)}") from None
    except RecursionError:
        raise ConfigError(
            f"{file}: `defaults:` leads back to the file itself", fix="files beside it come before the packaged ones; rename it"
        ) from None
    except (HydraException, OmegaConfBaseException, ValueError, TypeError, AssertionError, AttributeError) as error:
        if _MIXED in str(error):
            raise ConfigError(
                f"{file} cannot be composed: a section in it has the place of a list in a file it builds on, or the reverse",
                fix="write the section as a list of one: rollout.budgets may be [{kind: range, low: 16, high: 128}]",
            ) from None
        # Hydra raises plain errors, too, for a `defaults:` list of the wrong form.
        raise ConfigError(
            f"{file} cannot be composed: {_first_lines(error, count=1)}",
            fix=f"`defaults:` may name files beside it or in {PACKAGED}, without .yaml, such as `- /quickstart`",
        ) from None
    finally:
        GlobalHydra.instance().hydra = outer
        version.VersionBase.instance().version_base = outer_base


def _check_file(file: Path) -> None:
    """Refuse what Hydra would report badly: unreadable text, broken YAML, a file that is no mapping, Hydra's own settings."""
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{file} is not valid YAML: {_first_lines(error)}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{file} holds no settings", fix="write `key: value` lines, or `defaults: [/quickstart]`")
    if "hydra" in content:
        raise ConfigError(f"{file} configures Hydra itself", fix="remove its `hydra:` section")
    if "${" in str(content.get("defaults", "")):
        raise ConfigError(f"{file}: `defaults:` holds an interpolation", fix="name the files plainly")


def _first_lines(error: Exception, *, count: int = 6) -> str:
    return "\n    ".join(line for line in str(error).splitlines()[:count] if line.strip())


def _settings_from_tree(composed: DictConfig, overrides: Sequence[Override], *, origin: str) -> Settings:
    """Overrides, interpolation and validation of a composed tree."""
    # Composition marks the tree as fixed; unknown keys are to reach the validation below, which names the nearest.
    raw = OmegaConf.to_container(composed, resolve=False)
    assert isinstance(raw, dict)
    for section, key in SHORTHANDS.items():
        if isinstance(raw.get(section), str):
            raw[section] = {key: raw[section]}
    if isinstance(rollout := raw.get("rollout"), dict) and "budgets" in rollout:
        rollout["budgets"] = only_section(rollout["budgets"])  # so that an override reaches into it
    tree = OmegaConf.create(raw)
    profiles = [override for override in overrides if override.key_or_group == PROFILE]
    named = [override for override in overrides if _is_shorthand(override)]
    for override in profiles:
        tree.merge_with(OmegaConf.load(_profile(override)))
    for override in named:
        _apply_shorthand(tree, override)
    for override in overrides:
        if override not in named and override not in profiles:
            _apply(tree, override)
    data = _plain(tree, origin)
    try:
        # Through JSON, so that strict types still take a YAML list for a tuple; "8" or true for a number are refused.
        settings = Settings.model_validate_json(json.dumps(data), strict=True)
    except ValidationError as error:
        raise ConfigError(f"{origin} is not a valid configuration:\n{explain_validation(error, data)}") from None
    _check_model_is_used(settings)
    return settings


def _is_shorthand(override: Override) -> bool:
    return override.key_or_group in SHORTHANDS and isinstance(override.value(), str) and not override.is_delete()


def _apply_shorthand(tree: DictConfig, override: Override) -> None:
    section, name = override.key_or_group, override.value()
    key = f"{section}.{SHORTHANDS[section]}"
    if section == "data" and OmegaConf.select(tree, key) != name:
        OmegaConf.update(tree, "data.task", {}, merge=False, force_add=True)
    OmegaConf.update(tree, key, name, force_add=True)


def _apply(tree: DictConfig, override: Override) -> None:
    key = override.key_or_group
    try:
        if override.is_delete():
            _delete(tree, key)
        else:
            value = _unquoted(override.value())
            there = OmegaConf.select(tree, key)
            # A section goes into the section that is there; it takes the place of a list, and a list of a section.
            OmegaConf.update(tree, key, value, merge=isinstance(value, dict) == OmegaConf.is_dict(there), force_add=True)
    except (OmegaConfBaseException, AttributeError, TypeError, ValueError) as error:
        raise ConfigError(f"the override {override.input_line!r} cannot be applied: {_first_lines(error, count=1)}") from None


def _delete(tree: DictConfig, key: str) -> None:
    parent, _, last = key.rpartition(".")
    section = OmegaConf.select(tree, parent) if parent else tree
    if not isinstance(section, DictConfig) or last not in section:
        raise ConfigError(f"the override ~{key} removes a key that is not set")
    del section[last]


def _unquoted(value: Any) -> Any:
    """Quoted texts inside lists and mappings come out of Hydra's grammar wrapped."""
    if isinstance(value, QuotedString):
        return value.text
    if isinstance(value, list):
        return [_unquoted(item) for item in value]
    if isinstance(value, dict):
        return {_unquoted(key): _unquoted(item) for key, item in value.items()}
    return value


def _plain(tree: DictConfig, origin: str) -> dict[str, Any]:
    """The tree as plain values with ``${a.b}`` replaced; resolvers are refused, so no environment variable can leak."""
    raw = OmegaConf.to_container(tree, resolve=False)
    for key, value in leaves(raw):
        if isinstance(value, str) and "${" in _PLAIN_INTERPOLATION.sub("", value):
            raise ConfigError(
                f"{origin}: {key}: {value!r} calls a resolver", fix="only ${section.key} is allowed; write the value itself"
            )
    try:
        data = OmegaConf.to_container(tree, resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{origin}: {_first_lines(error, count=1)}", fix="${section.key} must name a key that is set") from None
    assert isinstance(data, dict)
    for key, value in leaves(data):
        if value == "???":
            raise ConfigError(f"{origin}: {key} is marked ??? and must be set", fix=f"add {key}=VALUE")
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{origin}: {key}={value} is not a finite number")
        if value is not None and not isinstance(value, str | int | float | bool):
            raise ConfigError(f"{origin}: {key}: a {type(value).__name__} is no text, number, list or mapping")
    return data  # type: ignore[return-value]


def leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Every scalar of nested mappings and lists with its dotted key."""
    if isinstance(value, Mapping):
        pairs = [(str(name), item) for name, item in value.items()]
    elif isinstance(value, list):
        pairs = [(str(index), item) for index, item in enumerate(value)]
    else:
        yield key, value
        return
    for name, item in pairs:
        yield from leaves(item, f"{key}.{name}" if key else name)


def _check_model_is_used(settings: Settings) -> None:
    """The warm start makes its own model; a model named beside it would silently never be trained."""
    warm, path = settings.warm_start is not None, settings.model.path
    if warm and path != EMBEDDED_MODEL:
        raise ConfigError(
            f"model.path={path} would not be used: warm_start makes the embedded model",
            fix="add warm_start=null to train the model you named",
        )
    if not warm and path == EMBEDDED_MODEL:
        raise ConfigError(f"model.path={EMBEDDED_MODEL} needs warm_start, which makes that model", fix="add warm_start={}")
