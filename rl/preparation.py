"""What a run needs before any worker starts: the model folder (warm-started if so configured), tokenizer, prompts and budgets."""

from __future__ import annotations

import logging
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rl.console import Console
from rl.data import DataError, Problems, load_problems
from rl.embedded import build_tiny
from rl.models import local_folder
from rl.prompts import PromptEncoder, PromptStream, load_tokenizer
from rl.settings import Settings
from rl.types import Prompt
from rl.waiting import StopFlag
from rollout.budgets import BudgetPlan

log = logging.getLogger("budget_rl")


@dataclass(frozen=True)
class Prepared:
    """Everything the loop reads but never changes."""

    model: Path
    tokenizer: Any
    stream: PromptStream
    held_out: tuple[Prompt, ...]
    plan: BudgetPlan
    dropped: int
    dropped_share: float


@dataclass(frozen=True)
class Inputs:
    """What the configuration names, found and readable; nothing was started or trained for it."""

    problems: Problems
    model: Path | None
    """None where the warm start is to make it."""


def find_inputs(settings: Settings) -> Inputs:
    """The problems and the model folder, so that a wrong name is an error before Ray starts or the warm start trains.

    Raises DataError or ModelError where they cannot be had.
    """
    warm = settings.warm_start
    return Inputs(load_problems(settings.data, extra=warm.traces if warm else 0), None if warm else local_folder(settings.model))


def prepare_run(settings: Settings, inputs: Inputs, console: Console, stop: StopFlag | None = None) -> Prepared:
    """Model, prompts and budget plan; runs the warm start when it is configured and not cached.

    Raises DataError when too few prompts are left.
    """
    problems = inputs.problems
    model = inputs.model or warm_started(settings, problems, console, stop)
    tokenizer = load_tokenizer(settings.model.model_copy(update={"path": str(model), "gguf_file": None, "revision": None}))
    encoder = PromptEncoder(tokenizer, settings.data)
    prompts, dropped = encoder.encode_all(problems.train)
    held_out, dropped_held_out = encoder.encode_all(problems.held_out)
    if dropped or dropped_held_out:
        log.warning(
            "%d of %d prompts and %d held-out problems are longer than data.max_prompt_length=%d and were dropped",
            dropped,
            len(problems.train),
            dropped_held_out,
            settings.data.max_prompt_length,
        )
    if len(prompts) < settings.prompts_per_step or not held_out:
        raise DataError(
            f"{len(prompts)} prompts and {len(held_out)} held-out problems are left; a step needs {settings.prompts_per_step}",
            fix="raise data.size or data.max_prompt_length, or lower prompts_per_step or data.held_out",
        )
    return Prepared(
        model=model,
        tokenizer=tokenizer,
        stream=PromptStream(prompts, settings.seed),
        held_out=tuple(held_out[: settings.eval.problems]),
        plan=BudgetPlan(settings.rollout, tokenizer),
        dropped=dropped,
        dropped_share=dropped / max(len(problems.train), 1),
    )


def warm_started(settings: Settings, problems: Problems, console: Console, stop: StopFlag | None) -> Path:
    """The embedded tiny model after its supervised warm start, from the cache if it was made before."""
    from rl.sft import cached_folder, train_warm_start, update_count
    from rl.traces import make_traces

    warm = settings.warm_start
    assert warm is not None
    target = cached_folder(settings)
    if (target / "config.json").is_file():
        console.say(f"warm start: cached in {target}")
        return target
    started = time.monotonic()
    target.parent.mkdir(parents=True, exist_ok=True)  # the cache: a folder that the learners' nodes may share, unlike /tmp
    with tempfile.TemporaryDirectory(prefix="blank-", dir=target.parent) as scratch:
        blank = Path(scratch)
        build_tiny(blank, warm)
        tokenizer = load_tokenizer(settings.model.model_copy(update={"path": str(blank)}))
        encoder = PromptEncoder(tokenizer, settings.data)
        traces = make_traces(problems.extra, settings=warm, rollout=settings.rollout, tokenizer=tokenizer, encoder=encoder)
        updates = update_count(len(traces), warm.batch_size, warm.epochs)
        share = sum(trace.correct for trace in traces) / len(traces)
        console.say(f"warm start: {len(traces)} noisy worked traces ({share:.0%} end right), {updates} updates")
        with console.progress("warm start", total=updates) as advance:
            loss = train_warm_start(settings, traces, blank, target, advance=advance, stop=stop)
    console.say(f"warm start: loss {loss:.3f} nats/token after {time.monotonic() - started:.0f} s, kept in {target}")
    return target
