"""Layers of transformers' own caches that store values only, or nothing, and what a cache really holds."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from transformers import cache_utils
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    QuantizedCache,
    StaticCache,
    StaticLayer,
    StaticSlidingWindowLayer,
)

_CACHES = (DynamicCache, StaticCache, QuantizedCache)


class LengthOnlyLayer(DynamicLayer):
    """A dynamic layer that knows its length although the tensors that it stores hold nothing."""

    def get_seq_length(self) -> int:
        # A layer that has not been updated holds tensors of one dimension.
        return self.keys.shape[-2] if self.is_initialized and self.keys.dim() == 4 else 0


class ValuesOnlyMixin:
    """Lets a quantized layer pass by tensors of width zero, which its back end cannot quantize."""

    def _quantize(self, tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return super()._quantize(tensor, *args, **kwargs) if tensor.shape[-1] else (tensor, None)

    def _dequantize(self, quantized: Any) -> torch.Tensor:
        passed_by = isinstance(quantized, tuple) and quantized[1] is None
        return quantized[0] if passed_by else super()._dequantize(quantized)


def _values_only(layer_class: type[CacheLayerMixin]) -> type[CacheLayerMixin]:
    return type(f"ValuesOnly{layer_class.__name__}", (ValuesOnlyMixin, layer_class), {"__module__": __name__})


# Stock layers that quantize, and what they become where a follower stores values.
_QUANTIZED = {
    layer_class: _values_only(layer_class)
    for name in ("QuantoQuantizedLayer", "HQQQuantizedLayer", "Fp8QuantizedLayer")
    if (layer_class := getattr(cache_utils, name, None))
}
_LAYERS = (
    LengthOnlyLayer,
    *(DynamicLayer, DynamicSlidingWindowLayer, StaticLayer, StaticSlidingWindowLayer),
    *_QUANTIZED,
    *_QUANTIZED.values(),
)


def cache_values(cache: Cache, value: torch.Tensor, layer_idx: int, leader_idx: int) -> torch.Tensor:
    """
    Append a follower's value states to its layer of `cache` and return all of that layer's value states.

    They are stored in the slot that is meant for keys, next to a values tensor of width zero: everything that a cache
    does by itself (its length, cropping, beam reordering, repeating, offloading) looks at the keys slot. No key is
    stored.

    Args:
        cache: a dynamic (also offloaded), static or quantized cache, as `generate()` creates it.
        value: (batch, key/value heads, new tokens, head_dim).
        layer_idx: the follower's own layer index.
        leader_idx: its leader's, whose window the follower's layer of the cache takes over.

    Returns:
        (batch, key/value heads, cached length, head_dim).

    Raises:
        ValueError: if the cache is of a kind whose handling of value-only layers is not known to be right.
    """
    if hasattr(cache, "update_values"):
        return cache.update_values(value, layer_idx, leader_idx)  # a cache of this package's own
    _check_supported(cache, layer_idx, value.device)
    _prepare(cache, layer_idx, leader_idx)
    values, _ = cache.update(value, value[..., :0], layer_idx)
    return values


def cache_nothing(cache: Cache, hidden_states: torch.Tensor, layer_idx: int) -> None:
    """
    Let a layer of `cache` count the tokens of `hidden_states` without storing anything about them.

    Masks and positions may be taken from any layer's length, so a layer that stores nothing has one as well. It holds
    tensors of width zero, which crop, reorder and repeat like others.

    Args:
        cache: a dynamic, static or quantized cache, as `generate()` creates it.
        hidden_states: (batch, new tokens, hidden size).
        layer_idx: the layer's index.

    Raises:
        ValueError: if the cache is of a kind whose handling of such layers is not known to be right.
    """
    _check_supported(cache, layer_idx, hidden_states.device)
    _prepare_nothing(cache, layer_idx)
    nothing = hidden_states[:, None, :, :0]
    cache.update(nothing, nothing, layer_idx)


def _check_supported(cache: Cache, layer_idx: int, device: torch.device) -> None:
    if type(cache) not in _CACHES:
        raise _refuse(cache)
    if layer_idx < len(cache.layers) and type(cache.layers[layer_idx]) not in _LAYERS:
        raise _refuse(cache.layers[layer_idx])
    if cache.offloading:
        _fetch_in_order(cache, device)


def _fetch_in_order(cache: Cache, device: torch.device) -> None:
    """
    Let an offloaded cache fetch its layers on the stream of everything else.

    transformers fetches the lowest layer for the next token on a stream of its own, and beam search reorders that
    layer without waiting for it (seen in 5.24). In order, nothing is read too early; what is lost is that a layer is
    fetched while the one below computes.
    """
    if type(cache) is not DynamicCache:
        raise ValueError(
            "an offloaded static cache is not supported with softmax sharing: decoding on one has crashed the base "
            'model too; use cache_implementation="offloaded", "static" or "dynamic"'
        )
    cache.prefetch_stream = torch.cuda.default_stream(device)


def _prepare(cache: Cache, layer_idx: int, leader_idx: int) -> None:
    """Make sure that a follower's layer of `cache` is of its leader's kind and holds values only."""
    if layer_idx >= len(cache.layers):
        return
    layer, leader = cache.layers[layer_idx], cache.layers[leader_idx]
    same_kind = type(layer) is _QUANTIZED.get(type(leader), type(leader))
    has_keys = layer.is_initialized and layer.values.dim() == 4 and layer.values.shape[-1] > 0
    if same_kind and not has_keys:
        return
    _check_empty(layer)
    if same_kind:
        # A static cache that was made in advance has room for keys as well.
        layer.values = layer.values[..., :0].contiguous()
    elif type(layer) in _QUANTIZED:
        cache.layers[layer_idx] = _without_keys(layer)
    else:
        # s of a leader with full attention needs all values, not a window of them.
        arguments = {
            name: getattr(leader, name) for name in ("max_cache_len", "sliding_window") if hasattr(leader, name)
        }
        cache.layers[layer_idx] = type(leader)(**arguments)


def _prepare_nothing(cache: Cache, layer_idx: int) -> None:
    """Make sure that a layer of `cache` counts tokens and stores nothing."""
    while len(cache.layers) <= layer_idx:  # a cache that was made without a configuration grows as layers run
        cache.layers.append(cache.layer_class_to_replicate())
    layer = cache.layers[layer_idx]
    stores = layer.is_initialized and layer.keys.dim() == 4 and layer.keys.shape[-1] > 0
    if stores:
        _check_empty(layer)
        # A static cache that was made in advance has room for keys and values.
        layer.keys, layer.values = (tensor[:, :1, :, :0].contiguous() for tensor in (layer.keys, layer.values))
    elif isinstance(layer, DynamicLayer) and not layer.is_sliding and type(layer) is not LengthOnlyLayer:
        cache.layers[layer_idx] = LengthOnlyLayer()


def _check_empty(layer: CacheLayerMixin) -> None:
    if layer.is_initialized and layer.get_seq_length():
        raise ValueError(
            "this cache was filled without softmax sharing, or under another plan; start with an empty one"
        )


def _without_keys(layer: CacheLayerMixin) -> CacheLayerMixin:
    """The values-only version of an empty quantized layer."""
    values_only = object.__new__(_QUANTIZED[type(layer)])
    vars(values_only).update(vars(layer))
    if hasattr(layer, "axis_value"):
        values_only.axis_key = layer.axis_value
    return values_only


def _refuse(cache: object) -> ValueError:
    return ValueError(
        f"a cache of type {type(cache).__name__} is not supported with softmax sharing; use a DynamicCache or a "
        'StaticCache (generate(cache_implementation="dynamic" or "static")), or a QuantizedCache'
    )


def kv_bytes(cache: Cache) -> int:
    """Bytes of all key and value tensors that `cache` holds now."""
    return sum(tensor.numel() * tensor.element_size() for tensor in _tensors(cache))


def _tensors(cache: Cache) -> Iterator[torch.Tensor]:
    for layer in cache.layers:
        for name in ("keys", "values", "_quantized_keys", "_quantized_values"):
            yield from _parts(getattr(layer, name, None))


def _parts(stored: Any) -> Iterator[torch.Tensor]:
    """The plain tensors in what a layer stores: a tensor, or a quantized one with its scales, in some container."""
    if isinstance(stored, dict):
        stored = tuple(stored.values())
    elif hasattr(stored, "__tensor_flatten__"):
        stored = tuple(getattr(stored, name) for name in stored.__tensor_flatten__()[0])
    if isinstance(stored, torch.Tensor):
        yield stored
    elif isinstance(stored, tuple):
        for part in stored:
            yield from _parts(part)


def kv_bytes_per_token(config, followers: int, dtype: torch.dtype) -> int:
    """
    Bytes of KV cache that one token of one sequence takes, as long as no sliding window lets go of tokens.

    Args:
        config: the model's (text) configuration.
        followers: how many layers store V only; 0 for the original model.
        dtype: data type of the cache.
    """
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    per_half = heads * head_dim * dtype.itemsize
    return (2 * config.num_hidden_layers - followers) * per_half
