"""What a run needs before any worker starts: the model folder (warm-started if so configured), tokenizer, prompts and budgets.

`find_inputs` says all that can be said against a configuration without starting or training anything; `prepare_run` trains.
"""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reward.teacher_files import Sources, check_teacher
from rl.behaviour import Vocabulary
from rl.console import Console
from rl.contrast import ContrastEncoder
from rl.data import DataError, Problems, load_problems
from rl.embedded import build_tiny, tiny_config, tiny_tokenizer
from rl.errors import ConfigError
from rl.models import at_folder, end_of_sequence_ids, local_folder, longest_context
from rl.pair_files import read_pairs
from rl.pair_sampling import check_enough, counted, longest_pair
from rl.pairs import FoundPairs, is_pairs_file, is_too_long, load_pairs
from rl.prompts import PromptEncoder, PromptStream, load_tokenizer, uses_chat_template
from rl.rollout_settings import ReflexSettings
from rl.settings import Settings
from rl.stage_settings import learns_from_pairs, makes_its_teachers
from rl.traces import Trace, make_traces
from rl.types import Prompt
from rl.waiting import StopFlag
from rollout.budgets import BudgetPlan
from rollout.reflex import end_id, reflection_ids

log = logging.getLogger("budget_rl")

UNBOUNDED = 10**9
"""Context in tokens of a model that does not say what it takes."""


@dataclass(frozen=True)
class Inputs:
    """What the configuration names, found, readable and fitting together; nothing was started or trained for it."""

    model: Path | None
    """None where the warm start is still to make it."""
    traces: tuple[Trace, ...]
    """What the warm start will learn from; empty where it has nothing to do."""
    tokenizer: Any
    stream: PromptStream
    held_out: tuple[Prompt, ...]
    plan: BudgetPlan
    dropped_share: float
    vocabulary: Vocabulary | None = None
    """The ids that a reflection bias is about; None without one."""
    pairs: FoundPairs | None = None
    """A data set's; None where the run has none, or samples them itself."""
    contrast: ContrastEncoder | None = None
    """T-REG's two prompts; None without token rewards."""
    teacher: Sources | None = None
    """The two models of a distillation's teacher; None without one."""


@dataclass(frozen=True)
class Prepared:
    """Everything the loop reads but never changes."""

    model: Path
    tokenizer: Any
    stream: PromptStream
    held_out: tuple[Prompt, ...]
    plan: BudgetPlan
    dropped_share: float
    vocabulary: Vocabulary | None = None
    pairs: FoundPairs | None = None
    contrast: ContrastEncoder | None = None
    teacher: Sources | None = None


def find_inputs(settings: Settings) -> Inputs:
    """Problems, model folder, tokenizer, prompts and budgets, so that a mistake is an error before Ray starts or anything trains.

    Raises DataError, ModelError or ConfigError where they cannot be had or do not fit together.
    """
    warm = settings.warm_start
    if warm:
        model, tokenizer = _cached_model(settings), tiny_tokenizer()
        check_context(settings, tiny_config(warm).max_position_embeddings)
    else:
        model = local_folder(settings.model)
        check_context(settings, longest_context(model))
        tokenizer = load_tokenizer(at_folder(settings.model, model))
    encoder = PromptEncoder(tokenizer, settings.data)
    plan = BudgetPlan(settings.rollout, tokenizer, encoder=encoder, max_steps=settings.max_steps)
    check_functions(settings, chat=uses_chat_template(tokenizer, settings.data))
    problems = load_problems(settings.data, extra=warm.traces if warm else 0)
    traces = []
    if warm and model is None:
        traces = make_traces(problems.extra, settings=warm, rollout=settings.rollout, tokenizer=tokenizer, encoder=encoder)
    prompts, held_out, dropped = _encoded(settings, problems, encoder, plan.longest_suffix())
    plan.check(prompts[0])
    return Inputs(
        model=model,
        traces=tuple(traces),
        tokenizer=tokenizer,
        stream=PromptStream(prompts, settings.seed),
        held_out=tuple(held_out[: settings.eval.problems]),
        plan=plan,
        dropped_share=dropped / max(len(problems.train), 1),
        vocabulary=reflection_vocabulary(settings.rollout.reflex, tokenizer),
        pairs=found_pairs(settings, tokenizer),
        contrast=contrast_of(settings, tokenizer, encoder, prompts[0], model),
        teacher=teacher_sources(settings, model),
    )


def found_pairs(settings: Settings, tokenizer: Any) -> FoundPairs | None:
    """The pairs of a data set, where the run learns from one. Raises DataError for one that cannot be read or is too small."""
    preference = settings.preference
    if preference is None or preference.pairs.from_rollouts or not learns_from_pairs(settings):
        return None
    path = Path(preference.pairs.source).expanduser()
    if is_pairs_file(path):
        found = known_pairs(path, settings, len(tokenizer))
    else:
        found = read_pairs(preference.pairs, settings.data, tokenizer, max_length=longest_pair(settings))
    check_enough(len(found.pairs), settings, what=counted(found))
    return found


def known_pairs(path: Path, settings: Settings, vocabulary: int) -> FoundPairs:
    """The pairs of an earlier run. Raises DataError for token ids that the tokenizer does not have."""
    assert settings.preference is not None
    wanted, longest = settings.preference.pairs.size, longest_pair(settings)
    pairs = load_pairs(path)[:wanted]
    largest = max((max(*p.prompt_ids, *p.chosen_ids, *p.rejected_ids) for p in pairs), default=0)
    if largest >= vocabulary:
        raise DataError(
            f"{path} holds token {largest}, and the tokenizer of model.path has {vocabulary}",
            fix="use the pairs of a run whose model has the same tokenizer",
        )
    kept = tuple(pair for pair in pairs if not is_too_long(pair, longest))
    return FoundPairs(kept, {"of an earlier run": len(pairs), "too_long": len(pairs) - len(kept)})


def contrast_of(
    settings: Settings, tokenizer: Any, encoder: PromptEncoder, prompt: Prompt, model: Path | None
) -> ContrastEncoder | None:
    """T-REG's two prompts, tried on one problem; None for a run without token rewards."""
    chosen, section = settings.treg, "treg.contrast"
    if chosen is None and settings.stage == "preference" and settings.preference is not None:
        chosen, section = settings.preference.treg, "preference.treg.contrast"
    if chosen is None:
        return None
    ends: list[int] = []
    if model is not None:
        positions, ends = longest_context(model), end_of_sequence_ids(model)
    else:
        assert settings.warm_start is not None
        positions = tiny_config(settings.warm_start).max_position_embeddings
    found = ContrastEncoder(chosen.contrast, encoder, tokenizer, max_length=positions or UNBOUNDED, eos_ids=ends, section=section)
    found.check(prompt.question, tokenizer.encode(prompt.answer, add_special_tokens=False))
    return found


def teacher_sources(settings: Settings, model: Path | None) -> Sources | None:
    """Where the teacher's models lie. Raises ConfigError for a teacher that cannot work beside the student."""
    if settings.distil is None or makes_its_teachers(settings):
        return None
    if model is None:
        raise ConfigError(
            "distil.teacher names models, and the student is yet to be made by warm_start, so that they cannot belong together",
            fix="set warm_start=null and model=FOLDER, or leave distil.teacher.dpo and reverse out",
        )
    return check_teacher(settings.distil.teacher, model, trust_remote_code=settings.model.trust_remote_code)


def check_functions(settings: Settings, *, chat: bool) -> None:
    """Load the run's own reward functions once, in processes as the reward workers do; raises RewardFunctionError."""
    if not settings.reward.functions:
        return
    from reward.function_pool import FunctionPool

    with FunctionPool(settings.reward.functions, settings.reward.function_deadline_s, chat=chat) as pool:
        pool.wait_ready()


def reflection_vocabulary(reflex: ReflexSettings | None, tokenizer: Any) -> Vocabulary | None:
    """The ids of the reflection words and of the token that ends the thinking.

    Raises ConfigError where the tokenizer lacks one.
    """
    if reflex is None:
        return None
    return Vocabulary(reflection_ids(tokenizer, reflex.words, leading_space=reflex.leading_space), end_id(tokenizer, reflex.end))


def check_context(settings: Settings, positions: int | None) -> None:
    """Raise ConfigError when the longest prompt and the longest response together exceed what the model takes.

    ``positions`` is the model's maximum; None where that is not known, and the engine finds out.
    """
    prompt, response = settings.data.max_prompt_length, settings.rollout.max_length
    if positions is not None and prompt + response > positions:
        raise ConfigError(
            f"data.max_prompt_length={prompt} and rollout.max_length={response} are {prompt + response} tokens together, "
            f"and the model takes at most {positions}",
            fix=f"set rollout.max_length to {positions - prompt} or less" if prompt < positions else "lower both",
        )


def prepare_run(settings: Settings, inputs: Inputs, console: Console, stop: StopFlag | None = None) -> Prepared:
    """The inputs with a trained model; runs the warm start when it is configured and not cached."""
    if settings.warm_start and inputs.model:
        console.say(f"warm start: cached in {inputs.model}")
    return Prepared(
        model=inputs.model or warm_started(settings, inputs.traces, console, stop),
        tokenizer=inputs.tokenizer,
        stream=inputs.stream,
        held_out=inputs.held_out,
        plan=inputs.plan,
        dropped_share=inputs.dropped_share,
        vocabulary=inputs.vocabulary,
        pairs=inputs.pairs,
        contrast=inputs.contrast,
        teacher=inputs.teacher,
    )


def warm_started(settings: Settings, traces: Sequence[Trace], console: Console, stop: StopFlag | None) -> Path:
    """The embedded tiny model after its supervised warm start on the traces, put into the cache."""
    from rl.sft import cached_folder, train_warm_start, update_count

    warm = settings.warm_start
    assert warm is not None
    target = cached_folder(settings)
    started = time.monotonic()
    target.parent.mkdir(parents=True, exist_ok=True)  # the cache: a folder that the learners' nodes may share, unlike /tmp
    with tempfile.TemporaryDirectory(prefix="blank-", dir=target.parent) as scratch:
        blank = Path(scratch)
        build_tiny(blank, warm)
        updates = update_count(len(traces), warm.batch_size, warm.epochs)
        share = sum(trace.correct for trace in traces) / len(traces)
        console.say(f"warm start: {len(traces)} noisy worked traces ({share:.0%} end right), {updates} updates")
        with console.progress("warm start", total=updates) as advance:
            loss = train_warm_start(settings, traces, blank, target, advance=advance, stop=stop)
    console.say(f"warm start: loss {loss:.3f} nats/token after {time.monotonic() - started:.0f} s, kept in {target}")
    return target


def _cached_model(settings: Settings) -> Path | None:
    from rl.sft import cached_folder

    folder = cached_folder(settings)
    return folder if (folder / "config.json").is_file() else None


def _encoded(
    settings: Settings, problems: Problems, encoder: PromptEncoder, suffix: str
) -> tuple[list[Prompt], list[Prompt], int]:
    """Prompts to train on, held-out prompts, and how many of the former were too long; says so, and refuses too few."""
    prompts, dropped = encoder.encode_all(problems.train, suffix=suffix)
    held_out, dropped_held_out = encoder.encode_all(problems.held_out, suffix=suffix)
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
    # Only where it was asked for: the default with a small data.held_out means all of them.
    if "problems" in settings.eval.model_fields_set and settings.eval.problems > len(held_out):
        log.warning(
            "eval.problems=%d, but only %d held-out problems are left of data.held_out=%d; evaluations use these",
            settings.eval.problems,
            len(held_out),
            settings.data.held_out,
        )
    return prompts, held_out, dropped
