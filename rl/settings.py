"""Every setting of a run, typed, with its unit and when to change it; unknown keys are refused (see launch/config.py).

This module imports neither torch nor Ray, so that a configuration is checked in milliseconds.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Decay = Annotated[float, Field(ge=0, lt=1)]
BudgetChoice = Annotated[int, Field(gt=0)] | Literal["free"]


class Section(BaseModel):
    """A part of the configuration: frozen, strict about names."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


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
    grader: Literal["auto", "reasoning_gym", "math", "exact"] = "auto"
    """`auto`: the task's own scorer for reasoning-gym, math for everything else."""
    extract: Literal["after_think", "boxed", "last_line"] = "after_think"
    """Where the answer stands: all text after `</think>`, the last \\boxed{} after `</think>`, or the last line."""
    seed: int = 0


class RolloutSettings(Section):
    workers: Positive = 1
    """Engine actors."""
    cpus_per_worker: float = Field(default=1.0, gt=0)
    """Ray CPUs per engine; on a laptop fractions let all actors fit, e.g. 0.5."""
    gpus_per_worker: float = Field(default=0.0, ge=0)
    threads_per_worker: int = Field(default=0, ge=0)
    """CPU threads of one engine; 0 takes all cores divided by the workers. Engines and learner take turns."""
    samples_per_prompt: int = Field(default=16, ge=1)
    """Rollouts per prompt, all budgets together (HBPO: 16)."""
    budgets: list[BudgetChoice] = Field(default_factory=lambda: ["free"])
    """Token budgets, increasing, `free` (no sentence) last if present; members are dealt evenly."""
    budget_template: str = "<think> I will answer the question with {budget} tokens"
    """Opens the response of a budgeted member; must hold `{budget}` once and `<think>` at most once."""
    free_template: str = "<think>"
    """Opens the response of an un-budgeted member."""
    max_length: Positive = 4096
    """L_max: cap on response tokens, prefill included (HBPO: 4096)."""
    temperature: float = Field(default=1.0, gt=0)
    top_p: float = 1.0
    top_k: int = -1
    min_p: float = 0.0
    max_concurrent: Positive = 64
    """Requests an engine decodes at once."""
    kv_cache_gb: float = Field(default=1.0, gt=0)
    """CPU: gigabytes for the KV cache of one engine."""
    gpu_memory_fraction: float = Field(default=0.85, gt=0, le=1)
    """GPU: share of its memory the engine may take."""
    tensor_parallel: Positive = 1
    enforce_eager: bool | None = None
    """None: eager on CPU (starts in seconds), compiled on GPU."""
    deadline_s: float = Field(default=1800.0, gt=0)
    """Longest wait for one step's rollouts."""
    start_deadline_s: float = Field(default=600.0, gt=0)
    """Longest wait for an engine to load the model."""
    weight_transport: Literal["auto", "object_store", "nccl"] = "auto"
    """How weights reach the engines: through Ray's object store (any device, checksummed), or by NCCL from GPU to GPU.
    `auto`: object_store; NCCL where tensor_parallel spreads an engine over several processes."""

    @field_validator("budgets")
    @classmethod
    def _increasing(cls, budgets: list[int | str]) -> list[int | str]:
        if not budgets:
            raise ValueError("rollout.budgets is empty; write [free] for rollouts without a budget")
        numbers = [b for b in budgets if isinstance(b, int)]
        if budgets.count("free") > 1 or ("free" in budgets and budgets[-1] != "free"):
            raise ValueError(f"rollout.budgets {budgets}: put `free` once, at the end")
        if any(a >= b for a, b in zip(numbers, numbers[1:], strict=False)):
            raise ValueError(f"rollout.budgets {budgets} must increase; write {sorted(set(numbers))}")
        return budgets

    @field_validator("budget_template")
    @classmethod
    def _one_budget(cls, template: str) -> str:
        if template.count("{budget}") != 1 or template.count("<think>") > 1:
            raise ValueError(f"rollout.budget_template {template!r} must hold {{budget}} exactly once and <think> at most once")
        return template

    @property
    def transport(self) -> Literal["object_store", "nccl"]:
        """`weight_transport` with `auto` decided."""
        if self.weight_transport == "auto":
            return "nccl" if self.tensor_parallel > 1 else "object_store"
        return self.weight_transport

    @model_validator(mode="after")
    def _transports(self) -> RolloutSettings:
        if self.transport == "nccl" and self.gpus_per_worker < 1:
            raise ValueError(
                f"rollout.weight_transport=nccl (tensor_parallel={self.tensor_parallel}) goes from GPU to GPU and an engine has "
                f"rollout.gpus_per_worker={self.gpus_per_worker:g}; use object_store with tensor_parallel=1, or give it GPUs"
            )
        if self.transport == "object_store" and self.tensor_parallel > 1:
            raise ValueError("rollout.weight_transport=object_store serves engines of one process; use nccl with tensor_parallel")
        return self

    @model_validator(mode="after")
    def _fits(self) -> RolloutSettings:
        numbers = [b for b in self.budgets if b != "free"]
        if numbers and numbers[-1] > self.max_length:
            raise ValueError(
                f"rollout.budgets: {numbers[-1]} is above rollout.max_length={self.max_length}; "
                f"raise max_length to {numbers[-1]} or more, or drop that budget"
            )
        if self.samples_per_prompt % len(self.budgets):
            k = len(self.budgets)
            low = self.samples_per_prompt // k * k
            raise ValueError(
                f"rollout.samples_per_prompt={self.samples_per_prompt} cannot be dealt evenly over {k} budgets; "
                f"use {' or '.join(str(n) for n in (low, low + k) if n)}"
            )
        unreplayable = [name for name, off in (("top_p", 1.0), ("top_k", -1), ("min_p", 0.0)) if getattr(self, name) != off]
        if unreplayable:
            raise ValueError(
                f"rollout.{unreplayable[0]} cuts the sampling distribution, which the learner cannot replay, so importance "
                f"ratios would be wrong; leave it at its default in training (evaluation has its own eval.top_p)"
            )
        return self


class RewardSettings(Section):
    method: Literal["hbpo", "correct", "dapo"] = "correct"
    """`correct`: 1 for a correct answer, else 0 (GRPO). `hbpo`: budget reward. `dapo`: correct plus overlong penalty."""
    form: Literal["piecewise", "min"] = "piecewise"
    """hbpo: the paper's piecewise form or the published code's minimum."""
    beta: float = 4.0
    """hbpo: height of the cosine."""
    alpha: float | None = None
    """hbpo: slope per token away from the budget; None is 1/max_length."""
    bad_format: float = 0.0
    """Reward of a MALFORMED answer (the paper 0, the published code -1)."""
    overlong_buffer: int = Field(default=0, ge=0)
    """dapo: the penalty grows linearly to 1 over the last so many tokens before max_length; 0 switches it off."""
    workers: Positive = 1
    """Reward actors."""
    cpus_per_worker: float = Field(default=0.1, ge=0)
    processes: Positive = 1
    """Grader child processes per actor."""
    grade_deadline_s: float = Field(default=10.0, gt=0)
    """A grader that needs longer for one answer is killed; the answer is TIMED_OUT and carries no number."""
    max_unscored: float = Field(default=0.2, ge=0, le=1)
    """The run stops when a larger share of a step's answers could not be scored."""


class AdvantageSettings(Section):
    estimator: Literal["group_normalised", "hierarchical"] = "group_normalised"
    intra_coef: float = 1.0
    """hierarchical: weight of the subgroup term (the paper 1, the published code 2)."""
    intra_scale: Literal["none", "spread"] = "none"
    """hierarchical: `none` is the paper; `spread` divides the subgroup term by the group's reward spread, like the group term."""
    centre: Literal["none", "group", "batch"] = "none"
    """Subtract the mean advantage of the group or of the batch. `none` is the paper and drifts: see docs/stability.md."""
    std_floor: float = Field(default=1e-6, gt=0)


class LossSettings(Section):
    clip_low: NonNegative = 0.2
    clip_high: NonNegative = 0.28
    dual_clip: float | None = Field(default=3.0, gt=1)
    """Bound on the loss of a negative advantage, in multiples of it; None switches it off."""
    kl_coef: NonNegative = 0.0
    """Weight of the KL to the frozen start policy; 0 keeps no reference model."""
    kl_form: Literal["k1", "k2", "k3"] = "k3"


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
    correction: Literal["auto", "none", "truncated", "replay"] = "auto"
    """Off-policy correction. `auto`: `replay` when sampling is shaped, else `none`. `none`: ratio pi_new/pi_old at temperature 1.
    `truncated`: the same times min(C, pi_old/mu_engine). `replay`: ratio of the shaped probabilities."""
    correction_cap: float = Field(default=2.0, gt=0)
    """C of `truncated`: largest weight pi_old / mu_engine."""
    prompts_per_step: Positive = 16
    max_steps: Positive | None = None
    max_tokens: Positive | None = None
    """Stop after so many response tokens."""
    max_minutes: float | None = Field(default=None, gt=0)
    resume: str = "auto"
    """`auto`: continue from the newest checkpoint of output.dir; `never`; or a checkpoint folder."""
    seed: int = 0
    allow_idle: bool = False
    """Go on although the first step shows that nothing can be learnt."""

    @model_validator(mode="after")
    def _stops(self) -> Settings:
        if self.max_steps is None and self.max_tokens is None and self.max_minutes is None:
            raise ValueError("the run would never stop; set max_steps, max_tokens or max_minutes")
        if self.learner.lr_schedule != "constant" and self.max_steps is None:
            raise ValueError(
                f"learner.lr_schedule={self.learner.lr_schedule} falls to 0 at max_steps, which is not set; set it, or constant"
            )
        return self

    @model_validator(mode="after")
    def _penalises_inside_the_response(self) -> Settings:
        buffer, longest = self.reward.overlong_buffer, self.rollout.max_length
        if buffer > longest:
            raise ValueError(
                f"reward.overlong_buffer={buffer} is longer than rollout.max_length={longest}; use {longest} or less"
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
            raise ValueError("advantage.estimator=hierarchical compares with HBPO's budget ceiling; it needs reward.method=hbpo")
        return self
