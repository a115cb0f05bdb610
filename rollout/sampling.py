"""What vLLM is told: the options of an engine and the sampling parameters of each lease; and what it forced afterwards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rl.errors import BudgetRLError
from rl.rollout_settings import RolloutSettings
from rl.types import Lease
from rollout.markers import END_THINK, THINK
from rollout.parameters import to_extra_args


@dataclass(frozen=True)
class Markers:
    """Token ids that begin and end the thinking."""

    start: tuple[int, ...]
    end: tuple[int, ...]


def thinking_markers(tokenizer: Any) -> Markers:
    """The ids of ``<think>`` and ``</think>``; `rollout.openings` refuses hard budgets where one is more than a token."""
    start, end = (tuple(tokenizer.encode(text, add_special_tokens=False)) for text in (THINK, END_THINK))
    return Markers(start, end)


def engine_options(settings: RolloutSettings) -> dict[str, Any]:
    """Keyword arguments of vLLM's engine for shaping, hard budgets and speculation; empty when none is used."""
    options: dict[str, Any] = {}
    if settings.reflex is not None:
        reflex = settings.reflex
        options["logits_processors"] = ["rollout.processor:ShapingProcessor"]
        words = {"words": list(reflex.words), "leading_space": reflex.leading_space, "end": reflex.end}
        options["additional_config"] = {"budget_rl": words}
    elif settings.adaptive is not None:
        options["logits_processors"] = ["rollout.processor:TemperatureProcessor"]
    if settings.hard_budgets:
        options["reasoning_config"] = {"reasoning_start_str": THINK, "reasoning_end_str": END_THINK}
    if settings.speculative is not None:
        options["speculative_config"] = dict(settings.speculative)
    return options


def sampling_params(lease: Lease, *, stop_ids: Sequence[int], top_p: float = 1.0) -> Any:
    """vLLM's sampling parameters for one lease: its seed, cap, temperature, shaping and hard budget."""
    from vllm import SamplingParams

    return SamplingParams(
        temperature=lease.shaping.temperature,
        top_p=top_p,
        max_tokens=lease.max_new_tokens,
        seed=lease.seed,
        logprobs=0,
        flat_logprobs=True,
        detokenize=False,
        stop_token_ids=list(stop_ids),
        extra_args=to_extra_args(lease.shaping),
        thinking_token_budget=lease.budget.tokens if lease.budget.hard else None,
    )


def forced_positions(lease: Lease, generated: Sequence[int], logp: Sequence[float], markers: Markers | None) -> tuple[int, ...]:
    """Positions in ``prefill + generated`` whose token a hard budget forced, increasing.

    vLLM counts the tokens after the last ``<think>`` of prompt and prefill and forces ``</think>`` once they are as many as the
    budget. It hands a forced token back unmarked, with log-prob 0. Where the model writes ``<think>`` itself, inside its thinking
    or after it, vLLM's two model runners count differently; there an end marker of log-prob 0 is taken for forced, which costs
    nothing: a token of probability 1 has no gradient.

    Raises BudgetRLError when the engine did not force where the budget says, as it would under another way of counting.
    """
    if not lease.budget.hard or markers is None:
        return ()
    before = [*lease.prompt.token_ids, *lease.prefill_ids]
    everything = [*before, *generated]
    opened = _after_last(before, markers.start)
    if opened is None or opened <= (_after_last(before, markers.end) or 0):
        opened = _after_first(everything, markers.start, len(before))
    if opened is None:
        return ()
    due = max(opened + lease.budget.tokens, len(before))
    natural = _after_first(everything, markers.end, max(opened, len(before)))
    forced: list[int] = []
    closed_at = natural
    reopened = _after_first(everything[:due], markers.start, max(opened, len(before))) is not None
    if reopened:
        closed_at = max(opened, len(before))  # from there on certain marks decide
    elif (natural is None or natural - len(markers.end) >= due) and due < len(everything):
        # The cap may cut the marker short.
        expected = markers.end[: len(everything) - due]
        found = tuple(everything[due : due + len(expected)])
        if found != expected or any(logp[due - len(before) + k] != 0.0 for k in range(len(expected))):
            raise BudgetRLError(
                f"rollout {lease.ticket}: the engine did not end the thinking after {lease.budget.tokens} tokens, where its hard "
                f"budget says so (tokens {found} instead of {expected})",
                fix="report this: vLLM counts thinking tokens in another way than budget-rl expects",
            )
        forced += range(due, due + len(expected))
        closed_at = due + len(expected)
    place = len(everything) if closed_at is None else closed_at
    size = len(markers.end)
    while place + size <= len(everything):
        span = range(place, place + size)
        if tuple(everything[place : place + size]) == markers.end and all(logp[p - len(before)] == 0.0 for p in span):
            forced += span
            place += size
        else:
            place += 1
    offset = len(lease.prompt.token_ids)
    return tuple(position - offset for position in forced)


def _after_last(ids: Sequence[int], marker: Sequence[int]) -> int | None:
    """Position after the last occurrence of ``marker``; None where there is none."""
    size = len(marker)
    for place in range(len(ids) - size, -1, -1):
        if tuple(ids[place : place + size]) == tuple(marker):
            return place + size
    return None


def _after_first(ids: Sequence[int], marker: Sequence[int], start: int) -> int | None:
    """Position after the first occurrence of ``marker`` at or after ``start``."""
    size = len(marker)
    for place in range(start, len(ids) - size + 1):
        if tuple(ids[place : place + size]) == tuple(marker):
            return place + size
    return None
