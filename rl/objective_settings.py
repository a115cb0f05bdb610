"""Settings of what is optimised: how advantages follow from rewards, and the policy loss."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from rl.sections import NonNegative, Section


class AdvantageSettings(Section):
    estimator: Literal[
        "group_normalised",
        "hierarchical",
        "token_level_average",
        "group_centred",
        "leave_one_out",
        "batch_normalised",
        "reward",
        "decoupled",
    ] = "group_normalised"
    """`group_normalised`: GRPO. `hierarchical`: HBPO. `token_level_average`: HAPO, mean and spread over a group's tokens instead
    of its answers. `group_centred`: GRPO without its division (Dr. GRPO). `leave_one_out`: RLOO. `batch_normalised`: over the
    whole batch. `reward`: the reward as it is. `decoupled`: GRPO of correctness, whose positive part the lengths share out; the
    rest of the reward does not count."""
    length_guard: bool = True
    """group_normalised: groups whose answers are all right keep a length reward at its natural size, groups all wrong have none.
    False is the papers' literal form; see docs/rewards.md."""
    guard: float | None = Field(default=5.0, gt=0)
    """token_level_average: a group in which an advantage reaches this size, because nearly all its tokens are right or wrong, has
    GRPO's advantages instead (in the published code only); None never."""
    difficulty_weight: Literal["none", "lead"] = "none"
    """`lead`: groups with a low pass rate weigh more (GRPO-LEAD)."""
    scale: float | None = Field(default=None, gt=0)
    """decoupled: length in tokens over which the share of a correct answer falls; None is rollout.max_length."""
    tau: float = Field(default=0.5, gt=0)
    """decoupled: smaller values prefer short answers more."""
    intra_coef: float = 1.0
    """hierarchical: weight of the subgroup term (the paper 1, the published code 2)."""
    intra_scale: Literal["none", "spread"] = "none"
    """hierarchical: `none` is the paper; `spread` divides the subgroup term by the group's reward spread, like the group term."""
    centre: Literal["none", "group", "batch"] = "none"
    """Subtract the mean advantage of the group or of the batch. `none` is the paper and drifts: see docs/stability.md."""
    std_floor: float = Field(default=1e-6, gt=0)
    """Added to the spread that a reward is divided by; token_level_average always has 1e-6."""


class HeterogeneousSettings(Section):
    """HAPO's loss: how much a token counts and how far its ratio may go, by its entropy (arXiv 2509.16591, parts C and D)."""

    clip: bool = True
    """Part D: the ratio may fall further where the policy is surer than the pivot, and rise further where it is less sure."""
    clip_kappa: float = Field(default=1.0, gt=0, le=1)
    """clip: how much further at the extremes, as a share of loss.clip_low and loss.clip_high."""
    redistribute: bool = True
    """Part C: advantages grow where the ratio of an unsure token leaves a zone around 1, and shrink where a sure one's stays."""
    redistribute_kappa: float = Field(default=1.0, gt=0, le=1)
    """redistribute: by how much at the extremes, as a share of the advantage; above 1 it would turn signs round."""
    zone: Literal["base", "adapted"] = "base"
    """redistribute: the zone reaches half of loss.clip_low and loss.clip_high to either side of 1 (the paper), or half of what
    `clip` makes of them for the token (the published code)."""
    entropy: Literal["old", "current"] = "old"
    """Whose entropy: that of the weights that sampled, which stays the same over a step's updates, or that of the policy as it is
    being updated (the published code)."""
    scope: Literal["batch", "microbatch"] = "batch"
    """What a token's entropy is compared with: all tokens of the step that carry loss, on all ranks and at the sampling weights,
    or those of its micro-batch (the published code), which makes the result depend on how micro-batches are cut. With `batch` and
    `entropy: current` a signal beyond the extremes counts as these."""
    literal: bool = False
    """The published code's sign: tokens surer than the pivot count like unsure ones, so that no advantage shrinks and no floor
    falls."""
    rho: float = Field(default=0.8, gt=0, lt=1)
    """Quantile of the log entropies that divides sure from unsure."""

    @model_validator(mode="after")
    def _does_something(self) -> HeterogeneousSettings:
        if not self.clip and not self.redistribute:
            raise ValueError(
                "loss.heterogeneous with clip=false and redistribute=false is the plain loss; switch one on, or leave it out"
            )
        if self.zone == "adapted" and self.redistribute and not self.clip:
            raise ValueError(
                "loss.heterogeneous.zone=adapted takes the widths that clip=false leaves as they are; set zone=base, or clip=true"
            )
        return self


class LossSettings(Section):
    clip_low: NonNegative = 0.2
    clip_high: NonNegative = 0.28
    dual_clip: float | None = Field(default=3.0, gt=1)
    """Bound on the loss of a negative advantage, in multiples of it; None switches it off."""
    kl_coef: NonNegative = 0.0
    """Weight of the KL to the frozen start policy; 0 keeps no reference model."""
    kl_form: Literal["k1", "k2", "k3"] = "k3"
    heterogeneous: HeterogeneousSettings | None = None
    """Advantages and clip widths by the entropy at each token (HAPO); None: the same for all. See docs/hapo.md."""

    @model_validator(mode="after")
    def _keeps_a_floor(self) -> LossSettings:
        chosen = self.heterogeneous
        if chosen is not None and chosen.clip and self.clip_low * (1 + chosen.clip_kappa) >= 1:
            raise ValueError(
                f"loss.clip_low={self.clip_low:g} widened by loss.heterogeneous.clip_kappa={chosen.clip_kappa:g} lets a ratio "
                f"fall to 0, which clips nothing; lower clip_low below {1 / (1 + chosen.clip_kappa):g}"
            )
        return self
