"""What a learner rank keeps between steps and over a resume, without a process group."""

from __future__ import annotations

import random
import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from rl.learner_worker import gathered, load_random_state, save_random_state


def _draw() -> list[float]:
    """From every generator; the odd number of Gaussian draws leaves a second one waiting in Python and NumPy."""
    return [random.gauss(0, 1), random.random(), float(np.random.randn()), float(np.random.rand()), float(torch.rand(()))]


def _seed(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def test_every_generator_goes_on_where_it_was_saved(tmp_path: Path) -> None:
    _seed(1)
    _draw()
    save_random_state(tmp_path / "rng", 3)
    expected = [_draw() for _ in range(3)]
    _seed(2)
    load_random_state(tmp_path / "rng", 3)
    assert [_draw() for _ in range(3)] == expected
    assert sorted(p.name for p in (tmp_path / "rng").iterdir()) == ["learner-3.json", "learner-3.safetensors"]


def test_a_checkpoint_with_torchs_state_alone_still_loads(tmp_path: Path) -> None:
    _seed(1)
    save_random_state(tmp_path, 0)
    (tmp_path / "learner-0.json").unlink()
    expected = float(torch.rand(()))
    _seed(2)
    python = random.getstate()
    load_random_state(tmp_path, 0)
    assert float(torch.rand(())) == expected
    assert random.getstate() == python


def _weights(alive: list[int], references: list[weakref.ref[torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    for i in range(4):
        tensor = torch.full((2,), float(i))
        references.append(weakref.ref(tensor))
        yield f"w{i}", tensor
        del tensor
        alive.append(sum(reference() is not None for reference in references))


def test_a_rank_that_needs_no_weights_takes_part_to_the_end_and_holds_one_at_a_time() -> None:
    alive: list[int] = []
    assert gathered(_weights(alive, []), keep=False) is None
    assert len(alive) == 4 and max(alive) <= 1


def test_the_first_rank_gets_all_weights() -> None:
    weights = gathered(_weights([], []), keep=True)
    assert weights is not None
    assert [(name, float(tensor[0])) for name, tensor in weights] == [(f"w{i}", float(i)) for i in range(4)]
