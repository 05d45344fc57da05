"""How a follower of CLA attends: its own queries over the keys and values of its leader, whatever the architecture."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .attention import (
    CACHE_NAMES,
    call_back_end,
    leader_state,
    original_config,
    past_key_values,
    refuse_continuous_batching,
)
from .cache import cache_nothing
from .families import Family, check_back_end
from .handover import HANDOVER, Handover, LeaderState

# Under this name transformers finds the function below; see LEADER_ATTENTION.
KV_ATTENTION = f"{__name__}.attention"

# The keyword under which a follower tells the function below whose keys and values to use.
LENDER = "uniattn_lender"


def kv_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """
    The model's own back end, for a leader recorded with its keys and values, for a follower on those of its leader.

    A transformers attention function (tensors after RoPE, norms and cache). Of a follower's own tensors only the
    queries count. Without a hand-over and a lender among `kwargs` it is exactly the back end.

    Returns:
        the heads' outputs (batch, query length, query heads, head_dim) and the probabilities or None.
    """
    handover: Handover | None = kwargs.pop(HANDOVER, None)
    lender: LeaderState | None = kwargs.pop(LENDER, None)
    if lender is not None:
        return _borrow(module, query, lender, kwargs)
    if handover is not None:
        if kwargs.get("cache") is not None:
            refuse_continuous_batching()
        check_back_end(original_config(module)._attn_implementation)
        state = LeaderState(module, query, key, attention_mask, kwargs, None, torch.is_grad_enabled(), value)
        handover.give(module.layer_idx, state)
    return call_back_end(module, query, key, value, attention_mask, **kwargs)


def _borrow(
    module: nn.Module, query: torch.Tensor, lender: LeaderState, kwargs: dict[str, Any]
) -> tuple[torch.Tensor, torch.Tensor | None]:
    device = query.device
    mask = lender.mask.to(device) if isinstance(lender.mask, torch.Tensor) else lender.mask
    # The mask belongs to the keys; some back ends apply the window by themselves.
    if "sliding_window" in kwargs:
        kwargs["sliding_window"] = lender.kwargs.get("sliding_window")
    return call_back_end(module, query, lender.key.to(device), lender.value.to(device), mask, **kwargs)


ALL_ATTENTION_FUNCTIONS.register(KV_ATTENTION, kv_attention)


def follow_keys_and_values(
    call: Callable[..., tuple[torch.Tensor, Any]],
    layer_idx: int,
    leader_idx: int,
    args: tuple,
    kwargs: dict[str, Any],
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """
    A CLA follower's attention: softmax(Q · K_leaderᵀ) · V_leader · W_o with the follower's own Q and W_o.

    Args:
        call: the forward of the follower's own attention module, which calls [`kv_attention`] as its back end.
        layer_idx: its layer index.
        leader_idx: that of its leader.
        args: positional arguments of its forward, hidden states (batch, length, hidden size) first.
        kwargs: the others. The cache among them is withheld: nothing is stored but the number of tokens.

    Returns:
        the attention output (batch, length, hidden size) and the probabilities, or None.
    """
    lender = leader_state(kwargs.get(HANDOVER), leader_idx)
    cache = past_key_values(kwargs)
    if cache is not None:
        cache_nothing(cache, args[0], layer_idx)
    without_cache = {name: None if name in CACHE_NAMES else value for name, value in kwargs.items()}
    return call(*args, **{**without_cache, LENDER: lender})


class _Zeros:
    """Stands in for a projection or norm whose output nobody reads; no module, so that nobody finds it among them."""

    def __init__(self, width: int) -> None:
        self.width = width

    def __call__(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states.new_zeros(()).expand(*hidden_states.shape[:-1], self.width)


class _FusedQuery:
    """Stands in for the projection into which Q, K and V were fused: the queries, and zeros for the others."""

    def __init__(self, attention: nn.Module, group: int, padding: int) -> None:
        self.attention, self.group, self.padding = attention, group, padding

    def __call__(self, hidden_states: torch.Tensor) -> torch.Tensor:
        query = self.attention.q_proj(hidden_states).unflatten(-1, (-1, self.group))
        return nn.functional.pad(query, (0, self.padding)).flatten(-2)


def _unchanged(states: torch.Tensor) -> torch.Tensor:
    return states


def forget_keys_and_values(attention: nn.Module, family: Family) -> None:
    """
    Take out of `attention` the weights that make keys and values; a CLA follower has no use for them.

    Its own forward still asks for both and gets zeros. Where Q, K and V were one projection, `q_proj` remains of it.
    """
    projection = getattr(attention, family.value)
    if family.fused is None:
        stand_ins = {name: _Zeros(getattr(attention, name).out_features) for name in (family.key, family.value)}
    else:
        like = {"device": projection.weight.device, "dtype": projection.weight.dtype}
        rows = len(family.query_rows(attention))
        groups = 1 if family.fused == "blocks" else rows // family.head_dim(attention)
        attention.q_proj = nn.Linear(projection.in_features, rows, bias=projection.bias is not None, **like)
        padding = (projection.out_features - rows) // groups
        stand_ins = {family.value: _FusedQuery(attention, rows // groups, padding)}
    stand_ins.update(dict.fromkeys(family.key_norms(attention), _unchanged))
    for name, stand_in in stand_ins.items():
        delattr(attention, name)
        setattr(attention, name, stand_in)
