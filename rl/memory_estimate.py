"""What a run will take of memory, estimated before any worker starts, and refused if there is too little.

Only :func:`read_model_shape` and :func:`planned_shape` import torch and transformers.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rl.errors import ModelError
from rl.settings import Settings

GB = 10**9
GIB = 2**30

ADAM_BYTES = 8
"""Two float32 moments per parameter."""
MASTER_BYTES = 4
"""DeepSpeed's ZeRO stages and bf16 keep a float32 copy of the parameters beside the ones computed with."""
ACTIVATION_FACTOR = 22
"""Values saved for the backward pass per token, layer and hidden unit; 1 with checkpointing, beside one whole layer.

Measured with saved-tensor hooks on small Llama blocks (hidden 192 to 576, MLP 2.7 to 3 times as wide): 19.7 to 22.6, and 1.3.
"""
LOGIT_CHUNK_TOKENS = 1024
"""Largest number of rows of the vocabulary matrix the learner holds at once, with float32 logits and their gradient."""
PROCESS_BYTES = int(1.2 * GB)
"""Resident size of a Python process that imported torch with vLLM or DeepSpeed, before a model."""
REWARD_PROCESS_BYTES = int(0.3 * GB)
"""Resident size of a grader process."""


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a model that memory depends on."""

    parameters: int
    """Distinct parameters: tied embeddings count once."""
    vocab: int
    hidden: int
    layers: int


@dataclass(frozen=True)
class ActorMemory:
    """Bytes that one actor of a kind takes on its device, by purpose, and on the host beside it."""

    actor: str
    count: int
    host: int
    """Host bytes whatever the device: the process itself and offloaded state."""
    gpus: float = 0.0
    """Ray GPUs of one actor; those with less than one may sit on the same GPU."""
    gpu_fraction: float = 0.0
    """Share of a GPU's memory that it claims however little it needs."""
    weight_copies: int = 0
    """Host bytes, whatever the device, of weights on their way to the engines or into a checkpoint."""
    weights: int = 0
    gradients: int = 0
    optimiser: int = 0
    activations: int = 0
    """Saved activations and the logit chunk of one micro-batch."""
    kv_cache: int = 0

    @property
    def on_gpu(self) -> bool:
        return self.gpus > 0

    @property
    def device_bytes(self) -> int:
        return self.weights + self.gradients + self.optimiser + self.activations + self.kv_cache

    @property
    def host_bytes(self) -> int:
        return self.host + self.weight_copies + (0 if self.on_gpu else self.device_bytes)


@dataclass(frozen=True)
class MemoryEstimate:
    """An estimate, meant to catch a model several times too large, not the last ten percent."""

    actors: tuple[ActorMemory, ...]

    @property
    def host_bytes(self) -> int:
        """Host bytes of all actors together."""
        return sum(actor.count * actor.host_bytes for actor in self.actors)


def estimate_memory(settings: Settings, model_params: int, vocab: int, hidden: int, layers: int) -> MemoryEstimate:
    """Bytes each actor will need, for a model of ``model_params`` parameters in ``layers`` blocks of ``hidden`` units."""
    shape = ModelShape(parameters=model_params, vocab=vocab, hidden=hidden, layers=layers)
    reward = settings.reward
    grader = ActorMemory("reward worker", reward.workers, host=REWARD_PROCESS_BYTES * (1 + reward.processes))
    # Of the whole run: rank 0 gathers the weights and bundles them, and Ray's object store holds the bundle for the engines.
    # By NCCL they go from GPU to GPU, but a checkpoint gathers and bundles them too.
    copies = 3 if settings.rollout.transport == "object_store" else 2
    driver = ActorMemory("driver", 1, host=PROCESS_BYTES, weight_copies=copies * _value_bytes(settings) * model_params)
    frozen = _frozen_memory(settings, shape)
    return MemoryEstimate((_engine_memory(settings, shape), _learner_memory(settings, shape), grader, *frozen, driver))


def _value_bytes(settings: Settings) -> int:
    return 4 if settings.model.dtype == "float32" else 2


def _engine_memory(settings: Settings, shape: ModelShape) -> ActorMemory:
    rollout, size = settings.rollout, _value_bytes(settings)
    on_gpu = rollout.gpus_per_worker > 0
    by_store = rollout.transport == "object_store"
    # On a GPU the cache takes what is left; one sequence of full length is the least that works (no key-value sharing assumed).
    longest = 2 * shape.layers * shape.hidden * size * (settings.data.max_prompt_length + rollout.max_length)
    return ActorMemory(
        actor="rollout engine",
        count=rollout.workers,
        host=PROCESS_BYTES,
        gpus=rollout.gpus_per_worker,
        gpu_fraction=rollout.gpu_memory_fraction if on_gpu else 0.0,
        # Copied out of the object store one tensor at a time; as a rule the embedding is the largest.
        weight_copies=size * shape.vocab * shape.hidden if by_store else 0,
        weights=size * shape.parameters // rollout.tensor_parallel,
        activations=4 * rollout.max_concurrent * shape.vocab,
        kv_cache=longest // rollout.tensor_parallel if on_gpu else int(rollout.kv_cache_gb * GIB),
    )


def _learner_memory(settings: Settings, shape: ModelShape) -> ActorMemory:
    """One rank under ZeRO: stage 1 splits the optimiser state over ranks, 2 the gradients too, 3 the weights too."""
    learner, size, n = settings.learner, _value_bytes(settings), shape.parameters
    stage, ranks = learner.zero_stage, learner.ranks
    keeps_master = stage > 0 or size < 4
    optimiser = n * (ADAM_BYTES + (MASTER_BYTES if keeps_master else 0)) // (ranks if stage >= 1 else 1)
    tokens = learner.tokens_per_microbatch
    per_layer = tokens * shape.hidden * size
    saved = per_layer * (shape.layers + ACTIVATION_FACTOR if learner.gradient_checkpointing else shape.layers * ACTIVATION_FACTOR)
    logits = 2 * 4 * min(tokens, LOGIT_CHUNK_TOKENS) * shape.vocab
    reference = size * n if settings.loss.kl_coef > 0 else 0
    if settings.distil is not None and settings.distil.teacher.mode == "hidden":
        reference += 2 * size * shape.vocab * shape.hidden  # the heads of the teacher's two models
    offloaded = optimiser if learner.offload_optimizer and learner.gpus_per_rank else 0
    return ActorMemory(
        actor="learner rank",
        count=ranks,
        host=PROCESS_BYTES + offloaded,
        gpus=learner.gpus_per_rank,
        weights=size * n // (ranks if stage == 3 else 1) + reference,
        gradients=size * n // (ranks if stage >= 2 else 1),
        optimiser=optimiser - offloaded,
        activations=saved + logits,
    )


def _frozen_memory(settings: Settings, shape: ModelShape) -> tuple[ActorMemory, ...]:
    """Workers of frozen models: a teacher holds two (its models are taken to be of the run's size), a scorer the start policy."""
    size, found = _value_bytes(settings), []
    kinds = []
    if settings.distil is not None:
        teacher = settings.distil.teacher
        kinds.append(("teacher", teacher, 1 if teacher.base is not None else 2))
    if settings.needs_scorer:
        kinds.append(("frozen start policy", settings.scorer, 1))
    for actor, chosen, models in kinds:
        # without a backward pass one layer's values and a chunk of logits are alive at once
        activations = chosen.tokens_per_pass * shape.hidden * size * ACTIVATION_FACTOR
        activations += 4 * 4 * min(chosen.tokens_per_pass, LOGIT_CHUNK_TOKENS) * shape.vocab
        found.append(
            ActorMemory(
                actor=actor,
                count=chosen.workers,
                host=PROCESS_BYTES,
                gpus=chosen.gpus_per_worker,
                weights=models * size * shape.parameters,
                activations=activations,
            )
        )
    return tuple(found)


def check_memory(estimate: MemoryEstimate, available_bytes: int, *, gpu_bytes: int | None = None) -> None:
    """Raise ModelError with advice when the actors need more than ``available_bytes`` of host memory.

    ``gpu_bytes`` is the size of one GPU; an actor on a GPU that needs more is refused likewise, and so are actors that together
    claim more of a GPU they share.
    """
    if estimate.host_bytes > available_bytes:
        largest = max(estimate.actors, key=lambda actor: actor.count * actor.host_bytes)
        raise ModelError(
            f"the run needs about {estimate.host_bytes / GB:.1f} GB of memory and {available_bytes / GB:.1f} GB is available; "
            f"the largest part is {_largest_part(largest, host=True)}",
            fix=_memory_advice(largest, host=True),
        )
    for actor in estimate.actors:
        if gpu_bytes is not None and actor.on_gpu and actor.device_bytes > gpu_bytes:
            raise ModelError(
                f"one {actor.actor} needs about {actor.device_bytes / GB:.1f} GB and a GPU has {gpu_bytes / GB:.1f} GB; "
                f"the largest part is {_largest_part(actor, host=False)}",
                fix=_memory_advice(actor, host=False),
            )
    if gpu_bytes is not None:
        _check_shared_gpu(estimate, gpu_bytes)


def _check_shared_gpu(estimate: MemoryEstimate, gpu_bytes: int) -> None:
    """Raise ModelError when the heaviest crowd of fractional actors that Ray can put on one GPU claims more than it has."""
    sharing = [actor for actor in estimate.actors if 0 < actor.gpus < 1]
    claims = [max(actor.device_bytes, int(actor.gpu_fraction * gpu_bytes)) for actor in sharing]
    crowds = itertools.product(*(range(actor.count + 1) for actor in sharing))
    fitting = [crowd for crowd in crowds if sum(n * a.gpus for n, a in zip(crowd, sharing, strict=True)) <= 1 + 1e-6]
    claimed, crowd = max((sum(n * claim for n, claim in zip(crowd, claims, strict=True)), crowd) for crowd in fitting)
    if claimed > gpu_bytes:
        who = ", ".join(
            f"{n} x {a.actor} at {claim / GB:.1f} GB" for n, a, claim in zip(crowd, sharing, claims, strict=True) if n
        )
        raise ModelError(
            f"actors that may share a GPU of {gpu_bytes / GB:.1f} GB claim {claimed / GB:.1f} GB of it: {who}",
            fix="lower rollout.gpu_memory_fraction, or raise rollout.gpus_per_worker or learner.gpus_per_rank: fewer then share",
        )


def _parts(actor: ActorMemory, *, host: bool) -> dict[str, int]:
    on_device = {name: getattr(actor, name) for name in ("weights", "gradients", "optimiser", "activations", "kv_cache")}
    if not host:
        return on_device
    return {"process": actor.host, "weight_copies": actor.weight_copies} | ({} if actor.on_gpu else on_device)


def _largest_part(actor: ActorMemory, *, host: bool) -> str:
    name, size = max(_parts(actor, host=host).items(), key=lambda part: part[1])
    times = f" in each of {actor.count} actors" if host and actor.count > 1 else ""
    return f"{name.replace('_', ' ')} of the {actor.actor}, {size / GB:.1f} GB{times}"


def _memory_advice(actor: ActorMemory, *, host: bool) -> str:
    name = max(_parts(actor, host=host).items(), key=lambda part: part[1])[0]
    if host and actor.count > 1:
        return (
            f"lower {'learner.ranks' if actor.actor == 'learner rank' else 'the number of ' + actor.actor + 's'}, or: "
            + _ADVICE[name]
        )
    return _ADVICE[name]


_ADVICE = {
    "weights": "use a smaller model, model.dtype=bfloat16, or learner.zero_stage=3 over more ranks on other machines",
    "gradients": "use a smaller model or model.dtype=bfloat16, or learner.zero_stage=2 over more ranks on other machines",
    "optimiser": "use a smaller model, learner.offload_optimizer=true (GPU), or more learner.ranks on other machines",
    "activations": "lower learner.tokens_per_microbatch (never changes the result) or set learner.gradient_checkpointing=true",
    "kv_cache": "lower rollout.kv_cache_gb (CPU), or rollout.max_length and data.max_prompt_length (GPU)",
    "weight_copies": "use a smaller model or model.dtype=bfloat16",
    "process": "lower rollout.workers, reward.workers or reward.processes",
}


def read_model_shape(folder: Path, *, trust_remote_code: bool = False) -> ModelShape:
    """The sizes of the model in ``folder`` from its config.json alone: torch's meta device allocates no weights.

    Raises ModelError when the folder holds no configuration that transformers can read.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(str(folder), trust_remote_code=trust_remote_code)
        return _shape_of(config, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"{folder} holds no model that can be read: {error}", fix="it needs a config.json of a causal LM"
        ) from error


def planned_shape(settings: Settings, folder: Path | None) -> ModelShape:
    """The sizes of the run's model: of ``folder``, or (None) of the embedded one that the warm start is yet to make."""
    if folder is not None:
        return read_model_shape(folder, trust_remote_code=settings.model.trust_remote_code)
    from rl.embedded import tiny_config

    assert settings.warm_start is not None
    return _shape_of(tiny_config(settings.warm_start), trust_remote_code=False)


def _shape_of(config: Any, *, trust_remote_code: bool) -> ModelShape:
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    text = config.get_text_config()
    # `parameters()` yields tied tensors once.
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return ModelShape(parameters, vocab=text.vocab_size, hidden=text.hidden_size, layers=text.num_hidden_layers)
