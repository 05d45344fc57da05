"""Checks on the model at hand that followers would compute what is expected of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .attention import follow, intercept_attention, release_attention
from .families import Decoder
from .handover import HANDOVER, Handover
from .modes import evaluation_mode

# Largest relative difference between two ways to the same sum, by data type of the weights.
_TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}
_LENGTH = 6


@torch.no_grad()
def check_sharing(model: nn.Module, decoder: Decoder, layers: list[int]) -> None:
    """
    Check for each of `layers` that a follower made of its own value and output projections reproduces it.

    Runs a few tokens through `model`, with every one of `layers` as a leader, then lets each follow itself. This
    catches every architecture whose attention does something between softmax and output that a follower would miss,
    and every layer that drops the hand-over. Leaves the model as it was. Without effect where weights are not there
    yet (on the meta device).

    Raises:
        ValueError: if a layer is not reproduced.
    """
    if any(parameter.is_meta or not parameter.numel() for parameter in model.parameters()):
        return
    seen: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def watch(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        seen[module.layer_idx] = (args[0] if args else kwargs["hidden_states"], output[0])

    handover = Handover(keep=True)
    attentions = {layer: decoder.attention(layer) for layer in layers}
    intercepted = [attention for attention in attentions.values() if intercept_attention(attention)]
    hooks = [attention.register_forward_hook(watch, with_kwargs=True) for attention in attentions.values()]
    try:
        embedding = model.get_input_embeddings().weight
        ids = torch.arange(_LENGTH, device=embedding.device).unsqueeze(0) % embedding.shape[0]
        with _runnable_back_end(decoder.backbone.config), evaluation_mode(model):
            decoder.backbone(input_ids=ids, use_cache=False, **{HANDOVER: handover})
            for layer, attention in attentions.items():
                if not handover.has(layer):
                    raise _refusal(model, layer, "it does not pass the leader's hand-over to its attention")
                hidden_states, expected = seen[layer]
                output, _ = follow(attention, decoder.family, layer, hidden_states, handover)
                _check_equal(model, layer, output, expected)
    finally:
        for hook in hooks:
            hook.remove()
        for attention in intercepted:
            release_attention(attention)


@contextmanager
def _runnable_back_end(config: Any) -> Iterator[None]:
    """
    Put eager in the place of back ends that compile for seconds or run on a GPU only, as the model may not be on one.

    What the probe looks for does not depend on the back end.
    """
    name = config._attn_implementation
    config._attn_implementation = name if name in ("eager", "sdpa") else "eager"
    try:
        yield
    finally:
        config._attn_implementation = name


def _check_equal(model: nn.Module, layer: int, output: torch.Tensor, expected: torch.Tensor) -> None:
    if output.shape != expected.shape:
        raise _refusal(model, layer, f"shapes {tuple(output.shape)} and {tuple(expected.shape)} differ")
    error, scale = (output - expected).float().norm(), expected.float().norm()
    if not error <= _TOLERANCE.get(expected.dtype, 5e-2) * scale:
        raise _refusal(model, layer, f"an error of {error:.1e} in outputs of {scale:.1e}")


def _refusal(model: nn.Module, layer: int, reason: str) -> ValueError:
    return ValueError(
        f"softmax sharing does not reproduce decoder layer {layer} of this {type(model).__name__} with that layer's "
        f"own values ({reason}); its attention differs from what UniAttn knows, so the model is refused. Use another "
        "base model, or other superblocks if only some layers differ"
    )
