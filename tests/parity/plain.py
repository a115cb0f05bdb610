"""The obvious form of what the learner does: one rollout at a time, transformers' own logits, log_softmax, torch's AdamW."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from rl.batch import pack_rollouts
from rl.behaviour import Behaviour, Vocabulary, behaviour_of
from rl.embedded import VOCABULARY, build_tiny
from rl.settings import WarmStartSettings
from rl.types import AdaptiveTemperature, EntropyStatistics, Reflex, Rollout, Shaping, TrainBatch
from tests.builders import make_lease, make_prompt, make_rollout

TINY = WarmStartSettings(hidden_size=64, layers=2, heads=2, seed=3)
FIRST_TOKEN = 4  # after <pad>, <eos>, <think>, </think>

HEATED = AdaptiveTemperature(EntropyStatistics(pivot=1.0, spread=1.0, high=0.4, low=-0.8, deviation=0.3, tokens=1000), tau=0.5)
"""Factors from 0.5 to 1.5 on a model of noise 0.3, whose log entropies are about 1.0 +- 0.3."""
REFLEXES = (Reflex("constant", amplitude=2.0, first=2, last=20), Reflex(amplitude=3.0, period=13.5), None)
"""The biases of rollouts 0, 1, 2, then round again."""
WORDS = (7, 30)
"""Ids that the biases lift."""

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


def shaped_batch(lengths: Lengths, *, seed: int = 0, adaptive: AdaptiveTemperature = HEATED) -> tuple[TrainBatch, Behaviour]:
    """Rollouts of base temperatures 0.7 and 1.3 under a rule and `REFLEXES`, and how they were drawn.

    Generated tokens 1 and 4 (0-based) are forced, every fourth token is one of `WORDS`. Rollouts go to two mini-batches in turn,
    so that a rollout's number is not its row.
    """
    rollouts = []
    for i, rollout in enumerate(random_rollouts(lengths, seed=seed, temperatures=(0.7, 1.3))):
        ids = [WORDS[t % 8 // 4] if t >= rollout.prefill_length and t % 4 == 0 else v for t, v in enumerate(rollout.response_ids)]
        shaping = Shaping(rollout.lease.shaping.temperature, adaptive, REFLEXES[i % len(REFLEXES)])
        forced = tuple(t for t in (rollout.prefill_length + 1, rollout.prefill_length + 4) if t < rollout.length)
        lease = replace(rollout.lease, shaping=shaping)
        rollouts.append(replace(rollout, lease=lease, response_ids=tuple(ids), forced=forced))
    vocabulary = Vocabulary(WORDS, end=VOCABULARY.index("</think>"))
    advantage_N = torch.randn(len(rollouts), generator=torch.Generator().manual_seed(seed))
    batch = pack_rollouts(rollouts, advantage_N, torch.arange(len(rollouts)) % 2, vocabulary=vocabulary)
    return batch, behaviour_of([rollout.lease.shaping for rollout in rollouts], vocabulary)


def loss_tokens(batch: TrainBatch) -> list[int]:
    """Tokens with loss of each mini-batch."""
    owner_T = batch.minibatch_N.repeat_interleave(batch.start_N.diff())
    return [int(batch.loss_mask_T[owner_T == m].sum()) for m in range(int(batch.minibatch_N.max()) + 1)]


def plain_logits(lm: PreTrainedModel, batch: TrainBatch, rollout: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Raw logits in front of every response token of one rollout, run alone, and these tokens."""
    token_T = batch.token_T[batch.start_N[rollout] : batch.start_N[rollout + 1]]
    first = int(batch.prompt_length_N[rollout])
    return lm(input_ids=token_T[None], use_cache=False).logits[0, first - 1 : -1], token_T[first:]


def plain_logp(
    lm: PreTrainedModel, batch: TrainBatch, rollout: int, *, temperature: float | torch.Tensor = 1.0, bias_ids: Sequence[int] = ()
) -> torch.Tensor:
    """Log-prob of every response token of one rollout: log_softmax((z + bias) / temperature)[token]."""
    logits_TV, token_T = plain_logits(lm, batch, rollout)
    bias_TV = torch.zeros_like(logits_TV)
    bias_TV[:, list(bias_ids)] = batch.bias_T[response_of(batch, rollout)][:, None]
    logp_TV = torch.log_softmax((logits_TV + bias_TV) / torch.as_tensor(temperature).reshape(-1, 1), dim=-1)
    return logp_TV[torch.arange(len(token_T)), token_T]


def plain_entropy(lm: PreTrainedModel, batch: TrainBatch, rollout: int) -> torch.Tensor:
    """Entropy of softmax(z), in nats, in front of every response token of one rollout."""
    logp_TV = torch.log_softmax(plain_logits(lm, batch, rollout)[0], dim=-1)
    return -(logp_TV.exp() * logp_TV).sum(dim=-1)


def plain_temperature(
    lm: PreTrainedModel, batch: TrainBatch, rollout: int, adaptive: AdaptiveTemperature | None
) -> float | torch.Tensor:
    """Temperature of every response token of one rollout: its base times HAPO's signed factor, without a gradient."""
    base = float(batch.temperature_N[rollout])
    if adaptive is None:
        return base
    stats = adaptive.statistics
    with torch.no_grad():
        height_T = (plain_entropy(lm, batch, rollout).log() - stats.pivot) / stats.spread
    signal_T = torch.where(height_T > 0, height_T / stats.high, height_T / -stats.low).clamp(-1, 1)
    return base * (1 + adaptive.tau * signal_T)


def response_of(batch: TrainBatch, rollout: int) -> slice:
    """Where the response of a rollout stands in the batch."""
    return slice(int(batch.start_N[rollout] + batch.prompt_length_N[rollout]), int(batch.start_N[rollout + 1]))


class PlainLearner:
    """PPO's clipped surrogate written out per rollout, with a KL to the start if ``kl_form``; clip and AdamW are torch's own.

    ``rows`` has (rollout, loss tokens, clipped, at the cap, rejected) of each rollout and pass, ``norm`` the last gradient norm.
    """

    def __init__(
        self, folder: Path, *, lr: float, grad_clip: float = 1.0, shaped: bool = False, cap: float | None = None,
        kl_coef: float = 0.0, kl_form: str = "k3", adaptive: AdaptiveTemperature | None = None, bias_ids: Sequence[int] = (),
        bounds: tuple[float, float] | None = None,
    ) -> None:
        self.lm, self.reference = load_plain(folder), load_plain(folder)
        self.kl_coef, self.kl_form = kl_coef, kl_form
        self.optimizer = torch.optim.AdamW(self.lm.parameters(), lr=lr, betas=(0.9, 0.999), weight_decay=0.01)
        self.grad_clip, self.shaped, self.cap = grad_clip, shaped, cap
        self.adaptive, self.bias_ids, self.bounds = adaptive, bias_ids, bounds
        self.temperature: dict[int, float | torch.Tensor] = {}
        self.rows: list[tuple[int, int, int, int, int]] = []
        self.norm = 0.0

    def logp(self, batch: TrainBatch, rollout: int) -> torch.Tensor:
        """Log-probs that the ratio is made of."""
        if not self.shaped:
            return plain_logp(self.lm, batch, rollout)
        return plain_logp(self.lm, batch, rollout, temperature=self.temperature[rollout], bias_ids=self.bias_ids)

    def step(self, batch: TrainBatch, members: Sequence[int], old: dict[int, torch.Tensor]) -> None:
        """One optimiser step on the token mean over all members."""
        losses, tokens = [], 0
        for i in members:
            response = response_of(batch, i)
            advantage_T, mask_T = batch.advantage_T[response], batch.loss_mask_T[response]
            ratio_T = (self.logp(batch, i) - old[i]).exp()
            bound_T = advantage_T * ratio_T.clamp(0.8, 1.28)
            loss_T, clipped_T = -torch.minimum(advantage_T * ratio_T, bound_T), bound_T < advantage_T * ratio_T
            loss_T = torch.where(advantage_T < 0, torch.minimum(loss_T, -3.0 * advantage_T), loss_T)
            capped = rejected = 0
            if self.cap is not None:
                gap_T = old[i] - batch.sampled_logp_T[response]
                loss_T = loss_T * torch.where(gap_T.isnan(), 1.0, gap_T.exp().clamp(max=self.cap))
                capped = int((gap_T.exp() > self.cap)[mask_T].sum())
                if self.bounds is not None and not self.bounds[0] <= float(gap_T.nanmean().exp()) <= self.bounds[1]:
                    rejected, loss_T = 1, loss_T * 0
            self.rows.append((i, int(mask_T.sum()), int(clipped_T[mask_T].sum()), capped, rejected))
            losses.append((loss_T + self.kl_coef * self._kl(batch, i))[mask_T].sum())
            tokens += int(mask_T.sum())
        self.optimizer.zero_grad()
        (torch.stack(losses).sum() / tokens).backward()
        self.norm = float(torch.nn.utils.clip_grad_norm_(self.lm.parameters(), self.grad_clip))
        self.optimizer.step()

    def _kl(self, batch: TrainBatch, rollout: int) -> torch.Tensor:
        with torch.no_grad():
            reference_T = plain_logp(self.reference, batch, rollout)
        gap_T = reference_T - plain_logp(self.lm, batch, rollout)
        return {"k1": -gap_T, "k2": gap_T**2 / 2, "k3": gap_T.exp() - 1 - gap_T}[self.kl_form]

    def update(self, batch: TrainBatch, *, epochs: int = 1) -> None:
        """All mini-batches, ``epochs`` times, against log-probs before the first step; temperatures stay what they were then."""
        with torch.no_grad():
            self.temperature = {i: plain_temperature(self.lm, batch, i, self.adaptive) for i in range(batch.rollouts)}
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
