"""A real engine with all shaping on against the learner's replay: every sampled token, every mixture, and the closed form."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rl.policy import load_policy
from rl.rollout_settings import AdaptiveSettings, ReflexSettings
from rl.settings import RolloutSettings
from rl.types import AdaptiveTemperature, Budget, BudgetKind, EntropyStatistics, Lease, Reflex, Shaping
from tests.builders import make_lease
from tests.parity.plain import load_plain, perturb_, random_rollouts, write_tiny
from tests.parity.serving import MAX_GAP, VOCABULARY, Served, largest_gap, start_engine

SETTINGS = RolloutSettings(
    max_length=64, max_concurrent=16, kv_cache_gb=0.1, budgets=[32], hard_budgets=True,
    adaptive=AdaptiveSettings(), reflex=ReflexSettings(period=20.0),
)  # fmt: skip
STATISTICS = EntropyStatistics(pivot=0.9, spread=1.0, high=0.6, low=-3.0, deviation=0.5, tokens=1000)
HEATED = AdaptiveTemperature(STATISTICS, tau=0.3)
WAVE = Reflex(amplitude=5.0, period=13.5, shift=0.1)
SHAPINGS = {
    "plain": Shaping(),
    "base": Shaping(0.7),
    "temperature": Shaping(1.0, HEATED),
    "literal": Shaping(0.8, replace(HEATED, form="literal")),
    "zscore": Shaping(1.0, replace(HEATED, form="zscore", tau=0.1)),
    "wave": Shaping(1.0, None, WAVE),
    "both": Shaping(0.6, HEATED, WAVE),
    "tip": Shaping(1.0, None, Reflex("constant", amplitude=-3.0, first=2, last=20)),
    "silver": Shaping(0.9, HEATED, Reflex("silver", rate=1.5)),
}
THINK = 2


@pytest.fixture(scope="module")
def sharp_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of about 2 nats of entropy: temperatures and biases change what it says."""
    return write_tiny(tmp_path_factory.mktemp("sharp"), noise=0.3)


@pytest.fixture(scope="module")
def engine(ray_cluster: None, sharp_folder: Path) -> Iterator[Served]:
    import ray

    served = start_engine(sharp_folder, SETTINGS)
    yield served
    ray.kill(served.actor)


def _leases(shapings: Sequence[Shaping], *, prompt: int = 12, hard: int = 0, tokens: int = 60) -> list[Lease]:
    drawn = random_rollouts([(prompt + i % 5, 3, 1) for i in range(len(shapings))], seed=5)
    budget = Budget(hard, BudgetKind.AT_MOST, "", hard=hard > 0)
    return [
        replace(
            make_lease(prompt=r.lease.prompt, member=i, prefill_ids=(THINK, *r.lease.prefill_ids[1:])),
            seed=100 + i, max_new_tokens=tokens, shaping=shaping, budget=budget,
        )
        for i, (r, shaping) in enumerate(zip(drawn, shapings, strict=True))
    ]


@pytest.mark.parametrize("name", SHAPINGS)
def test_every_shaping_is_replayed_to_the_engines_log_probs(engine: Served, sharp_folder: Path, name: str) -> None:
    engine.push_weights(_weights(sharp_folder))
    rollouts = engine.generate(_leases([SHAPINGS[name]] * 16))
    policy = load_policy(sharp_folder, dtype="float32")
    assert largest_gap(policy, rollouts) < MAX_GAP
    if name != "plain":  # a replay that forgets the shaping shows
        forgetful = [replace(r, lease=replace(r.lease, shaping=Shaping())) for r in rollouts]
        assert largest_gap(policy, forgetful) > 10 * MAX_GAP


def test_requests_of_every_shaping_in_one_batch_do_not_disturb_each_other(engine: Served, sharp_folder: Path) -> None:
    engine.push_weights(_weights(sharp_folder))
    leases = _leases(list(SHAPINGS.values()) * 4)
    mixed = engine.generate(leases)
    assert largest_gap(load_policy(sharp_folder, dtype="float32"), mixed) < MAX_GAP
    alone = {r.lease.ticket: r.response_ids for name in SHAPINGS.values()
             for r in engine.generate([lease for lease in leases if lease.shaping == name])}  # fmt: skip
    assert {r.lease.ticket: r.response_ids for r in mixed} == alone


def test_a_hard_budget_forces_the_end_of_thinking_which_the_bias_then_respects(engine: Served, sharp_folder: Path) -> None:
    engine.push_weights(_weights(sharp_folder))
    rollouts = engine.generate(_leases(list(SHAPINGS.values()) * 2, hard=20))
    # <think> and two more tokens of prefill; the budget counts those after <think>.
    cut = [r for r in rollouts if VOCABULARY.end not in r.response_ids[3:21] and r.length > 21]
    assert len(cut) >= len(rollouts) // 2
    for rollout in cut:
        assert rollout.forced[0] == 21 and rollout.response_ids[21] == VOCABULARY.end
        assert rollout.logp_T[21 - 3] == 0.0
    for rollout in rollouts:
        if rollout not in cut:  # ended by itself; only a thinking opened again could be cut
            assert all(THINK in rollout.response_ids[3:place] for place in rollout.forced)
    assert largest_gap(load_policy(sharp_folder, dtype="float32"), rollouts) < MAX_GAP


def test_prefix_cache_hits_change_nothing(engine: Served, sharp_folder: Path) -> None:
    """Prompts of more than two cache blocks of 128 tokens: the second generation finds them in the cache."""
    engine.push_weights(_weights(sharp_folder))
    leases = _leases(list(SHAPINGS.values()), prompt=300)
    first = engine.generate(leases)
    second, stats = engine.followed(leases)
    assert sum(part.cached_tokens for part in stats) >= len(leases) * 256
    assert [r.response_ids for r in first] == [r.response_ids for r in second]
    assert largest_gap(load_policy(sharp_folder, dtype="float32"), second) < MAX_GAP


def test_after_a_push_of_weights_the_replay_is_at_the_new_ones(engine: Served, sharp_folder: Path, tmp_path: Path) -> None:
    weights = _weights(sharp_folder, noise=0.1)
    engine.push_weights(weights)
    rollouts = engine.generate(_leases(list(SHAPINGS.values()) * 2))
    policy = load_policy(sharp_folder, dtype="float32")
    assert largest_gap(policy, rollouts) > 10 * MAX_GAP
    policy.lm.load_state_dict(weights)
    assert largest_gap(policy, rollouts) < MAX_GAP


def test_preempted_requests_keep_their_count_and_their_end(ray_cluster: None, sharp_folder: Path) -> None:
    """A cache of a few blocks: requests are thrown out half-way and begin again with what they had."""
    import ray

    served = start_engine(sharp_folder, SETTINGS.model_copy(update={"max_length": 190, "kv_cache_gb": 0.002}))
    leases = _leases(list(SHAPINGS.values()) * 2, prompt=60, tokens=180)
    rollouts, stats = served.followed(leases)
    ray.kill(served.actor)
    assert sum(part.preemptions or 0 for part in stats) > 0
    assert largest_gap(load_policy(sharp_folder, dtype="float32"), rollouts) < MAX_GAP


def _weights(folder: Path, *, noise: float = 0.0) -> dict[str, torch.Tensor]:
    lm = load_plain(folder)
    perturb_(lm, noise=noise, seed=21)
    return {name: p.detach() for name, p in lm.named_parameters(remove_duplicate=False)}


DRAWS = 20_000


@pytest.mark.parametrize("shaping", [Shaping(1.0, HEATED), Shaping(0.8, None, Reflex(amplitude=2.0, period=100.0, shift=0.25))])
def test_twenty_thousand_sampled_tokens_follow_the_closed_form(engine: Served, sharp_folder: Path, shaping: Shaping) -> None:
    """Pearson's statistic against ``softmax((z + bias) / T)``, cells of fewer than 5 expected tokens taken together."""
    engine.push_weights(_weights(sharp_folder))
    (lease,) = _leases([shaping], tokens=1)
    rollouts = engine.generate([replace(lease, seed=seed, ticket=f"0.{seed}.0") for seed in range(DRAWS)])
    counts = Counter(r.response_ids[-1] for r in rollouts)
    with torch.no_grad():
        ids = torch.tensor([[*lease.prompt.token_ids, *lease.prefill_ids]])
        logits = load_plain(sharp_folder)(ids).logits[0, -1].double()
    logp = torch.log_softmax(logits, -1)
    entropy = float(-(logp.exp() * logp).sum())
    factor = 1.0 if shaping.adaptive is None else 1 + 0.3 * _clamped(math.log(entropy))
    bias = torch.zeros_like(logits)
    bias[list(VOCABULARY.words)] = 0.0 if shaping.reflex is None else 2.0  # a quarter of the way: the top of the wave
    shaped = torch.softmax((logits + bias) / (shaping.temperature * factor), -1)
    assert _exceeds(counts, shaped) < 3.5
    assert _exceeds(counts, torch.softmax(logits / shaping.temperature, -1)) > 20.0  # without the shaping it would not


def _clamped(log_entropy: float) -> float:
    distance = log_entropy - STATISTICS.pivot
    scaled = distance / (STATISTICS.spread * (STATISTICS.high if distance > 0 else -STATISTICS.low))
    return min(max(scaled, -1.0), 1.0)


def _exceeds(counts: Counter[int], probability_V: torch.Tensor) -> float:
    """By how many standard deviations Pearson's statistic is above what the distribution would give."""
    expected = probability_V * DRAWS
    rare = expected < 5
    cells = [(counts[v], float(expected[v])) for v in torch.nonzero(~rare).flatten().tolist()]
    if bool(rare.any()):
        cells.append((sum(counts[v] for v in torch.nonzero(rare).flatten().tolist()), float(expected[rare].sum())))
    statistic = sum((seen - wanted) ** 2 / wanted for seen, wanted in cells)
    freedom = len(cells) - 1
    return (statistic - freedom) / math.sqrt(2 * freedom)
