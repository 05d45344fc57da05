"""Look at the attention of a model that is otherwise left as it is."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
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


@dataclass
class AttentionFlow:
    """
    What one forward pass did around one attention module. Every tensor is (batch, length, hidden size).

    Attributes:
        stream: the residual stream before attention.
        x: the normalised input of attention.
        output: what attention returned.
        added: what was added to the residual stream: the output, or what a norm or multiplier made of it.
    """

    stream: torch.Tensor
    x: torch.Tensor
    output: torch.Tensor
    added: torch.Tensor


@contextmanager
def watched_attention(decoder: Decoder, layers: Iterable[int]) -> Iterator[dict[int, AttentionFlow]]:
    """Watch the attention of `layers`; yields what the latest forward pass did, by layer."""
    flows: dict[int, AttentionFlow] = {}
    hooks = [hook for layer in layers for hook in _watch(decoder, layer, flows)]
    try:
        yield flows
    finally:
        for hook in hooks:
            hook.remove()


def _watch(decoder: Decoder, layer: int, flows: dict[int, AttentionFlow]) -> list[Any]:
    block, attention = decoder.layers[layer], decoder.attention(layer)
    multiplier = decoder.residual_multiplier(layer)
    streams: list[torch.Tensor] = []

    def enter(module: nn.Module, args: tuple, kwargs: dict) -> None:
        streams[:] = [args[0] if args else kwargs["hidden_states"]]

    def attend(module: nn.Module, args: tuple, kwargs: dict, output: tuple) -> None:
        x = args[0] if args else kwargs["hidden_states"]
        flows[layer] = AttentionFlow(streams.pop(), x, output[0], output[0] * multiplier)

    def normalise(module: nn.Module, args: tuple, output: Any) -> None:
        # The norm on attention's output is the module that reads this very tensor.
        if layer in flows and args and args[0] is flows[layer].output:
            flows[layer].added = output * multiplier

    hooks = [
        block.register_forward_pre_hook(enter, with_kwargs=True),
        attention.register_forward_hook(attend, with_kwargs=True),
    ]
    if decoder.normalises_attention(layer):
        hooks += [child.register_forward_hook(normalise) for child in block.children() if child is not attention]
    return hooks
