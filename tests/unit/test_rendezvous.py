"""The learner ranks' rendezvous is reached at its own address and no other."""

from __future__ import annotations

import socket
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest

from launch.environment_check import listening_addresses
from rl.process_group import _rendezvous_store


@pytest.mark.parametrize("named_by_us", [False, True], ids=["verl's variables", "ours"])
def test_the_store_listens_on_the_named_address_alone(monkeypatch: pytest.MonkeyPatch, named_by_us: bool) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # An address of the documentation range (RFC 5737), which no machine can listen on.
    monkeypatch.setenv("MASTER_ADDR", "203.0.113.1" if named_by_us else "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "1" if named_by_us else str(port))
    monkeypatch.setenv("LEARNER_RENDEZVOUS", f"127.0.0.1:{port}" if named_by_us else "")
    with ThreadPoolExecutor() as pool:
        first, second = pool.map(lambda rank: _rendezvous_store(rank, 2, timedelta(seconds=60)), (0, 1))
    assert listening_addresses(port) == ["127.0.0.1"]
    first.set("word", "heard")
    assert second.get("word") == b"heard"
