"""The rollout worker: a Ray actor around one vLLM engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rl.settings import RolloutSettings
from rl.types import Lease, Rollout, WeightVersion
from rollout.progress import EngineStats, Progress
from rollout.weights import WeightBundle


class RolloutActor:
    """Holds an engine; made with ``ray.remote(RolloutActor)``. Calls are served one after the other."""

    def __init__(
        self, settings: RolloutSettings, *, dtype: str, max_prompt_length: int, seed: int, trust_remote_code: bool
    ) -> None:
        self.settings = settings
        self.options: dict[str, Any] = {
            "dtype": dtype,
            "max_prompt_length": max_prompt_length,
            "seed": seed,
            "trust_remote_code": trust_remote_code,
        }
        self.engine: Any = None

    def start(self, folder: str) -> int:
        """Load the model folder; returns the number of weights the engine knows by name."""
        from rollout.engine import Engine

        self.engine = Engine(Path(folder), self.settings, **self.options)
        return len(self.engine.expected_shapes)

    def set_weights(self, bundle: WeightBundle) -> WeightVersion:
        """See Engine.set_weights; Ray hands the bundle over from the object store without a copy."""
        return self.engine.set_weights(bundle)

    def call(self, name: str, *arguments: Any) -> None:
        """One of the engine's weight-transfer control calls (NCCL push)."""
        if name not in ("init_weight_transfer_engine", "start_weight_update"):
            raise ValueError(f"{name} is no weight-transfer call")
        self.engine.require_idle()
        getattr(self.engine.llm, name)(*arguments)

    def receive(self, update_info: dict[str, Any]) -> None:
        """See Engine.receive."""
        self.engine.receive(update_info)

    def commit(self, number: int) -> WeightVersion:
        """See Engine.commit."""
        return self.engine.commit(WeightVersion(number, ""))

    def submit(self, leases: list[Lease], top_p: float = 1.0) -> None:
        """See Engine.submit."""
        self.engine.submit(leases, top_p=top_p)

    def advance(self, seconds: float) -> Progress:
        """See Engine.advance. With a second call queued behind the first, the engine does not wait for its caller."""
        return self.engine.advance(seconds)

    def abort(self, tickets: list[str] | None = None) -> tuple[str, ...]:
        """See Engine.abort."""
        return self.engine.abort(tickets)

    def generate(self, leases: list[Lease], top_p: float = 1.0) -> list[Rollout]:
        """See Engine.generate."""
        return self.engine.generate(leases, top_p=top_p)

    def stats(self) -> EngineStats:
        """What the engine did since its last Progress; looking does not reset it."""
        return self.engine.meter.peek(self.engine.version.number)

    def ping(self) -> int:
        """The weight version served; proves that the actor is alive."""
        return self.engine.version.number
