"""Pairs of answers: built from scored rollouts, streamed, kept on disk, packed for the learner.

Pairs from data sets are rl/pair_files.py's.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from rl.batch import pack_rollouts
from rl.data import DataError
from rl.guidance import Guidance, Pair
from rl.run_folder import read_lines, replace_text
from rl.types import Budget, BudgetKind, FinishReason, Group, Lease, Prompt, Rollout, Scored, Shaping, TrainBatch

SHORTER = 0.8
"""Of two right answers, one is clearly shorter with at most this share of the other's tokens."""
NEAR = 0.1
"""A budget to be met exactly counts as kept within this share of it."""
FORMAT = 1

Columns = Sequence[tuple[torch.Tensor | None, torch.Tensor | None]]
"""Of each pair, a value per token of the chosen and of the rejected response; None where there is none."""


@dataclass(frozen=True)
class FoundPairs:
    """Pairs, and what became of everything that could have been one."""

    pairs: tuple[Pair, ...]
    counts: Mapping[str, int]
    """How many were looked at, and how many left out, by reason."""


def make_pair(prompt_ids: Sequence[int], chosen_ids: Sequence[int], rejected_ids: Sequence[int], question: str = "") -> Pair:
    """A pair with its id: the first 16 hexadecimal digits of the SHA-256 of its token ids."""
    sides = [list(prompt_ids), list(chosen_ids), list(rejected_ids)]
    name = hashlib.sha256(json.dumps(sides).encode()).hexdigest()[:16]
    return Pair(name, tuple(prompt_ids), tuple(chosen_ids), tuple(rejected_ids), question)


def turned_round(pair: Pair) -> Pair:
    """The pair with its answers exchanged, for reverse DPO."""
    return make_pair(pair.prompt_ids, pair.rejected_ids, pair.chosen_ids, pair.question)


def is_too_long(pair: Pair, max_length: int) -> bool:
    """Whether the prompt with either answer has more than ``max_length`` tokens."""
    return len(pair.prompt_ids) + max(len(pair.chosen_ids), len(pair.rejected_ids)) > max_length


# ---- from scored rollouts --------------------------------------------------------------------------------------------


def pairs_of(groups: Sequence[Group], *, per_prompt: int = 1, prefer_short: bool = True, max_length: int) -> FoundPairs:
    """Pairs of the best with the worst answers of each prompt: "short and right" before "long and right" before wrong.

    The answers of a prompt are ordered by: right; budget kept; with ``prefer_short`` fewer tokens. The best is paired with the
    worst, the second best with the second worst, ..., each answer in one pair at most, ``per_prompt`` pairs at most. Two answers
    make a pair only if they differ in rank: one is right and one wrong; both are right, one kept its budget and one did not; or,
    with ``prefer_short``, both are right, neither was asked for an exact length, and one has at most ``SHORTER`` times the tokens
    of the other. Two wrong answers never do.

    An answer whose verdict carries no score takes no part. Answers are compared only where their prompts are the same tokens,
    which a budget at the end of a question changes; a budget sentence that opens a response is part of it. A budget to be met
    exactly is kept within ``NEAR`` of it; one that the engine enforces is kept always.

    max_length: longest prompt + answer in tokens. Counts: ``prompts`` (with different tokens), ``unscored`` answers, ``flat``
    prompts (no pair of theirs differs in rank), ``too_long`` pairs.
    """
    pairs: list[Pair] = []
    counts = {"prompts": 0, "unscored": 0, "flat": 0, "too_long": 0}
    for group in groups:
        scored = [member for member in group.members if member.verdict.is_scored]
        counts["unscored"] += len(group.members) - len(scored)
        siblings: dict[tuple[int, ...], list[Scored]] = {}
        for member in scored:
            siblings.setdefault(member.rollout.lease.prompt.token_ids, []).append(member)
        for members in siblings.values():
            made = _best_with_worst(members, per_prompt=per_prompt, prefer_short=prefer_short)
            short = [pair for pair in made if not is_too_long(pair, max_length)]
            counts["prompts"] += 1
            counts["flat"] += not made
            counts["too_long"] += len(made) - len(short)
            pairs += short
    return FoundPairs(tuple(pairs), counts)


def _best_with_worst(members: Sequence[Scored], *, per_prompt: int, prefer_short: bool) -> list[Pair]:
    def place(member: Scored) -> tuple[bool, bool, int]:
        return not member.verdict.is_correct, not _kept(member.rollout), _excess(member.rollout) if prefer_short else 0

    ordered = sorted(members, key=place)  # stable: of equals, the earlier member is the better one
    opposite = list(zip(ordered, reversed(ordered), strict=True))[: len(ordered) // 2]
    prompt = members[0].rollout.lease.prompt
    pairs = [
        make_pair(prompt.token_ids, best.rollout.response_ids, worst.rollout.response_ids, prompt.question)
        for best, worst in opposite
        if _differ(best, worst, prefer_short=prefer_short)
    ]
    return pairs[:per_prompt]


def _differ(best: Scored, worst: Scored, *, prefer_short: bool) -> bool:
    if not best.verdict.is_correct or not worst.verdict.is_correct:
        return best.verdict.is_correct
    if _kept(best.rollout) != _kept(worst.rollout):
        return True
    exact = BudgetKind.EXACT in (best.rollout.lease.budget.kind, worst.rollout.lease.budget.kind)
    return prefer_short and not exact and best.rollout.length <= SHORTER * worst.rollout.length


def _kept(rollout: Rollout) -> bool:
    budget = rollout.lease.budget
    if budget.is_free or budget.hard:  # a hard budget bounds the thinking alone, and the engine keeps it
        return True
    return _excess(rollout) <= (NEAR * budget.tokens if budget.kind is BudgetKind.EXACT else budget.tokens)


def _excess(rollout: Rollout) -> int:
    """What to have less of: tokens, or their distance from a length to be met exactly."""
    budget = rollout.lease.budget
    return abs(rollout.length - budget.tokens) if budget.kind is BudgetKind.EXACT else rollout.length


# ---- as a stream, and on disk ----------------------------------------------------------------------------------------


def split_pairs(pairs: Sequence[Pair], held_out: int, *, seed: int) -> tuple[list[Pair], list[Pair]]:
    """Training pairs and ``held_out`` others, in their order; no prompt is on both sides.

    Prompts are drawn by ``seed`` until the pairs are enough; what a drawn prompt has beyond that is in neither part.
    Raises DataError where nothing would be left to train on.
    """
    prompts = list(dict.fromkeys(pair.prompt_ids for pair in pairs))
    random.Random(f"held-out pairs/{seed}").shuffle(prompts)
    per_prompt: dict[tuple[int, ...], int] = {}
    for pair in pairs:
        per_prompt[pair.prompt_ids] = per_prompt.get(pair.prompt_ids, 0) + 1
    drawn: set[tuple[int, ...]] = set()
    count = 0
    for prompt in prompts:
        if count >= held_out:
            break
        drawn.add(prompt)
        count += per_prompt[prompt]
    train = [pair for pair in pairs if pair.prompt_ids not in drawn]
    if not train:
        raise DataError(
            f"{len(pairs)} pairs of {len(prompts)} prompts leave none to train on beside {held_out} held out",
            fix="lower preference.pairs.held_out, or make more pairs: see the counts of what was dropped",
        )
    return train, [pair for pair in pairs if pair.prompt_ids in drawn][:held_out]


class PairStream:
    """An endless stream of pairs: epoch e is a permutation seeded by (seed, e), so a position is a single number.

    Raises:
        DataError: no pairs.
    """

    def __init__(self, pairs: Sequence[Pair], seed: int) -> None:
        if not pairs:
            raise DataError("there are no pairs to stream", fix="check preference.pairs, and the counts of what was dropped")
        self._pairs = tuple(pairs)
        self._seed = seed
        self._cached: tuple[int, list[int]] = (-1, [])

    def __len__(self) -> int:
        """Pairs of one epoch."""
        return len(self._pairs)

    def take(self, cursor: int, n: int) -> tuple[list[Pair], int]:
        """The `n` pairs from position `cursor` (0-based, counted over all epochs), and the next position.

        A pure function of (pairs, seed, cursor, n): no pair is dropped or repeated within an epoch; a request that crosses the
        end of one goes on into the next.
        """
        if cursor < 0 or n < 0:
            raise ValueError(f"cursor={cursor} and n={n} must not be negative")
        taken = []
        for position in range(cursor, cursor + n):
            epoch, index = divmod(position, len(self._pairs))
            taken.append(self._pairs[self._order(epoch)[index]])
        return taken, cursor + n

    def _order(self, epoch: int) -> list[int]:
        if self._cached[0] != epoch:
            order = list(range(len(self._pairs)))
            random.Random(f"pairs/{self._seed}/{epoch}").shuffle(order)
            self._cached = (epoch, order)
        return self._cached[1]


def pairs_digest(pairs: Iterable[Pair]) -> str:
    """SHA-256 over token ids and questions, in order: the same digest is the same pairs in the same order."""
    digest = hashlib.sha256()
    for pair in pairs:
        digest.update(_line(pair).encode())
    return digest.hexdigest()


def write_pairs(path: Path, pairs: Sequence[Pair]) -> str:
    """Write pairs as JSON lines behind one with their number and digest, all at once; returns the digest."""
    digest = pairs_digest(pairs)
    head = json.dumps({"format": FORMAT, "pairs": len(pairs), "sha256": digest}) + "\n"
    replace_text(path, head + "".join(map(_line, pairs)))
    return digest


def is_pairs_file(path: Path) -> bool:
    """Whether the file begins as `write_pairs` begins one: a run's own pairs, not a data set of texts."""
    if path.suffix != ".jsonl" or not path.is_file():
        return False
    with path.open(encoding="utf-8") as file:
        try:
            head = json.loads(file.readline())
        except ValueError:
            return False
    return isinstance(head, dict) and head.keys() >= {"format", "pairs", "sha256"}


def load_pairs(path: Path, *, digest: str | None = None) -> list[Pair]:
    """The pairs that `write_pairs` wrote there.

    digest: what their digest has to be, for a run that goes on with the very same pairs.

    Raises:
        DataError: no such file, a damaged one, or other pairs than those of ``digest``.
    """
    if not path.is_file():
        raise DataError(f"there is no file {path} with pairs", fix="start the preference stage anew: it makes the file")
    try:
        head, *rows = read_lines(path)
        pairs = [make_pair(row["prompt"], row["chosen"], row["rejected"], row["question"]) for row in rows]
        stated, known = head["sha256"], head["format"] == FORMAT
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} holds no pairs as this version writes them ({error})", fix="remove it and start anew") from error
    if not known or pairs_digest(pairs) != stated:
        raise DataError(f"{path} is damaged: its pairs do not have the digest that it states", fix="remove it and start anew")
    if digest is not None and digest != stated:
        raise DataError(
            f"{path} holds other pairs than the checkpoint was trained on (digest {stated[:16]}, not {digest[:16]})",
            fix="put the file of that run back, or start anew with resume=never",
        )
    return pairs


def _line(pair: Pair) -> str:
    sides = {"prompt": pair.prompt_ids, "chosen": pair.chosen_ids, "rejected": pair.rejected_ids, "question": pair.question}
    return json.dumps(sides) + "\n"


# ---- for the learner -------------------------------------------------------------------------------------------------


def to_batch(
    pairs: Sequence[Pair],
    minibatch_P: Sequence[int] | None = None,
    *,
    credit: Columns | None = None,
    reference: Columns | None = None,
) -> TrainBatch:
    """Pairs as training data: rollout 2k is the chosen answer of pair k, 2k+1 the rejected one; all their tokens carry loss.

    The advantage of a token is its side, +1 or -1. minibatch_P: the mini-batch of each pair (None: 0). credit, reference: T-REG's
    token rewards and the frozen start policy's log-probs (nats) of the response tokens; they become ``guidance.credit_T`` (0
    where None) and ``guidance.reference_T``, which has no gaps.

    Raises:
        ValueError: lengths that disagree, or a reference that lacks an answer.
    """
    rollouts = [_as_rollout(f"{k}.{side}", pair, ids) for k, pair in enumerate(pairs) for side, ids in enumerate(_sides(pair))]
    owner_P = [0] * len(pairs) if minibatch_P is None else list(minibatch_P)
    if len(owner_P) != len(pairs):
        raise ValueError(f"{len(pairs)} pairs and {len(owner_P)} mini-batch ids")
    batch = pack_rollouts(
        rollouts,
        torch.tensor([1.0, -1.0]).repeat(len(pairs)),
        torch.tensor(owner_P, dtype=torch.int64).repeat_interleave(2),
    )
    guidance = Guidance(
        credit_T=None if credit is None else _column(pairs, credit),
        reference_T=None if reference is None else _column(pairs, reference, gaps=False),
    )
    return replace(batch, pair_N=torch.arange(len(pairs)).repeat_interleave(2), guidance=guidance)


def _sides(pair: Pair) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return pair.chosen_ids, pair.rejected_ids


def _as_rollout(ticket: str, pair: Pair, response_ids: tuple[int, ...]) -> Rollout:
    prompt = Prompt(id=pair.id, question=pair.question, answer="", token_ids=pair.prompt_ids)
    lease = Lease(ticket, prompt, 0, Budget(0, BudgetKind.FREE, ""), Shaping(), (), len(response_ids), 0, 0)
    nothing_sampled = (float("nan"),) * len(response_ids)
    return Rollout(lease, response_ids, 0, nothing_sampled, FinishReason.STOP, 0, "")


def _column(pairs: Sequence[Pair], values: Columns, *, gaps: bool = True) -> torch.Tensor:
    """float32 (T): the values of the response tokens, 0 at the prompts."""
    if len(values) != len(pairs):
        raise ValueError(f"{len(pairs)} pairs and values for {len(values)}")
    parts = [torch.zeros(0)]
    for pair, both in zip(pairs, values, strict=True):
        for ids, value_T in zip(_sides(pair), both, strict=True):
            if value_T is None and not gaps:
                raise ValueError(f"pair {pair.id} lacks the reference log-probs of an answer")
            if value_T is not None and value_T.shape != (len(ids),):
                raise ValueError(f"pair {pair.id} has an answer of {len(ids)} tokens and values of shape {tuple(value_T.shape)}")
            filled_T = torch.zeros(len(ids)) if value_T is None else value_T.detach().float().cpu()
            parts += [torch.zeros(len(pair.prompt_ids)), filled_T]
    return torch.cat(parts)
