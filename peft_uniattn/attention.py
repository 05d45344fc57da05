"""How a follower obtains s·V: from the leader's probabilities where they exist, else by the leader's back end."""

from __future__ import annotations

import copy
import sys
from functools import cache, partial
from types import ModuleType
from typing import Any

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .cache import cache_values
from .compensation import ATTENTION_OUTPUT, FFN_OUTPUT, HEADS, Compensation
from .families import Family, check_back_end
from .handover import HANDOVER, Handover, LeaderState

try:
    # By its full name: a checkpoint carries a copy of this file, and the kernels only where the package is installed.
    from peft_uniattn.kernels import lead
except ImportError:
    lead = None

# Under this name transformers finds the function below. It contains the module's own name, so that a checkpoint's
# copy of this file and the installed package can live in one process.
LEADER_ATTENTION = f"{__name__}.leader"

# The keywords under which transformers passes the cache to attention modules.
CACHE_NAMES = ("cache", "past_key_values", "layer_past")  # since 5.24, before, and in gpt_neox before

# What changes the probabilities and is not in the mask; with any of these a leader leaves s to its own back end.
_SPECIAL = ("softcap", "s_aux", "position_bias", "cu_seq_lens_k")


def intercept_attention(attention: nn.Module, function: str = LEADER_ATTENTION) -> bool:
    """
    Let `attention` call a registered attention function where it would call its back end, by default
    [`leader_attention`]; its class and code stay as they are. Returns False if it already did.

    The attention module gets a copy of its configuration that names our function. The model's own configuration keeps
    the real name, from which transformers derives the masks.
    """
    if hasattr(attention.config, "uniattn_original"):
        return False
    config = copy.copy(attention.config)
    config._attn_implementation_internal = function
    config.uniattn_original = attention.config
    attention.config = config
    return True


def release_attention(attention: nn.Module) -> None:
    """Undo [`intercept_attention`]."""
    attention.config = original_config(attention)


def original_config(attention: nn.Module) -> Any:
    """The model's own configuration, behind an intercepted attention module or not."""
    return vars(attention.config).get("uniattn_original", attention.config)  # getattr of a configuration is slow


class _AsItWas:
    """An attention module as its back end expects it: with the model's own configuration."""

    def __init__(self, attention: nn.Module, config: Any) -> None:
        self._attention = attention
        self.config = config

    def __getattr__(self, name: str) -> Any:
        return getattr(self._attention, name)


def leader_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """
    A leader's attention: the model's own back end, recorded for the followers.

    A transformers attention function (tensors after RoPE, norms and cache). Without a hand-over among `kwargs` it is
    exactly the back end. With one, a single decoded token is computed by a fused kernel that hands over s, or in the
    open, because followers then read the probabilities instead of all keys.

    Returns:
        the heads' outputs (batch, query length, query heads, head_dim) and the probabilities or None.
    """
    handover: Handover | None = kwargs.pop(HANDOVER, None)
    if handover is None:
        return call_back_end(module, query, key, value, attention_mask, **kwargs)
    if kwargs.get("cache") is not None:
        refuse_continuous_batching()

    config = original_config(module)
    back_end = config._attn_implementation
    check_back_end(back_end)
    grad_enabled = torch.is_grad_enabled()
    plain = not grad_enabled and _is_plain(key, attention_mask, kwargs)
    probabilities = None
    # Under eager, s is to be seen.
    fusible = plain and back_end != "eager" and (query.shape[2] == 1 or back_end == "sdpa")
    if fusible and (fused := _fused(module, config, query, key, value, attention_mask, kwargs, handover)) is not None:
        output, shared = fused
        state = LeaderState(module, query, key, attention_mask, kwargs, None, grad_enabled, shared=shared)
        handover.give(module.layer_idx, state)
        return output, None
    if plain and query.shape[2] == 1:
        probabilities = decode_probabilities(query, key, attention_mask, kwargs.get("scaling"))
        output = apply_probabilities(probabilities, value)
    else:
        output, probabilities = call_back_end(module, query, key, value, attention_mask, **kwargs)
    # With autograd, followers recompute s: sharing it would keep (length x length) tensors across checkpointed layers.
    # In its place flex_attention returns the logarithms of the denominators, of three dimensions, and with attention
    # sinks some models (granite_swa) scale outputs rather than s.
    is_shared = not grad_enabled and probabilities is not None and probabilities.dim() == 4
    kept = probabilities if is_shared and kwargs.get("s_aux") is None else None
    handover.give(module.layer_idx, LeaderState(module, query, key, attention_mask, kwargs, kept, grad_enabled))
    return output, probabilities


def _fused(
    module: nn.Module,
    config: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    kwargs: dict[str, Any],
    handover: Handover,
) -> tuple[torch.Tensor, Any] | None:
    """Output and s by a fused kernel; None where none fits or is faster."""
    if lead is None or kwargs.get("dropout"):
        return None
    configured = handover.kernels or (getattr(config, "kernels", None), getattr(config, "skip_mass", 0.0))
    causal = kwargs.get("is_causal")
    options = {
        "scaling": kwargs.get("scaling"),
        "causal": getattr(module, "is_causal", True) if causal is None else causal,
        "configured": configured,
        "once": handover.once,
        "leader": module,
        "followers": handover.followers or _followers(config, module.layer_idx),
        "back_end": partial(call_back_end, module, query, key, value, mask, **kwargs),
    }
    return lead(query, key, value, mask, **options)


def _followers(config: Any, leader_idx: int) -> int:
    """How many followers the configuration of a standalone model gives to a leader; 1 where it says nothing."""
    blocks = getattr(config, "superblocks", None) or ()
    return next((len(block) - 1 for block in blocks if block[0] == leader_idx), 1)


def _is_plain(key: torch.Tensor, mask: Any, kwargs: dict[str, Any]) -> bool:
    """Whether s is softmax(scores + mask) of tensors at hand, as opposed to a back end's own masks and extras."""
    if any(kwargs.get(name) is not None for name in _SPECIAL):
        return False
    if mask is None:
        # Without a mask, flash_attention_2 applies the window by itself.
        window = kwargs.get("sliding_window")
        return window is None or key.shape[2] <= window
    return isinstance(mask, torch.Tensor) and mask.dim() == 4


def refuse_continuous_batching(*args: Any, **kwargs: Any) -> None:
    """Stands in for the entrance to continuous batching, which hides the errors of a forward pass in its results."""
    raise ValueError(
        "continuous batching is not supported with softmax sharing, neither by generate_batch() nor by "
        'cache_implementation="paged"; use generate() with a dynamic or static cache'
    )


ALL_ATTENTION_FUNCTIONS.register(LEADER_ATTENTION, leader_attention)


def follow(
    attention: nn.Module,
    family: Family,
    leader_idx: int,
    hidden_states: torch.Tensor,
    handover: Handover | None,
    past_key_values: Any = None,
    compensation: Compensation | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """
    A follower's attention: s_leader · V · W_o (equation 12), plus its compensation (equation 14).

    Args:
        attention: the follower's own attention module, of which only the value and output projections are used.
        family: where these live.
        leader_idx: layer index of the leader.
        hidden_states: the normalised input of the layer, (batch, length, hidden size).
        handover: of this forward pass.
        past_key_values: the cache, or None.
        compensation: what to add, and where; None for nothing.

    Returns:
        the attention output (batch, length, hidden size) and the shared probabilities, or None where the back end
        does not form them.
    """
    leader = leader_state(handover, leader_idx)
    value = own = family.value_states(attention, hidden_states)
    if past_key_values is not None:
        value = cache_values(past_key_values, value, attention.layer_idx, leader_idx)
    heads, probabilities = share_softmax(value, leader)
    adds = source = None
    if compensation is not None:
        adds, source = compensation.design.adds, compensation.design.source(hidden_states, own, heads)
    if adds == HEADS:
        heads = heads + compensation.linear(source).view_as(heads)
    output = family.project_output(attention, heads)
    if adds == ATTENTION_OUTPUT:
        output = compensation.added_to(output, source)
    elif adds == FFN_OUTPUT:
        handover.defer(attention.layer_idx, compensation.linear(source))
    return output, probabilities


def leader_state(handover: Handover | None, leader_idx: int) -> LeaderState:
    """What the leader `leader_idx` has handed over; raises RuntimeError if nothing arrived (see [`Handover.take`])."""
    if handover is None:
        raise RuntimeError(
            "a follower was called without its leader's hand-over; call the whole model, and check that no wrapper "
            "drops keyword arguments between the model and its attention layers"
        )
    return handover.take(leader_idx)


def past_key_values(kwargs: dict[str, Any]) -> Any:
    """The cache among a decoder layer's keyword arguments, under any of the names that transformers uses, or None."""
    return next((kwargs[name] for name in CACHE_NAMES if kwargs.get(name) is not None), None)


def share_softmax(value: torch.Tensor, leader: LeaderState) -> tuple[torch.Tensor, torch.Tensor | None]:
    """
    s_leader · V by the leader's own back end.

    Args:
        value: V of any width, (batch, key/value heads, key length, width).
        leader: what the leader handed over.

    Returns:
        (batch, query length, query heads, width), and s or None where the back end does not form it.
    """
    device = value.device
    if leader.shared is not None:
        return leader.shared.to(device).apply(value), None
    if leader.probabilities is not None:
        probabilities = leader.probabilities.to(device)
        return apply_probabilities(probabilities, value), probabilities
    mask = leader.mask.to(device) if isinstance(leader.mask, torch.Tensor) else leader.mask
    query, key = leader.query.to(device), leader.key.to(device)
    return call_back_end(leader.attention, query, key, value, mask, **leader.kwargs)


def call_back_end(
    attention: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, **kwargs: Any
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What `attention` would get from its back end for these tensors, were it not intercepted."""
    config, file = original_config(attention), _modelling_file(type(attention))
    back_end = ALL_ATTENTION_FUNCTIONS.get_interface(config._attn_implementation, file.eager_attention_forward)
    return back_end(_AsItWas(attention, config), query, key, value, mask, **kwargs)


@cache
def _modelling_file(attention_class: type[nn.Module]) -> ModuleType:
    """Where a class has its eager attention, which is no registered function; classes mixed in on top have none."""
    modules = (sys.modules[cls.__module__] for cls in attention_class.__mro__)
    return next(module for module in modules if hasattr(module, "eager_attention_forward"))


def decode_probabilities(
    query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None, scaling: float | None
) -> torch.Tensor:
    """
    s = softmax(q·Kᵀ·scaling + mask) of a single decoded token, softmax in float32 or better.

    Args:
        query: (batch, query heads, 1, head_dim).
        key: (batch, key/value heads, length, head_dim).
        mask: boolean (True: visible) or additive, broadcastable to (batch, query heads, 1, length); None: all visible.
        scaling: default head_dim ** -0.5.

    Returns:
        (batch, query heads, 1, length) in the data type of `query`.
    """
    batch, query_heads, _, head_dim = query.shape
    kv_heads, length = key.shape[1], key.shape[2]
    scaling = head_dim**-0.5 if scaling is None else scaling
    grouped = query.reshape(batch, kv_heads, query_heads // kv_heads, head_dim)
    scores = _product(grouped, key.transpose(2, 3)).reshape(batch, query_heads, 1, length) * scaling
    if mask is not None:
        scores = (
            scores.masked_fill(~mask, torch.finfo(scores.dtype).min) if mask.dtype == torch.bool else scores + mask
        )
    return torch.softmax(scores, dim=-1).to(query.dtype)


def _product(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Product of 4-dimensional tensors in float32 or better: scores rounded to bfloat16 would be off by per cents."""
    if query.dtype in (torch.float32, torch.float64):
        return torch.matmul(query, key)
    if query.is_cuda:
        product = torch.bmm(query.flatten(0, 1), key.flatten(0, 1), out_dtype=torch.float32)
        return product.unflatten(0, query.shape[:2])
    return torch.matmul(query.float(), key.float())


def apply_probabilities(probabilities: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """
    s·V with grouped heads, without repeating V.

    Args:
        probabilities: (batch, query heads, query length, key length).
        value: (batch, key/value heads, key length, head_dim).

    Returns:
        (batch, query length, query heads, head_dim).
    """
    batch, query_heads, query_length, key_length = probabilities.shape
    kv_heads, head_dim = value.shape[1], value.shape[3]
    grouped = probabilities.reshape(batch, kv_heads, -1, key_length)
    heads = torch.matmul(grouped, value).reshape(batch, query_heads, query_length, head_dim)
    return heads.transpose(1, 2)
