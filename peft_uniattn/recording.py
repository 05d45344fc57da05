"""Look at the softmax of a model that is otherwise left as it is."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn
from transformers import PreTrainedModel

from .attention import intercept_attention, release_attention
from .families import Decoder, check_back_end, find_decoder, find_family
from .inspection import uniattn_layers


def wrappable_decoder(model: nn.Module) -> Decoder:
    """
    The decoder of a plain model that softmax sharing supports.

    Raises:
        ValueError: if `model` is not a transformers model, has a UniAttn adapter, or is not supported.
    """
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"{type(model).__name__} is not a transformers model; pass the base model without adapters")
    if uniattn_layers(model):
        raise ValueError("model has a UniAttn adapter already; pass the base model, for example model.unload()")
    decoder = find_decoder(model, find_family(model.config.get_text_config(decoder=True)))
    check_back_end(decoder.backbone.config._attn_implementation)
    return decoder


@contextmanager
def intercepted(decoder: Decoder, layers: Iterable[int]) -> Iterator[None]:
    """Let the attention of `layers` hand its queries, keys and mask to a hand-over that a forward is given."""
    attentions = [decoder.attention(layer) for layer in layers]
    changed = [attention for attention in attentions if intercept_attention(attention)]
    try:
        yield
    finally:
        for attention in changed:
            release_attention(attention)
