"""One vLLM engine inside this process: leases in at any time, rollouts out group by group, weights swapped while it is idle.

It is pulled: nothing happens between two calls, so vLLM keeps the one thread it was made in.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rl.models import end_of_sequence_ids
from rl.settings import RolloutSettings
from rl.types import FinishReason, Lease, Rollout, WeightVersion
from rollout.meter import Meter
from rollout.progress import OpenGroups, Progress
from rollout.sampling import engine_options, forced_positions, sampling_params, thinking_markers
from rollout.weights import INBOX, WeightBundle, WeightError, register_transfer, require_same_model

ENGINE_ENVIRONMENT = {
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "TOKENIZERS_PARALLELISM": "false",
}


def checkpoint_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the weights an engine loads from a Hugging Face folder; a tied head counts as well."""
    from safetensors import safe_open

    shapes: dict[str, tuple[int, ...]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as handle:
            shapes |= {name: tuple(handle.get_slice(name).get_shape()) for name in handle.keys()}  # noqa: SIM118
    if not shapes:
        raise WeightError(f"{folder} holds no safetensors file; convert the model with transformers' save_pretrained")
    config = json.loads((folder / "config.json").read_text())
    if config.get("tie_word_embeddings") and "model.embed_tokens.weight" in shapes:
        shapes["lm_head.weight"] = shapes["model.embed_tokens.weight"]
    return shapes


def _known(logp: float) -> float:
    """NaN stands for a token that was not sampled, so an engine whose numbers broke must not say it of one that was."""
    return -math.inf if math.isnan(logp) else logp


class Engine:
    """A vLLM engine that serves one model folder with the run's sampling settings."""

    def __init__(
        self,
        folder: Path,
        settings: RolloutSettings,
        *,
        dtype: str,
        max_prompt_length: int,
        seed: int,
        trust_remote_code: bool = False,
    ) -> None:
        for name, value in ENGINE_ENVIRONMENT.items():
            os.environ[name] = value
        if settings.tensor_parallel == 1:
            # In process: weights are handed over without any serialisation, and one actor is one process.
            os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)  # it would silently take the place of rollout.kv_cache_gb
        import torch
        from transformers import AutoTokenizer

        register_transfer()
        from vllm import LLM
        from vllm.config import WeightTransferConfig

        on_gpu = torch.cuda.is_available()
        eager = settings.enforce_eager if settings.enforce_eager is not None else not on_gpu
        memory: dict[str, Any] = (
            {"gpu_memory_utilization": settings.gpu_memory_fraction}
            if on_gpu
            else {"kv_cache_memory_bytes": int(settings.kv_cache_gb * 2**30)}
        )
        self.expected_shapes = checkpoint_shapes(folder)
        self.broken = ""
        self.stop_ids = end_of_sequence_ids(folder)
        self.tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
        self.markers = thinking_markers(self.tokenizer) if settings.hard_budgets else None
        self.version = WeightVersion(0, "")
        self.llm = LLM(
            model=str(folder),
            dtype=dtype,  # pyright: ignore[reportArgumentType]
            seed=seed,
            enforce_eager=eager,
            max_model_len=max_prompt_length + settings.max_length,
            max_num_seqs=settings.max_concurrent,
            max_num_batched_tokens=max(2048, max_prompt_length + settings.max_length),
            tensor_parallel_size=settings.tensor_parallel,
            trust_remote_code=trust_remote_code,
            enable_prefix_caching=True,
            # vLLM takes back the random number of a prompt cut in two, which torch's CPU generators cannot do: it raises. Uncut,
            # a prompt that does not fit in a step waits for the next one. None: vLLM's default.
            enable_chunked_prefill=None if on_gpu else False,
            # Otherwise the model's own top-p or repetition penalty would apply to requests that do not set them.
            generation_config="vllm",
            logprobs_mode="processed_logprobs",
            weight_transfer_config=WeightTransferConfig(backend=settings.transport),
            disable_log_stats=True,
            **memory,
            **engine_options(settings),
        )
        in_process = settings.tensor_parallel == 1
        self.meter = Meter(self.llm.llm_engine.engine_core.engine_core.scheduler if in_process else None)  # pyright: ignore[reportAttributeAccessIssue]
        self.groups = OpenGroups()
        if settings.transport == "object_store":
            self.llm.init_weight_transfer_engine({"init_info": {}})

    def set_weights(self, bundle: WeightBundle) -> WeightVersion:
        """Serve the bundle from the next request on.

        Raises WeightError (and keeps the old weights) when it is not sound, or while leases are open.
        """
        self._require_whole()
        self.require_idle()
        bundle.verify()
        new, old = bundle.version, self.version
        if new.number < old.number or (new.number == old.number and old.checksum not in ("", new.checksum)):
            raise WeightError(f"push of v{new.number} ({new.checksum[:12]}) after v{old.number}: versions only grow")
        require_same_model({entry.name: entry.shape for entry in bundle.entries}, self.expected_shapes)
        self.broken = f"it did not finish loading weights v{new.number}"  # until commit
        INBOX[new.number] = bundle
        try:
            self.llm.start_weight_update()
            self.llm.update_weights({"update_info": {"number": new.number}})
        finally:
            INBOX.pop(new.number, None)
        return self.commit(new)

    def receive(self, update_info: dict[str, Any]) -> None:
        """Take the weights of an open NCCL push.

        Raises WeightError before any transfer when it is not of this engine's model, or while leases are open.
        """
        self.require_idle()
        shapes = {name: tuple(shape) for name, shape in zip(update_info["names"], update_info["shapes"], strict=True)}
        require_same_model(shapes, self.expected_shapes)
        self.broken = "it did not finish an NCCL push"  # until commit
        self.llm.update_weights({"update_info": update_info})

    def commit(self, version: WeightVersion) -> WeightVersion:
        """Serve the received weights under ``version`` from the next request on."""
        self.llm.finish_weight_update(str(version.number))
        # Cached prefixes hold keys and values of the old weights.
        if not self.llm.reset_prefix_cache():
            raise WeightError("vLLM did not reset its prefix cache; requests still running would mix weight versions")
        served = self.llm.get_weight_version()
        if served != str(version.number):
            raise WeightError(f"the engine says it serves v{served} after a push of v{version.number}")
        self.version, self.broken = version, ""
        return self.version

    def _require_whole(self) -> None:
        if self.broken:
            raise WeightError(
                f"this engine can no longer be used, {self.broken}: its layers are of two versions; start a new one"
            )

    def require_idle(self) -> None:
        """Raise WeightError while leases are open: part of a response would come from the old weights, part from the new."""
        if len(self.groups):
            raise WeightError(
                f"new weights while {len(self.groups)} leases are open in this engine, first {self.groups.tickets()[0]}: their "
                f"responses would mix weight versions; abort them or wait for them"
            )

    def submit(self, leases: Sequence[Lease], *, top_p: float = 1.0) -> None:
        """Queue one request per lease, in the order given; ``top_p`` below 1 is for evaluation only.

        All or none: raises WeightError for a lease that asks for newer weights, ValueError for a ticket that is open already or
        a prompt that does not fit.
        """
        self._require_whole()
        stale = [lease.ticket for lease in leases if lease.min_version > self.version.number]
        if stale:
            raise WeightError(f"lease {stale[0]} asks for newer weights than the v{self.version.number} this engine has")
        taken: list[str] = []
        try:
            for lease in leases:
                self.groups.add(lease)
                taken.append(lease.ticket)
                self._request(lease, top_p)
        except Exception:
            self._stop(taken)
            raise

    def _request(self, lease: Lease, top_p: float) -> None:
        from vllm import TokensPrompt
        from vllm.sampling_params import RequestOutputKind

        params = sampling_params(lease, stop_ids=self.stop_ids, top_p=top_p)
        params.output_kind = RequestOutputKind.FINAL_ONLY
        core = self.llm.llm_engine
        prompt = TokensPrompt(prompt_token_ids=[*lease.prompt.token_ids, *lease.prefill_ids])
        (rendered,) = core.renderer.render_cmpl([prompt])
        self.meter.began(lease.ticket, core.add_request(lease.ticket, rendered, params))

    def advance(self, seconds: float) -> Progress:
        """Run engine steps, at least one, until a group is whole, ``seconds`` are over or nothing is open."""
        began = time.monotonic()
        while self.groups.leases and not self.groups.has_whole:
            self._step()
            if time.monotonic() - began >= seconds:
                break
        return Progress(self.groups.take(), self.meter.report(self.version.number), len(self.groups))

    def _step(self) -> None:
        began = time.monotonic()
        outputs: list[Any] = self.llm.llm_engine.step()
        self.meter.stepped(time.monotonic() - began, outputs)
        for output in outputs:
            self.groups.finish(self._rollout(self.groups.leases[output.request_id], output.outputs[0]))

    def abort(self, tickets: Sequence[str] | None = None) -> tuple[str, ...]:
        """Stop and forget these tickets, None: all; returns those that were open and will not be answered."""
        return self._stop(self.groups.tickets() if tickets is None else tickets)

    def _stop(self, tickets: Sequence[str]) -> tuple[str, ...]:
        running = [ticket for ticket in tickets if ticket in self.groups.leases]
        self.llm.llm_engine.abort_request(running)
        self.meter.stopped(running)
        return self.groups.drop(tickets)

    def generate(self, leases: Sequence[Lease], *, top_p: float = 1.0) -> list[Rollout]:
        """One rollout per lease, in the order given. Raises ValueError while other leases are open."""
        if len(self.groups):
            raise ValueError(f"{len(self.groups)} leases are open in this engine; generate() would take their rollouts")
        self.submit(leases, top_p=top_p)
        done: dict[str, Rollout] = {}
        try:
            while len(self.groups):
                done |= {rollout.lease.ticket: rollout for rollout in self.advance(math.inf).rollouts}
        except BaseException:
            self.abort()
            raise
        return [done[lease.ticket] for lease in leases]

    def _rollout(self, lease: Lease, completion: Any) -> Rollout:
        ids = (*lease.prefill_ids, *completion.token_ids)
        finish = FinishReason.LENGTH if completion.finish_reason == "length" else FinishReason.STOP
        flat = completion.logprobs
        # logprobs=0 gives exactly the sampled token per position.
        logp = tuple(_known(flat.logprobs[start]) for start in flat.start_indices)
        return Rollout(
            lease=lease,
            response_ids=ids,
            prefill_length=len(lease.prefill_ids),
            logp_T=logp,
            finish=finish,
            weight_version=self.version.number,
            text=self.tokenizer.decode(ids, skip_special_tokens=False),
            forced=forced_positions(lease, completion.token_ids, logp, self.markers),
        )
