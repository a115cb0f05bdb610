"""AlignDistil by hand: worked values, gradients, and its identities by enumerating a process of three steps over three tokens."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import pytest
import torch

import kernels
from rl.alignment import alignment_loss, compose_teacher, contrastive_reward, kl_weight, token_reward

DPO = torch.tensor([[2, 0.5, -1, 0, -0.5], [0.2, 0.1, 0, -0.1, -0.2], [-1, 3, 0.5, 0, -2]])
REVERSE = torch.tensor([[0.5, 1.5, -0.5, 0, 0], [0.2, 0.1, 0, -0.1, -0.2], [1, 0, 0.5, 0, 0.5]])
STUDENT = torch.tensor([[1, 1, -1, 0.2, -0.4], [0.5, 0, -0.2, 0.1, -0.3], [-0.5, 2, 0.4, 0.1, -1]])
SAMPLED = torch.tensor([[0], [2], [1]])
ALL = torch.ones(3, dtype=torch.bool)


def _logp(logits: torch.Tensor) -> torch.Tensor:
    """Of the sampled tokens."""
    return torch.log_softmax(logits.double(), dim=-1).gather(1, SAMPLED)[:, 0]


def _close(found: torch.Tensor, expected: list[float] | list[list[float]], atol: float = 1e-5) -> None:
    torch.testing.assert_close(found.double(), torch.tensor(expected, dtype=torch.float64), atol=atol, rtol=0)


def test_the_teacher_extrapolates_further_where_its_models_disagree() -> None:
    log_star, alpha = compose_teacher(DPO, REVERSE, r=20.0)
    _close(alpha, [9.646640, 0.001, 14.793100])
    _close(log_star[0], [0, -25.616601, -22.293281, -16.469961, -21.793281])
    _close(log_star[1].exp(), [0.241855, 0.218840, 0.198014, 0.179171, 0.162120])
    _close(log_star[2], [-77.965499, 0, -46.879299, -47.379299, -86.362049], atol=2e-5)  # float32 near 86
    mild, alpha = compose_teacher(DPO, REVERSE, r=2.0)
    _close(alpha, [0.965564, 0.001, 1.480210])
    _close(mild[0].exp(), [0.933812, 0.018641, 0.006741, 0.029694, 0.011113])
    _close(mild[2].exp(), [0.000011, 0.998435, 0.000966, 0.000586, 0.000002])
    assert log_star.dtype == alpha.dtype == torch.float32


@pytest.mark.parametrize(("r", "expected"), [(20.0, 0.760917), (30.0, 0.761129), (2.0, 0.757604)])
def test_the_loss_of_a_response_has_its_worked_value(r: float, expected: float) -> None:
    log_star, alpha = compose_teacher(DPO.double(), REVERSE.double(), r=r)
    assert alignment_loss(STUDENT.double(), log_star, alpha, ALL).item() == pytest.approx(expected, abs=1e-6)
    # Token 2 is weighed by 100, and so is what float32 rounds of its KL.
    log_star, alpha = compose_teacher(DPO, REVERSE, r=r)
    assert alignment_loss(STUDENT, log_star, alpha, ALL).item() == pytest.approx(expected, abs=1e-5)


def test_masked_tokens_count_neither_above_nor_below_the_line() -> None:
    log_star, alpha = compose_teacher(DPO, REVERSE, r=2.0)
    mask = torch.tensor([True, True, False])
    assert alignment_loss(STUDENT, log_star, alpha, mask).item() == pytest.approx(1.078110, abs=1e-5)
    student = STUDENT.clone().requires_grad_()
    loss = alignment_loss(student, log_star, alpha, torch.zeros(3, dtype=torch.bool))
    loss.backward()
    assert loss.item() == 0 and student.grad is not None and not student.grad.any()


def test_the_gradient_has_its_worked_value_and_its_closed_form() -> None:
    student = STUDENT.double().requires_grad_()
    log_star, alpha = compose_teacher(DPO.double(), REVERSE.double(), r=20.0)
    alignment_loss(student, log_star, alpha, ALL).backward()
    assert student.grad is not None
    _close(student.grad[0], [-0.017429, 0.013835, 0.000993, 0.000762, 0.001840], atol=1e-6)
    log_s = student.detach().log_softmax(dim=-1)
    gap = log_s - log_star
    kl = (log_s.exp() * gap).sum(dim=-1, keepdim=True)
    torch.testing.assert_close(student.grad, 0.1 / alpha[:, None] * log_s.exp() * (gap - kl) / 3)


def test_the_gradient_passes_the_numerical_check() -> None:
    student = STUDENT.double().requires_grad_()
    log_star, alpha = compose_teacher(DPO.double(), REVERSE.double(), r=20.0)
    mask = torch.tensor([1.0, 0.0, 0.5])
    assert torch.autograd.gradcheck(lambda z: alignment_loss(z, log_star, alpha, mask), (student,))


def test_no_gradient_reaches_the_teacher() -> None:
    dpo, reverse, student = (z.clone().requires_grad_() for z in (DPO, REVERSE, STUDENT))
    log_star, alpha = compose_teacher(dpo, reverse, r=2.0)
    alignment_loss(student, log_star, alpha, ALL).backward()
    assert not log_star.requires_grad and not alpha.requires_grad and student.grad is not None
    reward = token_reward(student[:, 0], log_star[:, 0], alpha)
    assert not reward.requires_grad and not contrastive_reward(dpo[:, 0], reverse[:, 0]).requires_grad


def test_a_constant_extrapolation_of_one_is_r_of_zero_and_eps_of_one() -> None:
    log_star, alpha = compose_teacher(DPO, REVERSE, r=0.0, eps=1.0)
    log_s = STUDENT.log_softmax(dim=-1)
    _close(alpha, [1, 1, 1])
    _close((log_s.exp() * (log_s - log_star)).sum(dim=-1), [1.278229, 0.020284, 1.168070])
    torch.testing.assert_close(log_star, (2 * DPO - REVERSE).log_softmax(dim=-1))  # raw logits do: what they lack cancels


@pytest.mark.parametrize(
    ("r", "weight", "reward"),
    [
        (20.0, [0.010366, 100, 0.006760], [0.010788, 25.082335, 0.002665]),
        (2.0, [0.103566, 100, 0.067558], [0.100692, 25.082335, 0.026532]),
    ],
)
def test_weights_and_token_rewards_have_their_worked_values(r: float, weight: list[float], reward: list[float]) -> None:
    log_star, alpha = compose_teacher(DPO.double(), REVERSE.double(), r=r)
    _close(kl_weight(alpha), weight)
    _close(token_reward(_logp(STUDENT), log_star.gather(1, SAMPLED)[:, 0], alpha), reward)


def test_a_bound_on_the_weight_bounds_loss_and_reward_alike() -> None:
    log_star, alpha = compose_teacher(DPO.double(), REVERSE.double(), r=20.0)
    _close(kl_weight(alpha, beta_max=2.0), [0.010366, 2, 0.006760])
    reward = token_reward(_logp(STUDENT), log_star.gather(1, SAMPLED)[:, 0], alpha, beta_max=2.0)
    _close(reward, [0.010788, 0.501647, 0.002665])
    # The three weighed KLs are 0.137249, 2 x 0.020284 and 0.117140.
    assert alignment_loss(STUDENT.double(), log_star, alpha, ALL, beta_max=2.0).item() == pytest.approx(0.098319, abs=1e-5)


def test_the_contrastive_reward_has_its_worked_value_and_so_has_the_teachers_normaliser() -> None:
    dpo, reverse = _logp(DPO), _logp(REVERSE)
    _close(contrastive_reward(dpo, reverse), [0.126856, 0, 0.193564])
    log_star, alpha = compose_teacher(DPO.double(), REVERSE.double(), r=20.0)
    log_z = (1 + alpha) * dpo - alpha * reverse - log_star.gather(1, SAMPLED)[:, 0]
    _close(log_z, [11.838316, 0, 28.488334], atol=1.1e-5)
    reward = token_reward(_logp(STUDENT), log_star.gather(1, SAMPLED)[:, 0], alpha)
    parts = contrastive_reward(dpo, reverse) - 0.1 / alpha * (_logp(STUDENT) - dpo) - 0.1 / alpha * log_z
    torch.testing.assert_close(reward, parts)


def test_the_definition_and_the_kernel_agree() -> None:
    log_star, alpha = compose_teacher(DPO, REVERSE, r=20.0)
    kl, kernel_alpha = kernels.alignment_kl(STUDENT, DPO, REVERSE, r=20.0)
    torch.testing.assert_close(kernel_alpha, alpha)
    loss = alignment_loss(STUDENT, log_star, alpha, ALL)
    torch.testing.assert_close((kl_weight(alpha) * kl).mean(), loss, atol=1e-5, rtol=0)


def test_a_token_that_cannot_occur_spoils_nothing() -> None:
    banned = [z.clone() for z in (STUDENT, DPO, REVERSE)]
    for z in banned:
        z[:, 3] = -torch.inf
    student = banned[0].requires_grad_()
    log_star, alpha = compose_teacher(banned[1], banned[2], r=2.0)
    alignment_loss(student, log_star, alpha, ALL).backward()
    assert student.grad is not None and student.grad.isfinite().all() and not student.grad[:, 3].any()
    never = torch.tensor([-torch.inf])
    assert token_reward(never, never, torch.tensor([1.0])).item() == 0
    assert contrastive_reward(never, never).item() == 0


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="cut both to the tokenizer's size"):
        compose_teacher(DPO, REVERSE[:, :4], r=1.0)
    with pytest.raises(ValueError, match="eps above 0"):
        compose_teacher(DPO, REVERSE, r=1.0, eps=0.0)
    with pytest.raises(ValueError, match="shapes disagree"):
        alignment_loss(STUDENT, DPO, torch.ones(3), torch.ones(2))


STEPS, TOKENS = 3, 3


@dataclass(frozen=True)
class _Process:
    """Three tokens, three steps: a state is what was written so far. One row of log-probs per state, float64."""

    student: torch.Tensor
    dpo: torch.Tensor
    other: torch.Tensor
    """The reverse-DPO model, or the start policy."""

    @staticmethod
    def draw(seed: int) -> _Process:
        generator = torch.Generator().manual_seed(seed)
        states = sum(TOKENS**step for step in range(STEPS))
        return _Process(*torch.randn(3, states, TOKENS, generator=generator, dtype=torch.float64).log_softmax(dim=-1))

    def responses(self) -> tuple[torch.Tensor, torch.Tensor]:
        """State and token of each step of every response: two of shape (TOKENS ** STEPS, STEPS)."""
        token = torch.tensor(list(itertools.product(range(TOKENS), repeat=STEPS)))
        return _states(token), token


def _states(token: torch.Tensor) -> torch.Tensor:
    """Row of the state in which each token of a response was chosen: states by their length, then by their tokens."""
    columns, code = [], torch.zeros_like(token[:, 0])
    for step in range(STEPS):
        columns.append(sum(TOKENS**shorter for shorter in range(step)) + code)
        code = code * TOKENS + token[:, step]
    return torch.stack(columns, dim=1)


def _reach(process: _Process) -> torch.Tensor:
    """Probability that the student comes through each state."""
    state, token = process.responses()
    probability = process.student[state, token].sum(dim=1).exp()
    reach = torch.zeros(len(process.student), dtype=torch.float64)
    return reach.index_add_(0, state.flatten(), probability.repeat_interleave(STEPS))


@pytest.mark.parametrize("seed", range(3))
def test_the_objective_of_a_log_ratio_reward_is_minus_the_kl_to_the_teacher_plus_its_normaliser(seed: int) -> None:
    """``J = E[beta_0 ln(pi_d/pi_0)(y) - beta ln(pi_s/pi_0)(y)] = -beta E sum KL + beta E sum ln Z`` with a = beta_0 / beta."""
    process, beta0, beta = _Process.draw(seed), 0.1, 0.04
    # pi* ~ pi_d^a pi_0^(1-a): the composed teacher of pi_d and pi_0 with the constant alpha = a - 1
    log_star, _ = compose_teacher(process.dpo, process.other, r=0.0, eps=beta0 / beta - 1)
    state, token = process.responses()
    student, dpo, start = (rows[state, token] for rows in (process.student, process.dpo, process.other))
    probability = student.sum(dim=1).exp()
    assert probability.sum().item() == pytest.approx(1.0)
    objective = (probability * (beta0 * (dpo - start) - beta * (student - start)).sum(dim=1)).sum()
    log_z = (beta0 / beta) * process.dpo + (1 - beta0 / beta) * process.other - log_star
    torch.testing.assert_close(log_z, log_z[:, :1].expand_as(log_z))  # the same whichever token it is read from
    kl = (process.student.exp() * (process.student - log_star)).sum(dim=1)
    torch.testing.assert_close(objective, (_reach(process) * beta * (log_z[:, 0] - kl)).sum())


@pytest.mark.parametrize("seed", range(3))
def test_the_identity_holds_for_a_weight_of_each_state(seed: int) -> None:
    """With the contrastive reward and the anchor pi_d, for every state its own beta_t = beta_0 / alpha_t."""
    process, beta0 = _Process.draw(seed), 0.1
    log_star, alpha = compose_teacher(process.dpo, process.other, r=20.0)
    beta = kl_weight(alpha, beta0=beta0)
    state, token = process.responses()
    student, dpo, reverse = (rows[state, token] for rows in (process.student, process.dpo, process.other))
    probability = student.sum(dim=1).exp()
    reward = contrastive_reward(dpo, reverse, beta0=beta0)
    objective = (probability * (reward - beta[state] * (student - dpo)).sum(dim=1)).sum()
    log_z = ((1 + alpha[:, None]) * process.dpo - alpha[:, None] * process.other - log_star)[:, 0]
    kl = (process.student.exp() * (process.student - log_star)).sum(dim=1)
    torch.testing.assert_close(objective, (_reach(process) * beta * (log_z - kl)).sum())
    # What the token reward lacks is the normaliser: its sum over a response is minus the weighed KL.
    tokens = token_reward(student, log_star[state, token], alpha[state], beta0=beta0)
    torch.testing.assert_close((probability * tokens.sum(dim=1)).sum(), -(_reach(process) * beta * kl).sum())


def _full_gradient(process: _Process, r: float) -> torch.Tensor:
    """Gradient of the weighed KLs in the student's logits, states weighed by how often the student comes there."""
    logits = process.student.clone().requires_grad_()
    log_star, alpha = compose_teacher(process.dpo, process.other, r=r)
    reach = _reach(process)
    # One state is a response of its own here: the loss divides by the weights' sum, which is the number of steps.
    (alignment_loss(logits, log_star, alpha, reach) * reach.sum()).backward()
    assert logits.grad is not None
    return logits.grad


def _score_gradient(process: _Process, token: torch.Tensor, r: float, *, to_go: bool = False) -> torch.Tensor:
    """What each response adds to ``-sum_t R_t grad ln pi_s(y_t)``: (responses, states, TOKENS); to_go: R_t and all after it."""
    log_star, alpha = compose_teacher(process.dpo, process.other, r=r)
    state = _states(token)
    reward = token_reward(process.student[state, token], log_star[state, token], alpha[state])
    reward = reward.flip(1).cumsum(1).flip(1) if to_go else reward
    slope = torch.nn.functional.one_hot(token, TOKENS) - process.student[state].exp()
    gradient = torch.zeros(len(token), *process.student.shape, dtype=torch.float64)
    rows = torch.arange(len(token))[:, None].expand_as(state)
    return gradient.index_put_((rows, state), -reward[..., None] * slope, accumulate=True)


@pytest.mark.parametrize("r", [2.0, 20.0])
@pytest.mark.parametrize("seed", range(3))
def test_token_rewards_have_the_full_gradient_as_their_mean(seed: int, r: float) -> None:
    """Exact, over all 27 responses; with the rewards of later tokens added (discount 1) it is another gradient."""
    process = _Process.draw(seed)
    _, token = process.responses()
    probability = process.student[_states(token), token].sum(dim=1).exp()
    mean = (probability[:, None, None] * _score_gradient(process, token, r)).sum(dim=0)
    torch.testing.assert_close(mean, _full_gradient(process, r), atol=1e-12, rtol=1e-9)
    undiscounted = (probability[:, None, None] * _score_gradient(process, token, r, to_go=True)).sum(dim=0)
    assert (undiscounted - mean).abs().max() > 1e-3


def test_sampled_token_rewards_estimate_the_full_gradient() -> None:
    """Every entry of the mean over 40,000 sampled responses lies within four of its standard errors of the exact gradient."""
    process, generator = _Process.draw(5), torch.Generator().manual_seed(6)
    token = torch.zeros(40_000, STEPS, dtype=torch.int64)
    for step in range(STEPS):
        rows = process.student[_states(token)[:, step]]  # the state of a step hangs on earlier tokens alone
        token[:, step] = torch.multinomial(rows.exp(), 1, generator=generator)[:, 0]
    sampled = _score_gradient(process, token, 2.0)
    exact = _full_gradient(process, 2.0)
    error = sampled.std(dim=0) / len(token) ** 0.5
    assert ((sampled.mean(dim=0) - exact).abs() <= 4 * error).all()
    assert (error < 0.1 * exact.abs().max()).all()  # tight enough to tell a wrong gradient
    assert ((sampled.mean(dim=0) + exact).abs() > 4 * error).any()
