"""The conductor of a run: prepare, start, loop, stop. Each part lives elsewhere; this file is the order of things."""

from __future__ import annotations

import logging
import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from launch.version import project_version
from reward.budget import budget_ceiling
from rl.advantage import compute
from rl.batch import pack_rollouts
from rl.checkpointing import find_resume, save_checkpoint
from rl.cluster import Workforce, connect, disconnect
from rl.collection import Collected, Collector
from rl.console import Console, redirect_library_chatter
from rl.coordinator import make_leases
from rl.errors import BudgetRLError
from rl.evaluation import evaluate, special_tokens, write_per_problem
from rl.figures import draw_curves, write_table
from rl.learner_worker import to_data_proto
from rl.preflight import check_memory, check_resources, derived_plan, estimate_memory, read_model_shape
from rl.preparation import Inputs, Prepared, find_inputs, prepare_run
from rl.run_folder import RunFolder
from rl.settings import Settings
from rl.step_metrics import advantage_metrics, learner_metrics, rollout_metrics
from rl.tracking import Tracker
from rl.types import Group, Manifest, Scored, Shaping, StepReport, TrainBatch
from rl.waiting import StopFlag, StopRequested, wait_for

log = logging.getLogger("budget_rl")

ADVANTAGE_DRIFT = 0.5
"""|mean advantage| above this share of its spread pushes all sampled tokens one way; see docs/stability.md."""
MISMATCH_LIMIT = {"float32": 1e-3, "bfloat16": 1.0}
"""Largest |engine - learner| log-prob that rounding explains (measured: 6e-5 in float32, 0.2 to 0.6 in bfloat16)."""
INTERRUPTED = 130


@dataclass
class Progress:
    """Where the run stands; together with the learner's state, all that a checkpoint holds."""

    step: int = 0
    cursor: int = 0
    tokens_seen: int = 0
    minutes_before: float = 0.0
    started: float = 0.0
    saved_step: int = -1

    @property
    def minutes(self) -> float:
        return self.minutes_before + (time.monotonic() - self.started) / 60


class Run:
    """One training run on a started workforce."""

    def __init__(self, settings: Settings, prepared: Prepared, workforce: Workforce, folder: RunFolder, console: Console,
                 tracker: Tracker, stop: StopFlag) -> None:
        self.settings, self.prepared, self.workforce = settings, prepared, workforce
        self.folder, self.console, self.tracker, self.stop = folder, console, tracker, stop
        self.collector = Collector(workforce.engines, workforce.scorers, settings)
        self.progress = Progress(started=time.monotonic())
        self.warned: set[str] = set()

    # -- the loop --------------------------------------------------------------------------------------------------------

    def restore(self, checkpoint: Path, manifest: Manifest) -> None:
        """Bring the learner, the engines and the counters to the state after ``manifest.step``."""
        wait_for(self.workforce.learners.load(str(checkpoint)), seconds=self.settings.learner.deadline_s, what="learner loads its state")
        self.progress = Progress(
            manifest.step, manifest.cursor, manifest.tokens_seen, manifest.minutes_spent, time.monotonic(), manifest.step
        )
        self.push_weights()

    def train(self) -> None:
        """Steps until a stop condition; raises StopRequested on Ctrl-C, after the step in progress if the learner was in it."""
        total = self.settings.max_steps
        with self.console.progress("training", total=total, done=self.progress.step, plain_lines=False) as advance:
            while not self.finished():
                if self.stop.is_set:
                    raise StopRequested(f"{self.stop.reason} after step {self.progress.step}")
                report = self.one_step()
                self.publish(report)
                advance(1)
                every = self.settings.output.checkpoint_every
                if every and self.progress.step % every == 0:
                    self.save()
                if self.settings.eval.every and self.progress.step % self.settings.eval.every == 0 and not self.finished():
                    self.evaluate()

    def finished(self) -> bool:
        """Whether a stop condition holds."""
        s, p = self.settings, self.progress
        return (
            (s.max_steps is not None and p.step >= s.max_steps)
            or (s.max_tokens is not None and p.tokens_seen >= s.max_tokens)
            or (s.max_minutes is not None and p.minutes >= s.max_minutes)
        )

    def one_step(self) -> StepReport:
        """Generate, score, learn, sync; the counters move only when all four are done."""
        started = time.monotonic()
        settings, progress = self.settings, self.progress
        prompts, cursor = self.prepared.stream.take(progress.cursor, settings.prompts_per_step)
        plan = self.prepared.plan
        budgets = plan.budgets(settings.rollout.samples_per_prompt)
        leases = make_leases(
            prompts, budgets, [[plan.prefill_ids(b, prompt.token_ids) for b in budgets] for prompt in prompts],
            step=progress.step, run_seed=settings.seed, shaping=Shaping(settings.rollout.temperature),
            max_length=settings.rollout.max_length, min_version=progress.step,
        )
        collected = self.collector.collect(leases, stop=self.stop)
        check_scored(collected, settings.reward.max_unscored)
        batch, advantage_N, members = build_batch(collected.groups, settings)
        metrics = rollout_metrics(collected.groups) | advantage_metrics(advantage_N, batch)
        metrics["rollouts/lost"] = float(len(collected.lost))
        if progress.step == 0:
            check_learnable(metrics, settings)
        learning = time.monotonic()
        metrics |= self.update(batch)
        syncing = time.monotonic()
        progress.step += 1
        self.push_weights()
        ended = time.monotonic()
        progress.cursor = cursor
        tokens = sum(m.rollout.length for group in collected.groups for m in group.members)
        progress.tokens_seen += tokens
        metrics |= {
            "time/generate": collected.generate_s, "time/score": collected.score_s, "time/learn": syncing - learning,
            "time/sync": ended - syncing, "time/step": ended - started, "rate/tokens_per_s": tokens / (ended - started),
            "tokens/total": float(progress.tokens_seen), "prompts/dropped": self.prepared.dropped_share,
        }
        self.write_samples(members, advantage_N)
        return StepReport(progress.step, metrics)

    def update(self, batch: TrainBatch) -> dict[str, float]:
        """One pass of optimiser steps over the step's rollouts."""
        settings = self.settings
        data = to_data_proto(batch, settings.learner.ranks)
        global_tokens = [0] * settings.learner.minibatches
        per_rollout = torch.zeros(batch.rollouts, dtype=torch.int64)
        owner_T = torch.arange(batch.rollouts).repeat_interleave(batch.start_N.diff())
        per_rollout.index_add_(0, owner_T, batch.loss_mask_T.long())
        for i, m in enumerate(batch.minibatch_N.tolist()):
            global_tokens[m] += int(per_rollout[i])
        per_step = settings.learner.minibatches * settings.learner.epochs
        data.meta_info["update"] = {
            "objective": "policy", "global_tokens": global_tokens, "correction": effective_correction(settings),
            "correction_cap": settings.correction_cap,
            "total_updates": settings.max_steps * per_step if settings.max_steps else None,
        }
        # Not interruptible: the weights must be those of a whole step when a checkpoint is written.
        totals = wait_for(
            self.workforce.learners.update(data), seconds=settings.learner.deadline_s, what=f"learner update {self.progress.step + 1}"
        )
        return learner_metrics(totals)

    def push_weights(self) -> None:
        """Every engine serves version ``step`` before the next rollout."""
        version, seconds = self.progress.step, self.settings.learner.deadline_s
        if self.settings.rollout.transport == "nccl":
            refs = self.workforce.learners.push_by_nccl(version, self.collector.live_engines, self.settings.rollout.tensor_parallel)
            wait_for(refs, seconds=seconds, what=f"weights v{version} go to the engines by NCCL")
            return
        refs = self.workforce.learners.collect_weights(version)
        wait_for(refs, seconds=seconds, what=f"learner collects weights v{version}")
        pushes = [engine.set_weights.remote(refs[0]) for engine in self.collector.live_engines]
        for index, served in enumerate(wait_for(pushes, seconds=seconds, what=f"engines take weights v{version}")):
            if served.number != version:
                raise BudgetRLError(f"engine {index} serves weights v{served.number} after a push of v{version}")

    # -- reporting -------------------------------------------------------------------------------------------------------

    def publish(self, report: StepReport) -> None:
        """Hand one report to every sink, and raise the alarms."""
        self.folder.append_metrics(report)
        self.tracker.step(report)
        self.console.step(report)
        if report.step == 1:
            self.console.first_step_table(report)
        m = report.metrics
        if abs(m["adv/mean"]) > ADVANTAGE_DRIFT * max(m["adv/std"], 1e-9) and m["adv/nonzero_tokens"] > 0:
            self.warn("drift", f"mean advantage {m['adv/mean']:+.2f} at step {report.step}: the update pushes all samples one way; "
                               f"set advantage.centre=batch (docs/stability.md)")
        if m["mismatch/max"] > MISMATCH_LIMIT[self.settings.model.dtype]:
            self.warn("mismatch", f"engine and learner disagree by {m['mismatch/max']:.1e} nats at step {report.step}: ratios are biased; "
                                  f"use correction=truncated or model.dtype=float32")
        if m["learn/skipped"]:
            log.warning("step %d: %d optimiser step skipped, loss or gradient was not finite; weights unchanged",
                        report.step, int(m["learn/skipped"]))

    def warn(self, key: str, text: str) -> None:
        """Say something once a run."""
        if key not in self.warned:
            self.warned.add(key)
            log.warning(text)

    def write_samples(self, members: list[Scored], advantage_N: torch.Tensor) -> None:
        """A few rollouts of the step, spread over the batch, to samples.jsonl."""
        wanted = min(self.settings.output.samples_per_step, len(members))
        picked = [i * len(members) // wanted for i in range(wanted)] if wanted else []
        self.folder.append_samples(self.progress.step, [sample_record(members[i], float(advantage_N[i])) for i in picked])

    @property
    def evaluation_file(self) -> Path:
        """Where the per-problem results at the current step lie, once evaluated."""
        return self.folder.path / f"eval-{self.progress.step}.json"

    def evaluate(self) -> dict[str, float]:
        """Held-out accuracy and tokens at the current weights, into every sink under the current step."""
        started = time.monotonic()
        results = evaluate(
            self.collector, self.prepared.plan, self.prepared.held_out, self.settings, version=self.progress.step, stop=self.stop
        )
        write_per_problem(self.evaluation_file, results, step=self.progress.step)
        metrics = {name: value for result in results for name, value in result.metrics().items()}
        report = StepReport(self.progress.step, metrics | {"time/eval": time.monotonic() - started})
        self.folder.append_metrics(report)
        self.tracker.step(report)
        free = results[0]
        self.console.say(
            f"step {self.progress.step}: held-out accuracy {free.accuracy:.3f}, {free.tokens:.1f} tokens, cut {free.truncated:.1%} "
            f"({len(self.prepared.held_out)} problems x {self.settings.eval.samples}, no budget)"
        )
        return metrics

    def save(self) -> Path | None:
        """Write a checkpoint of the last finished step unless there is one."""
        p = self.progress
        if p.saved_step == p.step:
            return None
        path = save_checkpoint(
            self.workforce, self.folder, self.prepared.model, self.settings, step=p.step, cursor=p.cursor,
            tokens_seen=p.tokens_seen, minutes_spent=p.minutes, run_id=self.tracker.run_id,
        )
        p.saved_step = p.step
        return path


# -- pure helpers ----------------------------------------------------------------------------------------------------------


def effective_correction(settings: Settings) -> str:
    """`auto` is `replay` when sampling was shaped (temperature not 1), else `none`; with temperature 1 the two are equal."""
    if settings.correction != "auto":
        return settings.correction
    return "replay" if settings.rollout.temperature != 1.0 else "none"


def build_batch(groups: tuple[Group, ...], settings: Settings) -> tuple[TrainBatch, torch.Tensor, list[Scored]]:
    """Advantages and packed training data of a step's scored members (unscored ones are left out of all statistics)."""
    members = [(g, m) for g, group in enumerate(groups) for m in group.members if m.reward is not None]
    scored = [m for _, m in members]
    group_N = torch.tensor([g for g, _ in members], dtype=torch.int64)
    reward_N = torch.tensor([m.reward.total for m in scored if m.reward is not None], dtype=torch.float64)
    budget_N = torch.tensor(
        [math.inf if m.rollout.lease.budget.is_free else float(m.rollout.lease.budget.tokens) for m in scored], dtype=torch.float64
    )
    ceiling_N = budget_ceiling(budget_N, max_length=settings.rollout.max_length, beta=settings.reward.beta)
    advantage_N = compute(reward_N, group_N, budget_N, ceiling_N.to(reward_N.dtype), settings.advantage).float()
    minibatch_N = group_N * settings.learner.minibatches // max(len(groups), 1)
    batch = pack_rollouts([m.rollout for m in scored], advantage_N, minibatch_N, train_prefix=settings.learner.train_prefix)
    return batch, advantage_N, scored


def sample_record(member: Scored, advantage: float) -> dict[str, object]:
    """One line of samples.jsonl."""
    lease = member.rollout.lease
    return {
        "ticket": lease.ticket, "prompt": lease.prompt.question, "gold": lease.prompt.answer, "answer": member.rollout.text,
        "budget": lease.budget.label, "length": member.rollout.length, "verdict": member.verdict.status.value,
        "extracted": member.verdict.extracted, "reward": None if member.reward is None else dict(member.reward.parts),
        "advantage": advantage, "finish": member.rollout.finish.value,
    }


def check_scored(collected: Collected, limit: float) -> None:
    """Raise when more than ``limit`` of a step's answers got no verdict: learning from the rest would be biased."""
    members = [m for group in collected.groups for m in group.members]
    unscored = [m for m in members if m.reward is None]
    total = len(members) + len(collected.lost)
    if len(unscored) == len(members) or (len(unscored) + len(collected.lost)) > limit * total:
        example = unscored[0].verdict.evidence if unscored else collected.lost[0]
        raise BudgetRLError(
            f"{len(unscored) + len(collected.lost)} of {total} answers could not be scored (limit {limit:.0%}); first: {example}",
            fix="raise reward.grade_deadline_s if graders are slow, or reward.max_unscored to go on regardless",
        )


def check_learnable(metrics: dict[str, float], settings: Settings) -> None:
    """Raise after the first rollouts when no token carries a learning signal."""
    if settings.allow_idle or metrics["adv/nonzero_tokens"] > 0:
        return
    cut, malformed = metrics["verdict/truncated"], metrics["verdict/malformed"]
    if cut > 0.5:
        fix = f"{cut:.0%} of answers are cut at rollout.max_length={settings.rollout.max_length}: raise it"
    elif malformed > 0.5:
        fix = f"{malformed:.0%} of answers have no readable answer: check data.extract={settings.data.extract} against samples.jsonl"
    elif metrics["train/accuracy"] > 0.99:
        fix = "every answer is right: use harder data"
    else:
        fix = "no group has both right and wrong answers: use easier data, or raise rollout.samples_per_prompt or prompts_per_step"
    raise BudgetRLError("nothing can be learnt from the first step: every advantage is zero", fix=f"{fix} (allow_idle=true goes on)")


# -- the run -----------------------------------------------------------------------------------------------------------------


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
    console.opening(folder, {"version": project_version(), "model": settings.model.path, "data": settings.data.source,
                             "method": f"{settings.reward.method} / {settings.advantage.estimator}"})
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


def _run(settings: Settings, inputs: Inputs, folder: RunFolder, console: Console, tracker: Tracker, stop: StopFlag,
         resume: tuple[Path, Manifest] | None) -> int:
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
            estimate_memory(settings, shape.parameters, shape.vocab, shape.hidden, shape.layers), int(resources.get("memory", 0))
        )
        start_actors(settings, workforce, prepared, stop)
        run = Run(settings, prepared, workforce, folder, console, tracker, stop)
        if resume is not None:
            run.restore(*resume)
            console.say(f"resumed from {resume[0].name}")
        if run.finished():
            console.say(f"the run already reached its end at step {run.progress.step}; raise max_steps to go on, or resume=never to start anew")
            if settings.eval.after and not run.evaluation_file.exists():
                run.evaluate()  # the run was killed between its last checkpoint and the end of this
            return 0
        before = run.evaluate() if settings.eval.before and run.progress.step == 0 else {}
        run.train()
        run.save()
        after = run.evaluate() if settings.eval.after else {}
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


def chosen_params(settings: Settings) -> dict[str, object]:
    """The few settings shown as MLflow parameters; the whole configuration is an artifact."""
    plan = derived_plan(settings)
    return {
        "model.path": settings.model.path, "model.dtype": settings.model.dtype, "data.source": settings.data.source,
        "reward.method": settings.reward.method, "advantage.estimator": settings.advantage.estimator,
        "rollout.budgets": settings.rollout.budgets, "rollout.max_length": settings.rollout.max_length,
        "learner.lr": settings.learner.lr, "learner.ranks": settings.learner.ranks, "learner.zero_stage": settings.learner.zero_stage,
        "rollouts_per_step": plan.rollouts_per_step, "correction": effective_correction(settings), "seed": settings.seed,
    }


def summarise(console: Console, before: dict[str, float], after: dict[str, float], folder: RunFolder) -> None:
    """Before and after, and where the outputs lie."""
    if before and after:
        accuracy = (before["eval/accuracy"], after["eval/accuracy"])
        tokens = (before["eval/tokens"], after["eval/tokens"])
        console.say(
            f"held-out, no budget: accuracy {accuracy[0]:.3f} -> {accuracy[1]:.3f} ({100 * (accuracy[1] - accuracy[0]):+.1f} points), "
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
