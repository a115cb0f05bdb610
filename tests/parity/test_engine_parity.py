"""A real vLLM engine in its own process against the learner: log-probs, pushes of weights, prefix cache, seeds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rl.batch import pack_rollouts
from rl.errors import BudgetRLError
from rl.learner import Learner
from rl.settings import RolloutSettings
from rl.types import Lease, Rollout
from rollout.weights import WeightBundle, bundle_weights
from tests.builders import make_lease
from tests.parity.plain import load_plain, loss_tokens, perturb_, random_rollouts
from tests.parity.serving import MAX_GAP, Served, start_engine

SETTINGS = RolloutSettings(max_length=48, max_concurrent=16, kv_cache_gb=0.1)
MakeLearner = Callable[..., Learner]


def _start(folder: Path, settings: RolloutSettings = SETTINGS) -> Served:
    return start_engine(folder, settings)


@pytest.fixture(scope="module")
def engine(ray_cluster: None, tiny_folder: Path) -> Iterator[Served]:
    import ray

    served = _start(tiny_folder)
    yield served
    ray.kill(served.actor)


def _weights(folder: Path, *, noise: float = 0.0, seed: int = 0) -> dict[str, torch.Tensor]:
    """All weights of a folder, optionally with noise, the tied head under its own name too."""
    lm = load_plain(folder)
    perturb_(lm, noise=noise, seed=seed)
    return {name: p.detach() for name, p in lm.named_parameters(remove_duplicate=False)}


def _save(weights: dict[str, torch.Tensor], start: Path, folder: Path) -> Path:
    from rl.sft import copy_tokenizer

    lm = load_plain(start)
    lm.load_state_dict(weights)
    lm.save_pretrained(folder)
    copy_tokenizer(start, folder)
    return folder


def _leases(count: int, *, prompt: int = 12, temperature: float = 1.0, min_version: int = 0) -> list[Lease]:
    """Leases with prompts of random tokens, each with its own seed and a prefill of three tokens."""
    drawn = random_rollouts([(prompt + i % 5, 3, 1) for i in range(count)], seed=5)
    return [
        replace(
            make_lease(prompt=r.lease.prompt, member=i, prefill_ids=r.lease.prefill_ids, temperature=temperature),
            seed=1000 + i,
            max_new_tokens=SETTINGS.max_length - 3,
            min_version=min_version,
        )
        for i, r in enumerate(drawn)
    ]


def _ids(rollouts: Sequence[Rollout]) -> list[tuple[int, ...]]:
    return [r.response_ids for r in rollouts]


def _learn(learner: Learner, rollouts: Sequence[Rollout]) -> dict[str, float]:
    """One update on the rollouts; its metrics hold the gap to the engine at the weights before the update."""
    advantage_N = torch.linspace(-1.0, 1.0, len(rollouts))
    batch = pack_rollouts(rollouts, advantage_N, torch.zeros(len(rollouts), dtype=torch.int64))
    totals = learner.update(batch, global_tokens=loss_tokens(batch), total_updates=None)
    assert totals["sum/mismatch_tokens"] == sum(len(r.logp_T) for r in rollouts) > 100
    return totals


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_engine_and_learner_agree_before_and_after_pushes(
    engine: Served, make_learner: MakeLearner, tiny_folder: Path, temperature: float
) -> None:
    learner, leases = make_learner(lr=1e-2), _leases(8, temperature=temperature)
    engine.push_weights(_weights(tiny_folder))
    for _ in range(3):
        rollouts = engine.generate(leases)
        assert _learn(learner, rollouts)["max/mismatch"] < MAX_GAP
        assert _learn(learner, rollouts)["max/mismatch"] > 10 * MAX_GAP  # without a push the gap shows
        engine.push_weights(dict(learner.named_weights()))


def test_weights_pushed_from_elsewhere_are_served_with_their_tied_head(
    engine: Served, make_learner: MakeLearner, tiny_folder: Path, tmp_path: Path
) -> None:
    engine.push_weights(_weights(tiny_folder))
    weights = _weights(tiny_folder, noise=0.1, seed=1)
    before = engine.generate(_leases(8))
    version = engine.push_weights(weights)
    after = engine.generate(_leases(8, min_version=version.number))
    assert _ids(before) != _ids(after)
    assert {r.weight_version for r in after} == {version.number} == {engine.version()}
    assert version.checksum == bundle_weights(weights.items(), 0).version.checksum
    learner = make_learner(folder=_save(weights, tiny_folder, tmp_path / "other"))
    assert _learn(learner, after)["max/mismatch"] < MAX_GAP


def _without_head(bundle: WeightBundle) -> WeightBundle:
    kept = [(name, tensor) for name, tensor in bundle.tensors() if name != "lm_head.weight"]
    return bundle_weights(kept, bundle.version.number)


def _damaged(bundle: WeightBundle) -> WeightBundle:
    buffer = bundle.buffer.copy()
    buffer[len(buffer) // 2] ^= 64
    return replace(bundle, buffer=buffer)


def _of_an_older_version(bundle: WeightBundle) -> WeightBundle:
    return bundle_weights(bundle.tensors(), 0)


def _of_the_same_version(bundle: WeightBundle) -> WeightBundle:
    return bundle_weights(bundle.tensors(), bundle.version.number - 1)


def _of_another_shape(bundle: WeightBundle) -> WeightBundle:
    return bundle_weights([(n, t[:-1] if "up_proj" in n else t) for n, t in bundle.tensors()], bundle.version.number)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_without_head, r"lacks 1 of .* first 'lm_head.weight'"),
        (_damaged, "arrived damaged"),
        (_of_an_older_version, "versions only grow"),
        (_of_the_same_version, "versions only grow"),
        (_of_another_shape, "up_proj"),
    ],
)
def test_a_push_that_is_not_sound_is_refused_and_the_old_weights_stay(
    engine: Served, tiny_folder: Path, spoil: Callable[[WeightBundle], WeightBundle], message: str
) -> None:
    version = engine.push_weights(_weights(tiny_folder))
    leases = _leases(4, min_version=version.number)
    before = engine.generate(leases)
    bundle = bundle_weights(_weights(tiny_folder, noise=0.1, seed=2).items(), engine.following)
    with pytest.raises(BudgetRLError, match=message):
        engine.push(spoil(bundle))
    assert engine.version() == version.number
    after = engine.generate(leases)
    assert [(r.response_ids, r.logp_T, r.weight_version) for r in after] == [
        (r.response_ids, r.logp_T, r.weight_version) for r in before
    ]
    engine.push(bundle)  # the sound one is still welcome
    engine.following += 1
    assert _ids(engine.generate(leases)) != _ids(before)


def test_an_engine_that_could_not_finish_a_load_is_not_used_any_more(ray_cluster: None, tiny_folder: Path) -> None:
    import ray

    served = _start(tiny_folder)
    weights = _weights(tiny_folder)
    with pytest.raises(BudgetRLError, match="KeyError|no_such_layer"):
        served.push_weights({**weights, "model.layers.1.no_such_layer.weight": torch.ones(3)})
    with pytest.raises(BudgetRLError, match="did not finish loading weights v1.*start a new one"):
        served.generate(_leases(1))
    with pytest.raises(BudgetRLError, match="start a new one"):
        served.push_weights(weights)
    ray.kill(served.actor)


def test_a_lease_that_asks_for_newer_weights_is_refused(engine: Served) -> None:
    leases = _leases(2)
    leases[1] = replace(leases[1], ticket="wants-more", min_version=10**6)
    with pytest.raises(BudgetRLError, match="wants-more asks for newer weights"):
        engine.generate(leases)


def test_cached_prefixes_of_old_weights_are_forgotten(engine: Served, tiny_folder: Path, tmp_path: Path) -> None:
    """Prompts of more than two cache blocks of 128 tokens, sampled before and after a push and by a fresh engine."""
    import ray

    leases = _leases(4, prompt=300)
    engine.push_weights(_weights(tiny_folder))
    engine.generate(leases)
    weights = _weights(tiny_folder, noise=0.1, seed=4)
    engine.push_weights(weights)
    warm = engine.generate(leases)
    cold = _start(_save(weights, tiny_folder, tmp_path / "new"))
    expected = cold.generate(leases)
    ray.kill(cold.actor)
    assert _ids(warm) == _ids(expected)
    for one, other in zip(warm, expected, strict=True):
        assert one.logp_T == pytest.approx(other.logp_T, abs=MAX_GAP)


def test_the_same_seed_gives_the_same_tokens_whatever_else_is_decoded(engine: Served, tiny_folder: Path) -> None:
    engine.push_weights(_weights(tiny_folder))
    leases = _leases(16)
    together = _ids(engine.generate(leases))
    assert _ids(engine.generate(leases)) == together
    assert _ids(engine.generate(leases[:4])) == together[:4]
    assert _ids(engine.generate(leases[::-1])) == together[::-1]
    others = _ids(engine.generate([replace(lease, seed=lease.seed + 5000) for lease in leases]))
    assert all(a != b for a, b in zip(others, together, strict=True))


def test_a_rollout_opens_with_its_prefill_and_keeps_to_its_cap(engine: Served) -> None:
    for rollout in engine.generate(_leases(4)):
        assert rollout.response_ids[:3] == rollout.lease.prefill_ids
        assert len(rollout.logp_T) == rollout.length - 3 <= rollout.lease.max_new_tokens
        assert max(rollout.logp_T) <= 0
