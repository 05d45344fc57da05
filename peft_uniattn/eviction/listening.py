"""Lets a model tell an [`H2OCache`] of its attention, without changing what the attention computes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.cache_utils import DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..attention import intercept_attention, original_config, past_key_values, release_attention
from ..families import FAMILIES, Decoder, find_decoder, find_family
from ..handover import HANDOVER, Handover
from ..inspection import base_model
from ..layer import UniAttnLayer
from ..plan import SOFTMAX
from ..standalone_modeling import MODEL_TYPE_PREFIX
from ..tuner.layer import AttentionTunerLayer
from .cache import H2OCache, H2OLayer
from .statistic import received, visible_to_newest

# Under this name transformers finds `h2o_attention`; under this keyword the cache travels to it.
H2O_ATTENTION = f"{__name__}.h2o"
H2O = "uniattn_h2o"

_BACK_ENDS = ("eager", "sdpa")


@contextmanager
def h2o(model: nn.Module) -> Iterator[nn.Module]:
    """
    Inside `with h2o(model):`, `model` can fill an [`H2OCache`]; afterwards it is as it was before.

    Args:
        model: a transformers model of a supported architecture, a standalone UniAttn model, or a `PeftModel` of
            either. Apply and remove adapters outside.
    """
    was_enabled = is_enabled(model)
    enable_h2o(model)
    try:
        yield model
    finally:
        if not was_enabled:
            disable_h2o(model)


def enable_h2o(model: nn.Module) -> None:
    """
    Let `model` fill an [`H2OCache`], until [`disable_h2o`]. With any other dynamic cache, or none, it computes what it
    computed before.

    Raises:
        ValueError: if the architecture is not supported, or if the model is one of CLA or LLMDrop.
    """
    decoder = _decoder(model)
    _check_method(decoder)
    if is_enabled(model):
        return
    for attention in _attentions(decoder):
        stranger = intercept_attention(attention)
        attention.config.uniattn_h2o_stranger = stranger
        attention.config.uniattn_h2o_inner = attention.config._attn_implementation
        attention.config._attn_implementation_internal = H2O_ATTENTION
    decoder.backbone.register_forward_pre_hook(_begin, with_kwargs=True)
    decoder.backbone.register_forward_hook(_end, with_kwargs=True, always_call=True)


def disable_h2o(model: nn.Module) -> None:
    """Undo [`enable_h2o`]; without effect on a model that is as it was."""
    decoder = _decoder(model)
    for attention in _attentions(decoder):
        if attention.config._attn_implementation != H2O_ATTENTION:
            continue
        if attention.config.uniattn_h2o_stranger:
            release_attention(attention)
        else:
            attention.config._attn_implementation_internal = attention.config.uniattn_h2o_inner
    # By function rather than by the handles that torch returns: handles do not survive a deepcopy of the model.
    backbone = decoder.backbone
    _remove(_begin, backbone._forward_pre_hooks, backbone._forward_pre_hooks_with_kwargs)
    _remove(_end, backbone._forward_hooks, backbone._forward_hooks_with_kwargs, backbone._forward_hooks_always_called)


def is_enabled(model: nn.Module) -> bool:
    """Whether `model` can fill an [`H2OCache`] now."""
    return _begin in _decoder(model).backbone._forward_pre_hooks.values()


def h2o_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """
    The attention that `module` had before, a leader's or a back end's, of which its layer of the cache is told.

    A transformers attention function. Decode takes s from where it is at hand (leaders, with kernels or without, and
    eager); else s is computed beside the back end, whose output is used in any case.
    """
    cache: H2OCache | None = kwargs.pop(H2O, None)
    if module.config.uniattn_h2o_stranger:
        kwargs.pop(HANDOVER, None)  # nobody follows this layer
    attend = ALL_ATTENTION_FUNCTIONS[module.config.uniattn_h2o_inner]
    layer = None if cache is None else cache.layers[module.layer_idx]
    if not isinstance(layer, H2OLayer):
        return attend(module, query, key, value, attention_mask, **kwargs)

    _check_back_end(module, kwargs)
    if not layer.undecided:
        raise ValueError(
            f"decoder layer {module.layer_idx} attends to keys that are not in its own layer of the H2OCache; H2O "
            "works on ordinary models and on UniAttn's Superblocks"
        )
    mask = layer.mask_of_stored(attention_mask, query.shape[1])
    output, probabilities = attend(module, query, key, value, mask, **kwargs)
    with torch.no_grad():
        if probabilities is None and query.shape[2] == 1:
            probabilities = _left_by_a_kernel(kwargs.get(HANDOVER), module.layer_idx)
        sums = received(query, key, mask, kwargs.get("scaling"), probabilities)
        layer.observe(sums, visible_to_newest(mask, key.shape[1]))
    return output, probabilities


ALL_ATTENTION_FUNCTIONS.register(H2O_ATTENTION, h2o_attention)


def _left_by_a_kernel(handover: Handover | None, layer_idx: int) -> torch.Tensor | None:
    """s of one decoded token as the leader's kernel has handed it over; None where none ran."""
    if handover is None or not handover.has(layer_idx):
        return None
    shared = handover.take(layer_idx).shared
    return None if shared is None else shared.probabilities()


def _check_back_end(module: nn.Module, kwargs: dict[str, Any]) -> None:
    name = original_config(module)._attn_implementation
    if name not in _BACK_ENDS:
        raise ValueError(
            f"attn_implementation={name!r} is not supported with an H2OCache; use one of {', '.join(_BACK_ENDS)}, for "
            'example model.set_attn_implementation("sdpa")'
        )
    extra = next((extra for extra in ("softcap", "s_aux", "position_bias") if kwargs.get(extra) is not None), None)
    if extra and name != "eager":
        raise ValueError(
            f"attn_implementation={name!r} with {extra} is not supported with an H2OCache, which would compute the "
            'probabilities without it; use model.set_attn_implementation("eager")'
        )


def _check_method(decoder: Decoder) -> None:
    """Raise ValueError where layers read keys and values of others, or nothing: H2O has no decision for them."""
    config = decoder.backbone.config
    method = "LLMDrop" if getattr(config, "dropped_layers", None) else None
    if getattr(config, "shared", SOFTMAX) != SOFTMAX:
        method = "CLA"
    for layer in range(len(decoder.layers)):
        attention = decoder.attention(layer)
        if isinstance(attention, AttentionTunerLayer) and not isinstance(attention, UniAttnLayer):
            method = attention.method
    if method:
        raise ValueError(f"H2O is not supported with {method}; use it on the base model or with UniAttn")


def _begin(backbone: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    cache = past_key_values(kwargs)
    if isinstance(cache, H2OCache):
        cache.begin(backbone.config)
        kwargs[H2O] = cache
    elif cache is not None and not isinstance(cache, DynamicCache):
        raise ValueError(
            f"H2O evicts from an H2OCache, and this is a {type(cache).__name__}; static, quantized and other caches "
            "cannot evict: pass past_key_values=H2OCache(...) without cache_implementation, or leave h2o(model)"
        )
    return args, kwargs


def _end(backbone: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
    if H2O in kwargs:
        kwargs[H2O].end()


def _remove(hook: Any, *registries: dict[int, Any]) -> None:
    hooks, *others = registries
    for key in [key for key, registered in hooks.items() if registered is hook]:
        del hooks[key]
        for other in others:
            other.pop(key, None)


def _decoder(model: nn.Module) -> Decoder:
    base = base_model(model)
    config = base.config.get_text_config(decoder=True)
    family = FAMILIES.get(config.model_type.removeprefix(MODEL_TYPE_PREFIX)) or find_family(config)
    return find_decoder(base, family)


def _attentions(decoder: Decoder) -> Iterator[nn.Module]:
    """The attention modules as they are without adapters around them."""
    for layer in range(len(decoder.layers)):
        attention = decoder.attention(layer)
        yield attention.get_base_layer() if isinstance(attention, BaseTunerLayer) else attention
