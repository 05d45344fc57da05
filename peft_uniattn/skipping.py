"""A decoder layer without attention (LLMDrop)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .attention import past_key_values
from .cache import cache_nothing


def skip_attention(
    hidden_states: torch.Tensor, layer_idx: int, cache: Any = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """
    What a bypassed attention adds to the residual stream: nothing. It stores nothing but the number of tokens.

    Args:
        hidden_states: (batch, length, hidden size).
        layer_idx: the layer's index.
        cache: the cache, or None.

    Returns:
        zeros of the same shape, and None in place of probabilities.
    """
    if cache is not None:
        cache_nothing(cache, hidden_states, layer_idx)
    # A product rather than fresh zeros: the norm before attention gets a gradient of zero instead of none, which
    # distributed training would take for an error.
    return 0 * hidden_states, None


class NoAttention(nn.Module):
    """Stands in for the attention module of a dropped layer; it has no weights."""

    def __init__(self, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
        return skip_attention(hidden_states, self.layer_idx, past_key_values(kwargs))
