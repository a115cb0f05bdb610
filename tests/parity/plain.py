"""The obvious form of what the learner does: one rollout at a time, transformers' own logits, log_softmax, torch's AdamW."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from rl.batch import pack_rollouts
from rl.embedded import VOCABULARY, build_tiny
from rl.settings import WarmStartSettings
from rl.types import Rollout, TrainBatch
from tests.builders import make_lease, make_prompt, make_rollout

TINY = WarmStartSettings(hidden_size=64, layers=2, heads=2, seed=3)
FIRST_TOKEN = 4  # after <pad>, <eos>, <think>, </think>

Lengths = Sequence[tuple[int, int, int]]
"""Prompt, prefill and generated tokens of each rollout."""


def write_tiny(folder: Path, *, noise: float = 0.08, seed: int = 11) -> Path:
    """A tiny model whose distributions are far from uniform, so that every mistake in attention or head shows."""
    build_tiny(folder, TINY)
    lm = load_plain(folder)
    perturb_(lm, noise=noise, seed=seed)
    lm.save_pretrained(folder)
    return folder


def perturb_(lm: PreTrainedModel, *, noise: float, seed: int) -> None:
    """Add normal noise to every weight."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in lm.parameters():
            parameter.add_(noise * torch.randn(parameter.shape, generator=generator))


def load_plain(folder: Path) -> PreTrainedModel:
    """The model as transformers loads it, float32."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def random_rollouts(lengths: Lengths, *, seed: int = 0, temperatures: Sequence[float] = (1.0,)) -> list[Rollout]:
    """Rollouts of random tokens; the temperatures go round."""
    rng = random.Random(seed)

    def tokens(count: int) -> list[int]:
        return [rng.randrange(FIRST_TOKEN, len(VOCABULARY)) for _ in range(count)]

    rollouts = []
    for i, (prompt, prefill, generated) in enumerate(lengths):
        lease = make_lease(
            prompt=make_prompt(i, token_ids=tokens(prompt)), member=i, prefill_ids=tokens(prefill),
            temperature=temperatures[i % len(temperatures)],
        )
        sampled = [rng.uniform(-6.0, -0.1) for _ in range(generated)]
        rollouts.append(make_rollout(lease, generated=tokens(generated), logp_T=sampled))
    return rollouts


def random_batch(lengths: Lengths, *, seed: int = 0, temperatures: Sequence[float] = (1.0,), minibatches: int = 1) -> TrainBatch:
    """The rollouts of :func:`random_rollouts` with advantages of both signs, dealt to mini-batches in blocks."""
    rollouts = random_rollouts(lengths, seed=seed, temperatures=temperatures)
    advantage_N = torch.randn(len(rollouts), generator=torch.Generator().manual_seed(seed))
    minibatch_N = torch.arange(len(rollouts)) * minibatches // len(rollouts)
    return pack_rollouts(rollouts, advantage_N, minibatch_N)


def loss_tokens(batch: TrainBatch) -> list[int]:
    """Tokens with loss of each mini-batch."""
    owner_T = batch.minibatch_N.repeat_interleave(batch.start_N.diff())
    return [int(batch.loss_mask_T[owner_T == m].sum()) for m in range(int(batch.minibatch_N.max()) + 1)]


def plain_logp(lm: PreTrainedModel, batch: TrainBatch, rollout: int, *, temperature: float = 1.0) -> torch.Tensor:
    """Log-prob of every response token of one rollout, run alone: log_softmax(z / temperature)[token]."""
    token_T = batch.token_T[batch.start_N[rollout] : batch.start_N[rollout + 1]]
    first = int(batch.prompt_length_N[rollout])
    logp_TV = torch.log_softmax(lm(input_ids=token_T[None], use_cache=False).logits[0] / temperature, dim=-1)
    return logp_TV[torch.arange(first - 1, len(token_T) - 1), token_T[first:]]


class PlainLearner:
    """PPO's clipped surrogate written out per rollout, with a KL to the start if ``kl_form``; clip and AdamW are torch's own."""

    def __init__(
        self, folder: Path, *, lr: float, grad_clip: float = 1.0, shaped: bool = False, cap: float | None = None,
        kl_coef: float = 0.0, kl_form: str = "k3",
    ) -> None:
        self.lm, self.reference = load_plain(folder), load_plain(folder)
        self.kl_coef, self.kl_form = kl_coef, kl_form
        self.optimizer = torch.optim.AdamW(self.lm.parameters(), lr=lr, betas=(0.9, 0.999), weight_decay=0.01)
        self.grad_clip, self.shaped, self.cap = grad_clip, shaped, cap

    def logp(self, batch: TrainBatch, rollout: int) -> torch.Tensor:
        """Log-probs that the ratio is made of."""
        temperature = float(batch.temperature_N[rollout]) if self.shaped else 1.0
        return plain_logp(self.lm, batch, rollout, temperature=temperature)

    def step(self, batch: TrainBatch, members: Sequence[int], old: dict[int, torch.Tensor]) -> None:
        """One optimiser step on the token mean over all members."""
        losses, tokens = [], 0
        for i in members:
            response = slice(int(batch.start_N[i] + batch.prompt_length_N[i]), int(batch.start_N[i + 1]))
            advantage_T, mask_T = batch.advantage_T[response], batch.loss_mask_T[response]
            ratio_T = (self.logp(batch, i) - old[i]).exp()
            loss_T = -torch.minimum(advantage_T * ratio_T, advantage_T * ratio_T.clamp(0.8, 1.28))
            loss_T = torch.where(advantage_T < 0, torch.minimum(loss_T, -3.0 * advantage_T), loss_T)
            if self.cap is not None:
                gap_T = old[i] - batch.sampled_logp_T[response]
                loss_T = loss_T * torch.where(gap_T.isnan(), 1.0, gap_T.exp().clamp(max=self.cap))
            losses.append((loss_T + self.kl_coef * self._kl(batch, i))[mask_T].sum())
            tokens += int(mask_T.sum())
        self.optimizer.zero_grad()
        (torch.stack(losses).sum() / tokens).backward()
        torch.nn.utils.clip_grad_norm_(self.lm.parameters(), self.grad_clip)
        self.optimizer.step()

    def _kl(self, batch: TrainBatch, rollout: int) -> torch.Tensor:
        with torch.no_grad():
            reference_T = plain_logp(self.reference, batch, rollout)
        gap_T = reference_T - plain_logp(self.lm, batch, rollout)
        return {"k1": -gap_T, "k2": gap_T**2 / 2, "k3": gap_T.exp() - 1 - gap_T}[self.kl_form]

    def update(self, batch: TrainBatch, *, epochs: int = 1) -> None:
        """All mini-batches, ``epochs`` times, against the log-probs before the first step."""
        with torch.no_grad():
            old = {i: self.logp(batch, i) for i in range(batch.rollouts)}
        for _ in range(epochs):
            for m in range(int(batch.minibatch_N.max()) + 1):
                self.step(batch, [i for i, owner in enumerate(batch.minibatch_N.tolist()) if owner == m], old)

    def weights(self) -> dict[str, torch.Tensor]:
        """Copies of all weights by name."""
        return {name: p.detach().clone() for name, p in self.lm.named_parameters()}


def largest_gap(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Largest absolute difference over the weights that both name."""
    shared = a.keys() & b.keys()
    assert shared
    return max(float((a[name] - b[name]).abs().max()) for name in shared)
