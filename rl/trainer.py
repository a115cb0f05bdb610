"""The conductor of a run: check, prepare, start, loop, stop. Each part lives elsewhere; this file is the order of things."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from transformers import AutoConfig

from launch.version import project_version
from reward.heads import refuse_head
from reward.teacher_files import check_ids, source_folder, vocabulary_size
from rl.checkpointing import Resume, find_resume, take_over
from rl.cluster import Workforce, check_cluster, connect, disconnect
from rl.console import COLUMNS_OF, Console, redirect_library_chatter
from rl.figures import draw_curves, write_table
from rl.guidance import HeadSources
from rl.memory_estimate import check_memory, estimate_memory, planned_shape
from rl.preflight import check_resources
from rl.preparation import Inputs, Prepared, find_inputs, prepare_run
from rl.run import Run
from rl.run_folder import RunFolder
from rl.settings import Settings
from rl.stage_settings import makes_its_teachers
from rl.stages import (
    TEACHERS,
    finished_model,
    made_model,
    run_class,
    staged,
    teacher_folder,
    teacher_settings,
    with_teachers,
)
from rl.step_rules import chosen_params
from rl.tracking import Status, Tracker, tracking_uri
from rl.waiting import StopFlag, StopRequested, wait_for

log = logging.getLogger("budget_rl")

INTERRUPTED = 130
"""Exit status of a run stopped by Ctrl-C, as shells have it."""


def run_training(settings: Settings, *, config_path: Path) -> int:
    """`budget-rl train`: the whole run; returns the exit status (0 done, 130 interrupted). Errors are raised, after clean-up.

    A teacher whose models are not given is made first: two runs of the preference stage, each in a folder of its own.
    """
    folder = RunFolder.create(settings.output, config_path.stem)
    if makes_its_teachers(settings):
        check_before_teachers(settings)
        made: dict[str, Path] = {}
        for name in TEACHERS:
            first = teacher_settings(settings, folder, name)
            made[name] = teacher_folder(folder, name)
            if finished_model(first, made[name]) is None and (status := run_stage(first, config_path=config_path)):
                return status
            made[name] = made_model(made[name])
        settings = with_teachers(settings, made["dpo"], made["reverse"])
    return run_stage(settings, config_path=config_path)


def check_before_teachers(settings: Settings) -> None:
    """Raise what can be said against the run itself before two other runs are made for it."""
    inputs = find_inputs(settings)
    check_resources(settings, cpus=float("inf"), gpus=float("inf"))
    assert settings.distil is not None
    teacher = settings.distil.teacher
    check_ids(teacher, vocabulary_size(inputs.tokenizer))
    if inputs.model is not None:
        trusted = settings.model.trust_remote_code
        config = AutoConfig.from_pretrained(str(inputs.model), trust_remote_code=trusted)
        refuse_head("model.path", config, plain=teacher.mode != "scalar")


def run_stage(settings: Settings, *, config_path: Path) -> int:
    """One stage in one folder; as :func:`run_training`, but its teacher's models must be there."""
    settings = staged(settings)
    folder = RunFolder.create(settings.output, config_path.stem)
    log_from = folder.log_size()
    console = Console(columns=COLUMNS_OF[settings.stage])
    with ExitStack() as closing:
        closing.callback(console.close)
        redirect_library_chatter(folder.log)
        console.opening(
            folder,
            {
                "version": project_version(),
                "model": settings.model.path,
                "data": settings.data.source,
                "method": method_name(settings),
            },
        )
        try:
            _run(settings, folder, console, log_from)
        except StopRequested:
            return INTERRUPTED
        except BaseException as error:
            console.record_error(error)  # the command line prints its message
            raise
    return 0


def _run(settings: Settings, folder: RunFolder, console: Console, log_from: int) -> None:
    resume = find_resume(settings, folder)
    inputs = find_inputs(settings)
    tracking_uri(settings.tracking, folder)
    workforce = Workforce(settings)
    run: Run | None = None
    with ExitStack() as closing:
        closing.callback(disconnect)
        stop = closing.enter_context(StopFlag())
        try:
            prepared = _prepare(settings, folder, inputs, console, stop)
            # Nothing is left to refuse: only now is an earlier run of this folder moved or cut.
            take_over(folder, settings, resume, log_from=log_from)
            tracker = closing.enter_context(tracked(settings, folder, run_id=resume[1].tracker_run_id if resume else None))
            redirect_library_chatter(folder.log)  # MLflow was imported meanwhile
            start_actors(settings, workforce, prepared, stop)
            run = run_class(settings)(settings, prepared, workforce, folder, console, tracker, stop)
            conduct(run, resume)
        except StopRequested as error:
            stop_cleanly(run, resume, console, error, asked=settings.resume)
            raise
        finally:
            workforce.close()


def _prepare(settings: Settings, folder: RunFolder, inputs: Inputs, console: Console, stop: StopFlag) -> Prepared:
    """Join Ray and make what the actors start from; refuses a run that this cluster cannot hold."""
    resources = connect()
    stop.arm()
    check_cluster(settings, resources)
    shape = planned_shape(settings, inputs.model)
    check_memory(
        estimate_memory(settings, shape.parameters, shape.vocab, shape.hidden, shape.layers),
        int(resources.get("memory", 0)),
        gpu_bytes=torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None,
    )
    prepared = prepare_run(settings, inputs, console, stop)
    redirect_library_chatter(folder.log)
    return prepared


@contextmanager
def tracked(settings: Settings, folder: RunFolder, *, run_id: str | None) -> Iterator[Tracker]:
    """The run in MLflow; at the end, however it ends, table and figure are drawn and the run is closed with its status."""
    tracker = Tracker(settings.tracking, folder, run_name=folder.name, run_id=run_id)
    status: Status = "FAILED"
    try:
        tracker.start(folder.config, chosen_params(settings))
        yield tracker
        status = "FINISHED"
    except (StopRequested, KeyboardInterrupt):
        status = "KILLED"
        raise
    finally:
        _write_outputs(folder, tracker, settings)
        tracker.finish(status)


def conduct(run: Run, resume: Resume | None) -> None:
    """Evaluate, train, evaluate, save: everything that happens on started actors."""
    settings, console = run.settings, run.console
    run.begin(resume)
    if run.finished():
        console.say(f"the run had reached its end at step {run.progress.step}; raise max_steps to go on, or use resume=never")
        if settings.eval.after and not run.evaluation_file.exists():
            run.evaluate()  # the run was killed between its last checkpoint and the end of this
        return
    before = run.evaluate() if settings.eval.before and run.progress.step == 0 else {}
    run.train()
    try:
        after = run.evaluate() if settings.eval.after else {}
    finally:
        run.save()  # after the evaluation, whose figures go into the model card, and also when it fails
    summarise(console, before, after, run.folder)


def start_actors(settings: Settings, workforce: Workforce, prepared: Prepared, stop: StopFlag) -> None:
    """Start engines, reward workers and learner ranks at once and wait for all of them."""
    engines = workforce.launch_engines(prepared.model)
    scorers = workforce.launch_scorers(prepared.tokenizer)
    teachers = workforce.launch_teachers(prepared.model, prepared.teacher) if prepared.teacher else []
    frozen = workforce.launch_frozen(prepared.model) if settings.needs_scorer else []
    learners = workforce.launch_learners(prepared.model, heads=teacher_heads(settings, prepared), stop=stop)
    seconds = settings.rollout.start_deadline_s
    wait_for(learners, seconds=seconds, what="learner ranks load the model", stop=stop)
    wait_for(scorers, seconds=seconds, what="reward workers start their graders", stop=stop)
    wait_for(frozen, seconds=seconds, what="workers load the frozen start policy", stop=stop)
    for card in wait_for(teachers, seconds=seconds, what="teachers load their models", stop=stop):
        workforce.vocabulary = card.vocabulary
    wait_for(engines, seconds=seconds, what="engines load the model", stop=stop)


def teacher_heads(settings: Settings, prepared: Prepared) -> HeadSources | None:
    """Where the learner finds the heads of the teacher's models; None where it does not need them."""
    sources, distil = prepared.teacher, settings.distil
    if sources is None or distil is None or distil.teacher.mode != "hidden":
        return None
    names = ("base", "base") if sources.base is not None else ("dpo", "reverse")
    trusted = settings.model.trust_remote_code
    folders = [
        source_folder(distil.teacher, name, str(getattr(sources, name)), trust_remote_code=trusted) for name in names
    ]
    return HeadSources(folders[0], folders[1], vocabulary_size(prepared.tokenizer))


def method_name(settings: Settings) -> str:
    """The stage in a few words, for the head of a run."""
    preference, distil = settings.preference, settings.distil
    if settings.stage == "preference" and preference is not None:
        return f"{'reverse ' if preference.reverse else ''}{preference.form}{' with T-REG' if preference.treg else ''} on pairs"
    beside = f" + distillation ({distil.teacher.mode})" if distil is not None else ""
    beside += " + T-REG" if settings.treg is not None else ""
    if settings.stage == "distil" and distil is not None:
        return f"AlignDistil on {distil.data} ({distil.teacher.mode})"
    return f"{settings.reward.method} / {settings.advantage.estimator}{beside}"


def stop_cleanly(run: Run | None, resume: Resume | None, console: Console, error: StopRequested, *, asked: str) -> None:
    """Keep the last finished step and say how to go on; ``asked`` is the setting `resume` of this run."""
    began = resume[1].step if resume else 0
    if run is None or run.progress.step <= began:
        kept = f"the same command goes on from {resume[0].name}" if resume else "nothing to keep"
        console.say(f"stopped ({error.cause}); no step was finished, {kept}")
        return
    path = run.save()
    kept = path.name if path else f"step {run.progress.step}, saved before"
    # `never` would begin anew, and the name of a checkpoint would go back to that one.
    command = "the same command" if asked == "auto" else "the same command with resume=auto"
    console.say(f"stopped ({error.cause}); checkpoint {kept}; {command} goes on from there")


def summarise(console: Console, before: dict[str, float], after: dict[str, float], folder: RunFolder) -> None:
    """Before and after, and where the outputs lie."""
    if before and after:
        accuracy = (before["eval/accuracy"], after["eval/accuracy"])
        tokens = (before["eval/tokens"], after["eval/tokens"])
        console.say(
            f"held-out, no budget: accuracy {accuracy[0]:.3f} -> {accuracy[1]:.3f} "
            f"({100 * (accuracy[1] - accuracy[0]):+.1f} points), "
            f"tokens {tokens[0]:.1f} -> {tokens[1]:.1f} ({tokens[1] / tokens[0]:.0%})"
        )
    console.say(f"curves {folder.figure}   table {folder.table}   checkpoints {folder.checkpoints}")


def _write_outputs(folder: RunFolder, tracker: Tracker, settings: Settings) -> None:
    """Table and figure from whatever metrics there are, also after a failure."""
    if not folder.metrics.exists():
        return
    try:
        write_table(folder.metrics, folder.table, columns=COLUMNS_OF[settings.stage])
        draw_curves(folder.metrics, folder.figure)
    except Exception as error:  # a full disk, a damaged line, any fault of the plotting library: the run ended as it ended
        log.warning("table and curves could not be drawn from %s: %s", folder.metrics.name, error)
    for path in (folder.table, folder.figure):
        if path.exists():
            tracker.artifact(path)
