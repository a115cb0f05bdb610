"""``budget-rl submit``: a configuration as a Ray job on this machine's cluster, checked before it is sent."""

from __future__ import annotations

import json
import os
import shlex
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from launch.config import find_config, load_settings
from rl.errors import BudgetRLError

HOST = "127.0.0.1"
"""The dashboard runs what it is sent, so it is reached, and should listen, on the loopback address only."""
PORT = 8265
CONNECT_DEADLINE_S = 3.0


def submit_job(config: Path, overrides: Sequence[str]) -> int:
    """Check the configuration, print the ``ray job submit`` command and run it; returns Ray's exit status.

    Raises ConfigError for a bad configuration and BudgetRLError when no Ray dashboard answers on the loopback address.
    """
    load_settings(config, overrides)
    command, variables = submit_command(find_config(config), overrides), submit_environment(os.environ)
    _check_dashboard()
    added = {name: value for name, value in variables.items() if os.environ.get(name) != value}
    print(" ".join([*(f"{name}={shlex.quote(value)}" for name, value in added.items()), shlex.join(command)]), flush=True)
    return subprocess.run(command, env=variables, check=False).returncode


def submit_command(config: Path, overrides: Sequence[str]) -> list[str]:
    """The command that submits ``config`` (absolute: the job starts in the directory where ``ray start`` ran)."""
    root = str(Path(__file__).resolve().parent.parent)
    # In a checkout the job finds the packages by this path; the working directory is not copied, so outputs stay put.
    runtime = json.dumps({"env_vars": {"PYTHONPATH": root}})
    ray = str(Path(sys.executable).with_name("ray"))
    entry = [sys.executable, "-m", "launch", "train", str(config), *overrides]
    return [ray, "job", "submit", "--address", f"http://{HOST}:{PORT}", "--runtime-env-json", runtime, "--", *entry]


def submit_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment of the submission: token authentication on unless chosen otherwise, no proxy for the loopback address."""
    variables = dict(environment)
    variables.setdefault("RAY_AUTH_MODE", "token")
    # A proxy set for the outside would be asked for 127.0.0.1 too.
    hosts = [host for host in variables.get("NO_PROXY", "").split(",") if host]
    variables["NO_PROXY"] = ",".join(hosts if HOST in hosts else [*hosts, HOST])
    # An address of another cluster in the environment would override the one given.
    variables.pop("RAY_ADDRESS", None)
    return variables


def _check_dashboard() -> None:
    try:
        socket.create_connection((HOST, PORT), timeout=CONNECT_DEADLINE_S).close()
    except OSError as error:
        raise BudgetRLError(
            f"no Ray dashboard answers at http://{HOST}:{PORT} within {CONNECT_DEADLINE_S:g} s ({error})",
            fix="start one: ray get-auth-token --generate; RAY_AUTH_MODE=token ray start --head --node-ip-address 127.0.0.1",
        ) from None
