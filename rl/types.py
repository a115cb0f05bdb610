"""The types that flow through budget-rl: this page is the architecture.

Shape legend used in every name: ``_T`` one value per token, ``_N`` one per rollout, ``_B`` one per row of a batch,
``_V`` vocabulary, ``_H`` hidden. Lengths are in tokens, times in seconds, log-probs and entropies in nats.
Data flows one way: Prompt -> Lease -> Rollout -> Scored -> Group -> TrainBatch -> StepReport.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Literal

import torch

from rl.guidance import Guidance


class BudgetKind(Enum):
    """How a budget binds: tokens to be met exactly or not to be exceeded, none, or an effort relative to the usual length."""

    EXACT = "exact"
    AT_MOST = "at_most"
    FREE = "free"
    EFFORT = "effort"


@dataclass(frozen=True)
class Budget:
    """What one rollout was asked to spend; data, never parsed back out of text. Raises ValueError where its parts contradict."""

    tokens: int
    """Budget in response tokens, prefill included (hard: of the thinking alone); 0 where there is none: FREE and EFFORT."""
    kind: BudgetKind
    template: str
    """Words that say it, with ``{budget}`` or ``{effort}``, for example ``<think> I will ... {budget} tokens``."""
    place: Literal["prefill", "suffix"] = "prefill"
    """Whether the words open the response or end the question."""
    hard: bool = False
    """Whether the engine ends the thinking after so many tokens by forcing ``</think>``."""
    effort: float | None = None
    """EFFORT: the length asked for as a multiple of the usual one, above 0 (AEC, arXiv 2510.27042); else None."""
    no_think: bool = False
    """FREE: whether the words close the thinking before it begins (AdaptThink, arXiv 2505.13417)."""

    def __post_init__(self) -> None:
        if (self.effort is not None) != (self.kind is BudgetKind.EFFORT):
            raise ValueError(f"a budget of kind {self.kind.value} cannot have effort={self.effort}")
        if self.no_think and self.kind is not BudgetKind.FREE:
            raise ValueError(f"a member that does not think has no budget, and this one is of kind {self.kind.value}")

    @property
    def is_free(self) -> bool:
        """Whether no number of tokens was asked for: FREE (with or without thinking) and EFFORT; ``tokens`` is 0 then."""
        return self.kind in (BudgetKind.FREE, BudgetKind.EFFORT)

    @property
    def label(self) -> str:
        """Name in metrics: ``"64"``, ``"free"``, ``"no_think"``, or ``"x1.50"`` for an effort."""
        if self.effort is not None:
            return f"x{self.effort:.2f}"
        if self.no_think:
            return "no_think"
        return "free" if self.is_free else str(self.tokens)

    @property
    def sentence(self) -> str:
        """The words with the number in them: what opens the response, or ends the question ("" when there are none)."""
        if self.effort is not None:
            return self.template.replace("{effort}", f"{self.effort:.2f}")
        return self.template.replace("{budget}", str(self.tokens))


@dataclass(frozen=True)
class EntropyStatistics:
    """What a step's log entropies ``l = ln max(H, 1e-8)`` looked like (HAPO, arXiv 2509.16591); nats.

    With ``h = (l - pivot) / spread``, the normalised signal is ``h / high`` above the pivot and ``h / |low|`` below.
    """

    pivot: float
    """The rho-quantile of l."""
    spread: float
    """Root mean square of ``l - pivot``."""
    high: float
    """Largest h, at least 0."""
    low: float
    """Smallest h, at most 0."""
    deviation: float
    """Standard deviation of l about its mean (population)."""
    tokens: int
    """Tokens they were taken from."""


@dataclass(frozen=True)
class AdaptiveTemperature:
    """HAPO's temperature by entropy; see `rollout.temperature.adaptive_temperature`."""

    statistics: EntropyStatistics
    form: Literal["signed", "literal", "zscore"] = "signed"
    tau: float = 0.05


@dataclass(frozen=True)
class Reflex:
    """A bias on reflection words that depends on the number t of tokens generated before; see `rollout/reflex.py`."""

    schedule: Literal["wave", "constant", "silver"] = "wave"
    amplitude: float = 3.0
    """Nats."""
    period: float = 600.0
    """Tokens."""
    shift: float = 0.0
    """Share of a period."""
    rate: float = 1.5
    first: int = 0
    """The bias is on for first <= t < last; always off after a generated ``</think>``."""
    last: int | None = None


@dataclass(frozen=True)
class Shaping:
    """Everything that turns raw logits into the distribution sampled from; the learner can replay all of it.

    ``softmax((z + bias_t 1[v is a reflection word]) / (temperature * factor(H)))``, H the entropy of softmax(z).
    """

    temperature: float = 1.0
    """Base temperature, > 0."""
    adaptive: AdaptiveTemperature | None = None
    """None: factor 1. Also None at the first step, which has no statistics yet."""
    reflex: Reflex | None = None
    """None: bias 0."""


@dataclass(frozen=True)
class Prompt:
    """One problem, tokenised once; ids are the truth from here on."""

    id: str
    """Stable over runs: a hash of the question text."""
    question: str
    answer: str
    token_ids: tuple[int, ...]
    entry: str = "{}"
    """JSON of whatever the grader needs beside the answer (a reasoning-gym entry, a data set row)."""
    other_answers: tuple[str, ...] = ()
    """Further gold answers; any one is right."""


@dataclass(frozen=True)
class Lease:
    """The right and duty of one engine to produce one rollout."""

    ticket: str
    """Unique in a run: ``step-index.prompt-index.member``; the order of tickets is the order of results."""
    prompt: Prompt
    member: int
    """Index inside the prompt's group, 0-based."""
    budget: Budget
    shaping: Shaping
    prefill_ids: tuple[int, ...]
    """Response tokens put there by us (budget sentence); they count in the length."""
    max_new_tokens: int
    """Cap on generated tokens, after the prefill; derived from the plan, never a second number."""
    seed: int
    min_version: int
    """The oldest weight version that may serve this lease."""
    attempt: int = 0


class FinishReason(Enum):
    """Why generation stopped."""

    STOP = "stop"
    LENGTH = "length"


@dataclass(frozen=True)
class Rollout:
    """One response, as sampled. ``response_ids = prefill + generated`` (end-of-sequence token included)."""

    lease: Lease
    response_ids: tuple[int, ...]
    prefill_length: int
    logp_T: tuple[float, ...]
    """Engine log-prob of each *generated* token under the distribution it was sampled from (float32 values)."""
    finish: FinishReason
    weight_version: int
    text: str
    """Derived from ``response_ids`` for graders and eyes; special tokens kept, so ``</think>`` is visible."""
    forced: tuple[int, ...] = ()
    """Positions in ``response_ids`` whose token a hard budget forced: not sampled, so no log-prob and no loss."""

    @property
    def length(self) -> int:
        """Response length in tokens: prefill + generated + end of sequence."""
        return len(self.response_ids)


class VerdictStatus(Enum):
    """What became of an answer. The first four are about the model, the last two about our machinery."""

    CORRECT = "correct"
    WRONG = "wrong"
    MALFORMED = "malformed"
    TRUNCATED = "truncated"
    TIMED_OUT = "timed_out"
    CRASHED = "crashed"


@dataclass(frozen=True)
class Verdict:
    """A grader's finding; TIMED_OUT and CRASHED never carry a number."""

    status: VerdictStatus
    extracted: str | None = None
    """The answer found in the text, None when there was none."""
    evidence: str = ""
    """Why, in a few words: the fraction scored, the exception, the deadline."""

    @property
    def is_scored(self) -> bool:
        return self.status not in (VerdictStatus.TIMED_OUT, VerdictStatus.CRASHED)

    @property
    def is_correct(self) -> bool:
        """True only for CORRECT; raises ValueError for a verdict that is not scored."""
        if not self.is_scored:
            raise ValueError(f"verdict {self.status.value} carries no score: {self.evidence}")
        return self.status is VerdictStatus.CORRECT


@dataclass(frozen=True)
class Reward:
    """The total reward of one rollout and its named parts (they sum to the total)."""

    total: float
    parts: Mapping[str, float]
    per_token: tuple[float | None, ...] | None = None
    """Rewards of single response tokens, beside the total; None where a token (or the whole answer) was given none."""


@dataclass(frozen=True)
class FunctionScore:
    """What one of the run's own reward functions said about one answer."""

    name: str
    """Of the function: `name` in `reward.functions`, else the function's own."""
    status: Literal["ok", "none", "timed_out", "crashed"]
    """``none``: the function does not apply to this answer. The last two are about the machinery and carry no number."""
    value: float | None = None
    """A finite number exactly for ``ok``; per-token rewards are summed."""
    per_token: tuple[float | None, ...] | None = None
    """Where the function rewards tokens: one per response token, None for a token that got nothing; else None."""
    correct: bool | None = None
    """Whether it calls the answer correct (the `acc` of verl's convention); None where it does not say."""
    extras: Mapping[str, float] = field(default_factory=dict)
    """Further numbers for the log."""
    evidence: str = ""
    """Why there is no number: the exception, what came back, the deadline."""


@dataclass(frozen=True)
class Scored:
    """A rollout with its verdict, and its reward once its group is complete.

    ``reward`` stays None where the verdict carries no score or the run's policy leaves it out: then it is in no loss.
    """

    rollout: Rollout
    verdict: Verdict
    reward: Reward | None = None
    functions: tuple[FunctionScore, ...] = ()
    """What the run's own reward functions said, in the order of `reward.functions`."""


@dataclass(frozen=True)
class Group:
    """The scored siblings of one prompt, in member order; members that were lost are simply missing."""

    prompt: Prompt
    members: tuple[Scored, ...]


@dataclass(frozen=True)
class TrainBatch:
    """Packed rollouts of one step, ready for the learner. N rollouts, T = total number of tokens, ragged.

    ``token_T`` concatenates prompt + response of every rollout; rollout ``i`` owns ``start_N[i] : start_N[i+1]``.
    """

    token_T: torch.Tensor
    """int64 (T)."""
    start_N: torch.Tensor
    """int64 (N+1), first 0, last T."""
    prompt_length_N: torch.Tensor
    """int64 (N)."""
    prefill_length_N: torch.Tensor
    """int64 (N)."""
    loss_mask_T: torch.Tensor
    """bool (T): response tokens that carry loss."""
    advantage_T: torch.Tensor
    """float32 (T), 0 outside the response."""
    sampled_logp_T: torch.Tensor
    """float32 (T): engine log-prob where the engine sampled, NaN elsewhere."""
    temperature_N: torch.Tensor
    """float32 (N): the base temperature of sampling."""
    minibatch_N: torch.Tensor
    """int64 (N): which mini-batch each rollout belongs to, 0-based."""
    bias_T: torch.Tensor
    """float32 (T): what was added to the logits of the reflection words, in nats; 0 where the engine did not sample."""
    index_N: torch.Tensor
    """int64 (N): each rollout's place in the step's whole batch, whatever share of it this is."""
    pair_N: torch.Tensor | None = None
    """int64 (N): number of the pair that a rollout belongs to, its chosen side (advantage 1) or its rejected one (-1)."""
    guidance: Guidance = Guidance()
    """What frozen models say of the tokens; (T) columns, 0 outside the response."""

    def columns(self) -> dict[str, torch.Tensor]:
        """Every tensor there is, by name; those of the guidance by theirs."""
        own = {name: value for name, value in vars(self).items() if isinstance(value, torch.Tensor)}
        return own | self.guidance.columns()

    @property
    def rollouts(self) -> int:
        return int(self.prompt_length_N.numel())

    @property
    def tokens(self) -> int:
        return int(self.token_T.numel())


@dataclass(frozen=True)
class WeightVersion:
    """A set of weights: a number that only grows and the checksum that proves what it is."""

    number: int
    checksum: str
    """SHA-256 over names, dtypes, shapes and bytes in name order."""


@dataclass(frozen=True)
class StepReport:
    """Every figure of one step, once; console, metrics.jsonl, MLflow and the table render this and nothing else."""

    step: int
    """1-based number of the finished step."""
    metrics: Mapping[str, float]
    """Flat ``section/name`` -> value. Units are in docs/metrics.md."""


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint holds and how to prove it: ``resume(manifest)`` continues as if never stopped."""

    step: int
    config: Mapping[str, Any]
    cursor: int
    """Position in the prompt stream."""
    tokens_seen: int
    minutes_spent: float
    tracker_run_id: str | None
    weights: WeightVersion
    world_size: int
    rollouts_seen: int = 0
    files: Mapping[str, str] = field(default_factory=dict)
    """Relative path -> SHA-256 of every file of the checkpoint."""
    format: int = 1
