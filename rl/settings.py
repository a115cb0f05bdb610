"""Every setting of a run, typed, with its unit and when to change it; unknown keys are refused (see launch/config.py).

This module imports neither torch nor Ray, so that a configuration is checked in milliseconds.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from reward.options import check_options
from rl.budget_settings import BudgetEffort, BudgetRange, BudgetSchedule, describe_budgets
from rl.distil_settings import DistilSettings, ScorerSettings
from rl.objective_settings import AdvantageSettings, LossSettings
from rl.preference_settings import PreferenceSettings, RlTregSettings
from rl.reward_settings import BUDGETED, MONITORED, RewardSettings
from rl.rollout_settings import RolloutSettings
from rl.sections import Decay, NonNegative, Positive, Section
from rl.stage_settings import check_stage


class ModelSettings(Section):
    path: str
    """Hugging Face hub id or local folder. With `warm_start` set, the folder is made by that stage instead."""
    revision: str | None = None
    """Commit of the hub model; required when trust_remote_code is on."""
    gguf_file: str | None = None
    """Name of a GGUF file inside the folder; converted once to safetensors."""
    trust_remote_code: bool = False
    """Run code that comes with the model. Needs a pinned `revision`."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Arithmetic of the engine and of the learner's matrix products; optimiser state is always float32."""

    @model_validator(mode="after")
    def _pinned(self) -> ModelSettings:
        if self.trust_remote_code and not self.revision:
            raise ValueError("model.trust_remote_code needs model.revision set to a commit, so that the code run is known")
        return self


class DataSettings(Section):
    source: str
    """`reasoning_gym:<task>`, a hub dataset id, or a .parquet/.json/.jsonl file."""
    task: dict[str, Any] = Field(default_factory=dict)
    """Parameters of the reasoning-gym task."""
    split: str = "train"
    """Split of a hub dataset."""
    question_column: str = "question"
    answer_column: str = "answer"
    """Reference answer, or a list of them: any one is right."""
    size: Positive = 8192
    """Problems drawn from a generated task (distinct by question text); files are read whole up to this many."""
    held_out: Positive = 256
    """Problems kept apart for evaluation, never trained on."""
    template: str = "auto"
    """`auto`: the tokenizer's chat template if it has one, else `{question}`; or a plain text with `{question}`."""
    system_prompt: str | None = None
    """System message of the chat template."""
    max_prompt_length: Positive = 1024
    """Prompts with more tokens are dropped, counted and reported."""
    grader: Literal["auto", "reasoning_gym", "math", "numeric", "choice", "exact", "format", "function"] = "auto"
    """`auto`: the task's own scorer for reasoning-gym, math for everything else. `function`: the first of reward.functions
    decides. docs/graders.md says what each takes for the same answer."""
    grader_options: dict[str, Any] = Field(default_factory=dict)
    """What the grader reads beside the answers: numeric `rel_tol`, `abs_tol`; choice `letters`; format `pattern`."""
    extract: Literal["after_think", "boxed", "last_line", "whole"] = "after_think"
    """Where the answer stands: all text after `</think>`, the last \\boxed{} after `</think>`, the last line, or the whole
    response."""
    seed: int = 0

    @model_validator(mode="after")
    def _grader_reads_its_options(self) -> DataSettings:
        check_options(self.grader, self.grader_options)
        return self


class LearnerSettings(Section):
    ranks: Positive = 1
    """Data-parallel DeepSpeed processes."""
    cpus_per_rank: float = Field(default=1.0, gt=0)
    gpus_per_rank: float = Field(default=0.0, ge=0)
    threads_per_rank: int = Field(default=0, ge=0)
    """CPU threads of one rank; 0 takes all cores divided by the ranks."""
    zero_stage: Literal[0, 1, 2, 3] = 1
    offload_optimizer: bool = False
    lr: float = Field(default=1e-6, gt=0)
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """`linear` and `cosine` fall to 0 at `max_steps`, which they need."""
    warmup_steps: int = Field(default=0, ge=0)
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    weight_decay: NonNegative = 0.01
    grad_clip: float = Field(default=1.0, gt=0)
    minibatches: Positive = 1
    """Optimiser steps per pass over a step's rollouts; must divide prompts_per_step."""
    epochs: Positive = 1
    """Passes over a step's rollouts."""
    tokens_per_microbatch: Positive = 8192
    """Padded tokens of one forward pass; changes memory, never the result."""
    train_prefix: bool = True
    """Whether the budget sentence carries loss (as in the published HBPO code)."""
    gradient_checkpointing: bool = False
    deadline_s: float = Field(default=1800.0, gt=0)
    """Longest wait for one update."""

    @model_validator(mode="after")
    def _offloads(self) -> LearnerSettings:
        if self.offload_optimizer and self.zero_stage == 0:
            raise ValueError("learner.offload_optimizer has no effect with learner.zero_stage=0; use zero_stage 1, 2 or 3")
        return self


class EvalSettings(Section):
    problems: Positive = 256
    samples: Positive = 4
    every: int = Field(default=0, ge=0)
    """Evaluate every so many steps; 0: only before and after."""
    before: bool = True
    after: bool = True
    with_budgets: bool = False
    """Also evaluate under each budget of rollout.budgets."""
    shaped: bool = False
    """Decode with rollout.adaptive and rollout.reflex as in training, on top of eval.temperature, instead of plainly."""
    temperature: float = Field(default=1.0, ge=0)
    top_p: float = Field(default=1.0, gt=0, le=1)


class OutputSettings(Section):
    dir: str | None = None
    """Folder of the run; None is ~/budget-rl/<name>."""
    name: str | None = None
    """Name of the run; None is the name of the configuration file."""
    checkpoint_every: int = Field(default=50, ge=0)
    """Steps between checkpoints; 0: only at the end or on Ctrl-C."""
    keep_checkpoints: Positive = 2
    samples_per_step: int = Field(default=4, ge=0)
    """Rollouts written to samples.jsonl each step."""


class TrackingSettings(Section):
    mlflow: str = "local"
    """`local`: SQLite in the run's parent folder; `off`; or a tracking URI."""
    experiment: str = "budget-rl"


class WarmStartSettings(Section):
    """Supervised warm start of the embedded tiny model on noisy worked traces; cached by the hash of these values."""

    hidden_size: Positive = 192
    layers: Positive = 4
    heads: Positive = 4
    traces: Positive = 20000
    """Worked traces; questions are disjoint from RL prompts and held-out problems."""
    epochs: Positive = 2
    batch_size: Positive = 64
    lr: float = Field(default=2e-3, gt=0)
    warmup_steps: int = Field(default=50, ge=0)
    error_rate: float = Field(default=0.08, ge=0, le=1)
    """Chance that a worked step of a trace is wrong."""
    recheck_rate: float = Field(default=0.5, ge=0, le=1)
    """Chance of each further re-check of a step: more is longer thinking."""
    budget_share: float = Field(default=0.5, ge=0, le=1)
    """Share of traces that open with the budget sentence."""
    seed: int = 0
    cache_dir: str = "~/.cache/budget-rl"

    @model_validator(mode="after")
    def _fills_a_batch(self) -> WarmStartSettings:
        if self.traces < self.batch_size:
            raise ValueError(
                f"warm_start.traces={self.traces} do not fill one warm_start.batch_size={self.batch_size}; lower the batch size"
            )
        return self


class Settings(Section):
    """A whole run."""

    model: ModelSettings
    data: DataSettings
    rollout: RolloutSettings = RolloutSettings()
    reward: RewardSettings = RewardSettings()
    advantage: AdvantageSettings = AdvantageSettings()
    loss: LossSettings = LossSettings()
    learner: LearnerSettings = LearnerSettings()
    eval: EvalSettings = EvalSettings()
    output: OutputSettings = OutputSettings()
    tracking: TrackingSettings = TrackingSettings()
    warm_start: WarmStartSettings | None = None
    """Set only by the embedded default; a real model is already trained."""
    stage: Literal["rl", "preference", "distil"] = "rl"
    """`rl`: learn from rewarded rollouts. `preference`: learn from pairs of answers (section `preference`). `distil`: learn from
    a composed teacher alone (section `distil`)."""
    preference: PreferenceSettings | None = None
    """The stage `preference`; under `distil` without models of its own, how these are trained."""
    distil: DistilSettings | None = None
    """A teacher to distil from: alone in stage `distil`, beside the reward in stage `rl`."""
    treg: RlTregSettings | None = None
    """T-REG's token rewards in the advantages (arXiv 2412.02685); None: none."""
    scorer: ScorerSettings = ScorerSettings()
    """Workers for the frozen start policy; none are started where nothing asks for it."""
    correction: Literal["auto", "none", "truncated", "replay"] = "auto"
    """Off-policy correction. `auto`: `replay` when sampling is shaped, else `none`. `none`: ratio pi_new/pi_old at temperature 1.
    `truncated`: the same times min(C, pi_old/mu_engine). `replay`: ratio of the shaped probabilities."""
    correction_cap: float = Field(default=2.0, ge=1)
    """C of `truncated`: largest weight pi_old / mu_engine."""
    correction_mask: Literal["none", "sequence", "geometric"] = "none"
    """`truncated`: leave out rollouts whose ratio pi_old / mu_engine is out of bounds: the product over the rollout's tokens
    (`sequence`, which rejects long ones first), or its geometric mean per token (`geometric`)."""
    correction_bounds: tuple[float, float] = (0.5, 2.0)
    """The bounds of correction_mask."""
    prompts_per_step: Positive = 16
    max_steps: Positive | None = None
    max_tokens: Positive | None = None
    """Stop after so many response tokens."""
    max_rollouts: Positive | None = None
    """Stop after so many rollouts, those that `rollout.refill` discarded included."""
    max_minutes: float | None = Field(default=None, gt=0)
    resume: str = "auto"
    """`auto`: continue from the newest checkpoint of output.dir; `never`; or a checkpoint folder."""
    seed: int = 0
    allow_idle: bool = False
    """Go on although the first step shows that nothing can be learnt."""

    @model_validator(mode="after")
    def _stops(self) -> Settings:
        steps = self.max_steps or (self.preference.steps if self.preference and self.stage == "preference" else None)
        if not any((steps, self.max_tokens, self.max_rollouts, self.max_minutes)):
            raise ValueError("the run would never stop; set max_steps, max_tokens, max_rollouts or max_minutes")
        if self.learner.lr_schedule != "constant" and steps is None:
            raise ValueError(
                f"learner.lr_schedule={self.learner.lr_schedule} falls to 0 at max_steps, which is not set; set it, or constant"
            )
        return self

    @property
    def needs_scorer(self) -> bool:
        """Whether the frozen start policy is asked for log-probs: by T-REG's token rewards or by ssToken's selection."""
        pairs_treg = self.stage == "preference" and self.preference is not None and self.preference.treg is not None
        return self.treg is not None or pairs_treg or (self.distil is not None and self.distil.sstoken is not None)

    @model_validator(mode="after")
    def _stage(self) -> Settings:
        check_stage(self)
        return self

    @model_validator(mode="after")
    def _budgets(self) -> Settings:
        budgets = self.rollout.budgets
        if isinstance(budgets, BudgetSchedule) and budgets.steps is None and self.max_steps is None:
            raise ValueError(
                "rollout.budgets: a schedule falls over max_steps, which is not set; set it, or steps beside kind: schedule"
            )
        if isinstance(budgets, BudgetRange) and budgets.per == "member" and self.advantage.estimator == "hierarchical":
            raise ValueError(
                "advantage.estimator=hierarchical compares members of one budget, and with per=member each has its own; "
                "set per=prompt in rollout.budgets, or advantage.estimator=group_normalised"
            )
        return self

    @model_validator(mode="after")
    def _rewards_what_is_asked_for(self) -> Settings:
        """A reward that looks at a budget, an effort or an exit needs rollouts that were asked for one."""
        reward, rollout = self.reward, self.rollout
        budgets, method = rollout.budgets, reward.method
        effort = isinstance(budgets, BudgetEffort)
        words = {"free", "no_think"} & set(budgets) if isinstance(budgets, list) else set()
        if method in BUDGETED and (words or effort):
            raise ValueError(
                f"reward.method={method} compares each length with a budget in tokens, and rollout.budgets "
                f"({describe_budgets(budgets)}) leaves members without one; use numbers alone, such as [32, 64], "
                "or [{kind: range, low: 16, high: 128}]"
            )
        if method == "aec" and not effort:
            raise ValueError(
                "reward.method=aec rewards lengths by the effort asked for; "
                "set rollout.budgets=[{kind: effort, low: 0.5, high: 3.0}]"
            )
        if method in BUDGETED and rollout.hard_budgets:
            raise ValueError(
                f"reward.method={method} compares the whole response with the budget, and rollout.hard_budgets bounds "
                "the thinking alone: an answer that keeps its budget would be fined; set rollout.hard_budgets=false"
            )
        if method == "adaptthink" and not self.learner.train_prefix:
            raise ValueError("reward.method=adaptthink teaches a choice by the loss on openings; set learner.train_prefix=true")
        if method == "adaptthink" and not rollout.budgets_name("no_think"):
            raise ValueError(
                "reward.method=adaptthink compares answers with and without thinking; set rollout.budgets=[free, no_think]"
            )
        if rollout.exits and not self.learner.train_prefix:
            raise ValueError("rollout.exits teaches to stop by the loss on the words of an exit; set learner.train_prefix=true")
        if method == "s_grpo" and not rollout.exits:
            raise ValueError("reward.method=s_grpo rewards early exits; set rollout.exits=4 and rollout.samples_per_prompt=5")
        if method in MONITORED and reward.monitor.first > rollout.max_length:
            raise ValueError(
                f"reward.monitor.first={reward.monitor.first} is above rollout.max_length={rollout.max_length}: no target could "
                "ever be missed; set reward.monitor.first, last and by to lengths in tokens below it"
            )
        return self

    @model_validator(mode="after")
    def _grades(self) -> Settings:
        if self.data.grader == "function" and not self.reward.functions:
            raise ValueError("data.grader=function lets the first of reward.functions decide, and there is none; name one")
        bare = RewardSettings()
        told = [
            name
            for name in ("functions", "method_weight", "overlong_buffer")
            if getattr(self.reward, name) != getattr(bare, name)
        ]
        told += ["policies"] if "penalise" in self.reward.policies.model_dump().values() else []
        told += ["method"] if self.reward.method not in ("correct", "classic") else []
        if self.advantage.estimator == "decoupled" and told:
            raise ValueError(
                "advantage.estimator=decoupled looks at correctness and length alone, so that "
                f"{', '.join('reward.' + name for name in told)} would not count; leave these out, or use another estimator"
            )
        return self

    @model_validator(mode="after")
    def _evaluates_shaped(self) -> Settings:
        if self.eval.shaped and self.rollout.adaptive is None and self.rollout.reflex is None:
            raise ValueError("eval.shaped draws with rollout.adaptive and rollout.reflex; set one of them, or leave it out")
        return self

    @model_validator(mode="after")
    def _masks(self) -> Settings:
        low, high = self.correction_bounds
        if not 0 < low < 1 < high:
            raise ValueError(f"correction_bounds={[low, high]} must lie around 1: 0 < low < 1 < high, such as [0.5, 2.0]")
        if self.correction_mask != "none" and self.correction != "truncated":
            raise ValueError(
                f"correction_mask={self.correction_mask} looks at pi_old / mu_engine, which only correction=truncated uses; "
                f"set correction=truncated, or correction_mask=none"
            )
        return self

    @model_validator(mode="after")
    def _penalises_inside_the_response(self) -> Settings:
        buffer, longest = self.reward.overlong_buffer, self.rollout.max_length
        if buffer > longest:
            raise ValueError(
                f"reward.overlong_buffer={buffer} is longer than rollout.max_length={longest}; use {longest} or less"
            )
        if buffer and self.rollout.length_schedule:
            raise ValueError(
                f"reward.overlong_buffer={buffer} counts back from rollout.max_length={longest}, which responses under "
                "rollout.length_schedule do not reach; leave one of the two out"
            )
        return self

    @model_validator(mode="after")
    def _leaves_a_ratio_of_one(self) -> Settings:
        chosen = self.loss.heterogeneous
        if chosen is not None and not chosen.redistribute and self.learner.minibatches * self.learner.epochs == 1:
            raise ValueError(
                "loss.heterogeneous.clip moves bounds that a ratio of 1 never meets, and with one update per step it always is "
                "1; set learner.minibatches or learner.epochs above 1, or redistribute=true"
            )
        return self

    @model_validator(mode="after")
    def _divides(self) -> Settings:
        p, m = self.prompts_per_step, self.learner.minibatches
        if p % m:
            divisors = [d for d in range(1, p + 1) if p % d == 0]
            raise ValueError(f"prompts_per_step={p} is not divisible by learner.minibatches={m}; use one of {divisors}")
        sequences = p * self.rollout.samples_per_prompt // m
        if sequences < self.learner.ranks:
            raise ValueError(
                f"a mini-batch has {sequences} rollouts for learner.ranks={self.learner.ranks}; "
                f"raise prompts_per_step or lower learner.ranks or learner.minibatches"
            )
        if self.advantage.estimator == "hierarchical" and self.reward.method != "hbpo":
            raise ValueError(
                "advantage.estimator=hierarchical compares with HBPO's budget ceiling; it needs reward.method=hbpo, "
                "or set advantage.estimator=group_normalised"
            )
        return self
