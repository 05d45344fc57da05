"""Which attention modules change the residual stream least, and the model without some of them (LLMDrop)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from ..calibration.batches import model_inputs, token_mask
from ..families import Decoder
from ..modes import evaluation_mode


@torch.no_grad()
def attention_similarity(
    decoder: Decoder,
    dataloader: Iterable[Mapping[str, torch.Tensor]],
    layers: Sequence[int],
    *,
    progress: bool = True,
) -> dict[int, float]:
    """
    Mean cosine similarity over tokens of the residual stream before and after the attention of each layer.

    Args:
        decoder: of the model as it is, adapted or not.
        dataloader: batches as for [`~peft_uniattn.calibrate`].
        layers: which layers.
        progress: show a progress bar.

    Raises:
        ValueError: if there is no data.
    """
    totals, tokens = dict.fromkeys(layers, 0.0), 0
    with evaluation_mode(decoder.backbone):
        bar = tqdm(dataloader, desc="similarity of attention", unit="batch", disable=not progress, leave=False)
        for index, batch in enumerate(bar):
            inputs = {key: value.to(decoder.backbone.device) for key, value in model_inputs(batch, index).items()}
            with watched_streams(decoder, layers) as streams:
                decoder.backbone(**inputs, use_cache=False)
            real = token_mask(inputs)
            tokens += int(real.sum())
            for layer, (before, _, after) in streams.items():
                cosine = nn.functional.cosine_similarity(before.float(), after.float(), dim=-1)
                totals[layer] += cosine[real.to(cosine.device)].sum().item()
    if not tokens:
        raise ValueError("dataloader is empty, or holds only padding; similarity needs some text")
    return {layer: total / tokens for layer, total in totals.items()}


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
    """Let the attention of `layers`, compensation included, add nothing to the residual stream."""
    attentions = [decoder.attention(layer) for layer in layers]

    def nothing(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
        return torch.zeros_like(hidden_states), None

    before = [attention.__dict__.get("forward") for attention in attentions]
    try:
        for attention in attentions:
            attention.forward = nothing
        yield
    finally:
        for attention, forward in zip(attentions, before, strict=True):
            del attention.forward
            if forward is not None:
                attention.forward = forward
