"""One vLLM engine inside this process: leases in, rollouts out, weights swapped between batches."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rl.settings import RolloutSettings
from rl.types import FinishReason, Lease, Rollout, WeightVersion
from rollout.weights import INBOX, WeightBundle, WeightError, register_transfer, require_same_model

log = logging.getLogger("budget_rl.rollout")

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


def end_of_sequence_ids(folder: Path) -> list[int]:
    """All end-of-sequence ids of the generation config; vLLM itself would only know the tokenizer's one."""
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        ids = json.loads(path.read_text()).get("eos_token_id") if path.exists() else None
        if ids is not None:
            return [ids] if isinstance(ids, int) else list(ids)
    return []


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
            # Otherwise the model's own top-p or repetition penalty would apply to requests that do not set them.
            generation_config="vllm",
            logprobs_mode="processed_logprobs",
            weight_transfer_config=WeightTransferConfig(backend=settings.transport),
            disable_log_stats=True,
            **memory,
        )
        if settings.transport == "object_store":
            self.llm.init_weight_transfer_engine({"init_info": {}})

    def set_weights(self, bundle: WeightBundle) -> WeightVersion:
        """Serve the bundle from the next request on; raises WeightError (and keeps the old weights) when it is not sound."""
        self._require_whole()
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
        """Take the weights of an open NCCL push; raises WeightError before any transfer when it is not of this engine's model."""
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

    def generate(self, leases: Sequence[Lease], *, top_p: float = 1.0) -> list[Rollout]:
        """Sample one rollout per lease, in the order given; ``top_p`` below 1 is for evaluation only."""
        from vllm import SamplingParams, TokensPrompt

        self._require_whole()
        stale = [lease.ticket for lease in leases if lease.min_version > self.version.number]
        if stale:
            raise WeightError(f"lease {stale[0]} asks for newer weights than the v{self.version.number} this engine has")
        prompts = [TokensPrompt(prompt_token_ids=[*lease.prompt.token_ids, *lease.prefill_ids]) for lease in leases]
        params = [
            SamplingParams(
                temperature=lease.shaping.temperature,
                top_p=top_p,
                max_tokens=lease.max_new_tokens,
                seed=lease.seed,
                logprobs=0,
                flat_logprobs=True,
                detokenize=False,
                stop_token_ids=self.stop_ids,
            )
            for lease in leases
        ]
        outputs = self.llm.generate(prompts, params, use_tqdm=False)
        return [self._rollout(lease, output.outputs[0]) for lease, output in zip(leases, outputs, strict=True)]

    def _rollout(self, lease: Lease, completion: Any) -> Rollout:
        ids = (*lease.prefill_ids, *completion.token_ids)
        finish = FinishReason.LENGTH if completion.finish_reason == "length" else FinishReason.STOP
        flat = completion.logprobs
        # logprobs=0 gives exactly the sampled token per position.
        logp = tuple(flat.logprobs[start] for start in flat.start_indices)
        return Rollout(
            lease=lease,
            response_ids=ids,
            prefill_length=len(lease.prefill_ids),
            logp_T=logp,
            finish=finish,
            weight_version=self.version.number,
            text=self.tokenizer.decode(ids, skip_special_tokens=False),
        )
