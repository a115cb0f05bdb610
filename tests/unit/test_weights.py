"""Weight bundles: what arrives is what was sent, damage is noticed, and a push that lacks a name is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from rl.types import WeightVersion
from rollout.weights import WeightBundle, WeightError, bundle_weights, require_complete


def _weights() -> dict[str, torch.Tensor]:
    """Three dtypes, a scalar, an odd size, a non-contiguous view and an empty tensor."""
    return {
        "b.weight": torch.arange(6, dtype=torch.float32).reshape(2, 3).t(),
        "a.bias": torch.tensor([1.5, -2.0, 3.0], dtype=torch.bfloat16),
        "scale": torch.tensor(7.0),
        "index": torch.tensor([1, 2], dtype=torch.int64),
        "nothing": torch.zeros(0, 4),
    }


def test_every_tensor_arrives_exactly_as_it_was_sent() -> None:
    sent = _weights()
    bundle = bundle_weights(sent.items(), 3)
    bundle.verify()
    arrived = dict(bundle.tensors())
    assert list(arrived) == sorted(sent)
    assert bundle.version.number == 3
    for name, tensor in sent.items():
        torch.testing.assert_close(arrived[name], tensor, rtol=0, atol=0)


def test_tensors_start_at_multiples_of_16_bytes() -> None:
    bundle = bundle_weights([("a", torch.ones(3, dtype=torch.bfloat16)), ("b", torch.ones(5)), ("c", torch.ones(1))], 0)
    assert [(e.start, e.end) for e in bundle.entries] == [(0, 6), (16, 36), (48, 52)]
    assert bundle.buffer.nbytes == 52


def test_a_read_only_buffer_as_it_comes_from_the_object_store_can_be_loaded() -> None:
    bundle = bundle_weights(_weights().items(), 0)
    bundle.buffer.flags.writeable = False
    bundle.verify()
    arrived = dict(bundle.tensors())
    for name, tensor in _weights().items():
        torch.testing.assert_close(arrived[name], tensor, rtol=0, atol=0)
    arrived["b.weight"].zero_()  # a loader may write to what it is given
    bundle.verify()


def test_the_checksum_depends_on_the_weights_and_not_on_their_order_or_the_version() -> None:
    items = list(_weights().items())
    assert bundle_weights(items, 1).version.checksum == bundle_weights(reversed(items), 2).version.checksum


@pytest.mark.parametrize(
    "other",
    [
        {"a": torch.tensor([[1.0, 2.0]])},  # shape
        {"b": torch.tensor([1.0, 2.0])},  # name
        {"a": torch.tensor([1.0, 2.0]).view(torch.int32)},  # dtype, with the same bytes
        {"a": torch.tensor([1.0, 2.0000002])},  # one bit
        {"a": torch.tensor([1.0, 2.0]), "b": torch.zeros(0)},  # one more
    ],
)
def test_any_difference_in_name_dtype_shape_or_bytes_changes_the_checksum(other: dict[str, torch.Tensor]) -> None:
    own = bundle_weights([("a", torch.tensor([1.0, 2.0]))], 0)
    assert own.version.checksum != bundle_weights(other.items(), 0).version.checksum


def _flip_a_bit(bundle: WeightBundle) -> WeightBundle:
    buffer = bundle.buffer.copy()
    buffer[17] ^= 1
    return replace(bundle, buffer=buffer)


def _cut(bundle: WeightBundle) -> WeightBundle:
    return replace(bundle, buffer=bundle.buffer[:-1])


def _rename(bundle: WeightBundle) -> WeightBundle:
    return replace(bundle, entries=(replace(bundle.entries[0], name="other"), *bundle.entries[1:]))


def _leave_out(bundle: WeightBundle) -> WeightBundle:
    return replace(bundle, entries=bundle.entries[1:])


def _forge(bundle: WeightBundle) -> WeightBundle:
    return replace(bundle, version=WeightVersion(bundle.version.number, "0" * 64))


@pytest.mark.parametrize("tamper", [_flip_a_bit, _cut, _rename, _leave_out, _forge])
def test_a_damaged_bundle_is_refused(tamper: Callable[[WeightBundle], WeightBundle]) -> None:
    bundle = bundle_weights(_weights().items(), 5)
    with pytest.raises(WeightError, match="weights v5 arrived damaged"):
        tamper(bundle).verify()
    bundle.verify()


def test_tied_names_share_their_bytes() -> None:
    table = torch.arange(8.0).reshape(4, 2)
    bundle = bundle_weights([("lm_head.weight", table), ("model.embed_tokens.weight", table)], 0)
    head, embedding = bundle.entries
    assert (head.start, head.end) == (embedding.start, embedding.end) == (0, 32)
    assert bundle.buffer.nbytes == 32
    for _, tensor in bundle.tensors():
        torch.testing.assert_close(tensor, table, rtol=0, atol=0)


def test_views_that_only_start_at_the_same_address_are_not_taken_for_tied_names() -> None:
    table = torch.arange(6.0).reshape(2, 3)
    sent = {"first_row": table[0], "table": table, "turned": table.t(), "bits": table.view(torch.int32), "long": table.view(-1)}
    arrived = dict(bundle_weights(sent.items(), 0).tensors())
    for name, tensor in sent.items():
        torch.testing.assert_close(arrived[name], tensor, rtol=0, atol=0)


def test_equal_values_in_different_places_are_sent_twice() -> None:
    bundle = bundle_weights([("a", torch.ones(4)), ("b", torch.ones(4))], 0)
    assert bundle.buffer.nbytes == 32


def test_a_bundle_does_not_follow_later_changes_of_the_weights() -> None:
    live = torch.ones(2)
    bundle = bundle_weights([("w", live)], 0)
    live.zero_()
    bundle.verify()
    assert dict(bundle.tensors())["w"].tolist() == [1.0, 1.0]


def test_nothing_to_send_is_a_sound_empty_bundle() -> None:
    bundle = bundle_weights([], 0)
    bundle.verify()
    assert list(bundle.tensors()) == [] and bundle.buffer.dtype == np.uint8


def test_a_push_without_the_tied_head_is_refused_by_name() -> None:
    expected = frozenset({"lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"})
    with pytest.raises(WeightError, match=r"lacks 1 of 3 weights, first 'lm_head.weight'.*tied heads under both names"):
        require_complete(["model.embed_tokens.weight", "model.norm.weight"], expected)


def test_a_push_with_all_names_and_more_is_complete() -> None:
    require_complete(["b", "a", "extra"], frozenset({"a", "b"}))
