"""Figures of reward functions, by hand."""

from __future__ import annotations

from dataclasses import replace

from rl.function_metrics import function_metrics
from rl.types import FunctionScore, Group
from tests.builders import make_prompt, make_scored


def test_a_function_is_reported_before_its_weight_with_its_extras_and_failures() -> None:
    said = [
        FunctionScore("judge", "ok", 1.0, extras={"style": 0.5}),
        FunctionScore("judge", "ok", 0.0, extras={"style": 0.0}),
        FunctionScore("judge", "none"),
        FunctionScore("judge", "crashed"),
    ]
    members = tuple(replace(make_scored(), functions=(score,)) for score in said)
    assert function_metrics([Group(make_prompt(), members)]) == {
        "function/judge": 0.5, "function/judge/failed": 0.25, "function/judge/style": 0.25,
    }  # fmt: skip
    assert function_metrics([Group(make_prompt(), (make_scored(),))]) == {}
