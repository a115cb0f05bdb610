"""One data-parallel rank of the learner: DeepSpeed around the policy, in token-budget micro-batches.

The update of a mini-batch is the gradient of ``sum over all its loss tokens / number of those tokens``, whatever the split into
micro-batches or ranks. DeepSpeed averages gradients over ranks, so each local sum is scaled by world size / global tokens.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from reward.heads import read_head
from rl.batch import MicroBatch, pad_rows, plan_microbatches, select_rollouts, units_of
from rl.errors import BudgetRLError
from rl.guidance import HeadSources
from rl.heterogeneous import entropy_statistics
from rl.losses import kl_penalty
from rl.objectives import add, distillation_objective, likelihood_objective, policy_objective, preference_objective
from rl.optimisation import deepspeed_config, learning_rate
from rl.policy import PLAIN, Alignment, PolicyModel, Scores, load_policy
from rl.process_group import gathered_over_ranks
from rl.replay import POLICY, OldScores, Task, select_old
from rl.selection import weighted
from rl.settings import LearnerSettings, LossSettings
from rl.sstoken import PromptAttention
from rl.types import EntropyStatistics, TrainBatch

log = logging.getLogger("budget_rl.learner")


class Learner:
    """Policy, optimiser and (when KL is on) frozen reference of one rank; torch.distributed must be initialised."""

    def __init__(
        self,
        folder: Path,
        settings: LearnerSettings,
        loss: LossSettings,
        *,
        dtype: str,
        trust_remote_code: bool = False,
        heads: HeadSources | None = None,
    ) -> None:
        """``heads``: where those of the teacher's two models lie, which a distillation by hidden states needs here."""
        import deepspeed

        self.settings, self.loss_settings = settings, loss
        self.world_size = dist.get_world_size()
        policy = load_policy(
            folder, dtype=dtype, trust_remote_code=trust_remote_code, gradient_checkpointing=settings.gradient_checkpointing
        )
        self.device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
        self.tied_names = _tied_names(policy)
        self.reference: PolicyModel | None = None
        if loss.kl_coef > 0:
            self.reference = load_policy(folder, dtype=dtype, trust_remote_code=trust_remote_code).to(self.device).eval()
            self.reference.requires_grad_(False)
        self.teacher_heads: tuple[torch.Tensor, ...] = () if heads is None else tuple(
            read_head(folder, vocabulary=heads.vocabulary, dtype=dtype, trust_remote_code=trust_remote_code).to(self.device)
            for folder in (heads.dpo, heads.reverse)
        )
        optimizer = torch.optim.AdamW(
            policy.parameters(), lr=settings.lr, betas=settings.betas, weight_decay=settings.weight_decay, fused=True
        )
        self.engine: Any
        self.engine, *_ = deepspeed.initialize(
            model=policy, optimizer=optimizer, config=deepspeed_config(settings, dtype=dtype), dist_init_required=False
        )
        self.updates = 0
        self.skipped = 0

    @property
    def lm(self) -> Any:
        """The Hugging Face model inside the engine."""
        return self.engine.module.lm

    # -- updates ---------------------------------------------------------------------------------------------------------

    def update(
        self,
        batch: TrainBatch,
        *,
        global_tokens: list[int],
        total_updates: int | None,
        task: Task = POLICY,
    ) -> dict[str, Any]:
        """One or more optimiser steps on this rank's share of a step's rollouts.

        ``global_tokens[m]`` is what the loss of mini-batch ``m`` is divided by: its loss tokens over all ranks, or its pairs.
        Returns sums for the driver to add over ranks (`sum/*`), maxima (`max/*`), values equal on every rank (`same/*`),
        `rollout_N5` (see `rl.replay.rollout_rows`) and, if the task asks for it, `entropy_T`: float32, nats, of every token the
        engines sampled, at the sampling weights.
        """
        self.engine.train()
        totals: dict[str, Any] = {}
        minibatches = len(global_tokens)
        sampled = task.objective in ("policy", "distillation")
        epochs = self.settings.epochs if sampled else 1
        # With one update per batch the ratio is 1 by definition: its own forward is the old policy, so no extra pass is paid.
        single_pass = minibatches == 1 and epochs == 1 and not self._needs_statistics(task)
        old = self._old_scores(batch, totals, task) if sampled and not single_pass else None
        statistics = None if old is None else self._statistics(batch, old, task)
        if task.distillation is not None:
            batch = weighted(batch, old, global_tokens, task.distillation, gather=gathered_over_ranks)
        for _ in range(epochs):
            for m in range(minibatches):
                if global_tokens[m] == 0:
                    continue  # none of its answers was scored, and DeepSpeed cannot step without a gradient; all ranks skip it
                index = [i for i, owner in enumerate(batch.minibatch_N.tolist()) if owner == m]
                part = select_rollouts(batch, index)
                part_old = None if old is None else select_old(batch, index, old)
                self._minibatch(part, part_old, statistics, global_tokens[m], totals, task)
                self._optimiser_step(totals, total_updates)
        for name in ("entropy_T", "rollout_N5"):
            if name in totals:
                totals[name] = torch.cat(totals[name])
        return totals

    def score(self, batch: TrainBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-prob (float32, nats) of every response token at the present weights, 0 elsewhere, and each rollout's index_N."""
        old = self._old_scores(batch, {}, Task(objective="likelihood"))
        return old.raw.cpu(), batch.index_N

    def top_ids(self, batch: TrainBatch, k: int, vocabulary: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The policy's k most probable ids below ``vocabulary`` at every response token, int32 (T, k), 0 elsewhere; index_N."""
        found = torch.zeros((batch.tokens, k), dtype=torch.int32)
        with torch.no_grad():
            for index in self._equal_plan(batch):
                micro = self._move(pad_rows(batch, index))
                scores = self.engine(micro.token_BS, micro.position_T, micro.target_T, top=(k, vocabulary))
                if index:
                    found[micro.source_T.cpu()] = scores.top.cpu()
        return found, batch.index_N

    def _minibatch(
        self,
        batch: TrainBatch,
        old: OldScores | None,
        statistics: EntropyStatistics | None,
        global_tokens: int,
        totals: dict[str, Any],
        task: Task,
    ) -> None:
        plan = self._equal_plan(batch)
        for number, index in enumerate(plan):
            micro = self._move(pad_rows(batch, index))
            self.engine.set_gradient_accumulation_boundary(number == len(plan) - 1)
            # A row that only keeps this rank in step has no token in the batch, so no old log-prob either.
            micro_old = old.at(micro.source_T) if old is not None and index else None
            scores = self._scores(micro, task, micro_old)
            if task.objective == "likelihood":
                loss = likelihood_objective(micro, scores, totals)
            elif task.objective == "preference":
                loss = preference_objective(micro, scores, totals, task=task.preference)
            else:
                if micro_old is None:
                    micro_old = OldScores.of(scores)
                    self._compare(totals, scores, micro, task)
                loss = self._sampled_objective(micro, micro_old, scores, statistics, totals, task)
            add(totals, "sum/entropy", float((scores.entropy.detach() * micro.mask_T).sum()))
            add(totals, "sum/tokens", float(micro.mask_T.sum()))
            add(totals, "sum/padding", micro.padding)
            add(totals, "sum/grid", micro.token_BS.numel())
            self.engine.backward(loss * (self.world_size / max(global_tokens, 1)), scale_wrt_gas=False)

    def _sampled_objective(
        self,
        micro: MicroBatch,
        old: OldScores,
        scores: Scores,
        statistics: EntropyStatistics | None,
        totals: dict[str, Any],
        task: Task,
    ) -> torch.Tensor:
        """Policy loss, its KL to the start policy, and a distillation, as far as the task and the settings ask for them."""
        terms: list[torch.Tensor] = []
        settings = self.loss_settings
        if task.objective == "policy":
            terms.append(
                policy_objective(
                    micro, old, scores, totals, settings=settings, correction=task.correction, statistics=statistics
                )
            )
        if task.distillation is not None:
            distilled = distillation_objective(micro, old, scores, totals, task=task.distillation, settings=settings)
            terms.append(task.distillation.weight * distilled)
        if self.reference is not None:
            with torch.no_grad():
                reference = self.reference(micro.token_BS, micro.position_T, micro.target_T).raw
            penalty = (kl_penalty(scores.raw, reference, settings.kl_form) * micro.mask_T).sum()
            terms.append(settings.kl_coef * penalty)
            add(totals, "sum/kl", float(penalty.detach()))
        return torch.stack(terms).sum()

    def _scores(self, micro: MicroBatch, task: Task, old: OldScores | None = None) -> Scores:
        """The policy on a micro-batch; once there are old scores, the temperature is theirs, whatever the entropy is by now."""
        behaviour, temperature_T, bias_T = task.behaviour, _temperatures(micro), micro.bias_T
        supervised = task.objective in ("likelihood", "preference")
        if supervised or (old is not None and task.correction.mode != "replay"):
            behaviour, temperature_T, bias_T = PLAIN, None, None  # nobody looks at the shaped log-prob
        elif old is not None:
            behaviour, temperature_T = replace(behaviour, rule=None), old.temperature
        aligned = self._alignment(micro, task) if torch.is_grad_enabled() else None
        return self.engine(
            micro.token_BS, micro.position_T, micro.target_T, temperature_T, bias_T, behaviour, alignment=aligned
        )

    def _alignment(self, micro: MicroBatch, task: Task) -> Alignment | None:
        """What the head needs to compare the student with the teacher; None where log-probs of the tokens suffice."""
        distillation, guide = task.distillation, micro.guidance
        whole = guide.dpo_hidden_TH is not None or guide.id_TK is not None
        if distillation is None or distillation.mode == "scalar" or not whole:  # none of the step's answers is distilled
            return None
        dpo = reverse = None
        if guide.dpo_hidden_TH is not None and guide.reverse_hidden_TH is not None:
            heads = self.teacher_heads
            dpo, reverse = (guide.dpo_hidden_TH, heads[0]), (guide.reverse_hidden_TH, heads[1])
        return Alignment(
            vocabulary=distillation.vocabulary,
            r=distillation.r,
            eps=distillation.eps,
            id_TK=guide.id_TK,
            teacher_logp_TK=guide.teacher_logp_TK,
            tail_T=guide.tail_T,
            dpo=dpo,
            reverse=reverse,
        )

    def _needs_statistics(self, task: Task) -> bool:
        """Whether the entropies of the whole batch must be known before the first update."""
        heterogeneous = self.loss_settings.heterogeneous
        by_batch = heterogeneous is not None and (heterogeneous.scope == "batch" or heterogeneous.entropy == "old")
        selects = task.distillation is not None and task.distillation.selects_by_policy
        return (by_batch and task.objective == "policy") or selects

    def _statistics(self, batch: TrainBatch, old: OldScores, task: Task) -> EntropyStatistics | None:
        """Statistics of the log entropies of all tokens with loss, over all ranks; None where nobody asks or there are none."""
        heterogeneous = self.loss_settings.heterogeneous
        if heterogeneous is None or task.objective != "policy" or heterogeneous.scope != "batch":
            return None
        entropy_T = gathered_over_ranks(old.entropy[batch.loss_mask_T.to(self.device)])
        if not entropy_T.numel() or not bool(torch.isfinite(entropy_T).all()):
            return None  # the gradient is not finite either: the step is skipped and said to be
        return entropy_statistics(entropy_T, rho=heterogeneous.rho)

    def _old_scores(self, batch: TrainBatch, totals: dict[str, Any], task: Task) -> OldScores:
        """The scores at the sampling weights, before the first update, over the whole batch."""
        found: list[tuple[torch.Tensor, OldScores]] = []
        with torch.no_grad():
            for index in self._equal_plan(batch):
                micro = self._move(pad_rows(batch, index))
                with self._probed(batch, index, task) as probe:
                    scores = self._scores(micro, task)
                if index:
                    # a token is scored by where it stands, one behind the position that predicts it
                    mass_T = None if probe is None else probe.mass_BS.flatten()[micro.position_T + 1]
                    found.append((micro.source_T, replace(OldScores.of(scores), attention=mass_T)))
                    self._compare(totals, scores, micro, task)
        return OldScores.gathered(found, batch.tokens, self.device)

    def _probed(self, batch: TrainBatch, index: list[int], task: Task) -> AbstractContextManager[PromptAttention | None]:
        """A forward pass in which the attention to the prompt is measured, where ssToken's selection looks at it."""
        chosen = None if task.distillation is None else task.distillation.sstoken
        if chosen is None or chosen[0] == 1:
            return nullcontext()
        length_B = batch.prompt_length_N[index] if index else torch.ones(1, dtype=torch.int64)
        return PromptAttention(self.lm, length_B.to(self.device))

    def _compare(self, totals: dict[str, Any], scores: Scores, micro: MicroBatch, task: Task) -> None:
        """Gap between the engine's log-prob and the learner's at the same weights, and the entropies, of sampled tokens."""
        known_T = ~torch.isnan(micro.sampled_logp_T)
        gap_T = (scores.shaped.detach() - micro.sampled_logp_T)[known_T].abs()
        gap_T = gap_T.nan_to_num(nan=math.inf)  # max() would pass over a NaN
        add(totals, "sum/mismatch", float(gap_T.sum()))
        add(totals, "sum/mismatch_tokens", int(known_T.sum()))
        if gap_T.numel():
            totals["max/mismatch"] = max(totals.get("max/mismatch", 0.0), float(gap_T.max()))
        if task.entropies:
            totals.setdefault("entropy_T", []).append(scores.entropy.detach()[known_T].float().cpu())

    def _equal_plan(self, batch: TrainBatch) -> list[list[int]]:
        """Micro-batches of this rank, padded with empty ones to the longest plan: unequal counts abort ZeRO-2 and 3."""
        units = units_of(batch, range(batch.rollouts))
        plan = plan_microbatches(batch.start_N.diff().tolist(), self.settings.tokens_per_microbatch, units)
        count = torch.tensor([len(plan)], device=self.device)
        dist.all_reduce(count, op=dist.ReduceOp.MAX)
        return plan + [[]] * (int(count) - len(plan))

    def _optimiser_step(self, totals: dict[str, float], total_updates: int | None) -> None:
        lr = learning_rate(self.settings, self.updates, total_updates)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr
        if self.settings.zero_stage == 0:
            # Stage 0 in float32 has no overflow check of its own and would write NaN into the weights.
            norm = self._gradient_norm()
            if math.isfinite(norm):
                self.engine.step()
            else:
                self.engine.zero_grad()
        else:
            self.engine.step()  # stages 1 to 3 leave the weights alone when a gradient is not finite
            norm = float(self.engine.get_global_grad_norm())
        applied = math.isfinite(norm) and norm >= 0
        if applied:
            totals["same/grad_norm"] = norm
        self.updates += 1
        self.skipped += not applied
        totals["same/lr"] = lr
        totals["same/skipped"] = totals.get("same/skipped", 0.0) + (not applied)

    def _gradient_norm(self) -> float:
        """Euclidean norm of the whole gradient; ranks already hold the same average. Not finite when any element is not."""
        squares = [p.grad.double().pow(2).sum() for p in self.engine.module.parameters() if p.grad is not None]
        return float(torch.stack(squares).sum().sqrt()) if squares else 0.0

    def _move(self, micro: MicroBatch) -> MicroBatch:
        if self.device.type == "cpu":
            return micro
        tensors = {name: value.to(self.device) for name, value in vars(micro).items() if isinstance(value, torch.Tensor)}
        return replace(micro, **tensors, guidance=micro.guidance.map(lambda column: column.to(self.device)))

    # -- weights and state -----------------------------------------------------------------------------------------------

    def named_weights(self, *, device: torch.device | str = "cpu") -> Iterator[tuple[str, torch.Tensor]]:
        """Every parameter by its Hugging Face name, tied ones under each of their names, gathered and copied one at a time.

        A collective under ZeRO-3: all ranks must iterate to the end.
        """
        import deepspeed

        for name, parameter in self.lm.named_parameters():
            with deepspeed.zero.GatheredParameters([parameter], enabled=self.settings.zero_stage == 3):
                tensor = parameter.detach().to(device, copy=True)
            yield name, tensor
            for alias in self.tied_names.get(name, ()):
                yield alias, tensor

    def save(self, folder: Path) -> None:
        """Write the DeepSpeed state (all ranks) under ``folder``."""
        state = {"updates": self.updates, "skipped": self.skipped}
        if not self.engine.save_checkpoint(str(folder), tag="state", client_state=state, save_latest=False):
            raise BudgetRLError(f"DeepSpeed could not save its state under {folder}; check that the disk is writable")

    def load(self, folder: Path) -> None:
        """Read the state written by :meth:`save`. The caller has verified checksums: DeepSpeed unpickles these files."""
        path, state = self.engine.load_checkpoint(str(folder), tag="state")
        if path is None:
            raise BudgetRLError(f"DeepSpeed found no state under {folder}; resume from another checkpoint")
        self.updates, self.skipped = int(state["updates"]), int(state["skipped"])


def _tied_names(policy: PolicyModel) -> dict[str, list[str]]:
    """Parameter name -> its other names: an engine that is not told `lm_head.weight` keeps the old head, silently."""
    first: dict[int, str] = {}
    tied: dict[str, list[str]] = {}
    for name, parameter in policy.lm.named_parameters(remove_duplicate=False):
        owner = first.setdefault(id(parameter), name)
        if owner != name:
            tied.setdefault(owner, []).append(name)
    return tied


def _temperatures(micro: MicroBatch) -> torch.Tensor | None:
    """None when every temperature is 1, which spares the second distribution."""
    return None if bool((micro.temperature_T == 1.0).all()) else micro.temperature_T
