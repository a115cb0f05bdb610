"""How many tokens a rollout adds to the run."""

from __future__ import annotations

from rl.generation import new_tokens
from rl.settings import Settings
from tests.builders import make_lease, make_rollout

BASE = {"model": {"path": "m"}, "data": {"source": "x.json"}, "max_steps": 1}


def test_an_exit_adds_only_what_it_generated_and_everything_else_its_whole_response() -> None:
    exits = Settings.model_validate(BASE | {"rollout": {"exits": 2, "samples_per_prompt": 3}})
    rollouts = [make_rollout(make_lease(member=m, prefill_ids=[7] * prefill)) for m, prefill in enumerate((5, 9, 1))]
    assert [new_tokens(r, exits) for r in rollouts] == [2, 2, 3]
    assert [new_tokens(r, Settings.model_validate(BASE)) for r in rollouts] == [7, 11, 3]
