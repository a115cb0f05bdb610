"""``budget-rl reward-check``: which function, tried on which questions; the trial itself is reward/check.py."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from launch.config import load_settings
from reward.check import SAMPLE_PROBLEMS, check_function, show_findings
from reward.functions import absolute_path
from rl.data import Problem, load_problems
from rl.errors import ConfigError
from rl.reward_settings import FunctionSettings
from rl.settings import DataSettings, Settings

DEADLINE_S = 30.0


def run_reward_check(
    path: str,
    *,
    config: Path | None = None,
    data: str | None = None,
    convention: str | None = None,
    samples: int = 4,
    deadline_s: float | None = None,
) -> int:
    """Try the function ``path`` and print a table; returns 1 if a check failed, else 0.

    Questions come from ``data`` (a file or ``reasoning_gym:TASK``), from ``config``, which also says what `reward.functions` has
    of this function, or are a few sums. Raises ConfigError or DataError where those cannot be read.
    """
    if samples < 1 or (deadline_s is not None and deadline_s <= 0):
        raise ConfigError(f"--samples {samples} and --deadline-s {deadline_s} must be positive")
    settings = None if config is None else load_settings(config)
    function = FunctionSettings(path=path) if settings is None else _configured(path, settings)
    if convention is not None:
        function = FunctionSettings.model_validate({**function.model_dump(), "convention": convention})
    if deadline_s is None:
        deadline_s = DEADLINE_S if settings is None else settings.reward.function_deadline_s
    source = settings.data if settings is not None else None if data is None else DataSettings(source=data)
    findings = check_function(
        function,
        SAMPLE_PROBLEMS[:samples] if source is None else _problems(source, samples),
        deadline_s=deadline_s,
        data_source="sample" if source is None else source.source,
        system_prompt=None if source is None else source.system_prompt,
    )
    show_findings(findings)
    return 1 if any(finding.status == "FAILED" for finding in findings) else 0


def _configured(path: str, settings: Settings) -> FunctionSettings:
    """What the configuration says of the function; a function that it does not name is taken as it is."""
    same = [f for f in settings.reward.functions if absolute_path(f.path) == absolute_path(path)]
    return same[0] if same else FunctionSettings(path=path)


def _problems(data: DataSettings, samples: int) -> Sequence[Problem]:
    return load_problems(data.model_copy(update={"size": samples, "held_out": 1})).train
