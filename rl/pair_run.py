"""A stage that learns from pairs of answers: DPO and its relatives, or a distillation on the chosen answers."""

from __future__ import annotations

import json
import logging
import time
from typing import Any

import torch

from rl.batch import select_rollouts
from rl.checkpointing import Resume
from rl.guidance import Pair
from rl.manifest import CheckpointError
from rl.pair_columns import Both, PairColumns, read_columns, split_column, write_columns
from rl.pair_sampling import check_enough, counted, sample_pairs
from rl.pairs import FoundPairs, PairStream, load_pairs, pairs_digest, split_pairs, to_batch, turned_round, write_pairs
from rl.preference import preference_loss
from rl.replay import Preference, Task
from rl.run import Run
from rl.sampling_state import read_state
from rl.step_metrics import learner_metrics, pair_metrics
from rl.types import StepReport, TrainBatch
from rl.updates import distillation_of, loss_tokens, pair_counts, planned_updates, update_learners

log = logging.getLogger("budget_rl")

PAIRS_NAME, COLUMNS_NAME = "pairs.jsonl", "pairs.safetensors"
"""In the run's folder: the pairs it learns from, and what frozen models said of them."""


class PairRun(Run):
    """A run whose steps are batches of pairs; everything around the steps is that of any run."""

    pairs: PairStream
    held_out: list[Pair]
    columns: PairColumns
    digest: str

    # -- before the first step -------------------------------------------------------------------------------------------

    def begin(self, resume: Resume | None) -> None:
        """Find the pairs and what frozen models say of them, while learner and engines still hold the start policy."""
        every = self.find_pairs(resume)
        seed = self.settings.seed
        train, self.held_out = split_pairs(every, self.preference.pairs.held_out, seed=seed)
        self.pairs = PairStream(train, seed)
        self.columns = self.find_columns(resume, train + self.held_out)
        if resume is not None:
            self.restore(*resume)
            self.console.say(f"resumed from {resume[0].name}")
        else:
            self.push_weights()
            self.progress.started = time.monotonic()  # max_minutes is about training

    @property
    def preference(self) -> Any:
        """The settings of the pairs, which every stage that learns from them has."""
        assert self.settings.preference is not None
        return self.settings.preference

    def find_pairs(self, resume: Resume | None) -> list[Pair]:
        """The run's pairs: those it began with, else a data set's or new ones from the start policy's answers."""
        kept = None if resume is None else resume[0].parent.parent / PAIRS_NAME
        here = self.folder.path / PAIRS_NAME
        if resume is not None and kept is not None:
            digest = read_state(resume[0], "pairs", lambda content: content.get("digest"))
            if not kept.is_file():
                raise CheckpointError(
                    f"{kept} is missing: {resume[0].name} goes on with the pairs in it",
                    fix="put the file back, or start anew with resume=never",
                )
            pairs = load_pairs(kept, digest=digest)
        else:
            found = self.prepared.pairs or self.sampled_pairs()
            check_enough(len(found.pairs), self.settings, what=counted(found))
            self.console.say(f"pairs: {len(found.pairs)} ({counted(found)})")
            pairs = list(found.pairs)
        self.digest = pairs_digest(pairs)
        if kept is None or kept.resolve() != here.resolve():
            write_pairs(here, pairs)
        # The file holds them as they were found, so that it can be another run's source.
        return [turned_round(pair) for pair in pairs] if self.preference.reverse else pairs

    def sampled_pairs(self) -> FoundPairs:
        """Pairs from answers of the start policy, which the engines still hold."""
        asked = self.preference.pairs
        prompts = min(asked.prompts, len(self.prepared.stream))
        with self.console.progress("pairs", total=prompts) as advance:
            return sample_pairs(
                self.collector, self.prepared.plan, self.prepared.stream, self.settings, stop=self.stop, advance=advance
            )

    def find_columns(self, resume: Resume | None, pairs: list[Pair]) -> PairColumns:
        """Reference log-probs and token rewards, from the run's folder where an earlier start computed them."""
        key = json.dumps({"pairs": pairs_digest(pairs), "preference": self.preference.model_dump(mode="json")}, sort_keys=True)
        path = self.folder.path / COLUMNS_NAME
        if resume is not None and (known := read_columns(path, key=key)) is not None:
            return known
        started = time.monotonic()
        batch = to_batch(pairs)
        needs_reference = self.settings.stage == "preference" and self.preference.form == "dpo"
        reference = split_column(self.frozen.learner_logp(batch), pairs) if needs_reference else None
        columns = PairColumns(reference, self.pair_credits(pairs))
        if reference is not None or columns.credit is not None:
            write_columns(path, columns, key=key)
            self.console.say(f"frozen models scored {len(pairs)} pairs, {time.monotonic() - started:.0f} s")
        return columns

    def pair_credits(self, pairs: list[Pair]) -> dict[str, Both] | None:
        """T-REG's token rewards of both answers; None where the run has none."""
        treg = self.preference.treg
        if treg is None or self.settings.stage != "preference":
            return None
        assert self.credits is not None
        if treg.self_test:
            found = self.credits.self_test(
                [pair.question for pair in pairs],
                [pair.chosen_ids for pair in pairs],
                [0] * len(pairs),
                section="preference.treg",
            )
            self.console.say(
                f"T-REG's self-test: the right token earned more at {found.share:.0%} of {found.places} places "
                f"(95 % interval from {found.lower:.0%})"
            )
        return self.credits.of_pairs(pairs, say=self.console.say)

    # -- steps -----------------------------------------------------------------------------------------------------------

    def one_step(self) -> StepReport:
        """Learn from the next pairs of the stream; the counters move when the update is done."""
        started = time.monotonic()
        settings, progress = self.settings, self.progress
        pairs, cursor = self.pairs.take(progress.cursor, self.preference.pairs_per_step)
        metrics = self.distil(pairs) if settings.stage == "distil" else self.prefer(pairs)
        progress.step += 1
        progress.cursor = cursor
        tokens = sum(len(pair.chosen_ids) if settings.stage == "distil" else pair.tokens for pair in pairs)
        progress.tokens_seen += tokens
        seconds = time.monotonic() - started
        metrics |= {
            "time/step": seconds,
            "tokens/total": float(progress.tokens_seen),
            "rate/tokens_per_s": tokens / seconds,
            "pair/epoch": progress.cursor / len(self.pairs),
        }
        return StepReport(progress.step, metrics)

    def prefer(self, pairs: list[Pair]) -> dict[str, float]:
        """One update of the preference loss."""
        totals = self.updated(self.batch_of(pairs), Task(objective="preference", preference=self.terms()))
        metrics = learner_metrics(totals) | pair_metrics(totals)
        del metrics["policy/loss"], metrics["mismatch/mean"], metrics["mismatch/max"]  # nothing was sampled
        return metrics

    def distil(self, pairs: list[Pair]) -> dict[str, float]:
        """One update towards the teacher on the chosen answers."""
        chosen = select_rollouts(to_batch(pairs), range(0, 2 * len(pairs), 2))
        batch, figures = self.frozen.teach(chosen, torch.ones(len(pairs), dtype=torch.bool))
        task = Task(objective="distillation", distillation=distillation_of(self.settings, batch, self.frozen.vocabulary))
        return figures | learner_metrics(self.updated(batch, task))

    def updated(self, batch: TrainBatch, task: Task) -> list[dict[str, Any]]:
        """The ranks' totals of one optimiser step."""
        learner = self.settings.learner
        return update_learners(
            self.workforce.learners,
            batch,
            task,
            ranks=learner.ranks,
            divisors=pair_counts(batch, 1) if task.objective == "preference" else loss_tokens(batch, 1),
            total_updates=planned_updates(self.settings),
            seconds=learner.deadline_s,
            what=f"learner update {self.progress.step + 1}",
        )

    def batch_of(self, pairs: list[Pair]) -> TrainBatch:
        """Pairs with what frozen models said of them."""
        reference, credit = self.columns.of(pairs)
        return to_batch(pairs, credit=credit, reference=reference)

    def terms(self) -> Preference:
        """The preference loss as the settings want it."""
        chosen = self.preference
        alpha = 0.0 if chosen.treg is None else chosen.treg.alpha
        return Preference(form=chosen.form, beta=chosen.beta, margin=chosen.margin, treg_alpha=alpha)

    # -- evaluation and state --------------------------------------------------------------------------------------------

    def evaluate(self) -> dict[str, float]:
        """Held-out problems as in every run, and the loss and accuracy on held-out pairs."""
        if self.progress.step:
            self.push_weights()
        metrics = super().evaluate()
        # Before the first step DPO's margins are 0 but for rounding.
        if self.settings.stage == "preference" and self.held_out and self.progress.step:
            found = self.held_out_pairs()
            self.reporter.evaluation(self.progress.step, found)
            metrics |= found
            self.console.say(
                f"step {self.progress.step}: held-out pairs: accuracy {found['eval/pair_accuracy']:.3f}, "
                f"margin {found['eval/pair_margin']:+.3f}, loss {found['eval/pair_loss']:.4f} ({len(self.held_out)} pairs)"
            )
        return metrics

    def held_out_pairs(self) -> dict[str, float]:
        """The preference loss on the held-out pairs at the present weights, without a gradient."""
        batch, terms = self.batch_of(self.held_out), self.terms()
        row_T = torch.repeat_interleave(torch.arange(batch.rollouts), batch.start_N.diff())
        assert batch.pair_N is not None
        result = preference_loss(
            self.frozen.learner_logp(batch),
            batch.loss_mask_T,
            row_T,
            batch.pair_N,
            torch.tensor([1, -1]).repeat(len(self.held_out)),
            reference_T=batch.guidance.reference_T,
            credit_T=batch.guidance.credit_T,
            form=terms.form,
            beta=terms.beta,
            margin=terms.margin,
            treg_alpha=terms.treg_alpha,
        )
        count = len(self.held_out)
        names = ("loss", "accuracy", "margin", "chosen_reward", "rejected_reward")
        return {f"eval/pair_{name}": float(getattr(result, name)) / count for name in names}

    def extra_state(self) -> dict[str, Any]:
        """Which pairs the run learns from."""
        return {"pairs": {"digest": self.digest}}
