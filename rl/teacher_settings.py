"""The settings of the frozen teacher of AlignDistil; imports neither torch nor Ray."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from rl.sections import NonNegative, Positive, Section


class TeacherSettings(Section):
    """Two frozen models, one trained to prefer the better answers, one the worse, and what is made of them (docs/teacher.md)."""

    dpo: str | None = None
    """Model trained by DPO: local folder or hub id. None: the preference stage makes it."""
    reverse: str | None = None
    """The same of chosen and rejected swapped."""
    base: str | None = None
    """Model under two LoRA adapters: then `dpo` and `reverse` are adapter folders, and the base is in memory once."""
    dpo_revision: str | None = None
    """Commit of a hub model; required of each of the three where model.trust_remote_code is on."""
    reverse_revision: str | None = None
    base_revision: str | None = None
    mode: Literal["scalar", "topk", "hidden"] = "hidden"
    """What comes back of each response token. `hidden`: final hidden states, for the learner's loss over the full vocabulary.
    `topk`: log-probs of a few ids and of the rest together. `scalar`: one log-prob, for a reward per token."""
    r: NonNegative = 30.0
    """Strength of the extrapolation, `alpha = r TVD + eps`. The paper's code has r / 2 (`beta2`): 30 on-policy, 20 off-policy."""
    eps: float = Field(default=1e-3, gt=0)
    """Extrapolation where the two models agree. The weight of the KL there is beta_0 / eps."""
    top_k: Positive = 32
    """topk: ids that the teacher adds, its likeliest."""
    student_k: int = Field(default=32, ge=0)
    """topk: ids that the student asks about, its own likeliest; 0 leaves it to the teacher's."""
    workers: Positive = 1
    """Teacher actors; each holds both models."""
    cpus_per_worker: float = Field(default=0.5, gt=0)
    """Ray CPUs per teacher actor; on a laptop fractions let all actors fit."""
    gpus_per_worker: NonNegative = 0.0
    """Ray GPUs per teacher actor; 0 computes on CPUs."""
    threads_per_worker: int = Field(default=0, ge=0)
    """CPU threads of one teacher actor; 0 takes all cores divided by the workers."""
    tokens_per_pass: Positive = 8192
    """Padded tokens of one forward pass; more needs more memory and never changes the result."""
    deadline_s: float = Field(default=600.0, gt=0)
    """Longest wait for the answers to one step; loading has rollout.start_deadline_s."""

    @model_validator(mode="after")
    def _complete(self) -> TeacherSettings:
        if self.base is not None and (self.dpo is None or self.reverse is None):
            missing = "dpo" if self.dpo is None else "reverse"
            raise ValueError(
                f"distil.teacher.base={self.base} is the model under two LoRA adapters, and distil.teacher.{missing} names none; "
                "name both adapter folders, or leave base out"
            )
        for name in ("dpo", "reverse", "base"):
            if getattr(self, f"{name}_revision") is not None and getattr(self, name) is None:
                key = f"distil.teacher.{name}"
                raise ValueError(f"{key}_revision is set and {key} is not; name the hub model too")
        return self
