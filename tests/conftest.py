"""What all tests share: an environment that reports to nobody, small engine caches, one Ray, the one reason to skip (`gpu`)."""

from __future__ import annotations

import os
from collections.abc import Iterator

# Before any library is imported: they read these once. A value set outside wins, so a single run can differ.
for _name, _value in {
    "DO_NOT_TRACK": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB per engine; the default would take a large share of the memory for every engine
    "MPLBACKEND": "Agg",
}.items():
    os.environ.setdefault(_name, _value)

import pytest  # noqa: E402
from hypothesis import settings  # noqa: E402

# No per-example deadline: on a shared machine it would fail by chance. A failing example is printed so that it can be replayed.
settings.register_profile("budget-rl", deadline=None, print_blob=True)
settings.load_profile("budget-rl")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked `gpu` where torch sees no CUDA device; torch is imported only if such a test was collected."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """A Ray cluster of this machine alone, as a run starts it; one for all tests, since a process can hold only one."""
    from rl.cluster import connect, disconnect

    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        connect()
    yield
    disconnect()
