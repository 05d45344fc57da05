"""A model without the attention of some layers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from ..families import Decoder
from ..skipping import NoAttention


@contextmanager
def bypassed(decoder: Decoder, layers: Iterable[int]) -> Iterator[None]:
    """
    Let the attention of `layers`, compensation included, add nothing to the residual stream, as LLMDrop does.

    For adapted layers, on which no second adapter can be; elsewhere use [`LLMDropConfig`].
    """
    attentions = [decoder.attention(layer) for layer in layers]
    before = [attention.__dict__.get("forward") for attention in attentions]
    try:
        for attention in attentions:
            attention.forward = NoAttention(attention.layer_idx).forward
        yield
    finally:
        for attention, forward in zip(attentions, before, strict=True):
            del attention.forward
            if forward is not None:
                attention.forward = forward
