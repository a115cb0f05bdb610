"""What a run reports of its steps: every sink gets the same figures, and what looks wrong is said once."""

from __future__ import annotations

import logging

import torch

from rl.console import Console
from rl.fairness import unfair_rejection
from rl.run_folder import RunFolder
from rl.settings import Settings
from rl.step_rules import sample_record
from rl.tracking import Tracker
from rl.types import Scored, StepReport

log = logging.getLogger("budget_rl")

ADVANTAGE_DRIFT = 0.5
"""|mean advantage| above this share of its spread pushes all sampled tokens one way; see docs/stability.md."""
MISMATCH_LIMIT = {"float32": 1e-3, "bfloat16": 1.0}
"""Largest |engine - learner| log-prob that rounding explains (measured: 6e-5 in float32, 0.2 to 0.6 in bfloat16)."""


class Reporter:
    """The sinks of one run."""

    def __init__(self, settings: Settings, folder: RunFolder, console: Console, tracker: Tracker) -> None:
        self.settings, self.folder, self.console, self.tracker = settings, folder, console, tracker
        self.warned: set[str] = set()

    def record(self, report: StepReport) -> None:
        """Hand one report to every sink."""
        self.folder.append_metrics(report)
        self.tracker.step(report)
        self.console.step(report)
        if report.step == 1 and "verdict/truncated" in report.metrics:
            self.console.first_step_table(report)

    def publish(self, report: StepReport) -> None:
        """Record a finished step and raise the alarms."""
        self.record(report)
        m = report.metrics
        if m["learn/skipped"]:
            log.warning(
                "step %d: %d optimiser step skipped, loss or gradient was not finite; weights unchanged",
                report.step,
                int(m["learn/skipped"]),
            )
        if "adv/mean" not in m:
            return  # nothing was sampled
        drifts = abs(m["adv/mean"]) > ADVANTAGE_DRIFT * max(m["adv/std"], 1e-9) and m["adv/nonzero_tokens"] > 0
        if drifts and self.settings.stage == "rl":  # a distillation looks at no advantage
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

    def evaluation(self, step: int, metrics: dict[str, float]) -> None:
        """Figures of an evaluation at ``step`` into every sink but the console."""
        report = StepReport(step, metrics)
        self.folder.append_metrics(report)
        self.tracker.step(report)
