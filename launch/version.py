"""The version of budget-rl, wherever it runs from."""

from __future__ import annotations

import tomllib
from importlib import metadata
from pathlib import Path

DISTRIBUTION = "budget-rl"


def project_version() -> str:
    """The version of the installed distribution, or of the checkout this file lies in."""
    try:
        return metadata.version(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        project = Path(__file__).resolve().parent.parent / "pyproject.toml"
        return f"{tomllib.loads(project.read_text(encoding='utf-8'))['project']['version']} (checkout, not installed)"
