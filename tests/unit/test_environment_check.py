"""What ``budget-rl doctor`` finds, on inputs of known meaning and on this machine's own sockets."""

from __future__ import annotations

import socket

import pytest
from packaging.requirements import Requirement

from launch.environment_check import (
    check_environment,
    compare_version,
    cpu_features,
    dashboard_exposure,
    foreign_kernels,
    listening_addresses,
)


def test_the_other_kernels_distribution_is_refused_with_the_command_that_removes_it() -> None:
    found = foreign_kernels(["torch", "kernels"])
    assert found.failed
    assert "pip uninstall -y kernels" in found.fix
    assert not foreign_kernels(["torch", "budget-rl"]).failed


@pytest.mark.parametrize(
    ("found", "tested", "status"),
    [
        ("0.31.0", "0.31.0", "ok"),
        ("0.31.0+cpu", "0.31.0", "ok"),
        ("0.31.4", "0.31.0", "warn"),
        ("0.32.0", "0.31.0", "fail"),
        (None, "0.31.0", "fail"),
    ],
)
def test_a_version_is_held_against_the_range_and_the_tested_pin(found: str | None, tested: str, status: str) -> None:
    assert compare_version(Requirement("engine>=0.31,<0.32"), found, tested).status == status


def test_the_cpu_line_follows_the_flags() -> None:
    assert "bfloat16 is fast" in cpu_features("flags\t\t: fpu avx512f avx512_bf16 sse\n").found
    assert "float32" in cpu_features("flags\t\t: fpu avx512f sse\n").found
    assert "float32" in cpu_features("").found


def test_a_dashboard_open_to_the_network_is_a_warning_only_beyond_loopback() -> None:
    assert dashboard_exposure(["0.0.0.0"]).status == "warn"
    assert dashboard_exposure(["::", "127.0.0.1"]).status == "warn"
    assert dashboard_exposure(["127.0.0.1", "::1"]).status == "ok"
    assert dashboard_exposure([]).found == "not running"


def test_a_listening_socket_is_found_with_its_address() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert listening_addresses(port) == ["127.0.0.1"]
    assert listening_addresses(port) == []


def test_this_environment_has_no_failed_check() -> None:
    failed = [finding for finding in check_environment() if finding.failed]
    assert failed == []
