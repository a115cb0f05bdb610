"""One training run on a started workforce: the loop of generate, score, learn and sync, and what each step reports."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rl.behaviour import behaviour_of
from rl.budget_settings import BudgetMemory
from rl.checkpointing import Resume, save_checkpoint
from rl.cluster import Workforce
from rl.collection import Collected, Collector
from rl.console import Console
from rl.credit import Credits
from rl.errors import BudgetRLError
from rl.evaluation import evaluate, write_per_problem
from rl.fairness import fairness_metrics
from rl.function_metrics import function_metrics
from rl.generation import generate_step, new_tokens
from rl.guiding import FrozenModels
from rl.measuring import measure_reference, measure_targets, monitor_is_due, prompts_ahead
from rl.pair_sampling import right_answers
from rl.preparation import Prepared
from rl.replay import Task
from rl.reporting import Reporter
from rl.reward_state import RewardState
from rl.run_folder import RunFolder
from rl.sampling_state import SamplingState, read_rewards, read_sampling
from rl.settings import Settings
from rl.step_metrics import advantage_metrics, budget_labels, exit_metrics, learner_metrics, rollout_metrics
from rl.step_rules import build_batch, chosen_correction, idle_error, sample_record, unscored_error, unscored_members
from rl.tracking import Tracker
from rl.types import Manifest, Scored, Shaping, StepReport, TrainBatch
from rl.updates import distillation_of, loss_tokens, planned_updates, update_learners
from rl.waiting import StopFlag, StopRequested, wait_for
from rollout.progress import engine_metrics

log = logging.getLogger("budget_rl")

UNSCORED_KEPT = 10
"""Answers kept when too many of a step could not be judged."""


@dataclass
class Progress:
    """Where the run stands; together with the learner's state, all that a checkpoint holds."""

    step: int = 0
    cursor: int = 0
    tokens_seen: int = 0
    minutes_before: float = 0.0
    started: float = 0.0
    saved_step: int = -1
    rollouts_seen: int = 0

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
        self.reporter = Reporter(settings, folder, console, tracker)
        self.frozen = FrozenModels.of(settings, workforce, stop)
        self.credits: Credits | None = None
        if prepared.contrast is not None:
            self.credits = Credits(settings, prepared.contrast, prepared.tokenizer, workforce.frozen, stop)
        self.progress = Progress(started=time.monotonic())
        self.sampling, self.rewards = SamplingState(), RewardState()
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
            self.test_credits()
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
            step=manifest.step,
            cursor=manifest.cursor,
            tokens_seen=manifest.tokens_seen,
            minutes_before=manifest.minutes_spent,
            started=time.monotonic(),
            saved_step=manifest.step,
            rollouts_seen=manifest.rollouts_seen,
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
            or (s.max_rollouts is not None and p.rollouts_seen >= s.max_rollouts)
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
            self.reporter.warn("refill", f"step {progress.step + 1}: {found.refill.shortage(settings)}")
        batch, advantage_N, members = build_batch(found.refill.kept, settings, self.prepared.vocabulary)
        metrics = rollout_metrics(groups, drawn=not settings.rollout.has_listed_budgets) | advantage_metrics(advantage_N, batch)
        metrics |= function_metrics(groups) | exit_metrics(groups, exits=settings.rollout.exits)
        metrics |= self.rewards.figures(settings.reward)
        metrics |= {"rollouts/lost": float(len(collected.lost)), "prompts/dropped": self.prepared.dropped_share}
        metrics |= engine_metrics(collected.stats) | found.refill.figures()
        self.reporter.write_samples(progress.step + 1, members, advantage_N)
        if progress.step == 0 and settings.stage == "rl" and (error := idle_error(metrics, settings)) is not None:
            self.reporter.record(StepReport(1, metrics))  # what the advice is about, on screen and on disk
            raise error
        batch, guided = self.guide(batch, members)
        learning = time.monotonic()
        metrics |= guided | self.update(batch, shaping, members)
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
        progress.rollouts_seen += sum(len(group.members) for group in groups)
        metrics |= {
            "time/generate": collected.generate_s,
            "time/score": collected.score_s,
            "time/learn": syncing - learning,
            "time/sync": ended - syncing,
            "time/step": ended - started,
            "rate/tokens_per_s": tokens / (ended - started),
            "tokens/total": float(progress.tokens_seen),
            "rollouts/total": float(progress.rollouts_seen),
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

    def test_credits(self) -> None:
        """Prove on the start policy's own right answers that T-REG's token rewards have the right sign, or refuse to go on."""
        treg = self.settings.treg
        if treg is None or self.credits is None or not treg.self_test:
            return
        answers = right_answers(self.collector, self.prepared.plan, self.prepared.stream, self.settings, stop=self.stop)
        found = self.credits.self_test(
            [r.lease.prompt.question for r in answers],
            [r.response_ids for r in answers],
            [r.prefill_length for r in answers],
            section="treg",
        )
        self.console.say(
            f"T-REG's self-test: the right token earned more at {found.share:.0%} of {found.places} places "
            f"(95 % interval from {found.lower:.0%})"
        )

    def check_scored(self, collected: Collected) -> None:
        """Raise when too many answers got no verdict, with the worst of them in unscored.jsonl."""
        if (error := unscored_error(collected, self.settings.reward.max_unscored)) is not None:
            worst = unscored_members(collected)[:UNSCORED_KEPT]
            self.folder.append_unscored(self.progress.step + 1, [sample_record(m, 0.0) for m in worst])
            raise error

    def guide(self, batch: TrainBatch, members: list[Scored]) -> tuple[TrainBatch, dict[str, float]]:
        """The batch with what frozen models say of it: T-REG's token rewards in its advantages, a teacher beside them."""
        figures: dict[str, float] = {}
        if self.settings.treg is not None and self.credits is not None:
            rollouts = [member.rollout for member in members]
            batch, figures = self.credits.reshaped(batch, rollouts, weight=self.settings.treg.weight)
        distil = self.settings.distil
        if distil is not None:
            wanted = [m.verdict.status.value in distil.verdicts for m in members]
            batch, taught = self.frozen.teach(batch, torch.tensor(wanted))
            figures |= taught
        return batch, figures

    def update(self, batch: TrainBatch, shaping: Shaping, members: list[Scored]) -> dict[str, float]:
        """One pass of optimiser steps over the step's rollouts."""
        settings = self.settings
        per_step = settings.learner.minibatches * settings.learner.epochs
        correction = chosen_correction(settings)
        task = Task(
            objective="distillation" if settings.stage == "distil" else "policy",
            correction=correction,
            behaviour=behaviour_of([shaping], self.prepared.vocabulary),
            entropies=settings.rollout.adaptive is not None,
            distillation=distillation_of(settings, batch, self.frozen.vocabulary),
        )
        # Not interruptible: the weights must be those of a whole step when a checkpoint is written.
        totals = update_learners(
            self.workforce.learners,
            batch,
            task,
            ranks=settings.learner.ranks,
            divisors=loss_tokens(batch, settings.learner.minibatches),
            total_updates=planned_updates(settings),
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

    # -- evaluation and state --------------------------------------------------------------------------------------------

    def publish(self, report: StepReport) -> None:
        """Record a finished step and raise the alarms."""
        self.reporter.publish(report)

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
        self.reporter.evaluation(self.progress.step, metrics | {"time/eval": time.monotonic() - started})
        self.evaluation = (self.progress.step, metrics)
        free = results[0]
        self.console.say(
            f"step {self.progress.step}: held-out accuracy {free.accuracy:.3f}, {free.tokens:.1f} tokens, "
            f"cut {free.truncated:.1%} ({len(self.prepared.held_out)} problems x {self.settings.eval.samples}, no budget)"
        )
        return metrics

    def extra_state(self) -> dict[str, Any]:
        """What a checkpoint of this kind of run holds beside what all have: sections of its state.json."""
        return {}

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
            rollouts_seen=p.rollouts_seen,
            minutes_spent=p.minutes,
            run_id=self.tracker.run_id,
            evaluation=self.evaluation[1] if self.evaluation[0] == p.step else {},
            sampling=self.sampling,
            rewards=self.rewards,
            extra=self.extra_state(),
        )
        p.saved_step = p.step
        return path
