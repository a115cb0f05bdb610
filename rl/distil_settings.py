"""Settings of the distillation from a composed teacher; imports neither torch nor Ray."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from rl.sections import Positive, Section
from rl.teacher_settings import TeacherSettings


class SsTokenSettings(Section):
    """Distil only the tokens that ssToken scores highest in each answer (arXiv 2510.18250)."""

    gamma: float = Field(default=0.5, ge=0, le=1)
    """Weight of what the policy gained on the start policy at a token; the rest is the attention it pays to the prompt there.
    At 1 attention is not measured."""
    share: float = Field(default=0.6, gt=0, le=1)
    """Share of each answer's tokens that are kept."""


class ScorerSettings(Section):
    """The workers that hold the frozen start policy, where T-REG's token rewards or ssToken ask for its log-probs."""

    workers: Positive = 1
    cpus_per_worker: float = Field(default=0.25, gt=0)
    gpus_per_worker: float = Field(default=0.0, ge=0)
    threads_per_worker: int = Field(default=0, ge=0)
    """CPU threads of one worker; 0 takes all cores divided by the workers."""
    tokens_per_pass: Positive = 8192
    """Padded tokens of one forward pass; changes memory, never the result."""
    deadline_s: float = Field(default=600.0, gt=0)
    """Longest wait for the answers to one step."""


class DistilSettings(Section):
    """AlignDistil: reverse KL to a teacher extrapolated from a DPO and a reverse-DPO model (arXiv 2503.02832)."""

    teacher: TeacherSettings = TeacherSettings()
    data: Literal["rollouts", "pairs"] = "rollouts"
    """`rollouts`: the policy's own answers (on-policy). `pairs`: the chosen answers of `preference.pairs` (off-policy; then set
    teacher.r=20, as the published code has it)."""
    weight: float = Field(default=1.0, gt=0)
    """stage rl: weight of the distillation beside the policy loss."""
    beta0: float | None = Field(default=None, gt=0)
    """Scale of the reward that the teacher stands for: the beta of the DPO that made it. A token's KL weighs beta0 / alpha.
    None: `preference.beta` where the run trains its teacher, else 0.1."""
    beta_max: float | None = Field(default=None, gt=0)
    """Cap on that weight, which is 100 where both models of the teacher agree (beta0 0.1, eps 0.001); None: no cap."""
    length_norm: bool = True
    """Divide each answer's sum by its number of distilled tokens."""
    verdicts: list[Literal["correct", "wrong", "malformed", "truncated"]] = Field(
        default_factory=lambda: ["correct", "wrong", "malformed", "truncated"], min_length=1
    )
    """rollouts: answers to distil, by their verdict; answers that no grader could judge are never distilled."""
    entropy_share: float | None = Field(default=None, gt=0, lt=1)
    """Distil only this share of a step's tokens, those the policy was least sure of; None: all."""
    sstoken: SsTokenSettings | None = None
    """Distil only the tokens that ssToken picks; None: all."""

    @property
    def scale(self) -> float:
        """beta0, decided."""
        return 0.1 if self.beta0 is None else self.beta0

    @model_validator(mode="after")
    def _one_selection(self) -> DistilSettings:
        if self.data == "pairs" and "verdicts" in self.model_fields_set:
            raise ValueError("distil.verdicts chooses among graded answers, and distil.data=pairs grades none; leave it out")
        if self.entropy_share is not None and self.sstoken is not None:
            raise ValueError("distil.entropy_share and distil.sstoken both choose tokens; leave one out")
        if self.data == "pairs" and self.teacher.mode == "scalar":
            raise ValueError(
                "distil.teacher.mode=scalar learns from what the teacher says of sampled tokens, and distil.data=pairs samples "
                "none; set teacher.mode=hidden or topk"
            )
        return self
