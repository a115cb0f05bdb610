"""ssToken: which tokens are worth learning from, by what the policy has gained on them and how much they look at the prompt."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from types import TracebackType
from typing import Any, NamedTuple

import torch

from rl.errors import ConfigError

MIN_MAX_FLOOR = 1e-8
"""Added to the range of a sample's gains, so that equal gains count as 0."""
CHUNK_ELEMENTS = 1 << 24
"""Attention scores held at once, over rows, heads, queries and keys: 64 MiB of float32."""
MEASURED = ("sdpa", "eager")
"""Attention implementations of transformers under which the attention to the prompt can be measured."""


def scores(
    gain_T: torch.Tensor, attention_T: torch.Tensor | None, owner_T: torch.Tensor, rollouts: int, *, gamma: float = 0.5
) -> torch.Tensor:
    """Score of each token among those of its sample: the higher, the sooner it is kept.

    ``gamma (g_t - min g) / (max g - min g + 1e-8) + (1 - gamma) attention_t``, minimum and maximum over the sample's tokens;
    ``g_t = log p_current - log p_history``, above 0 where the policy has improved on the token. A NaN or infinite gain makes NaN
    scores, see :func:`keep_highest`.

    Shapes: gain_T (T) floating point, nats; attention_T (T) or None, see :class:`PromptAttention`, in [0, 1]; owner_T int64 (T),
    each token's sample in [0, rollouts). Returns the gains' dtype, without gradient. Raises ValueError for shapes that differ,
    for a gamma outside [0, 1], or for no attention where gamma is below 1.
    Source: ssToken (arXiv 2510.18250), its score and its published code.
    """
    if not 0 <= gamma <= 1:
        raise ValueError(f"gamma must lie between 0 and 1, got {gamma}")
    _check_vectors(gain_T, owner_T, rollouts)
    gain_T = gain_T.detach()
    edge_N = gain_T.new_zeros(rollouts)
    least_N = edge_N.scatter_reduce(0, owner_T, gain_T, "amin", include_self=False)
    most_N = edge_N.scatter_reduce(0, owner_T, gain_T, "amax", include_self=False)
    score_T = gamma * (gain_T - least_N[owner_T]) / (most_N - least_N + MIN_MAX_FLOOR)[owner_T]
    if gamma == 1:
        return score_T
    if attention_T is None:
        raise ValueError(f"gamma={gamma} weighs the attention to the prompt, and there is none; measure it or set gamma to 1")
    if attention_T.shape != gain_T.shape:
        raise ValueError(f"attention_T has shape {tuple(attention_T.shape)}, the gains have {tuple(gain_T.shape)}")
    return score_T + (1 - gamma) * attention_T.detach().to(gain_T.dtype)


def keep_highest(score_T: torch.Tensor, owner_T: torch.Tensor, rollouts: int, *, share: float = 0.6) -> torch.Tensor:
    """Whether each token is among the ``ceil(share L)`` highest of its sample's L; of equal ones the earlier is.

    A NaN counts as highest: the token stays in the loss, which then is not finite either and says so.

    Shapes: score_T (T) floating point; owner_T int64 (T), each token's sample in [0, rollouts). Returns bool (T), the same on
    every call. Raises ValueError for shapes that differ or a share outside (0, 1].
    Source: ssToken (arXiv 2510.18250), its rho.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share must lie above 0 and be at most 1, got {share}")
    _check_vectors(score_T, owner_T, rollouts)
    length_N = torch.bincount(owner_T, minlength=rollouts)
    # The product may come out a rounding error above a whole number: 0.28 * 100 is 28.000000000000004.
    kept_N = (share * length_N.double() - 1e-9).ceil().long()
    # Two stable sorts: by score inside each sample, samples one after the other.
    order_T = score_T.argsort(descending=True, stable=True)
    order_T = order_T[owner_T[order_T].argsort(stable=True)]
    start_N = length_N.cumsum(0) - length_N
    rank_T = torch.empty_like(order_T)
    rank_T[order_T] = torch.arange(order_T.numel(), device=order_T.device)
    return rank_T - start_N[owner_T] < kept_N[owner_T]


def prompt_mass(
    query_BHSD: torch.Tensor,
    key_BGSD: torch.Tensor,
    prompt_length_B: torch.Tensor,
    *,
    scaling: float | None = None,
    mask: torch.Tensor | None = None,
    causal: bool = True,
) -> torch.Tensor:
    """Attention mass that every query position puts on the keys of its row's prompt, mean over heads.

    ``mean_h sum_{j < p} softmax_j(s_hij)`` over the visible keys j; ``s_hij = scaling q_hi . k_gj``, p the row's prompt length, g
    the key-value head of head h; ``scaling`` None: ``D^-1/2``. Without a ``mask`` query i sees the keys j <= i if ``causal``,
    else all; with one it sees what that leaves: bool, True where visible, or floating point, added to s.
    Holds ``CHUNK_ELEMENTS`` scores at once, never all queries' times all keys'.

    Shapes: query (B, H, S, D); key (B, G, S, D), H a multiple of G; prompt_length_B integer (B); mask broadcastable to
    (B, H, S, S). Returns float32 (B, S), without gradient.
    Source: ssToken (arXiv 2510.18250), the attention to the prompt.
    """
    rows, heads, width, size = query_BHSD.shape
    groups = key_BGSD.shape[1]
    scale = size**-0.5 if scaling is None else scaling
    position_S = torch.arange(width, device=query_BHSD.device)
    beyond_BS = position_S >= prompt_length_B.to(position_S.device)[:, None]
    mass_BS = torch.empty((rows, width), device=query_BHSD.device)
    step = max(1, CHUNK_ELEMENTS // (rows * heads * width))
    # Half precision would round the sums, and an autocast around us would bring it back.
    with torch.no_grad(), torch.autocast(query_BHSD.device.type, enabled=False):
        key_BGDS = key_BGSD.float().transpose(-1, -2)
        query_BGHSD = query_BHSD.unflatten(1, (groups, heads // groups))
        for start in range(0, width, step):
            end = min(start + step, width)
            seen = end if causal and mask is None else width
            chunk_BGQD = query_BGHSD[:, :, :, start:end].float().flatten(2, 3) * scale
            score_BHQS = (chunk_BGQD @ key_BGDS[..., :seen]).view(rows, heads, end - start, seen)
            if mask is None:
                if causal:
                    score_BHQS.masked_fill_(position_S[:seen] > position_S[start:end, None], -math.inf)
            elif mask.dtype == torch.bool:
                score_BHQS.masked_fill_(~mask[:, :, start:end], -math.inf)
            else:
                score_BHQS += mask[:, :, start:end]
            weight_BHQS = score_BHQS.softmax(-1).masked_fill_(beyond_BS[:, None, None, :seen], 0)
            mass_BS[:, start:end] = weight_BHQS.sum(-1).mean(1)
    return mass_BS


class _Call(NamedTuple):
    """What one layer's attention worked on."""

    query: torch.Tensor
    key: torch.Tensor
    mask: torch.Tensor | None
    scaling: float | None
    causal: bool
    weights: torch.Tensor | None
    """(B, H, S, S), where the implementation returns them."""


class PromptAttention:
    """Measures the attention to the prompt during one forward pass of a causal model, at its last attention layer.

    ``with PromptAttention(lm, prompt_length_B) as probe: model(...)`` and then ``probe.mass_BS``. ``lm``: the Hugging Face model,
    called itself or inside a wrapper; ``prompt_length_B``: integer (rows), tokens. Rows are right-padded, without mask and cache;
    prompt keys are the positions below the row's prompt length. The pass gives what it gives without the probe; of several
    passes the last is measured.

    The token at a position is scored by the mass at that very position, one after the position that predicts it. What stands at
    padding means nothing. See :func:`prompt_mass` for the formula.

    Raises ConfigError when the attention does not go through transformers' registry as sdpa or eager, has a dropout switched on
    that shows in the weights, or ran with a cache; ValueError when the prompt lengths do not fit the rows, or when the model is
    being measured already. The model's configuration is restored whatever happens.
    Source: ssToken (arXiv 2510.18250), its published code, which takes the last layer.
    """

    def __init__(self, lm: Any, prompt_length_B: torch.Tensor) -> None:
        if prompt_length_B.ndim != 1 or prompt_length_B.is_floating_point():
            raise ValueError(f"prompt_length_B must be an integer vector, got {prompt_length_B.dtype} in {prompt_length_B.ndim}d")
        self._lm = lm
        self._prompt_length_B = prompt_length_B
        self._restore: list[tuple[Any, str | None]] = []
        self._modules: list[int] = []
        self._call: _Call | None = None
        self._mass_BS: torch.Tensor | None = None

    @property
    def mass_BS(self) -> torch.Tensor:
        """float32 (rows, width), in [0, 1]; there once the with block has ended."""
        if self._mass_BS is None:
            raise RuntimeError("the attention to the prompt is there only after the with block, around one forward pass")
        return self._mass_BS

    def __enter__(self) -> PromptAttention:
        _register()
        modules = [id(module) for module in self._lm.modules()]
        if any(module in _ACTIVE for module in modules):
            raise ValueError("the attention of this model is being measured already")
        self._modules = modules
        _ACTIVE.update(dict.fromkeys(modules, self))
        self._restore = [(config, config._attn_implementation) for config in _configs(self._lm)]
        for config, implementation in self._restore:  # parents first, since a config sets its sub-configs too
            config._attn_implementation = f"{implementation}_prompt" if implementation in MEASURED else implementation
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for config, implementation in self._restore:
            config._attn_implementation = implementation
        for module in self._modules:
            del _ACTIVE[module]
        call, self._call = self._call, None
        if kind is None:
            self._mass_BS = self._measured(call)

    def _measured(self, call: _Call | None) -> torch.Tensor:
        if call is None:
            found = sorted({str(implementation) for _, implementation in self._restore})
            raise ConfigError(
                f"the attention of {type(self._lm).__name__} ({', '.join(found)}) cannot be measured: it does not pass through "
                f"transformers' registry as one of {', '.join(MEASURED)}",
                fix="load the model with attn_implementation sdpa, or set ssToken's gamma to 1, which needs no attention",
            )
        rows, _, width, _ = call.query.shape
        length_B = self._prompt_length_B
        if call.key.shape[2] != width:
            raise ConfigError(f"{call.key.shape[2]} keys for {width} queries: a cache is on", fix="call with use_cache=False")
        if length_B.numel() != rows or not 0 <= int(length_B.min()) <= int(length_B.max()) <= width:
            raise ValueError(f"prompt lengths {length_B.tolist()} do not fit {rows} rows of {width} tokens")
        if call.weights is None:
            return prompt_mass(call.query, call.key, length_B, scaling=call.scaling, mask=call.mask, causal=call.causal)
        prompt_BS = torch.arange(width, device=call.weights.device) < length_B.to(call.weights.device)[:, None]
        return (call.weights.mean(1, dtype=torch.float32) * prompt_BS[:, None]).sum(-1)


_ACTIVE: dict[int, PromptAttention] = {}
"""The probe of every module that is being measured, by identity."""


def _register() -> None:
    """Make the measuring twins of the implementations known to transformers; only a model in a probe uses them."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    for name in MEASURED:
        ALL_ATTENTION_FUNCTIONS.register(f"{name}_prompt", _recording(name))
        # Under a name without a mask function transformers makes none, and a sliding window would be lost.
        ALL_MASK_ATTENTION_FUNCTIONS.register(f"{name}_prompt", ALL_MASK_ATTENTION_FUNCTIONS[name])


def _recording(name: str) -> Callable[..., tuple[torch.Tensor, torch.Tensor | None]]:
    def attention(
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **options: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        output, weights = _implementation(module, name)(module, query, key, value, attention_mask, **options)
        if weights is not None and options.get("dropout"):
            raise ConfigError(
                f"attention dropout of {options['dropout']} is on while the attention is measured",
                fix="call eval() on the model, or set its attention_dropout to 0",
            )
        probe = _ACTIVE.get(id(module))
        if probe is None:  # another model that shares the configuration
            return output, weights
        causal = options.get("is_causal")
        probe._call = _Call(  # the last layer's call is the one that stays
            query=query.detach(),
            key=key.detach(),
            mask=attention_mask,
            scaling=options.get("scaling"),
            causal=getattr(module, "is_causal", True) if causal is None else causal,
            weights=None if weights is None else weights.detach(),
        )
        return output, weights

    return attention


def _implementation(module: torch.nn.Module, name: str) -> Callable[..., tuple[torch.Tensor, torch.Tensor | None]]:
    """The function the module would have called itself: a model's file holds its eager one and may have a registry of its own."""
    for kind in type(module).__mro__:
        names = vars(sys.modules[kind.__module__])
        if "eager_attention_forward" in names and "ALL_ATTENTION_FUNCTIONS" in names:
            return names["ALL_ATTENTION_FUNCTIONS"].get_interface(name, names["eager_attention_forward"])
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if name not in ALL_ATTENTION_FUNCTIONS:
        raise ConfigError(f"{type(module).__name__} has no {name} attention to measure", fix="set ssToken's gamma to 1")
    return ALL_ATTENTION_FUNCTIONS[name]


def _configs(lm: Any) -> list[Any]:
    """Every configuration that a module of the model reads, each once, parents before their sub-configurations."""
    found: dict[int, Any] = {}

    def add(config: Any) -> None:
        if id(config) not in found:
            found[id(config)] = config
            for name in config.sub_configs:
                if (part := getattr(config, name, None)) is not None:
                    add(part)

    for module in lm.modules():
        if hasattr(getattr(module, "config", None), "_attn_implementation"):
            add(module.config)
    return list(found.values())


def _check_vectors(value_T: torch.Tensor, owner_T: torch.Tensor, rollouts: int) -> None:
    if value_T.ndim != 1 or not value_T.is_floating_point():
        raise ValueError(f"expected a floating point vector, got {value_T.dtype} of shape {tuple(value_T.shape)}")
    if owner_T.shape != value_T.shape:
        raise ValueError(f"owner_T has shape {tuple(owner_T.shape)}, the tokens have {tuple(value_T.shape)}")
    if owner_T.numel() and not 0 <= int(owner_T.min()) <= int(owner_T.max()) < rollouts:
        raise ValueError(f"owner_T names samples outside 0 to {rollouts - 1}")
