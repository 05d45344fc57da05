"""Which attention changes the residual stream least, measured on data (https://arxiv.org/abs/2406.15786)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from ..families import Decoder, find_decoder, find_family
from ..inspection import base_model
from ..modes import evaluation_mode


@torch.no_grad()
def measure_attention_similarity(
    model: nn.Module,
    dataloader: Iterable[Mapping[str, torch.Tensor]],
    *,
    max_batches: int | None = None,
    progress: bool = True,
) -> list[float]:
    """
    Cosine similarity of what goes into every layer's attention block and what comes out of it, residual included.

    The mean over tokens of the cosine of x, the residual stream before a layer, and x + Attn(Norm(x)), after its
    attention (a norm or multiplier on the output of attention counts as a part of it), in float32 or better. Where it
    is close to 1, attention changes little.

    Args:
        model: a transformers model, or a `PeftModel`, whose adapter is then in force.
        dataloader: batches with `input_ids` (batch, length) and optionally `attention_mask` (1: token, 0: padding,
            which is left out) and `position_ids`. Other entries are ignored.
        max_batches: use only the first batches.
        progress: show a progress bar.

    Returns:
        the similarity of every layer, bottom to top.

    Raises:
        ValueError: if the architecture is not supported, or if there are no tokens.
    """
    base = base_model(model)
    decoder = find_decoder(base, find_family(base.config.get_text_config(decoder=True)))
    device = base.get_input_embeddings().weight.device
    meters = [_Meter(decoder, layer) for layer in range(len(decoder.layers))]
    tokens = 0
    try:
        with evaluation_mode(base):
            bar = tqdm(
                dataloader, "measuring similarity", max_batches, unit="batch", disable=not progress, leave=False
            )
            for index, batch in enumerate(bar):
                if index == max_batches:
                    break
                inputs = {name: batch[name].to(device) for name in _INPUTS if batch.get(name) is not None}
                mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
                for meter in meters:
                    meter.tokens = mask
                decoder.backbone(**inputs, use_cache=False)
                tokens += int(mask.sum())
    finally:
        for meter in meters:
            meter.remove()
    if not tokens:
        raise ValueError("dataloader holds no tokens; give it some text")
    return [meter.total / tokens for meter in meters]


_INPUTS = ("input_ids", "attention_mask", "position_ids")


class _Meter:
    """Sums the similarities of one layer over tokens, by hooks."""

    def __init__(self, decoder: Decoder, layer_idx: int) -> None:
        layer, attention = decoder.layers[layer_idx], decoder.attention(layer_idx)
        self.total = 0.0
        self.tokens: torch.Tensor | None = None
        self._multiplier = decoder.residual_multiplier(layer_idx)
        self._hooks = [
            layer.register_forward_pre_hook(self._enter, with_kwargs=True),
            attention.register_forward_hook(self._attend),
            layer.register_forward_hook(self._leave),
        ]
        # Some architectures put a norm on the output of attention; it is the module that reads that very tensor.
        self._hooks += [
            child.register_forward_hook(self._normalise) for child in layer.children() if child is not attention
        ]

    def _enter(self, layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self._before = args[0] if args else kwargs["hidden_states"]

    def _attend(self, attention: nn.Module, args: tuple, output: tuple) -> None:
        self._raw = self._added = output[0]

    def _normalise(self, child: nn.Module, args: tuple, output: Any) -> None:
        if args and args[0] is getattr(self, "_raw", None):
            self._added = output

    def _leave(self, layer: nn.Module, args: tuple, output: Any) -> None:
        before, added = (tensor.to(torch.promote_types(tensor.dtype, torch.float32)) for tensor in self._residual())
        similarity = torch.cosine_similarity(before, before + added, dim=-1)
        self.total += similarity[self.tokens.to(similarity.device)].double().sum().item()

    def _residual(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The residual stream before attention, and what attention adds to it; keeps neither."""
        before, added = self._before, self._added * self._multiplier
        del self._before, self._added, self._raw
        return before, added

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()


def choose_layers_to_drop(
    similarity: Sequence[float], num_layers: int, *, start_layer: int | None = None, end_layer: int | None = None
) -> list[int]:
    """
    The layers whose attention changes the residual stream least.

    Args:
        similarity: of every layer, from [`measure_attention_similarity`].
        num_layers: how many to choose.
        start_layer: the lowest that may be chosen. Default: half of the layers, rounded down, as in the UniAttn paper.
        end_layer: where to stop, exclusive. Default: the number of layers.

    Returns:
        layer indices, most similar first (of equals, the upper one first).

    Raises:
        ValueError: if the range does not lie in the model, or holds too few layers.
    """
    total = len(similarity)
    start = total // 2 if start_layer is None else start_layer
    end = total if end_layer is None else end_layer
    if not 0 <= start < end <= total:
        raise ValueError(f"start_layer={start} and end_layer={end} are no range of the model's {total} layers")
    if not 1 <= num_layers <= end - start:
        raise ValueError(
            f"num_layers={num_layers} cannot be chosen from layers {start} to {end - 1}; use 1 to {end - start}, or a "
            "wider range"
        )
    return sorted(range(start, end), key=lambda layer: (-similarity[layer], -layer))[:num_layers]
