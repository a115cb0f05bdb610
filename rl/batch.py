"""From scored rollouts to packed training data and on to padded micro-batches; every step is exactly reversible."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from rl.behaviour import Vocabulary, replayed_bias
from rl.guidance import Guidance
from rl.types import Rollout, TrainBatch


def pack_rollouts(
    rollouts: Sequence[Rollout],
    advantage_N: torch.Tensor,
    minibatch_N: torch.Tensor,
    *,
    token_advantages: Sequence[torch.Tensor | None] | None = None,
    train_prefix: bool = True,
    vocabulary: Vocabulary | None = None,
) -> TrainBatch:
    """Pack rollouts into one ragged batch: prompt + response of each, one after the other.

    ``advantage_N`` (float, N) is spread over the response tokens of its rollout; prompt tokens carry no loss, and the budget
    sentence only when ``train_prefix``; what a hard budget forced carries none. ``token_advantages``: per rollout float (response
    length) or None, added to it. ``vocabulary`` is needed where a rollout has a
    reflection bias. Raises ValueError when the lengths disagree or a prompt is empty.
    """
    if not len(rollouts) == advantage_N.numel() == minibatch_N.numel():
        raise ValueError(f"{len(rollouts)} rollouts, {advantage_N.numel()} advantages, {minibatch_N.numel()} mini-batch ids")
    tokens: list[int] = []
    starts, prompt_lengths, prefill_lengths = [0], [], []
    mask: list[bool] = []
    sampled: list[float] = []
    bias: list[torch.Tensor] = []
    for rollout in rollouts:
        prompt = rollout.lease.prompt.token_ids
        if not prompt:
            raise ValueError(f"rollout {rollout.lease.ticket} has no prompt token, so nothing predicts its first response token")
        prefill, generated = rollout.prefill_length, rollout.length - rollout.prefill_length
        if generated != len(rollout.logp_T):
            raise ValueError(f"rollout {rollout.lease.ticket}: {generated} generated tokens but {len(rollout.logp_T)} log-probs")
        tokens += [*prompt, *rollout.response_ids]
        starts.append(len(tokens))
        prompt_lengths.append(len(prompt))
        prefill_lengths.append(prefill)
        forced = set(rollout.forced)
        kept = [place not in forced for place in range(prefill, rollout.length)]
        mask += [False] * len(prompt) + [train_prefix] * prefill + kept
        drawn = [logp if keep else float("nan") for logp, keep in zip(rollout.logp_T, kept, strict=True)]
        sampled += [float("nan")] * (len(prompt) + prefill) + drawn
        bias += [torch.zeros(len(prompt) + prefill), replayed_bias(rollout, vocabulary)]
    start_N = torch.tensor(starts, dtype=torch.int64)
    loss_mask_T = torch.tensor(mask, dtype=torch.bool)
    spread_T = advantage_N.float().repeat_interleave(start_N.diff())
    for end, added_T in zip(starts[1:], token_advantages or (), strict=False):
        if added_T is not None:
            spread_T[end - added_T.numel() : end] += added_T
    return TrainBatch(
        token_T=torch.tensor(tokens, dtype=torch.int64),
        start_N=start_N,
        prompt_length_N=torch.tensor(prompt_lengths, dtype=torch.int64),
        prefill_length_N=torch.tensor(prefill_lengths, dtype=torch.int64),
        loss_mask_T=loss_mask_T,
        advantage_T=torch.where(loss_mask_T, spread_T, torch.zeros_like(spread_T)),
        sampled_logp_T=torch.tensor(sampled, dtype=torch.float32),
        temperature_N=torch.tensor([r.lease.shaping.temperature for r in rollouts], dtype=torch.float32),
        minibatch_N=minibatch_N.to(torch.int64),
        bias_T=torch.cat(bias),
        index_N=torch.arange(len(rollouts)),
    )


def unpack_tokens(batch: TrainBatch) -> list[list[int]]:
    """Token ids of every rollout (prompt + response), in order: the inverse of packing."""
    return [batch.token_T[a:b].tolist() for a, b in zip(batch.start_N[:-1].tolist(), batch.start_N[1:].tolist(), strict=True)]


def select_rollouts(batch: TrainBatch, index: Sequence[int]) -> TrainBatch:
    """The sub-batch of the given rollouts, in the given order."""
    lengths = batch.start_N.diff()
    picked = torch.tensor(list(index), dtype=torch.int64)
    positions = [torch.arange(int(batch.start_N[i]), int(batch.start_N[i + 1])) for i in index]
    position_T = torch.cat(positions) if positions else torch.zeros(0, dtype=torch.int64)
    start_N = torch.cat([torch.zeros(1, dtype=torch.int64), lengths[picked].cumsum(0)])
    return TrainBatch(
        token_T=batch.token_T[position_T],
        start_N=start_N,
        prompt_length_N=batch.prompt_length_N[picked],
        prefill_length_N=batch.prefill_length_N[picked],
        loss_mask_T=batch.loss_mask_T[position_T],
        advantage_T=batch.advantage_T[position_T],
        sampled_logp_T=batch.sampled_logp_T[position_T],
        temperature_N=batch.temperature_N[picked],
        minibatch_N=batch.minibatch_N[picked],
        bias_T=batch.bias_T[position_T],
        index_N=batch.index_N[picked],
        pair_N=None if batch.pair_N is None else batch.pair_N[picked],
        guidance=batch.guidance.map(lambda column: column[position_T]),
    )


def units_of(batch: TrainBatch, index: Sequence[int]) -> list[list[int]]:
    """The given rollouts in parts that must meet in one forward pass: pairs, else each rollout by itself."""
    if batch.pair_N is None:
        return [[i] for i in index]
    units: dict[int, list[int]] = {}
    for i in index:
        units.setdefault(int(batch.pair_N[i]), []).append(i)
    return list(units.values())


def plan_microbatches(
    lengths: Sequence[int], token_budget: int, units: Sequence[Sequence[int]] | None = None
) -> list[list[int]]:
    """Group rollouts of similar length so that rows x longest <= token_budget; longest first, so that memory peaks at once.

    Returns lists of indices; ``units`` (None: each rollout) stay together, and one larger than the budget gets a micro-batch of
    its own. Padding is what sorting leaves: 6 % on the quickstart. Packs were slower, 1.06x to 1.71x the longer the row
    (`python -m tests.benchmarks.layout`).
    """
    parts = [[i] for i in range(len(lengths))] if units is None else units
    longest_of = [max(lengths[i] for i in part) for part in parts]
    plan: list[list[int]] = []
    longest = 0
    for p in sorted(range(len(parts)), key=lambda p: (-longest_of[p], p)):
        if plan and (len(plan[-1]) + len(parts[p])) * longest <= token_budget:
            plan[-1] += parts[p]
        else:
            plan.append(list(parts[p]))
            longest = longest_of[p]
    return plan


@dataclass(frozen=True)
class MicroBatch:
    """Right-padded rows of one forward pass. Causal attention alone keeps real tokens from seeing the padding on their right.

    ``position_T`` indexes the flattened (rows x width) grid at the positions that *predict* the R response tokens of all rows.
    """

    token_BS: torch.Tensor
    """int64 (rows, width)."""
    position_T: torch.Tensor
    """int64 (R)."""
    target_T: torch.Tensor
    """int64 (R): the response tokens."""
    source_T: torch.Tensor
    """int64 (R): where each response token stands in the TrainBatch."""
    row_T: torch.Tensor
    """int64 (R): each response token's row."""
    index_B: torch.Tensor
    """int64 (rows): each row's rollout, by TrainBatch.index_N; -1 for a row that only keeps ranks in step."""
    mask_T: torch.Tensor
    """bool (R): whether the token carries loss."""
    advantage_T: torch.Tensor
    sampled_logp_T: torch.Tensor
    temperature_T: torch.Tensor
    """float32 (R): base temperature."""
    bias_T: torch.Tensor
    """float32 (R), nats."""
    padding: int
    """Padded tokens in the grid."""
    pair_B: torch.Tensor
    """int64 (rows): TrainBatch.pair_N; -1 where there are no pairs."""
    side_B: torch.Tensor
    """int64 (rows): 1 for the chosen answer of a pair, -1 for the rejected one, 0 without pairs."""
    guidance: Guidance
    """Columns of the R response tokens."""


def pad_rows(batch: TrainBatch, index: Sequence[int]) -> MicroBatch:
    """Lay the given rollouts out as rows; an empty index gives a row of two tokens that carries no loss."""
    if not index:
        one = torch.zeros(1, dtype=torch.int64)
        return MicroBatch(
            token_BS=torch.zeros((1, 2), dtype=torch.int64),
            position_T=one,
            target_T=one,
            source_T=one,
            row_T=one,
            index_B=one - 1,
            mask_T=torch.zeros(1, dtype=torch.bool),
            advantage_T=torch.zeros(1),
            sampled_logp_T=torch.full((1,), float("nan")),
            temperature_T=torch.ones(1),
            bias_T=torch.zeros(1),
            padding=2,
            pair_B=one - 1,
            side_B=one,
            guidance=batch.guidance.map(_one_row),
        )
    starts, ends = batch.start_N[:-1].tolist(), batch.start_N[1:].tolist()
    width = max(ends[i] - starts[i] for i in index)
    token_BS = torch.zeros((len(index), width), dtype=torch.int64)
    positions, sources, temperatures, owners = [], [], [], []
    for row, i in enumerate(index):
        length, prompt = ends[i] - starts[i], int(batch.prompt_length_N[i])
        token_BS[row, :length] = batch.token_T[starts[i] : ends[i]]
        positions.append(torch.arange(row * width + prompt - 1, row * width + length - 1))
        sources.append(torch.arange(starts[i] + prompt, ends[i]))
        owners.append(torch.full((length - prompt,), row))
        temperatures.append(batch.temperature_N[i].expand(length - prompt))
    source_T = torch.cat(sources)
    return MicroBatch(
        token_BS=token_BS,
        position_T=torch.cat(positions),
        target_T=batch.token_T[source_T],
        source_T=source_T,
        row_T=torch.cat(owners),
        index_B=batch.index_N[torch.tensor(list(index))],
        mask_T=batch.loss_mask_T[source_T],
        advantage_T=batch.advantage_T[source_T],
        sampled_logp_T=batch.sampled_logp_T[source_T],
        temperature_T=torch.cat(temperatures),
        bias_T=batch.bias_T[source_T],
        padding=token_BS.numel() - sum(ends[i] - starts[i] for i in index),
        pair_B=torch.full((len(index),), -1) if batch.pair_N is None else batch.pair_N[torch.tensor(list(index))],
        side_B=torch.tensor([_side(batch, i) for i in index]),
        guidance=batch.guidance.map(lambda column: column[source_T]),
    )


def _side(batch: TrainBatch, i: int) -> int:
    """Whether rollout i is the chosen or the rejected answer of its pair: the sign of its advantage."""
    return 0 if batch.pair_N is None else int(batch.advantage_T[int(batch.start_N[i + 1]) - 1].sign())


def _one_row(column: torch.Tensor) -> torch.Tensor:
    """One row that stands for no token; ids count up, because those of a row are distinct."""
    if column.dtype == torch.int64 and column.dim() == 2:
        return torch.arange(column.shape[1])[None]
    return column.new_zeros((1, *column.shape[1:]))
