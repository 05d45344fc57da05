"""A model without the attention of some layers."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager

from ..families import Decoder
from ..modes import replaced_forwards
from ..skipping import NoAttention


def bypassed(decoder: Decoder, layers: Iterable[int]) -> AbstractContextManager[None]:
    """
    Let the attention of `layers`, compensation included, add nothing to the residual stream, as LLMDrop does.

    For adapted layers, on which no second adapter can be; elsewhere use [`LLMDropConfig`].
    """
    attentions = [decoder.attention(layer) for layer in layers]
    return replaced_forwards((attention, NoAttention(attention.layer_idx).forward) for attention in attentions)
