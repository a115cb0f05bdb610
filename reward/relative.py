"""Length rewards relative to something: the answer's group, its prompt's history, the start policy, a controller's weight.

A group is one prompt (one prompt and effort for `aec`); ids may come in any order. Nothing here loops over rollouts.
"""

from __future__ import annotations

import math

import torch

from reward.checks import (
    check_flags,
    check_like,
    check_max_length,
    checked_answers,
    checked_lengths,
    checked_positive,
    checked_shares,
    real,
)


class Groups:
    """Who belongs together; every result has shape (N), float64, the group's value at each of its members."""

    def __init__(self, group_N: torch.Tensor, like_N: torch.Tensor, like: str = "length_N") -> None:
        if group_N.is_floating_point() or group_N.is_complex() or group_N.dtype == torch.bool:
            raise TypeError(f"group_N must hold integer ids, got {group_N.dtype}")
        check_like("group_N", group_N, like, like_N)
        if group_N.dim() != 1:
            raise ValueError(f"group_N must have one dimension, got shape {tuple(group_N.shape)}")
        labels, self._index_N = torch.unique(group_N, return_inverse=True)
        self._count = labels.numel()
        self.size_N = self.total(torch.ones_like(like_N, dtype=torch.float64))

    def total(self, value_N: torch.Tensor) -> torch.Tensor:
        return value_N.new_zeros(self._count).index_add_(0, self._index_N, value_N)[self._index_N]

    def mean(self, value_N: torch.Tensor) -> torch.Tensor:
        return self.total(value_N) / self.size_N

    def smallest(self, value_N: torch.Tensor) -> torch.Tensor:
        start = value_N.new_full((self._count,), math.inf)
        return start.scatter_reduce_(0, self._index_N, value_N, "amin")[self._index_N]

    def largest(self, value_N: torch.Tensor) -> torch.Tensor:
        return -self.smallest(-value_N)

    def standard_score(self, value_N: torch.Tensor, of_N: torch.Tensor, *, ddof: int, floor: float) -> torch.Tensor:
        """``(v - mean) / (std + floor)`` with mean and std over the members in the mask; 0 where one gives no std."""
        counted_N = of_N.double()
        count_N = self.total(counted_N)
        centred_N = value_N - self.total(value_N * counted_N) / count_N.clamp(min=1.0)
        std_N = (self.total(counted_N * centred_N**2) / (count_N - ddof).clamp(min=1.0)).sqrt()
        return torch.where(count_N > ddof, centred_N / (std_N + floor), 0.0)

    def earlier(self, mark_N: torch.Tensor, place_N: torch.Tensor) -> torch.Tensor:
        """The sum of marks over the members of the group with a strictly smaller place."""
        rows_N2 = torch.stack([self._index_N.double(), place_N], dim=1)
        sorted_P2, position_N = torch.unique(rows_N2, dim=0, return_inverse=True)
        sum_P = mark_N.new_zeros(len(sorted_P2)).index_add_(0, position_N, mark_N)
        before_N = (sum_P.cumsum(0) - sum_P)[position_N]
        return before_N - self.smallest(before_N)


def group_mean_length(length_N: torch.Tensor, group_N: torch.Tensor) -> torch.Tensor:
    """The mean length of each rollout's group, AEC's T_avg in its literal reading.

    Shapes: length_N (N) in tokens; group_N (N) integer ids. Returns float32 (N).
    Raises ValueError or TypeError naming the argument. Source: Adaptive Effort Control (arXiv 2510.27042).
    """
    length_N = checked_lengths("length_N", length_N)
    return Groups(group_N, length_N).mean(length_N).float()


def aec(
    correct_N: torch.Tensor,
    length_N: torch.Tensor,
    effort_N: torch.Tensor,
    average_N: torch.Tensor,
    *,
    soft_delta: float = 0.0,
) -> torch.Tensor:
    """e1's Adaptive Effort Control: right, and within ``r`` times the usual length: ``1[ok] 1[n / T_avg <= r]``.

    ``soft_delta`` d > 0 (ours) replaces the cliff by a slope: ``1[ok] clamp(1 - (n / T_avg - r) / d, 0, 1)``.
    With the group's mean as T_avg the limit moves with the policy and every finite r shortens: of correct log-normal lengths
    (sigma 0.5) r = 1 rewards 60 %, whose mean is 0.67 T_avg. A running mean or the start policy's stops that.

    Shapes: all (N); correct_N bool; length_N n in response tokens, a truncated answer wrong with its capped length; effort_N r
    above 0, inf for none; average_N T_avg in tokens, above 0 and finite. Returns float32 (N), in [0, 1].
    Raises ValueError or TypeError naming the argument. Source: Adaptive Effort Control (arXiv 2510.27042).
    """
    if soft_delta < 0:
        raise ValueError(f"soft_delta must be at least 0, got {soft_delta}")
    length_N = checked_answers(correct_N, length_N)
    check_like("effort_N", effort_N, "length_N", length_N)
    check_like("average_N", average_N, "length_N", length_N)
    effort_N = checked_positive("effort_N", effort_N, endless="a rollout without an effort")
    # Divide rather than multiply: n / T rounds to the same number as a written r where they are equal.
    excess_N = length_N / checked_positive("average_N", average_N) - effort_N
    share_N = (1.0 - excess_N / soft_delta).clamp(0.0, 1.0) if soft_delta else (excess_N <= 0).double()
    return torch.where(correct_N, share_N, 0.0).float()


def alp(
    correct_N: torch.Tensor, length_N: torch.Tensor, group_N: torch.Tensor, *, max_length: int, beta: float = 0.2
) -> torch.Tensor:
    """ALP: tokens cost more where the prompt is easy: ``1[ok] - (beta / L) max(p, 1/K) n``.

    p is the group's pass rate and K its size, so a prompt that nobody solves still pays a K-th. L and beta are ours: the paper's
    values are not public.

    Shapes: all (N); correct_N bool; length_N n and max_length L in response tokens; group_N integer ids. Returns float32 (N).
    Raises ValueError or TypeError naming the argument. Source: Just Enough Thinking (arXiv 2506.05256).
    """
    check_max_length(max_length)
    length_N = checked_answers(correct_N, length_N)
    groups = Groups(group_N, length_N)
    rate_N = groups.total(correct_N.double()).clamp(min=1.0) / groups.size_N
    return (correct_N.double() - beta / max_length * rate_N * length_N).float()


def efficient(correct_N: torch.Tensor, length_N: torch.Tensor, group_N: torch.Tensor, *, alpha: float = 0.1) -> torch.Tensor:
    """Efficient reasoning's sigmoid: ``1[ok] (1 - alpha sigmoid(z))``, z the length's standard score among the correct answers.

    ``z = (n - mean_ok) / (std_ok + 1e-7)`` over the correct answers of the group, population std; 0 for a single one.

    Shapes: all (N); correct_N bool; length_N n in tokens; group_N integer ids. Returns float32 (N), in [1 - alpha, 1] or 0.
    Raises ValueError or TypeError naming the argument. Source: Training LMs to Reason Efficiently (arXiv 2502.04463).
    """
    length_N = checked_answers(correct_N, length_N)
    score_N = Groups(group_N, length_N).standard_score(length_N, correct_N, ddof=0, floor=1e-7)
    return torch.where(correct_N, 1.0 - alpha * torch.sigmoid(score_N), 0.0).float()


def kimi(correct_N: torch.Tensor, length_N: torch.Tensor, group_N: torch.Tensor, *, weight: float = 1.0) -> torch.Tensor:
    """Kimi k1.5's length reward: ``1 + w lambda`` for a correct answer, ``w min(0, lambda)`` for any other.

    ``lambda = 1/2 - (n - min) / (max - min)`` over the whole group; 0 where all lengths are equal.

    Shapes: all (N); correct_N bool; length_N n in tokens; group_N integer ids. Returns float32 (N).
    Raises ValueError or TypeError naming the argument. Source: Kimi k1.5 (arXiv 2501.12599, section 2.3.3).
    """
    length_N = checked_answers(correct_N, length_N)
    groups = Groups(group_N, length_N)
    low_N, high_N = groups.smallest(length_N), groups.largest(length_N)
    span_N = high_N - low_N
    lambda_N = torch.where(span_N > 0, 0.5 - (length_N - low_N) / torch.where(span_N > 0, span_N, 1.0), 0.0)
    return torch.where(correct_N, 1.0 + weight * lambda_N, weight * lambda_N.clamp(max=0.0)).float()


def difficulty_bands(correct_N: torch.Tensor, group_N: torch.Tensor) -> torch.Tensor:
    """LASER-D's difficulty by the group's own pass rate p: 2 (high) for p >= 2/3, 1 (medium) for p >= 1/3, else 0 (low).

    Shapes: correct_N (N) bool; group_N (N) integer ids. Returns int64 (N). Raises ValueError or TypeError naming the argument.
    Source: LASER (arXiv 2505.15612).
    """
    check_flags("correct_N", correct_N)
    right_N = correct_N.double()
    groups = Groups(group_N, right_N, "correct_N")
    thirds_N = 3.0 * groups.total(right_N)  # whole numbers on both sides: exact at 1/3 and 2/3
    return (thirds_N >= groups.size_N).long() + (thirds_N >= 2.0 * groups.size_N).long()


def history_min(correct_N: torch.Tensor, length_N: torch.Tensor, shortest_N: torch.Tensor) -> torch.Tensor:
    """History-aware policy optimisation: a correct answer pays more the shorter it is than the shortest correct one ever, h.

    ``1[ok] + c`` with ``c = cos(min(n / h, 2) pi / 2)``, at least -0.7 for a correct answer, at most 0 for any other; ``1[ok]``
    alone before the prompt's first correct answer.

    Shapes: all (N); correct_N bool; length_N n and shortest_N h in tokens, h above 0, inf or NaN where there is none.
    Returns float32 (N), in [-1, 2]. Raises ValueError or TypeError naming the argument.
    Source: HAPO, History-Aware (arXiv 2505.11225) and its code; not the HAPO that adapts temperatures.
    """
    length_N = checked_answers(correct_N, length_N)
    check_like("shortest_N", shortest_N, "length_N", length_N)
    shortest_N = torch.nan_to_num(real("shortest_N", shortest_N), nan=math.inf, posinf=math.inf)
    shortest_N = checked_positive("shortest_N", shortest_N, endless="a prompt that has no correct answer yet")
    cosine_N = torch.cos((length_N / shortest_N).clamp(max=2.0) * (math.pi / 2.0))
    bounded_N = torch.where(correct_N, cosine_N.clamp(min=-0.7), cosine_N.clamp(max=0.0))
    return (correct_N.double() + torch.where(torch.isinf(shortest_N), 0.0, bounded_N)).float()


def shorterbetter(
    correct_N: torch.Tensor, length_N: torch.Tensor, group_N: torch.Tensor, *, alpha: float = 2.0, beta: float = 1e-3
) -> torch.Tensor:
    """ShorterBetter: ``alpha 1[ok] - beta |n - n*|``, n* the shortest correct answer of the group, the mean length without one.

    Shapes: all (N); correct_N bool; length_N n in tokens; group_N integer ids; beta in reward per token. Returns float32 (N).
    Raises ValueError or TypeError naming the argument. Source: ShorterBetter (arXiv 2504.21370).
    """
    length_N = checked_answers(correct_N, length_N)
    groups = Groups(group_N, length_N)
    shortest_N = groups.smallest(torch.where(correct_N, length_N, math.inf))
    best_N = torch.where(torch.isinf(shortest_N), groups.mean(length_N), shortest_N)
    return (alpha * correct_N.double() - beta * (length_N - best_N).abs()).float()


def dast_budget(correct_N: torch.Tensor, length_N: torch.Tensor, group_N: torch.Tensor, *, max_length: int) -> torch.Tensor:
    """DAST's token length budget of each prompt: ``p mean_ok + (1 - p) L``, long where the pass rate p is low.

    mean_ok is the mean length of the group's correct answers; without one the budget is L.

    Shapes: all (N); correct_N bool; length_N and max_length L in tokens; group_N integer ids. Returns float32 (N), tokens.
    Raises ValueError or TypeError naming the argument. Source: DAST (arXiv 2503.04472, equation 1).
    """
    check_max_length(max_length)
    length_N = checked_answers(correct_N, length_N)
    groups, right_N = Groups(group_N, length_N), correct_N.double()
    rate_N = groups.mean(right_N)
    # p * mean_ok is the sum over correct answers by the group's size.
    return (groups.mean(right_N * length_N) + (1.0 - rate_N) * max_length).float()


def dast(correct_N: torch.Tensor, length_N: torch.Tensor, budget_N: torch.Tensor) -> torch.Tensor:
    """DAST's calibrated reward: with ``l = (n - b) / b``, ``max(0.5 - 0.5 l, 0.1)`` if correct, else ``min(0.9 l - 0.1, -0.1)``.

    The paper makes preference pairs of it (SimPO); here it is a reward. A wrong answer pays less the shorter it is.

    Shapes: all (N); correct_N bool; length_N n and budget_N b (`dast_budget`) in tokens, b above 0 and finite.
    Returns float32 (N), in [-1, 1]. Raises ValueError or TypeError naming the argument. Source: DAST (arXiv 2503.04472).
    """
    length_N = checked_answers(correct_N, length_N)
    check_like("budget_N", budget_N, "length_N", length_N)
    budget_N = checked_positive("budget_N", budget_N)
    excess_N = (length_N - budget_N) / budget_N
    right_N, wrong_N = (0.5 - 0.5 * excess_N).clamp(min=0.1), (0.9 * excess_N - 0.1).clamp(max=-0.1)
    return torch.where(correct_N, right_N, wrong_N).float()


def grpo_lead(correct_N: torch.Tensor, length_N: torch.Tensor, group_N: torch.Tensor, *, alpha: float = 0.05) -> torch.Tensor:
    """GRPO-LEAD: ``exp(-alpha z)`` for a correct answer, -1 for any other, z the length's standard score among the correct ones.

    ``z = (n - mean_ok) / (std_ok + 1e-6)`` over the correct answers of the group, sample std (the worked values need it); 0 for a
    single one. The released code does so only in groups whose three shortest answers average more than 4000 tokens.

    Shapes: all (N); correct_N bool; length_N n in tokens; group_N integer ids. Returns float32 (N).
    Raises ValueError or TypeError naming the argument. Source: GRPO-LEAD (arXiv 2504.09696).
    """
    length_N = checked_answers(correct_N, length_N)
    score_N = Groups(group_N, length_N).standard_score(length_N, correct_N, ddof=1, floor=1e-6)
    return torch.where(correct_N, torch.exp(-alpha * score_N), -1.0).float()


def lead_weight(
    pass_rate_N: torch.Tensor, *, low: float = 0.4, high: float = 1.5, centre: float = 0.75, slope: float = 10.0
) -> torch.Tensor:
    """GRPO-LEAD's weight of an advantage, large where the prompt is hard: ``low + (high - low) / (1 + exp(slope (p - centre)))``.

    The released code takes p for a positive advantage and 1 - p for any other.

    Shapes: pass_rate_N (N) in [0, 1]. Returns float32 (N). Raises ValueError or TypeError naming the argument.
    Source: GRPO-LEAD (arXiv 2504.09696).
    """
    rate_N = checked_shares("pass_rate_N", pass_rate_N)
    return (low + (high - low) * torch.sigmoid(-slope * (rate_N - centre))).float()


def o1_pruner(
    correct_N: torch.Tensor,
    length_N: torch.Tensor,
    reference_length_N: torch.Tensor,
    reference_accuracy_N: torch.Tensor,
    *,
    weight: float = 2.0,
    low: float = -2.0,
    high: float = 4.0,
) -> torch.Tensor:
    """O1-Pruner: shorter and better than the start policy: ``clamp(n_ref / n - 1 + weight (1[ok] - acc_ref), low, high)``.

    Before standardisation: the paper then divides by the spread, which the advantage does here.

    Shapes: all (N); correct_N bool; length_N n and reference_length_N in tokens, above 0; reference_accuracy_N in [0, 1]; both
    references are the start policy's means on the prompt. Returns float32 (N), in [low, high].
    Raises ValueError or TypeError naming the argument. Source: O1-Pruner (arXiv 2501.12570).
    """
    if low > high:
        raise ValueError(f"low must not be above high, got {low} and {high}")
    length_N = checked_positive("length_N", checked_answers(correct_N, length_N))
    check_like("reference_length_N", reference_length_N, "length_N", length_N)
    check_like("reference_accuracy_N", reference_accuracy_N, "length_N", length_N)
    saved_N = checked_positive("reference_length_N", reference_length_N) / length_N - 1.0
    better_N = correct_N.double() - checked_shares("reference_accuracy_N", reference_accuracy_N)
    return (saved_N + weight * better_N).clamp(low, high).float()


def s_grpo(correct_N: torch.Tensor, exit_N: torch.Tensor, group_N: torch.Tensor) -> torch.Tensor:
    """S-GRPO's decaying reward: of the exits from one path of thought, the n-th correct one earns ``2^-(n - 1)``, a wrong one 0.

    n is 1 + how many correct answers left the path strictly earlier, so equal exits share their place.

    Shapes: all (N); correct_N bool; exit_N where the path was left, in tokens or by number, at least 0, inf for the full path;
    group_N integer ids, one per path. Returns float32 (N), in [0, 1]. Raises ValueError or TypeError naming the argument.
    Source: S-GRPO (arXiv 2505.07686).
    """
    check_flags("correct_N", correct_N)
    check_like("exit_N", exit_N, "correct_N", correct_N)
    exit_N = real("exit_N", exit_N)
    if not bool((exit_N >= 0).all()):
        raise ValueError("exit_N must be at least 0 everywhere; write inf for the full path")
    before_N = Groups(group_N, exit_N, "exit_N").earlier(correct_N.double(), exit_N)
    return torch.where(correct_N, torch.exp2(-before_N), 0.0).float()


def adaptthink(
    correct_N: torch.Tensor, no_think_N: torch.Tensor, reference_accuracy_N: torch.Tensor, *, delta: float = 0.05
) -> torch.Tensor:
    """AdaptThink: not thinking pays where it is as good as the start policy: ``1[ok] - acc_ref + delta 1[no thinking]``.

    Shapes: all (N); correct_N and no_think_N bool; reference_accuracy_N in [0, 1], the start policy's on the prompt.
    Returns float32 (N). Raises ValueError or TypeError naming the argument. Source: AdaptThink (arXiv 2505.13417).
    """
    check_flags("correct_N", correct_N)
    check_flags("no_think_N", no_think_N)
    check_like("no_think_N", no_think_N, "correct_N", correct_N)
    check_like("reference_accuracy_N", reference_accuracy_N, "correct_N", correct_N)
    reference_N = checked_shares("reference_accuracy_N", reference_accuracy_N)
    return (correct_N.double() - reference_N + delta * no_think_N.double()).float()


def adlp(correct_N: torch.Tensor, length_N: torch.Tensor, *, weight: float) -> torch.Tensor:
    """A-DLP: ``1[ok] - weight n``, the weight following the accuracy (`reward.controllers.adlp_update`).

    Shapes: all (N); correct_N bool; length_N n in tokens; weight in reward per token, at least 0. Returns float32 (N).
    Raises ValueError or TypeError naming the argument. Source: Thinking Fast and Right (arXiv 2505.18298).
    """
    if not weight >= 0:
        raise ValueError(f"weight must be at least 0, got {weight}")
    length_N = checked_answers(correct_N, length_N)
    return (correct_N.double() - weight * length_N).float()
