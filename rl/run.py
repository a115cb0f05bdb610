"""One training run on a started workforce: the loop of generate, score, learn and sync, and what each step reports."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from rl.behaviour import behaviour_of
from rl.budget_settings import BudgetMemory
from rl.checkpointing import Resume, save_checkpoint
from rl.cluster import Workforce
from rl.collection import Collected, Collector
from rl.console import Console
from rl.errors import BudgetRLError
from rl.evaluation import evaluate, write_per_problem
from rl.fairness import fairness_metrics, unfair_rejection
from rl.function_metrics import function_metrics
from rl.generation import generate_step, new_tokens
from rl.learner_worker import to_data_proto
from rl.measuring import measure_reference, measure_targets, monitor_is_due, prompts_ahead
from rl.preparation import Prepared
from rl.replay import Task
from rl.reward_state import RewardState
from rl.run_folder import RunFolder
from rl.sampling_state import SamplingState, read_rewards, read_sampling
from rl.settings import Settings
from rl.step_metrics import advantage_metrics, budget_labels, exit_metrics, learner_metrics, rollout_metrics
from rl.step_rules import build_batch, chosen_correction, idle_error, sample_record, unscored_error, unscored_members
from rl.tracking import Tracker
from rl.types import Manifest, Scored, Shaping, StepReport, TrainBatch
from rl.waiting import StopFlag, StopRequested, wait_for
from rollout.progress import engine_metrics

log = logging.getLogger("budget_rl")

ADVANTAGE_DRIFT = 0.5
"""|mean advantage| above this share of its spread pushes all sampled tokens one way; see docs/stability.md."""
UNSCORED_KEPT = 10
"""Answers kept when too many of a step could not be judged."""
MISMATCH_LIMIT = {"float32": 1e-3, "bfloat16": 1.0}
"""Largest |engine - learner| log-prob that rounding explains (measured: 6e-5 in float32, 0.2 to 0.6 in bfloat16)."""


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

    def __init__(
        self,
        settings: Settings,
        prepared: Prepared,
        workforce: Workforce,
        folder: RunFolder,
        console: Console,
        tracker: Tracker,
        stop: StopFlag,
    ) -> None:
        self.settings, self.prepared, self.workforce = settings, prepared, workforce
        self.folder, self.console, self.tracker, self.stop = folder, console, tracker, stop
        self.collector = Collector(workforce.engines, workforce.scorers, settings)
        self.progress = Progress(started=time.monotonic())
        self.sampling, self.rewards = SamplingState(), RewardState()
        self.warned: set[str] = set()
        self.evaluation: tuple[int, dict[str, float]] = (-1, {})
        """The newest held-out figures and the step they were measured at."""

    # -- the loop --------------------------------------------------------------------------------------------------------

    def begin(self, resume: Resume | None) -> None:
        """Bring learner, engines and counters to where the run starts.

        A fresh run pushes its weights too: engines that take them under other names or shapes fail now, not after a first step.
        """
        if resume is None:
            self.push_weights()
            self.measure_start(None)
        else:
            self.measure_start(resume[0])
            self.restore(*resume)
            self.console.say(f"resumed from {resume[0].name}")

    def restore(self, checkpoint: Path, manifest: Manifest) -> None:
        """Bring the learner, the engines and the counters to the state after ``manifest.step``."""
        wait_for(
            self.workforce.learners.load(str(checkpoint)),
            seconds=self.settings.learner.deadline_s,
            what="learner loads its state",
        )
        self.sampling = read_sampling(checkpoint)
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
                if every and self.progress.step % every == 0 and not self.finished():
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
        if monitor_is_due(settings, self.rewards, progress.step):
            measure_targets(
                self.collector,
                self.prepared.plan,
                self.prepared.stream,
                settings,
                self.rewards,
                version=progress.step,
                stop=self.stop,
            )
        shaping = self.sampling.shaping(settings.rollout)
        found = generate_step(
            self.collector,
            self.prepared.plan,
            self.prepared.stream,
            settings,
            cursor=progress.cursor,
            step=progress.step,
            shaping=shaping,
            sampling=self.sampling,
            rewards=self.rewards,
            stop=self.stop,
            check=self.check_scored,
        )
        collected, groups = found.collected, found.refill.groups
        if found.refill.short_by:
            self.warn("refill", f"step {progress.step + 1}: {found.refill.shortage(settings)}")
        batch, advantage_N, members = build_batch(found.refill.kept, settings, self.prepared.vocabulary)
        metrics = rollout_metrics(groups, drawn=not settings.rollout.has_listed_budgets) | advantage_metrics(advantage_N, batch)
        metrics |= function_metrics(groups) | exit_metrics(groups, exits=settings.rollout.exits)
        metrics |= self.rewards.figures(settings.reward)
        metrics |= {"rollouts/lost": float(len(collected.lost)), "prompts/dropped": self.prepared.dropped_share}
        metrics |= engine_metrics(collected.stats) | found.refill.figures()
        self.write_samples(progress.step + 1, members, advantage_N)
        if progress.step == 0 and (error := idle_error(metrics, settings)) is not None:
            self.record(StepReport(1, metrics))  # what the advice is about, on screen and on disk
            raise error
        learning = time.monotonic()
        metrics |= self.update(batch, shaping, members)
        syncing = time.monotonic()
        progress.step += 1
        self.push_weights()
        ended = time.monotonic()
        progress.cursor = found.cursor
        if isinstance(settings.rollout.budgets, BudgetMemory):
            self.sampling.memory.observe(collected.groups)
        self.rewards.observe(groups, settings.reward)
        tokens = sum(new_tokens(m.rollout, settings) for group in groups for m in group.members)
        progress.tokens_seen += tokens
        metrics |= {
            "time/generate": collected.generate_s,
            "time/score": collected.score_s,
            "time/learn": syncing - learning,
            "time/sync": ended - syncing,
            "time/step": ended - started,
            "rate/tokens_per_s": tokens / (ended - started),
            "tokens/total": float(progress.tokens_seen),
        }
        return StepReport(progress.step, metrics)

    def measure_start(self, checkpoint: Path | None) -> None:
        """Measure the start policy where rewards compare with it; the engines must still hold it.

        ``checkpoint``: what the run goes on from. It knows the prompts measured so far; a longer run comes to further ones.
        """
        if checkpoint is not None:
            self.rewards = read_rewards(checkpoint)
        if not self.settings.reward.needs_reference:
            return
        prompts = prompts_ahead(self.prepared.stream, self.settings)
        started = time.monotonic()
        with self.console.progress("start policy", total=len(prompts)) as advance:
            found = measure_reference(
                self.collector, self.prepared.plan, prompts, self.settings, self.rewards, stop=self.stop, advance=advance
            )
        self.console.say(f"start policy measured on {found} of {len(prompts)} prompts, {time.monotonic() - started:.0f} s")
        self.progress.started = time.monotonic()  # max_minutes is about training

    def check_scored(self, collected: Collected) -> None:
        """Raise when too many answers got no verdict, with the worst of them in unscored.jsonl."""
        if (error := unscored_error(collected, self.settings.reward.max_unscored)) is not None:
            worst = unscored_members(collected)[:UNSCORED_KEPT]
            self.folder.append_unscored(self.progress.step + 1, [sample_record(m, 0.0) for m in worst])
            raise error

    def update(self, batch: TrainBatch, shaping: Shaping, members: list[Scored]) -> dict[str, float]:
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
        correction = chosen_correction(settings)
        data.meta_info["update"] = {
            "global_tokens": global_tokens,
            "total_updates": settings.max_steps * per_step if settings.max_steps else None,
            "task": Task(
                correction=correction,
                behaviour=behaviour_of([shaping], self.prepared.vocabulary),
                entropies=settings.rollout.adaptive is not None,
            ),
        }
        # Not interruptible: the weights must be those of a whole step when a checkpoint is written.
        totals = wait_for(
            self.workforce.learners.update(data),
            seconds=settings.learner.deadline_s,
            what=f"learner update {self.progress.step + 1}",
        )
        rows = [rank["rollout_N5"] for rank in totals if "rollout_N5" in rank]
        asked = (member.rollout.lease.budget for member in members)
        labels = budget_labels(asked, binned=not settings.rollout.has_listed_budgets)
        fairness = fairness_metrics(
            torch.cat(rows) if rows else torch.zeros(0, 5),
            [member.rollout.length for member in members],
            [labels[member.rollout.lease.budget] for member in members],
            clip=per_step > 1,
            correction=correction.mode == "truncated",
        )
        entropies = [rank["entropy_T"] for rank in totals if "entropy_T" in rank]
        return learner_metrics(totals) | fairness | self.sampling.learn(settings.rollout, entropies)

    def push_weights(self) -> None:
        """Every engine serves version ``step`` before the next rollout."""
        version, seconds = self.progress.step, self.settings.learner.deadline_s
        if self.settings.rollout.transport == "nccl":
            refs = self.workforce.learners.push_by_nccl(
                version, self.collector.live_engines, self.settings.rollout.tensor_parallel
            )
            wait_for(refs, seconds=seconds, what=f"weights v{version} go to the engines by NCCL")
            return
        refs = self.workforce.learners.collect_weights(version)
        wait_for(refs, seconds=seconds, what=f"learner collects weights v{version}")
        pushes = [engine.set_weights.remote(refs[0]) for engine in self.collector.live_engines]
        for index, served in enumerate(wait_for(pushes, seconds=seconds, what=f"engines take weights v{version}")):
            if served.number != version:
                raise BudgetRLError(f"engine {index} serves weights v{served.number} after a push of v{version}")

    # -- reporting -------------------------------------------------------------------------------------------------------

    def record(self, report: StepReport) -> None:
        """Hand one report to every sink."""
        self.folder.append_metrics(report)
        self.tracker.step(report)
        self.console.step(report)
        if report.step == 1:
            self.console.first_step_table(report)

    def publish(self, report: StepReport) -> None:
        """Record a finished step and raise the alarms."""
        self.record(report)
        m = report.metrics
        if abs(m["adv/mean"]) > ADVANTAGE_DRIFT * max(m["adv/std"], 1e-9) and m["adv/nonzero_tokens"] > 0:
            self.warn(
                "drift",
                f"mean advantage {m['adv/mean']:+.2f} at step {report.step}: the update pushes all samples one way; "
                f"set advantage.centre=group (docs/stability.md)",
            )
        if m["mismatch/max"] > MISMATCH_LIMIT[self.settings.model.dtype]:
            log.info("step %d: mismatch/max is %.1e nats", report.step, m["mismatch/max"])
            self.warn(
                "mismatch",
                f"engine and learner disagree by {m['mismatch/max']:.1e} nats at step {report.step}: ratios are biased; "
                f"use correction=truncated or model.dtype=float32",
            )
        if (unfair := unfair_rejection(dict(m))) is not None:
            self.warn("rejection", f"step {report.step}: {unfair}")
        if m["learn/skipped"]:
            log.warning(
                "step %d: %d optimiser step skipped, loss or gradient was not finite; weights unchanged",
                report.step,
                int(m["learn/skipped"]),
            )

    def warn(self, key: str, text: str) -> None:
        """Say something once a run."""
        if key not in self.warned:
            self.warned.add(key)
            log.warning(text)

    def write_samples(self, step: int, members: list[Scored], advantage_N: torch.Tensor) -> None:
        """A few rollouts of ``step``, spread over the batch, to samples.jsonl."""
        wanted = min(self.settings.output.samples_per_step, len(members))
        # A step further into its group each time, so that every budget gets its turn.
        stride = self.settings.rollout.samples_per_prompt // max(wanted, 1)
        picked = [(i * len(members) // wanted + i * stride) % len(members) for i in range(wanted)]
        self.folder.append_samples(step, [sample_record(members[i], float(advantage_N[i])) for i in picked])

    @property
    def evaluation_file(self) -> Path:
        """Where the per-problem results at the current step lie, once evaluated."""
        return self.folder.path / f"eval-{self.progress.step}.json"

    def evaluate(self) -> dict[str, float]:
        """Held-out accuracy and tokens at the current weights, into every sink under the current step."""
        started = time.monotonic()
        results = evaluate(
            self.collector,
            self.prepared.plan,
            self.prepared.held_out,
            self.settings,
            version=self.progress.step,
            step=self.progress.step,
            sampling=self.sampling,
            stop=self.stop,
        )
        write_per_problem(self.evaluation_file, results, step=self.progress.step)
        metrics = {name: value for result in results for name, value in result.metrics().items()}
        report = StepReport(self.progress.step, metrics | {"time/eval": time.monotonic() - started})
        self.folder.append_metrics(report)
        self.tracker.step(report)
        self.evaluation = (self.progress.step, metrics)
        free = results[0]
        self.console.say(
            f"step {self.progress.step}: held-out accuracy {free.accuracy:.3f}, {free.tokens:.1f} tokens, "
            f"cut {free.truncated:.1%} ({len(self.prepared.held_out)} problems x {self.settings.eval.samples}, no budget)"
        )
        return metrics

    def save(self) -> Path | None:
        """Write a checkpoint of the last finished step unless there is one."""
        p = self.progress
        if p.saved_step == p.step:
            return None
        path = save_checkpoint(
            self.workforce,
            self.folder,
            self.prepared.model,
            self.settings,
            step=p.step,
            cursor=p.cursor,
            tokens_seen=p.tokens_seen,
            minutes_spent=p.minutes,
            run_id=self.tracker.run_id,
            evaluation=self.evaluation[1] if self.evaluation[0] == p.step else {},
            sampling=self.sampling,
            rewards=self.rewards,
        )
        p.saved_step = p.step
        return path
