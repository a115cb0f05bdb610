"""What frozen models said of the pairs, kept in the run's folder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rl.manifest import CheckpointError
from rl.pair_columns import PairColumns, read_columns, split_column, write_columns
from rl.pairs import make_pair, to_batch

PAIRS = [make_pair((1, 2), (3, 4, 5), (6,)), make_pair((7,), (8,), (9, 9))]


def test_a_column_of_a_batch_comes_apart_into_answers_and_back_together() -> None:
    batch = to_batch(PAIRS)
    found = split_column(batch.token_T.float(), PAIRS)
    assert [[side.tolist() for side in found[pair.id]] for pair in PAIRS] == [[[3, 4, 5], [6]], [[8], [9, 9]]]
    reference, _ = PairColumns(found).of(PAIRS)
    again = to_batch(PAIRS, reference=reference).guidance.reference_T
    assert again is not None
    assert torch.equal(again[batch.loss_mask_T], batch.token_T.float()[batch.loss_mask_T])


def test_columns_are_read_back_under_their_key_and_under_no_other(tmp_path: Path) -> None:
    path = tmp_path / "pairs.safetensors"
    columns = PairColumns(split_column(torch.randn(to_batch(PAIRS).tokens), PAIRS), None)
    write_columns(path, columns, key="these pairs")
    found = read_columns(path, key="these pairs")
    assert found is not None and found.credit is None and found.reference is not None and columns.reference is not None
    for pair in PAIRS:
        assert all(torch.equal(a, b) for a, b in zip(found.reference[pair.id], columns.reference[pair.id], strict=True))
    assert read_columns(path, key="other pairs") is None
    assert read_columns(tmp_path / "nothing", key="these pairs") is None


def test_a_damaged_file_is_refused_with_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "pairs.safetensors"
    path.write_bytes(b"not tensors")
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_columns(path, key="k")
