"""Settings of the rollout workers: engines, sampling, how sampling is shaped, budgets."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from rl.budget_settings import BudgetEffort, BudgetRange, BudgetSource, gives_one_per_group, largest_budget, length_cap
from rl.sections import Positive, Section

REFLECTION_WORDS = ("wait", "Wait", "but", "But", "Alternatively")
"""The words of CyclicReflex (arXiv 2506.11077), looked up in the vocabulary as they stand here."""

LOSSY_VERIFICATION = ("synthetic", "fly")
"""Ways of verifying drafts, of this or other versions of vLLM, that change the distribution."""
V1_DRAFTING = ("ngram", "ngram_gpu", "suffix", "custom_class", "medusa", "mlp_speculator")
"""Drafting that vLLM 0.31 runs on its V1 model runner, which takes no logits processors beside it."""


class AdaptiveSettings(Section):
    """HAPO's adaptive temperature: hotter where the model is unsure, cooler where it is sure (arXiv 2509.16591, part A)."""

    form: Literal["signed", "literal", "zscore"] = "signed"
    """`signed`: 1 + tau clamp(h), h in [-1, 1]. `literal`: the published code, which never cools. `zscore`: 1 + tau z."""
    tau: float = Field(default=0.05, gt=0, lt=1)
    """Largest change of the temperature as a share of it; for `zscore` the change per standard deviation (paper: 0.1)."""
    rho: float = Field(default=0.8, gt=0, lt=1)
    """Quantile of the log entropies at which the temperature is not changed."""


class ReflexSettings(Section):
    """A bias on reflection words over the course of an answer (CyclicReflex, arXiv 2506.11077) and its baselines."""

    schedule: Literal["wave", "constant", "silver"] = "wave"
    """`wave`: triangular, rising first. `constant`: `amplitude` at every token (TIP: -3). `silver`: powers of `rate`."""
    amplitude: float = Field(default=1.0, ge=-100, le=100)
    """Nats added to the words' logits: height of the wave, or the constant; `silver` has none. Above 2, ratios are clipped."""
    period: float = Field(default=600.0, gt=0)
    """Tokens of one wave; other schedules have none."""
    shift: float = Field(default=0.0, ge=0, le=1)
    """Phase at the first token, as a share of the period."""
    rate: float = Field(default=1.5, gt=0, le=3)
    """Base of the `silver` schedule, whose largest bias is rate^4."""
    first: int = Field(default=0, ge=0)
    """Generated tokens before the bias begins."""
    last: Positive | None = None
    """Generated tokens after which it ends; None: at `</think>` only."""
    words: list[str] = Field(default_factory=lambda: list(REFLECTION_WORDS), min_length=1)
    """Keys of the vocabulary to bias; each must be one token."""
    end: str = "</think>"
    """Key of the vocabulary after which there is no bias: the token that ends the thinking."""
    leading_space: bool = False
    """Bias the words with a space in front too, where the vocabulary has them as one token."""

    @model_validator(mode="after")
    def _ends_after_it_begins(self) -> ReflexSettings:
        if self.last is not None and self.last <= self.first:
            raise ValueError(f"rollout.reflex: last={self.last} is not above first={self.first}, so nothing would be biased")
        if self.schedule == "wave" and self.amplitude < 0:
            raise ValueError("rollout.reflex.amplitude below 0 turns the wave round; use shift=0.5 instead")
        return self


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
    budgets: BudgetSource = Field(default_factory=lambda: ["free"])
    """A list (numbers increasing, then `free`, then `no_think`; members are dealt evenly), or a section with `kind`: range,
    schedule, memory or effort."""
    budget_kind: Literal["at_most", "exact"] = "at_most"
    """Whether a budget is a cap or a target; metrics and samples say how it was kept accordingly."""
    budget_place: Literal["prefill", "suffix", "none"] = "prefill"
    """Where the budget is said: opening the response, after the question, or nowhere (a hard budget needs no words)."""
    budget_template: str = "<think> I will answer the question with {budget} tokens"
    """The words; must hold `{budget}` once and `<think>` at most once (in a suffix, not at all)."""
    free_template: str = "<think>"
    """Opens the response of a member whose response no budget sentence opens."""
    effort_template: str = "Reasoning effort: {effort} (1.00 = your usual length)."
    """budgets of kind effort: the words; must hold `{effort}` once, which is said with two decimals. A prefill puts `<think>` in
    front of them, and both a prefill and a suffix a space unless they begin with one."""
    no_think_template: str = "<think></think>"
    """Opens the response of a `no_think` member; must hold `</think>` once."""
    hard_budgets: bool = False
    """The engine ends the thinking at the budget: it forces `</think>`, which carries no loss."""
    answer_tokens: Positive | None = None
    """hard_budgets: tokens left for the answer after the budget; None: up to max_length."""
    max_length: Positive = 4096
    """L_max: cap on response tokens, prefill included (HBPO: 4096)."""
    length_schedule: list[tuple[Annotated[int, Field(ge=0)], Positive]] = []
    """Caps for training, as entries [first step, cap]: the first at step 0, steps increasing, caps falling (ThinkPrune)."""
    exits: int = Field(default=0, ge=0)
    """Members of a group that leave the thinking of the group's one full path early, at places drawn in it (S-GRPO); 0: none."""
    exit_template: str = "</think>"
    """exits: the words with which they leave it; must hold `</think>` once."""
    refill: int = Field(default=0, ge=0)
    """Most further rounds of prompts in a step that take the place of groups whose rewards are all equal, which teach nothing
    (dynamic sampling, DAPO); 0: none. A step then generates up to 1 + refill times as much. See docs/hapo.md."""
    temperature: float = Field(default=1.0, gt=0)
    """Base temperature."""
    adaptive: AdaptiveSettings | None = None
    """Temperature by entropy (HAPO); None: the base temperature everywhere."""
    reflex: ReflexSettings | None = None
    """Bias on reflection words (CyclicReflex); None: no bias."""
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

    speculative: dict[str, Any] | None = None
    """vLLM's speculative_config, passed through; see docs/shaping.md. Off by default."""
    heartbeat_s: float = Field(default=120.0, gt=0)
    """Longest silence of an engine that has work; then it counts as lost."""
    order: Literal["longest_first", "arrival"] = "longest_first"
    """Whether an engine starts the leases expected to be longest first, or takes them as they come. Changes no result."""

    @field_validator("budgets")
    @classmethod
    def _increasing(cls, budgets: Any) -> Any:
        if not isinstance(budgets, list):
            return budgets
        if not budgets:
            raise ValueError("rollout.budgets is empty; write [free] for rollouts without a budget")
        numbers = [b for b in budgets if isinstance(b, int)]
        words = [word for word in ("free", "no_think") if word in budgets]
        if budgets != [*numbers, *words]:
            raise ValueError(f"rollout.budgets {budgets}: put `free` once, at the end, and `no_think` once, behind it")
        if any(a >= b for a, b in zip(numbers, numbers[1:], strict=False)):
            raise ValueError(f"rollout.budgets {budgets} must increase; write {[*sorted(set(numbers)), *words]}")
        return budgets

    @field_validator("budget_template")
    @classmethod
    def _one_budget(cls, template: str) -> str:
        if template.count("{budget}") != 1 or template.count("<think>") > 1:
            raise ValueError(f"rollout.budget_template {template!r} must hold {{budget}} exactly once and <think> at most once")
        return template

    @property
    def has_listed_budgets(self) -> bool:
        """Whether every step has the same few budgets; else each step has its own."""
        return isinstance(self.budgets, list) or (isinstance(self.budgets, BudgetEffort) and self.budgets.levels is not None)

    def budgets_name(self, word: Literal["free", "no_think"]) -> bool:
        """Whether `budgets` is a list with this word in it."""
        return isinstance(self.budgets, list) and word in self.budgets

    def longest_response(self, step: int | None = None) -> int:
        """Cap on response tokens in training after ``step`` finished steps; without a step `max_length`, as in evaluations."""
        cap = None if step is None else length_cap(self.length_schedule, step)
        return self.max_length if cap is None else cap

    @field_validator("free_template")
    @classmethod
    def _no_budget(cls, template: str) -> str:
        if "{budget}" in template:
            raise ValueError(f"rollout.free_template {template!r} opens responses that say no budget; leave {{budget}} out of it")
        return template

    @field_validator("effort_template")
    @classmethod
    def _one_effort(cls, template: str) -> str:
        if template.count("{effort}") != 1 or "think>" in template or "{budget}" in template:
            raise ValueError(
                f"rollout.effort_template {template!r} must hold {{effort}} exactly once, and neither {{budget}} nor <think>, "
                "which is put in front where the words open the response"
            )
        return template

    @field_validator("no_think_template", "exit_template")
    @classmethod
    def _ends_the_thinking(cls, template: str, info: ValidationInfo) -> str:
        begins, _, _ = template.partition("</think>")
        opened = begins.count("<think>") if info.field_name == "no_think_template" else 0
        if template.count("</think>") != 1 or template.count("<think>") != opened or opened > 1 or "{budget}" in template:
            may = "and in front of it <think> at most once" if info.field_name == "no_think_template" else "and no <think>"
            raise ValueError(f"rollout.{info.field_name} {template!r} must hold </think> exactly once, {may}; it says no budget")
        return template

    @property
    def is_shaped(self) -> bool:
        """Whether tokens are drawn from anything but softmax(logits)."""
        return self.temperature != 1.0 or self.adaptive is not None or self.reflex is not None

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
        largest = largest_budget(self.budgets)
        if largest is not None and largest > self.max_length:
            raise ValueError(
                f"rollout.budgets: {largest} is above rollout.max_length={self.max_length}; "
                f"raise max_length to {largest} or more, "
                + ("or drop that budget" if isinstance(self.budgets, list) else f"or lower it in kind: {self.budgets.kind}")
            )
        last_cap = self.length_schedule[-1][1] if self.length_schedule else self.max_length
        if largest is not None and isinstance(self.budgets, (list, BudgetRange)) and largest > last_cap:
            raise ValueError(
                f"rollout.budgets: {largest} is above {last_cap}, the last cap of rollout.length_schedule; "
                "lower the budget, or end the schedule earlier"
            )
        return self

    @model_validator(mode="after")
    def _deals(self) -> RolloutSettings:
        source, samples = self.budgets, self.samples_per_prompt
        dealt = source if isinstance(source, list) else source.levels if isinstance(source, BudgetEffort) else None
        if dealt is None or gives_one_per_group(source):
            return self
        k, what = len(dealt), "budgets" if isinstance(source, list) else "efforts"
        if samples % k:
            low = samples // k * k
            raise ValueError(
                f"rollout.samples_per_prompt={samples} cannot be dealt evenly over {k} {what}; "
                f"use {' or '.join(str(n) for n in (low, low + k) if n)}"
            )
        if what == "efforts" and samples < 2 * k:
            raise ValueError(
                f"rollout.samples_per_prompt={samples} leaves one member for each of {k} efforts and none to compare it with; "
                f"use {2 * k} or more, or per: prompt"
            )
        return self

    @model_validator(mode="after")
    def _falls(self) -> RolloutSettings:
        steps, caps = [first for first, _ in self.length_schedule], [cap for _, cap in self.length_schedule]
        told = f"rollout.length_schedule={[list(entry) for entry in self.length_schedule]}"
        if steps and steps[0] != 0:
            raise ValueError(f"{told} says nothing of step 0; begin it with [0, {self.max_length}]")
        if any(a >= b for a, b in zip(steps, steps[1:], strict=False)):
            raise ValueError(f"{told}: its steps must increase; sort the entries")
        if any(a <= b for a, b in zip(caps, caps[1:], strict=False)):
            raise ValueError(f"{told}: its caps must fall; leave out entries that change nothing")
        if caps and caps[0] > self.max_length:
            raise ValueError(f"{told} begins above rollout.max_length={self.max_length}; lower it, or raise max_length")
        return self

    @model_validator(mode="after")
    def _exits_early(self) -> RolloutSettings:
        if self.reflex is not None and (self.exits or self.budgets_name("no_think")):
            raise ValueError(
                "rollout.reflex lifts its words until the model writes </think>, which members that leave the thinking early or "
                "skip it never write; leave out rollout.reflex, or rollout.exits and no_think"
            )
        if not self.exits:
            return self
        if self.samples_per_prompt != self.exits + 1:
            raise ValueError(
                f"rollout.samples_per_prompt={self.samples_per_prompt}: a group is the full path and rollout.exits={self.exits} "
                f"exits from it; set it to {self.exits + 1}, or exits to {self.samples_per_prompt - 1}"
            )
        if not gives_one_per_group(self.budgets) or self.budgets_name("no_think") or self.hard_budgets:
            raise ValueError(
                "rollout.exits leaves the thinking of one path per prompt, so a group has one budget, neither hard nor no_think; "
                "set rollout.budgets=[free], or another source of one budget per prompt, and hard_budgets=false"
            )
        return self

    @model_validator(mode="after")
    def _reflects(self) -> RolloutSettings:
        reflex, longest = self.reflex, self.max_length
        if reflex is not None and reflex.first >= longest:
            raise ValueError(
                f"rollout.reflex.first={reflex.first} is not below rollout.max_length={longest}, so nothing would be biased"
            )
        if reflex is not None and reflex.schedule == "wave" and reflex.period > 2 * longest:
            raise ValueError(
                f"rollout.reflex.period={reflex.period:g}: inside rollout.max_length={longest} such a wave only ever lifts; "
                f"use a period of {longest} or less, or schedule=constant"
            )
        return self

    @model_validator(mode="after")
    def _budget_words(self) -> RolloutSettings:
        source = self.budgets
        says_number = any(isinstance(choice, int) for choice in source) if isinstance(source, list) else True
        if self.budget_place == "suffix" and "<think>" in self.budget_template and not isinstance(source, BudgetEffort):
            raise ValueError(
                f"rollout.budget_template={self.budget_template!r} opens the thinking inside the question; "
                f'with budget_place=suffix write words only, such as " Think for {{budget}} tokens."'
            )
        if self.budget_place == "none" and not self.hard_budgets and says_number:
            raise ValueError("rollout.budget_place=none tells nobody the budget; set hard_budgets=true, prefill or suffix")
        opening = "budget_template" if self.budget_place == "prefill" else "free_template"
        if self.hard_budgets and "<think>" not in getattr(self, opening):
            raise ValueError(
                f"rollout.hard_budgets counts from <think>, and rollout.{opening}={getattr(self, opening)!r} does not write it; "
                f"put <think> into it"
            )
        if self.answer_tokens is not None and not self.hard_budgets:
            raise ValueError("rollout.answer_tokens comes after a hard budget; set rollout.hard_budgets=true, or leave it out")
        largest = largest_budget(self.budgets)
        if self.hard_budgets and largest is None:
            raise ValueError("rollout.hard_budgets=true has no budget to enforce; name some in rollout.budgets")
        if self.hard_budgets and largest is not None and largest >= self.max_length:
            raise ValueError(
                f"rollout.hard_budgets: a budget of {largest} leaves no answer inside rollout.max_length={self.max_length}; "
                f"raise max_length"
            )
        return self

    @model_validator(mode="after")
    def _speculates(self) -> RolloutSettings:
        speculative = self.speculative or {}
        if speculative.get("rejection_sample_method") in LOSSY_VERIFICATION:
            raise ValueError(
                f"rollout.speculative.rejection_sample_method={speculative['rejection_sample_method']} accepts drafts that the "
                "model would not have drawn, so importance ratios would be wrong; leave it out, or use block"
            )
        if speculative and self.gpus_per_worker == 0:
            raise ValueError(
                "rollout.speculative needs a GPU: vLLM 0.31 on a CPU draws wrong tokens with it (docs/shaping.md); leave it out"
            )
        if not speculative or (self.adaptive is None and self.reflex is None):
            return self
        method = speculative.get("method") or speculative.get("model")
        if speculative.get("parallel_drafting") and method not in ("dflash", "dspark"):
            method = "parallel_drafting"
        if method in (*V1_DRAFTING, "parallel_drafting"):
            raise ValueError(
                f"rollout.speculative with {method} makes vLLM 0.31 use its V1 model runner, which takes no "
                "logits processors, so rollout.adaptive and rollout.reflex could not work; use eagle, eagle3, mtp, draft_model "
                "or dflash, or leave rollout.speculative out"
            )
        return self

    @model_validator(mode="after")
    def _replayable(self) -> RolloutSettings:
        unreplayable = [name for name, off in (("top_p", 1.0), ("top_k", -1), ("min_p", 0.0)) if getattr(self, name) != off]
        if unreplayable:
            raise ValueError(
                f"rollout.{unreplayable[0]} cuts the sampling distribution, which the learner cannot replay, so importance "
                f"ratios would be wrong; leave it at its default in training (evaluation has its own eval.top_p)"
            )
        return self
