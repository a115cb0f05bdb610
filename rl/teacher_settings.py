"""Settings of the teacher workers; imports neither torch nor Ray."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from rl.sections import NonNegative, Positive, Section


class TeacherSettings(Section):
    """The two frozen models that a teacher is composed of, and the workers that hold them (AlignDistil, arXiv 2503.02832)."""

    dpo: str | None = None
    """The DPO model: a local folder or a hub id; with `base` a folder of LoRA weights. None: the preference stage makes both."""
    reverse: str | None = None
    """The reverse-DPO model, trained with the better and the worse answer exchanged."""
    base: str | None = None
    """The model under two LoRA adapters `dpo` and `reverse`, held once; None: they are whole models."""
    mode: Literal["scalar", "topk", "hidden"] = "hidden"
    """What comes back of each token. `hidden`: both models' last hidden states; the learner holds both heads and compares whole
    distributions. `topk`: probabilities of some ids and of all others together. `scalar`: that of the sampled token alone."""
    r: NonNegative = 30.0
    """Extrapolation weight alpha = r TVD + eps of a token on which the two models disagree wholly (twice the `beta2` of the
    published code: 30 on the policy's own answers, 20 on a data set's)."""
    eps: float = Field(default=1e-3, gt=0)
    """The weight where they agree."""
    top_k: Positive = 32
    """topk: ids that the teacher picks."""
    student_k: int = Field(default=32, ge=0)
    """topk: ids that the student picks."""
    workers: Positive = 1
    """Teacher actors, each with both models."""
    cpus_per_worker: float = Field(default=0.5, gt=0)
    gpus_per_worker: float = Field(default=0.0, ge=0)
    threads_per_worker: int = Field(default=0, ge=0)
    """CPU threads of one teacher; 0 takes all cores divided by the workers."""
    tokens_per_pass: Positive = 8192
    """Padded tokens of one forward pass; changes memory, never the result."""
    deadline_s: float = Field(default=600.0, gt=0)
    """Longest wait for the answers to one step."""

    @property
    def is_made(self) -> bool:
        """Whether the preference stage is to make the two models."""
        return self.dpo is None and self.reverse is None

    @model_validator(mode="after")
    def _both_or_none(self) -> TeacherSettings:
        if (self.dpo is None) != (self.reverse is None):
            missing = "dpo" if self.dpo is None else "reverse"
            raise ValueError(f"distil.teacher.{missing} is not given, and the teacher is made of two models; give both or neither")
        if self.base is not None and self.is_made:
            raise ValueError("distil.teacher.base is what two LoRA adapters go with; give distil.teacher.dpo and reverse, too")
        return self
