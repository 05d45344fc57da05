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
from .kv_sharing import KV_ATTENTION, LENDER, follow_keys_and_values
from .modes import evaluation_mode

# Largest relative difference between two ways to the same sum, by data type of the weights.
_TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}
_LENGTH = 6
# What is checked, and what a layer is given for it.
OWN_VALUES = "softmax sharing", "that layer's own values"


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
    if not _has_weights(model):
        return
    seen: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def watch(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        seen[module.layer_idx] = (args[0] if args else kwargs["hidden_states"], output[0])

    handover = Handover(keep=True)
    attentions = {layer: decoder.attention(layer) for layer in layers}
    intercepted = [attention for attention in attentions.values() if intercept_attention(attention)]
    hooks = [attention.register_forward_hook(watch, with_kwargs=True) for attention in attentions.values()]
    try:
        with _runnable_back_end(decoder.backbone.config), evaluation_mode(model):
            _run(model, decoder, handover)
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


@torch.no_grad()
def check_kv_sharing(model: nn.Module, decoder: Decoder, leader_of: dict[int, int]) -> None:
    """
    Check that the keys of every leader suit the queries of its followers.

    Each follower's module is lent its leader's weights and given its leader's input; on its leader's keys and values
    it then has to return what its leader returns. This catches every pair of layers of which one turns its queries in
    another way (another RoPE, none at all, another scale), and everything that [`check_sharing`] catches. Leaves the
    model as it was. Without effect where weights are not there yet.

    Args:
        model: the model.
        decoder: its decoder, attention modules bare or wrapped.
        leader_of: the leader of every layer that the plan concerns; a leader's is itself.

    Raises:
        ValueError: if the output is another one.
    """
    if not _has_weights(model):
        return
    attentions = {
        layer: getattr(decoder.attention(layer), "base_layer", decoder.attention(layer)) for layer in leader_of
    }
    intercepted = [attention for attention in attentions.values() if intercept_attention(attention, KV_ATTENTION)]
    try:
        with _runnable_back_end(decoder.backbone.config), evaluation_mode(model):
            calls = _calls(model, decoder, attentions)
            for layer, leader in leader_of.items():
                if layer == leader:
                    continue
                handover = Handover()
                args, kwargs = calls[leader]
                expected, _ = attentions[leader](*args, **{**kwargs, HANDOVER: handover})
                if not handover.has(leader):
                    raise _refusal(model, leader, "it does not go through transformers' attention interface")
                _, kwargs = calls[layer]
                with _weights_of(attentions[layer], attentions[leader]):
                    output, _ = follow_keys_and_values(
                        attentions[layer], layer, leader, args, {**kwargs, HANDOVER: handover}
                    )
                _check_equal(
                    model, leader, output, expected, ("key and value sharing", f"the queries of layer {layer}")
                )
    finally:
        for attention in intercepted:
            release_attention(attention)


def _calls(
    model: nn.Module, decoder: Decoder, attentions: dict[int, nn.Module]
) -> dict[int, tuple[tuple, dict[str, Any]]]:
    """The arguments with which a forward of `model` calls each of `attentions`, hidden states first and positional."""
    calls = {}

    def watch(layer: int) -> Any:
        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            named = {name: value for name, value in kwargs.items() if name not in (HANDOVER, LENDER)}
            args = args or (named.pop("hidden_states"),)
            calls[layer] = args, named
            if HANDOVER not in kwargs and module is decoder.attention(layer):
                raise _refusal(model, layer, "it does not pass the leader's hand-over to its attention")

        return hook

    hooks = [
        attention.register_forward_pre_hook(watch(layer), with_kwargs=True) for layer, attention in attentions.items()
    ]
    try:
        _run(model, decoder, Handover())
    finally:
        for hook in hooks:
            hook.remove()
    return calls


@contextmanager
def _weights_of(attention: nn.Module, other: nn.Module) -> Iterator[None]:
    """Let `attention` have the submodules and parameters of `other`."""
    own = attention._modules, attention._parameters
    try:
        attention._modules, attention._parameters = other._modules, other._parameters
        yield
    finally:
        attention._modules, attention._parameters = own


def _has_weights(model: nn.Module) -> bool:
    return not any(parameter.is_meta or not parameter.numel() for parameter in model.parameters())


def _run(model: nn.Module, decoder: Decoder, handover: Handover) -> None:
    embedding = model.get_input_embeddings().weight
    ids = torch.arange(_LENGTH, device=embedding.device).unsqueeze(0) % embedding.shape[0]
    decoder.backbone(input_ids=ids, use_cache=False, **{HANDOVER: handover})


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


def _check_equal(
    model: nn.Module, layer: int, output: torch.Tensor, expected: torch.Tensor, how: tuple[str, str] = OWN_VALUES
) -> None:
    if output.shape != expected.shape:
        raise _refusal(model, layer, f"shapes {tuple(output.shape)} and {tuple(expected.shape)} differ", how)
    error, scale = (output - expected).float().norm(), expected.float().norm()
    if not error <= _TOLERANCE.get(expected.dtype, 5e-2) * scale:
        raise _refusal(model, layer, f"an error of {error:.1e} in outputs of {scale:.1e}", how)


def _refusal(model: nn.Module, layer: int, reason: str, how: tuple[str, str] = OWN_VALUES) -> ValueError:
    sharing, given = how
    return ValueError(
        f"{sharing} does not reproduce decoder layer {layer} of this {type(model).__name__} with {given} "
        f"({reason}); its attention differs from what UniAttn knows, so the model is refused. Use another "
        "base model, or other superblocks if only some layers differ"
    )
