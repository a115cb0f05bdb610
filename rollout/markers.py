"""The marks between which a reasoning model thinks."""

from __future__ import annotations

THINK = "<think>"
END_THINK = "</think>"
