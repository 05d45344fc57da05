"""Watch the residual stream around attention, and leave the attention of some layers out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..families import Decoder
from ..skipping import NoAttention


@contextmanager
def watched_streams(
    decoder: Decoder, layers: Sequence[int]
) -> Iterator[dict[int, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]]:
    """
    Watch one forward pass.

    Yields:
        filled in by the forward: layer -> the residual stream before attention, the normalised input of attention, and
        the residual stream after it, each (batch, length, hidden size).
    """
    streams: dict[int, Any] = {}
    entering: dict[int, torch.Tensor] = {}
    hooks = []
    for layer in layers:

        def enter(module: nn.Module, args: tuple, kwargs: dict, layer: int = layer) -> None:
            entering[layer] = args[0] if args else kwargs["hidden_states"]

        def leave(module: nn.Module, args: tuple, kwargs: dict, output: Any, layer: int = layer) -> None:
            x = args[0] if args else kwargs["hidden_states"]
            before = entering.pop(layer)
            streams[layer] = before, x, before + output[0]

        hooks.append(decoder.layers[layer].register_forward_pre_hook(enter, with_kwargs=True))
        hooks.append(decoder.attention(layer).register_forward_hook(leave, with_kwargs=True))
    try:
        yield streams
    finally:
        for hook in hooks:
            hook.remove()


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
