"""Settings of the preference stage and of T-REG's token rewards; imports neither torch nor Ray."""

from __future__ import annotations

import difflib
import re
from typing import Literal

from pydantic import Field, field_validator, model_validator

from rl.sections import NonNegative, Positive, Section

PLACEHOLDERS = ("question", "draft")
SHARED = "{question}\n\nDraft of an answer:\n{draft}\n\n"
BETTER = f"{SHARED}Rewrite the draft so that it becomes helpful, correct, coherent and concise."
WORSE = f"{SHARED}Rewrite the draft so that it becomes unhelpful, incorrect, incoherent and verbose."
ROLLOUTS = "rollouts"


class ContrastSettings(Section):
    """The two prompts of T-REG: one asks for a better version of an answer, one for a worse (arXiv 2412.02685).

    Both are put where a question stands: into the chat template, or into `data.template`. What they share comes first, so that
    a prefix cache serves both.
    """

    better: str = BETTER
    """Text with `{question}` and, where it asks for a revision, `{draft}`: the answer that is scored."""
    worse: str = WORSE
    """The same for a worse version; `{question}` may be left out."""

    @field_validator("better", "worse")
    @classmethod
    def _known_placeholders(cls, template: str) -> str:
        for name in re.findall(r"\{(\w+)\}", template):
            close = difflib.get_close_matches(name, PLACEHOLDERS, n=1, cutoff=0.7)
            if close and name not in PLACEHOLDERS:
                raise ValueError(f"{{{name}}} is not filled in; did you mean {{{close[0]}}}?")
        return template

    @model_validator(mode="after")
    def _differ(self) -> ContrastSettings:
        if "{question}" not in self.better:
            raise ValueError("contrast.better does not say where the question goes; put {question} into it")
        if self.better == self.worse:
            raise ValueError("contrast.better and contrast.worse are the same, so that every token reward would be 0; change one")
        return self


class TregSettings(Section):
    """T-REG's token rewards in the preference loss."""

    alpha: float = Field(default=0.25, gt=0, lt=2)
    """Weight of the token rewards: a token weighs between 1 - alpha/2 and 1 + alpha/2 (the paper: 0.1, 0.25 or 0.5)."""
    contrast: ContrastSettings = ContrastSettings()
    self_test: bool = True
    """Before the first step, check on answers with some numbers exchanged that the right token gets the higher reward, and stop
    where it does not."""


class RlTregSettings(Section):
    """T-REG's token rewards in RL: the advantage A of a token becomes A + weight |A| r."""

    weight: float = Field(default=0.25, gt=0, lt=2)
    """Weight of the token rewards (lambda); below 2 no advantage changes its sign."""
    contrast: ContrastSettings = ContrastSettings()
    self_test: bool = True
    """Before the first step, check on answers with some numbers exchanged that the right token gets the higher reward, and stop
    where it does not."""


class PairSettings(Section):
    """Where pairs of answers come from."""

    source: str = ROLLOUTS
    """`rollouts`: sampled from the model and compared by verdict, budget and length. Or a data set with preferred and rejected
    answers: a hub id (`owner/name` or `owner/name:configuration`), or a .parquet/.json/.jsonl file. Also the `pairs.jsonl` of an
    earlier run of the same tokenizer."""
    split: str = "train"
    """Split of a hub data set."""
    prompt_column: str = "prompt"
    """Column of the prompt, text or chat messages. A data set without a column `prompt` has it at the start of both answers."""
    chosen_column: str = "chosen"
    rejected_column: str = "rejected"
    size: Positive | None = None
    """Rows of a data set that are read, from its start; None: all."""
    samples: int = Field(default=8, ge=2)
    """rollouts: answers sampled per prompt."""
    prompts: Positive = 512
    """rollouts: prompts that are sampled."""
    per_prompt: Positive = 1
    """rollouts: pairs made of one prompt's answers at most."""
    prefer_short: bool = True
    """rollouts: of two right answers, prefer one that is clearly shorter (at most 0.8 times the other's tokens)."""
    held_out: int = Field(default=64, ge=0)
    """Pairs kept apart to measure the loss and the accuracy on; no prompt is on both sides."""
    max_length: Positive | None = None
    """Pairs with more tokens of prompt + answer on either side are dropped, counted and reported. None:
    data.max_prompt_length + rollout.max_length."""

    @property
    def from_rollouts(self) -> bool:
        """Whether pairs are sampled rather than read."""
        return self.source == ROLLOUTS


class PreferenceSettings(Section):
    """A stage that learns from pairs of answers, on the same learner as RL."""

    form: Literal["dpo", "simpo"] = "dpo"
    """`dpo`: log-ratios to the frozen start policy (arXiv 2305.18290). `simpo`: mean log-probs without a reference (arXiv
    2405.14734)."""
    reverse: bool = False
    """Learn to prefer the rejected answers: the second model of AlignDistil's teacher (arXiv 2503.02832)."""
    beta: float = Field(default=0.1, gt=0)
    """Scale of the rewards. dpo: 0.01 to 0.5, a smaller one moves further from the start policy; simpo: 2 to 10."""
    margin: NonNegative = 0.0
    """simpo: by how much the chosen answer's reward is to be above the rejected one's (gamma; 0.3 to 1.6 times beta)."""
    treg: TregSettings | None = None
    """T-REG's token rewards in the loss; None: none."""
    pairs: PairSettings = PairSettings()
    pairs_per_step: Positive = 32
    steps: Positive | None = None
    """Optimiser steps; None: max_steps."""
    lr: float | None = Field(default=None, gt=0)
    """Learning rate; None: learner.lr."""

    @model_validator(mode="after")
    def _fits_together(self) -> PreferenceSettings:
        if self.form == "dpo" and self.margin:
            raise ValueError(f"preference.margin={self.margin:g} belongs to simpo; set preference.form=simpo, or leave it out")
        if self.reverse and self.treg is not None:
            raise ValueError(
                "preference.reverse prefers the rejected answers, and preference.treg the tokens of better ones; leave one out"
            )
        return self
