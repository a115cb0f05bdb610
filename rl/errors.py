"""The errors a person is meant to read: each names the cause and, where there is one, the fix.

The command line prints them without a traceback; everything else that is raised is a defect and gets one.
"""

from __future__ import annotations


class BudgetRLError(Exception):
    """An error with a cause the user can act on; ``str()`` is the cause, then the fix on its own line."""

    def __init__(self, cause: str, *, fix: str = "") -> None:
        super().__init__(cause, fix)
        self.cause = cause
        self.fix = fix

    def __str__(self) -> str:
        return f"{self.cause}\n  fix: {self.fix}" if self.fix else self.cause

    def __reduce__(self) -> tuple[object, ...]:
        # Ray sends exceptions between processes; the default rule would pass `fix` as a positional argument.
        return _rebuild, (type(self), self.cause, self.fix)


def _rebuild(kind: type[BudgetRLError], cause: str, fix: str) -> BudgetRLError:
    return kind(cause, fix=fix)


class ConfigError(BudgetRLError):
    """The configuration cannot be run as it is written."""


class ModelError(BudgetRLError):
    """A model cannot be found or read, or does not fit in memory."""
