"""The conductor of a run: prepare, start, loop, stop. Each part lives elsewhere; this file is the order of things."""

from __future__ import annotations

from pathlib import Path

import torch

from launch.version import project_version
from rl.checkpointing import find_resume
from rl.cluster import Workforce, connect, disconnect
from rl.console import Console, redirect_library_chatter
from rl.evaluation import special_tokens
from rl.figures import draw_curves, write_table
from rl.preflight import check_memory, check_resources, estimate_memory, read_model_shape
from rl.preparation import Inputs, Prepared, find_inputs, prepare_run
from rl.run import Run
from rl.run_folder import RunFolder
from rl.settings import Settings
from rl.step_rules import chosen_params
from rl.tracking import Tracker
from rl.types import Manifest
from rl.waiting import StopFlag, StopRequested, wait_for

INTERRUPTED = 130
"""Exit status of a run stopped by Ctrl-C, as shells have it."""


def run_training(settings: Settings, *, config_path: Path) -> int:
    """`budget-rl train`: the whole run; returns the exit status (0 done, 130 interrupted). Errors are raised, after clean-up."""
    folder = RunFolder.create(settings.output, config_path.stem)
    console = Console()
    resume = find_resume(settings, folder)
    if resume is None:
        folder = folder.set_aside_earlier_run()
    else:
        folder.truncate_after(resume[1].step)
    redirect_library_chatter(folder.log)
    folder.write_config(settings.model_dump(mode="json"))
    console.opening(
        folder,
        {
            "version": project_version(),
            "model": settings.model.path,
            "data": settings.data.source,
            "method": f"{settings.reward.method} / {settings.advantage.estimator}",
        },
    )
    inputs = find_inputs(settings)
    tracker = Tracker(settings.tracking, folder, run_name=folder.name, run_id=resume[1].tracker_run_id if resume else None)
    status = "FAILED"
    try:
        tracker.start(folder.config, chosen_params(settings))
        with StopFlag() as stop:
            code = _run(settings, inputs, folder, console, tracker, stop, resume)
        status = "KILLED" if code == INTERRUPTED else "FINISHED"
        return code
    except BaseException as error:
        status = "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED"
        raise
    finally:
        _write_outputs(folder, tracker)
        tracker.finish(status)
        disconnect()
        console.close()


def _run(
    settings: Settings,
    inputs: Inputs,
    folder: RunFolder,
    console: Console,
    tracker: Tracker,
    stop: StopFlag,
    resume: tuple[Path, Manifest] | None,
) -> int:
    resources = connect()
    stop.arm()
    check_resources(settings, cpus=resources.get("CPU", 0.0), gpus=resources.get("GPU", 0.0))
    workforce = Workforce(settings)
    run: Run | None = None
    try:
        prepared = prepare_run(settings, inputs, console, stop)
        redirect_library_chatter(folder.log)
        shape = read_model_shape(prepared.model, trust_remote_code=settings.model.trust_remote_code)
        check_memory(
            estimate_memory(settings, shape.parameters, shape.vocab, shape.hidden, shape.layers),
            int(resources.get("memory", 0)),
            gpu_bytes=torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None,
        )
        start_actors(settings, workforce, prepared, stop)
        run = Run(settings, prepared, workforce, folder, console, tracker, stop)
        if resume is not None:
            run.restore(*resume)
            console.say(f"resumed from {resume[0].name}")
        if run.finished():
            console.say(
                f"the run had reached its end at step {run.progress.step}; raise max_steps to go on, or use resume=never"
            )
            if settings.eval.after and not run.evaluation_file.exists():
                run.evaluate()  # the run was killed between its last checkpoint and the end of this
            return 0
        before = run.evaluate() if settings.eval.before and run.progress.step == 0 else {}
        run.train()
        try:
            after = run.evaluate() if settings.eval.after else {}
        finally:
            run.save()  # after the evaluation, whose figures go into the model card, and also when it fails
        summarise(console, before, after, folder)
        return 0
    except StopRequested as error:
        stop_cleanly(run, console, error)
        return INTERRUPTED
    finally:
        workforce.close()


def start_actors(settings: Settings, workforce: Workforce, prepared: Prepared, stop: StopFlag) -> None:
    """Start engines, reward workers and learner ranks at once and wait for all of them."""
    engines = workforce.launch_engines(prepared.model)
    scorers = workforce.launch_scorers(special_tokens(prepared.tokenizer))
    learners = workforce.launch_learners(prepared.model)
    seconds = settings.rollout.start_deadline_s
    wait_for(learners, seconds=seconds, what="learner ranks load the model", stop=stop)
    wait_for(scorers, seconds=seconds, what="reward workers start their graders", stop=stop)
    wait_for(engines, seconds=seconds, what="engines load the model", stop=stop)


def stop_cleanly(run: Run | None, console: Console, error: StopRequested) -> None:
    """Keep the last finished step."""
    if run is None or run.progress.step == 0:
        console.say(f"stopped ({error.cause}); no step was finished, nothing to keep")
        return
    path = run.save()
    kept = path.name if path else f"step {run.progress.step}, saved before"
    console.say(f"stopped ({error.cause}); checkpoint {kept}; the same command goes on from there")


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


def _write_outputs(folder: RunFolder, tracker: Tracker) -> None:
    """Table and figure from whatever metrics there are, also after a failure."""
    if not folder.metrics.exists():
        return
    write_table(folder.metrics, folder.table)
    draw_curves(folder.metrics, folder.figure)
    for path in (folder.table, folder.figure):
        tracker.artifact(path)
