"""vLLM's own OpenAI server with our processor, driven by the openai client: a trained model served as it was trained."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import openai
import pytest

from rl.policy import load_policy
from rl.types import AdaptiveTemperature, EntropyStatistics, Reflex, Rollout, Shaping
from rollout.parameters import to_extra_args
from tests.builders import make_lease, make_prompt, make_rollout
from tests.parity.plain import write_tiny
from tests.parity.serving import MAX_GAP, largest_gap

START_S = 240.0
PROMPT = [9, 15, 30, 41, 22]
STATISTICS = EntropyStatistics(pivot=0.9, spread=1.0, high=0.6, low=-3.0, deviation=0.5, tokens=0)
SHAPINGS = [
    Shaping(),
    Shaping(0.7, AdaptiveTemperature(STATISTICS, tau=0.3)),
    Shaping(1.0, None, Reflex(amplitude=5.0, period=13.5)),
    Shaping(0.8, AdaptiveTemperature(STATISTICS), Reflex("constant", amplitude=-3.0, last=20)),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("served"), noise=0.3)


@pytest.fixture(scope="module")
def client(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    """The server in a process group of its own, outside the checkout, as a user would start it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "log"
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), "--served-model-name", "tiny",
        "--host", "127.0.0.1", "--port", str(port), "--enforce-eager", "--dtype", "float32", "--max-model-len", "256",
        "--max-num-seqs", "8", "--kv-cache-memory-bytes", str(2**26), "--generation-config", "vllm",
        "--logprobs-mode", "processed_logprobs", "--logits-processors", "rollout.processor:ShapingProcessor",
    ]  # fmt: skip
    with log.open("wb") as output:
        server = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, cwd=log.parent, start_new_session=True,
            env={**os.environ, "VLLM_NO_USAGE_STATS": "1", "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
    try:
        _wait_until_healthy(server, f"http://127.0.0.1:{port}/health", log)
        with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=120) as connected:
            yield connected
    finally:
        os.killpg(server.pid, 15)
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, 9)
            server.wait()


def _wait_until_healthy(server: subprocess.Popen[bytes], url: str, log: Path) -> None:
    end = time.monotonic() + START_S
    while time.monotonic() < end:
        if server.poll() is not None:
            break
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except OSError:
            time.sleep(0.5)  # one look at a time; the deadline above decides
    pytest.fail(f"the server did not start: {log.read_text(errors='replace')[-3000:]}")


def _ask(client: openai.OpenAI, arguments: dict[str, Any] | None, **options: Any) -> Any:
    extra = {"return_token_ids": True, **({"vllm_xargs": arguments} if arguments else {})}
    return client.completions.create(
        model="tiny", prompt=PROMPT, max_tokens=40, logprobs=0, extra_body=extra, **{"temperature": 1.0, "seed": 5, **options}
    )


def _as_rollout(answer: Any, shaping: Shaping) -> Rollout:
    choice = answer.choices[0]
    lease = replace(make_lease(prompt=make_prompt(token_ids=PROMPT)), shaping=shaping)
    return make_rollout(lease, generated=choice.token_ids, logp_T=choice.logprobs.token_logprobs)


def test_every_shaping_over_http_is_the_distribution_that_training_replays(client: openai.OpenAI, folder: Path) -> None:
    rollouts = [
        _as_rollout(_ask(client, to_extra_args(shaping), temperature=shaping.temperature, seed=seed), shaping)
        for shaping in SHAPINGS
        for seed in range(3)
    ]
    assert sum(len(r.logp_T) for r in rollouts) > 100
    policy = load_policy(folder, dtype="float32")
    assert largest_gap(policy, rollouts) < MAX_GAP
    forgetful = [replace(r, lease=replace(r.lease, shaping=Shaping())) for r in rollouts[3:]]
    assert largest_gap(policy, forgetful) > 10 * MAX_GAP


def test_an_answer_that_goes_on_from_its_own_tokens_keeps_its_count(client: openai.OpenAI) -> None:
    """Greedy, so that both ways are one: a whole answer, and its second half asked for with the first in the prompt."""
    wave = {"reflex_amplitude": 30.0, "reflex_period": 24}
    whole = _ask(client, wave, temperature=0.0).choices[0].token_ids
    begun = client.completions.create(
        model="tiny", prompt=[*PROMPT, *whole[:7]], max_tokens=len(whole) - 7, temperature=0.0,
        extra_body={"return_token_ids": True, "vllm_xargs": {**wave, "reflex_generated": 7}},
    )  # fmt: skip
    forgotten = client.completions.create(
        model="tiny", prompt=[*PROMPT, *whole[:7]], max_tokens=len(whole) - 7, temperature=0.0,
        extra_body={"return_token_ids": True, "vllm_xargs": wave},
    )  # fmt: skip
    assert begun.choices[0].token_ids == whole[7:]  # pyright: ignore
    assert forgotten.choices[0].token_ids != whole[7:]  # pyright: ignore


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"reflex_amplitude": "high"}, "reflex_amplitude must be a finite number"),
        ({"reflex_amplitude": 1000}, "reflex_amplitude must lie in"),
        ({"reflex_period": 0}, "reflex_period must be above 0"),
        ({"reflex_perod": 9}, "did you mean reflex_period"),
        ({"adaptive_tau": 0.05}, "adaptive_pivot"),
        ({"reflex_first": [1, 2]}, "whole number of tokens"),
    ],
)
def test_a_wrong_parameter_is_http_status_400_and_the_server_lives_on(
    client: openai.OpenAI, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(openai.BadRequestError, match=message) as caught:
        _ask(client, arguments)
    assert caught.value.status_code == 400
    assert _ask(client, None).choices[0].token_ids


def test_requests_without_our_keys_are_answered_as_by_a_plain_server(client: openai.OpenAI, folder: Path) -> None:
    plain = _as_rollout(_ask(client, None), Shaping())
    assert largest_gap(load_policy(folder, dtype="float32"), [plain]) < MAX_GAP
    assert _as_rollout(_ask(client, {"reflex_amplitude": 0}), Shaping()).response_ids == plain.response_ids
