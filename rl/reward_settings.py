"""The settings of rewards: the method and its constants, the user's own functions, and what becomes of each verdict."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal

from pydantic import Field, model_validator

from rl.sections import Decay, NonNegative, Positive, Section

Method = Literal[
    "correct",
    "classic",
    "cosine",
    "hbpo",
    "dapo",
    "aec",
    "lcpo_exact",
    "lcpo_max",
    "laser",
    "laser_d",
    "laser_de",
    "alp",
    "efficient",
    "kimi",
    "triangle",
    "history_min",
    "shorterbetter",
    "dast",
    "grpo_lead",
    "o1_pruner",
    "budgetthinker",
    "s_grpo",
    "adaptthink",
    "adlp",
    "none",
]
Policy = Literal["shape", "mask", "penalise"]

_LASER = {"bonus": 0.5, "wrong": -0.5}
OPTIONS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "correct": {},
        "classic": {},
        "cosine": {"beta": 4.0},
        "hbpo": {"form": "piecewise", "beta": 4.0, "alpha": None},
        "dapo": {},
        "aec": {"average": "group", "decay": 0.9, "soft_delta": 0.0},
        "lcpo_exact": {"alpha": 3e-4},
        "lcpo_max": {"alpha": 3e-4, "delta": 0.5},
        "laser": {**_LASER, "target": None},
        "laser_d": dict(_LASER),
        "laser_de": dict(_LASER),
        "alp": {"beta": 0.2},
        "efficient": {"alpha": 0.1},
        "kimi": {"weight": 1.0, "warmup": 0},
        "triangle": {"weight": 0.2, "height": 1.0},
        "history_min": {},
        "shorterbetter": {"alpha": 2.0, "beta": 1e-3},
        "dast": {},
        "grpo_lead": {"alpha": 0.05},
        "o1_pruner": {"weight": 2.0},
        "budgetthinker": {},
        "s_grpo": {},
        "adaptthink": {"delta": 0.05},
        "adlp": {"start": 1e-3, "rate": 1e-3, "accuracy": 0.62},
        "none": {},
    }
)
"""``reward.method`` -> the keys of the section `reward` that it reads and their values where nothing else is said."""

MONITORED = ("laser_d", "laser_de")
"""Methods whose targets a monitor measures; see MonitorSettings."""
REFERENCED = ("o1_pruner", "adaptthink")
"""Methods that compare with the start policy on the same prompt; so does aec with average=frozen."""
BUDGETED = ("lcpo_exact", "lcpo_max", "triangle", "budgetthinker")
"""Methods that need a budget in tokens for every member."""


class FunctionSettings(Section):
    """A reward function of the user's own; it runs in a process that is killed at its deadline."""

    path: str
    """`FILE.py:NAME` or `package.module:NAME`. This is code that runs with your rights."""
    name: str | None = None
    """Name of its part in the metrics; None is the function's own."""
    weight: float = 1.0
    """Weight of its value in the reward; with 0 it is only logged (or only grades, see data.grader)."""
    length: bool = False
    """Whether its value depends on how long an answer is; then advantage.length_guard treats it as it treats a length reward."""
    convention: Literal["auto", "trl", "verl"] = "auto"
    """`trl`: f(completions, prompts, **columns) -> list; `verl`: f(data_source, solution_str, ground_truth, extra_info) -> float
    or dict. `auto` decides by the names of its parameters."""
    messages: bool | None = None
    """trl: whether prompts and completions are lists of chat messages instead of texts; None: where a chat template is used."""
    arguments: dict[str, Any] = Field(default_factory=dict)
    """Further keyword arguments."""
    environment: list[str] = Field(default_factory=list)
    """Names of environment variables it may see, such as an API key; all others are kept from it."""

    @property
    def called(self) -> str:
        """Its name: as set, else the last part of its path."""
        return self.name or self.path.rpartition(":")[2]


class MonitorSettings(Section):
    """laser_d, laser_de: how often and on what the target of each difficulty is measured (arXiv 2505.15612)."""

    every: Positive = 20
    """Steps."""
    prompts: Positive = 500
    """Training prompts, the same ones each time."""
    samples: Positive = 8
    """Answers to each."""
    first: Positive = 4096
    """Shortest target that is tried, in tokens."""
    last: Positive = 16384
    """Longest one."""
    by: Positive = 1024
    """Distance between them."""


class ReferenceSettings(Section):
    """o1_pruner, adaptthink, aec with average=frozen: what is measured of the start policy before the first step."""

    samples: Positive = 4
    """Answers to each prompt that the run will train on."""


class PolicySettings(Section):
    """What becomes of verdicts that are about the model. TIMED_OUT and CRASHED are about our machinery: never a number."""

    wrong: Policy = "shape"
    """`shape`: the reward that the method says. `mask`: left out of the group and of the loss. `penalise`: reward.penalty."""
    malformed: Policy = "shape"
    truncated: Policy = "shape"


class RewardSettings(Section):
    method: Method = "correct"
    """`correct`: 1 for a correct answer, else 0 (GRPO). Every other name: docs/rewards.md. `none`: reward.functions alone."""
    method_weight: NonNegative = 1.0
    """Weight of the method's reward beside reward.functions."""
    form: Literal["piecewise", "min"] | None = None
    """hbpo: the paper's piecewise form or the published code's minimum."""
    alpha: float | None = None
    """hbpo: slope per token away from the budget (None is 1/max_length); lcpo_*: slope per token; efficient, grpo_lead: strength;
    shorterbetter: worth of a correct answer."""
    beta: float | None = None
    """hbpo, cosine: height of the cosine; alp, shorterbetter: weight of the length."""
    weight: NonNegative | None = None
    """kimi, triangle: weight of the length part; o1_pruner: weight of the accuracy."""
    delta: float | None = None
    """lcpo_max: reward at the budget; adaptthink: bonus of an answer without thinking."""
    bonus: float | None = None
    """laser*: what a correct answer within its target earns beside 1."""
    wrong: float | None = None
    """laser*: reward of a wrong answer."""
    target: Positive | None = None
    """laser: target length in tokens; it must be set."""
    height: float | None = None
    """triangle: the most that the length part earns, r_max."""
    warmup: int | None = Field(default=None, ge=0)
    """kimi: steps before the length part is switched on."""
    average: Literal["group", "ema", "frozen"] | None = None
    """aec: what an effort is relative to: mean length of the group, of the prompt over time, or of the start policy."""
    decay: Decay | None = None
    """aec with average=ema: weight of the past."""
    soft_delta: NonNegative | None = None
    """aec: width of a soft edge instead of the paper's cliff, in multiples of the average; 0 is the cliff."""
    start: NonNegative | None = None
    """adlp: first weight of the length, per token."""
    rate: NonNegative | None = None
    """adlp: how fast that weight follows the accuracy."""
    accuracy: float | None = Field(default=None, ge=0, le=1)
    """adlp: training accuracy above which the weight rises."""
    overlong_buffer: int = Field(default=0, ge=0)
    """DAPO's penalty, added to any method: grows linearly to 1 over the last so many tokens before max_length; 0 is off."""
    functions: list[FunctionSettings] = Field(default_factory=list)
    """Your own reward functions; their weighted values are added to the method's reward."""
    function_deadline_s: float = Field(default=60.0, gt=0)
    """Longest time for one call of one of them; its answers are TIMED_OUT then."""
    correct_from: float = 1.0
    """data.grader=function: value of the first function from which an answer is CORRECT."""
    policies: PolicySettings = PolicySettings()
    penalty: float = -1.0
    """Reward of a verdict whose policy is `penalise`."""
    monitor: MonitorSettings = MonitorSettings()
    reference: ReferenceSettings = ReferenceSettings()
    workers: Positive = 1
    """Reward actors."""
    cpus_per_worker: float = Field(default=0.1, ge=0)
    processes: Positive = 1
    """Grader child processes per actor."""
    grade_deadline_s: float = Field(default=10.0, gt=0)
    """A grader that needs longer for one answer is killed; the answer is TIMED_OUT and carries no number."""
    max_unscored: float = Field(default=0.2, ge=0, le=1)
    """The run stops when a larger share of a step's answers could not be scored."""

    def option(self, name: str) -> Any:
        """The value of a key that the method reads: as set, else the method's own."""
        chosen = getattr(self, name)
        return OPTIONS[self.method][name] if chosen is None else chosen

    @property
    def needs_reference(self) -> bool:
        """Whether the start policy is measured before the first step."""
        return self.method in REFERENCED or (self.method == "aec" and self.option("average") == "frozen")

    @model_validator(mode="after")
    def _reads_what_is_set(self) -> RewardSettings:
        known = {name for options in OPTIONS.values() for name in options}
        reads = OPTIONS[self.method]
        for name in sorted(known):
            if getattr(self, name) is not None and name not in reads:
                what = f"it reads {', '.join(sorted(reads))}" if reads else "it reads no constants"
                raise ValueError(f"reward.{name} has no effect with reward.method={self.method}: {what}; leave it out")
        if self.decay is not None and self.option("average") != "ema":
            raise ValueError("reward.decay has no effect without reward.average=ema; leave it out")
        if self.method == "laser" and self.target is None:
            raise ValueError("reward.method=laser needs reward.target, a length in tokens; laser_d measures one instead")
        if self.method == "none" and not any(function.weight for function in self.functions):
            raise ValueError("reward.method=none leaves no reward at all; name your function in reward.functions, with a weight")
        names = [function.called for function in self.functions]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"{names.count(name)} of reward.functions are called {name!r}; give each a `name` of its own")
        if self.monitor.first > self.monitor.last:
            raise ValueError(f"reward.monitor: first={self.monitor.first} is above last={self.monitor.last}; swap them")
        return self
