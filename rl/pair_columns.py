"""What frozen models say of a run's pairs, computed once and kept in the run's folder: reference log-probs and token rewards."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from rl.guidance import Pair
from rl.manifest import CheckpointError

Both = tuple[torch.Tensor, torch.Tensor]
"""One value per token of the chosen answer, and one per token of the rejected one."""


@dataclass(frozen=True)
class PairColumns:
    """Columns of response tokens by pair id; None where the run needs none."""

    reference: dict[str, Both] | None = None
    """float32, nats: log-probs under the start policy."""
    credit: dict[str, Both] | None = None
    """float32: T-REG's token rewards."""

    def of(self, pairs: Sequence[Pair]) -> tuple[list[Both] | None, list[Both] | None]:
        """Reference and credit of the given pairs, in order."""
        found = [None if column is None else [column[pair.id] for pair in pairs] for column in (self.reference, self.credit)]
        return found[0], found[1]


def split_column(value_T: torch.Tensor, pairs: Sequence[Pair]) -> dict[str, Both]:
    """A column of `rl.pairs.to_batch(pairs)` (T) as one entry per pair, prompts left out."""
    found: dict[str, Both] = {}
    at = 0
    for pair in pairs:
        sides = []
        for ids in (pair.chosen_ids, pair.rejected_ids):
            at += len(pair.prompt_ids)
            sides.append(value_T[at : at + len(ids)].clone())
            at += len(ids)
        found[pair.id] = (sides[0], sides[1])
    return found


def write_columns(path: Path, columns: PairColumns, *, key: str) -> None:
    """Write the columns as safetensors, whole or not at all; ``key`` says what they belong to."""
    from safetensors.torch import save_file

    tensors: dict[str, torch.Tensor] = {}
    names: dict[str, list[str]] = {}
    for name, column in (("reference", columns.reference), ("credit", columns.credit)):
        if column is not None:
            names[name] = list(column)
            tensors[name] = torch.cat([side for both in column.values() for side in both])
            tensors[f"{name}_lengths"] = torch.tensor([side.numel() for both in column.values() for side in both])
    draft = path.with_name(f".{path.name}.part")
    save_file(tensors, draft, metadata={"key": key, "pairs": json.dumps(names)})
    draft.replace(path)


def read_columns(path: Path, *, key: str) -> PairColumns | None:
    """What :func:`write_columns` wrote under the same ``key``; None where there is nothing of that key.

    Raises CheckpointError when the file is damaged.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("key") != key:
                return None
            names = json.loads(metadata["pairs"])
            found = {
                name: _unpacked(ids, file.get_tensor(name), file.get_tensor(f"{name}_lengths")) for name, ids in names.items()
            }
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}", fix="remove the file: it is computed again") from error
    return PairColumns(**found)


def _unpacked(ids: Sequence[str], value_T: torch.Tensor, lengths: torch.Tensor) -> dict[str, Both]:
    sides = value_T.split(lengths.tolist())
    return {pair_id: (sides[2 * i], sides[2 * i + 1]) for i, pair_id in enumerate(ids)}
