"""The job file on a real head node: `ray start --head`, then the literal `ray job submit launch/hbpo.yaml`."""

from __future__ import annotations

import json
import shutil
import socket
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.e2e.runs import RUN_DEADLINE_S, SMALL, Launched, Workplace, step_records

ACTORS = {"RolloutActor", "RewardActor", "LearnerWorker"}


@dataclass(frozen=True)
class Cluster:
    """A head node on the loopback address; ``environment`` is what a shell needs to talk to it."""

    environment: Mapping[str, str]
    head: Launched


def free_ports(count: int) -> Sequence[str]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [str(one.getsockname()[1]) for one in sockets]
    for one in sockets:
        one.close()
    return ports


@pytest.fixture(scope="module")
def cluster(workplace: Workplace) -> Iterator[Cluster]:
    port, dashboard, agent, client = free_ports(4)
    environment = {"RAY_AUTH_MODE": "token", "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}", "NO_PROXY": "127.0.0.1"}
    token = workplace.start("ray", "get-auth-token", "--generate", extra=environment)
    assert token.wait(RUN_DEADLINE_S) == 0, token.text
    # A short path of its own: the path of a socket is limited to 107 characters.
    sessions = tempfile.mkdtemp(prefix="brl-")
    head = workplace.start(
        "ray", "start", "--head", "--node-ip-address", "127.0.0.1", "--port", port, "--dashboard-port", dashboard,
        "--dashboard-agent-listen-port", agent, "--ray-client-server-port", client, "--temp-dir", sessions, extra=environment,
    )  # fmt: skip
    try:
        assert head.wait(RUN_DEADLINE_S) == 0, head.text
        yield Cluster(environment, head)
    finally:
        # Not `ray stop`: it ends every Ray on the machine.
        head.end()
        shutil.rmtree(sessions, ignore_errors=True)


def submit(workplace: Workplace, cluster: Cluster, output: Path, model: Path, *options: str, steps: int) -> Launched:
    """`ray job submit [OPTIONS] launch/hbpo.yaml a.b=c ...` from the repository."""
    overrides = [*SMALL, f"model={model}", f"output.dir={output}", f"max_steps={steps}"]
    return workplace.start(
        "ray", "job", "submit", *options, *(["--"] if options else []), "launch/hbpo.yaml", *overrides, extra=cluster.environment
    )


def living_actors(workplace: Workplace, cluster: Cluster) -> set[str]:
    """Class names of the actors that Ray lists as alive."""
    listing = workplace.start("ray", "list", "actors", "--filter", "state=ALIVE", "--format", "json", extra=cluster.environment)
    assert listing.wait(RUN_DEADLINE_S) == 0, listing.text
    start = listing.text.find("[")
    return {actor["class_name"] for actor in json.loads(listing.text[start:])} if start >= 0 else set()


def test_the_job_file_runs_to_success_on_actors_that_ray_lists(workplace: Workplace, cluster: Cluster, warm_model: Path) -> None:
    output = workplace.folder / "submitted"
    job = submit(workplace, cluster, output, warm_model, steps=12)
    # `ray list` is a slow command, so it is asked only once there is something to list.
    job.running("a learner process", lambda: any(title.startswith("ray::LearnerWorker") for title in cluster.head.titles()))
    job.running("all actors", lambda: living_actors(workplace, cluster) >= ACTORS)
    assert job.wait() == 0, job.text
    assert "succeeded" in job.text
    assert f"output   {output}" in job.text
    assert [record["step"] for record in step_records(output)] == list(range(1, 13))
    assert not living_actors(workplace, cluster) & ACTORS


def test_the_job_file_runs_from_a_copied_working_directory(workplace: Workplace, cluster: Cluster, warm_model: Path) -> None:
    output = workplace.folder / "submitted-copy"
    job = submit(workplace, cluster, output, warm_model, "--working-dir", ".", steps=2)
    assert job.wait() == 0, job.text
    assert "succeeded" in job.text
    assert len(step_records(output)) == 2
    assert (output / "curves.png").is_file()


