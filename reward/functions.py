"""Anyone's reward function: found by its path, its convention told by the names of its parameters.

TRL's convention: ``f(prompts=, completions=, completion_ids=, **columns)``; verl's: ``f(data_source=, solution_str=,
ground_truth=, extra_info=)``, and its batched form with the plural names. What they are given and may give back is in
reward/function_calls.py. Used in the child process, so nothing heavy is imported.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import itertools
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from rl.errors import ConfigError

Convention = Literal["trl", "verl", "verl_batch"]
TRL_GIVES = ("prompts", "completions", "completion_ids", "prompt_ids", "trainer_state", "log_extra", "log_metric")
VERL_GIVES = ("data_source", "solution_str", "ground_truth", "extra_info")
VERL_BATCH_GIVES = ("data_sources", "solution_strs", "ground_truths", "extra_infos")
_GIVES: Mapping[Convention, tuple[str, ...]] = {"trl": TRL_GIVES, "verl": VERL_GIVES, "verl_batch": VERL_BATCH_GIVES}
_TELLING: Mapping[Convention, frozenset[str]] = {
    "trl": frozenset({"prompts", "completions", "completion_ids"}),
    "verl": frozenset({"solution_str"}),
    "verl_batch": frozenset({"solution_strs"}),
}
"""A parameter of one of these names tells the convention."""
CONVENTIONS = (
    "TRL's f(completions, **kwargs) -> list, one item per completion; or "
    "verl's f(data_source, solution_str, ground_truth, extra_info) -> number or dict"
)
_FORMS = "write FILE.py:NAME or package.module:NAME"
_TRACEBACK_LINES = 6


class RewardFunctionError(ConfigError):
    """A function of `reward.functions` cannot be called: it is not there, does not import, or takes other arguments."""


@dataclass(frozen=True)
class RewardFunction:
    """A loaded function and how to call it."""

    call: Callable[..., Any]
    convention: Convention
    names: frozenset[str]
    """Of its parameters."""
    required: frozenset[str]
    """Those without a default."""
    takes_any: bool
    """Whether it has ``**kwargs``."""
    arguments: Mapping[str, Any]
    """From the configuration; they win over what the convention gives."""
    is_async: bool

    @property
    def takes_batches(self) -> bool:
        """Whether one call serves many answers; an async function's calls wait together."""
        return self.convention != "verl" or self.is_async

    def bound(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The keyword arguments of a call: of those given the ones it takes, then its own.

        Raises RewardFunctionError for a parameter that nothing gives.
        """
        kwargs = {name: value for name, value in given.items() if self.takes_any or name in self.names}
        kwargs.update(self.arguments)
        missing = sorted(self.required - kwargs.keys())
        if missing:
            known = ", ".join(sorted(given))
            raise RewardFunctionError(
                f"the function needs {missing[0]!r}, which nothing gives (there are: {known})",
                fix="add a column of that name to the data, put it into `arguments`, or give the parameter a default",
            )
        return kwargs


def absolute_path(path: str) -> str:
    """``FILE.py:NAME`` with the file made absolute; a module's path comes back as it is."""
    place, colon, name = path.rpartition(":")
    return f"{Path(place).expanduser().absolute()}{colon}{name}" if _is_file(place) else path


def load_function(path: str) -> Callable[..., Any]:
    """Import what ``FILE.py:NAME`` or ``package.module:NAME`` names; a file's folder becomes importable.

    Raises RewardFunctionError: no such file, module or name, an import that raises (with its last lines), nothing callable.
    """
    place, _, name = path.rpartition(":")
    if not place or not name.isidentifier():
        raise RewardFunctionError(f"{path!r} names no function", fix=_FORMS)
    module = _import_file(Path(place).expanduser()) if _is_file(place) else _import_module(place)
    try:
        found = getattr(module, name)
    except AttributeError:
        functions = [n for n, member in vars(module).items() if callable(member) and not n.startswith("_")]
        raise RewardFunctionError(f"{place} has no function {name!r}{_nearest(name, functions)}", fix=_FORMS) from None
    except (Exception, SystemExit) as error:  # a module may import what it is asked for only now, as trl.rewards does
        raise _import_error(place, error) from error
    if not callable(found):
        raise RewardFunctionError(
            f"{name} in {place} is of type {type(found).__name__} and cannot be called", fix="name a function"
        )
    return found


def _is_file(place: str) -> bool:
    return place.endswith(".py") or "/" in place


def _import_file(file: Path) -> ModuleType:
    if not file.is_file():
        siblings = [p.name for p in file.parent.glob("*.py")] if file.parent.is_dir() else []
        raise RewardFunctionError(f"there is no file {file}{_nearest(file.name, siblings)}", fix=_FORMS)
    folder = str(file.parent.absolute())
    sys.path[:] = [folder, *(p for p in sys.path if p != folder)]
    # A file may be called like a module that is loaded already, such as json.py; it must not take that one's place.
    name = file.stem if file.stem not in sys.modules else f"reward_function_{file.stem}"
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise RewardFunctionError(f"{file} is no Python file", fix=_FORMS)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise _import_error(str(file), error) from error
    return module


def _import_module(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and f"{name}.".startswith(f"{error.name}."):
            fix = "install it, put its folder on PYTHONPATH, or write FILE.py:NAME"
            raise RewardFunctionError(f"there is no module {error.name}", fix=fix) from error
        raise _import_error(name, error) from error
    except (Exception, SystemExit) as error:
        raise _import_error(name, error) from error


def _import_error(place: str, error: BaseException) -> RewardFunctionError:
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename != __file__ and "importlib" not in f.filename]
    text = "".join([*traceback.format_list(frames), *traceback.format_exception_only(error)])
    lines = text.strip().splitlines()[-_TRACEBACK_LINES:]
    by_hand = f"python {place}" if _is_file(place) else f'python -c "import {place}"'
    return RewardFunctionError("\n    ".join([f"{place} cannot be imported:", *lines]), fix=f"see what {by_hand} says")


def fit_function(
    call: Callable[..., Any], *, convention: str = "auto", arguments: Mapping[str, Any] | None = None
) -> RewardFunction:
    """Tell the convention by the names of the parameters (``auto``) and check that they can be given.

    Raises RewardFunctionError: the signature fits neither convention or not the one asked for, takes a parameter that the
    convention does not give, or does not take one of ``arguments``.
    """
    arguments = arguments or {}
    try:
        parameters = inspect.signature(call).parameters.values()
    except (TypeError, ValueError) as error:
        raise RewardFunctionError(f"its parameters cannot be read ({error})", fix="wrap it in a def of your own") from error
    by_name = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    names = frozenset(p.name for p in by_name)
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
    shown = f"({', '.join(str(p).partition('=')[0].partition(':')[0].strip() for p in parameters)})"
    chosen = _convention(names, takes_any, convention, shown)
    required = frozenset(p.name for p in by_name if p.default is p.empty)
    for name in arguments:
        if not takes_any and name not in names:
            raise RewardFunctionError(f"the function has no parameter {name!r} of `arguments`{_nearest(name, names)}")
    lacking = sorted(required - set(_GIVES[chosen]) - arguments.keys())
    if lacking and chosen != "trl":  # TRL's may be columns of the data, which are known when it is called
        raise RewardFunctionError(
            f"the function needs {lacking[0]!r}, which verl's convention does not give (it gives {', '.join(_GIVES[chosen])})",
            fix="put it into `arguments`, or give the parameter a default",
        )
    is_async = inspect.iscoroutinefunction(call) or inspect.iscoroutinefunction(type(call).__call__)
    return RewardFunction(call, chosen, names, required, takes_any, arguments, is_async)


def _convention(names: frozenset[str], takes_any: bool, asked: str, shown: str) -> Convention:
    fitting: list[Convention] = [c for c, telling in _TELLING.items() if telling & names]
    if asked == "auto" and len(fitting) == 1:
        return fitting[0]
    if asked == "auto":
        how = "fits both conventions" if fitting else "fits neither convention"
        raise RewardFunctionError(
            f"the signature {shown} {how}: {CONVENTIONS}",
            fix="rename its parameters or set `convention`; of a function that makes one, name what it makes: reward = make(...)",
        )
    for found in fitting:
        if found.removesuffix("_batch") == asked:
            return found
    if takes_any:
        return "trl" if asked == "trl" else "verl"
    raise RewardFunctionError(f"the signature {shown} does not fit convention={asked}; there are: {CONVENTIONS}")


def _nearest(name: str, known: Iterable[str]) -> str:
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {close[0]}?"
    return f" (there are: {', '.join(itertools.islice(names, 20))})" if names else ""
