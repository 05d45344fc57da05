"""
Decoder layers as torch.compile makes them, compiled once for each kind of layer rather than once for each layer.

Compiling a whole model takes longer with every layer, and every contender is a model of its own. Layers of one kind
differ by nothing but their weights, their part of the cache and their index, so one graph serves them all: plain
layers, leaders and followers make four. What two layers could have fused is lost, one addition a layer.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from types import FunctionType
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, StaticCache

from ..attention import CACHE_NAMES
from ..families import FAMILIES, find_decoder
from ..standalone_modeling import MODEL_TYPE_PREFIX


class CompiledLayers:
    """
    The decoder layers of a model over one static cache, compiled.

    Args:
        model: base or unified.
        cache: the cache that all forwards use.
        compiler: back end of torch.compile.
    """

    def __init__(self, model: PreTrainedModel, cache: StaticCache, compiler: str = "inductor") -> None:
        decoder = find_decoder(model, FAMILIES[model.config.model_type.removeprefix(MODEL_TYPE_PREFIX)])
        self._layers = [(layer, decoder.attention(index)) for index, layer in enumerate(decoder.layers)]
        self._caches = [_only(layer, cache) for layer in cache.layers]
        # torch.compile keeps its results with a function's code, and does not ask which attention back end is allowed:
        # contenders with one code between them would get each other's.
        own = FunctionType(_forward.__code__.replace(), globals(), _forward.__name__)
        self._forward = torch.compile(own, fullgraph=True, dynamic=False, backend=compiler)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Let forwards of the model run the compiled layers."""
        with ExitStack() as stack:
            for (layer, attention), cache in zip(self._layers, self._caches, strict=True):
                stack.enter_context(_alike(attention))
                layer.forward = partial(_with_cache, self._forward, layer, cache)
                stack.callback(delattr, layer, "forward")
            yield


def _forward(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return type(layer).forward(layer, *args, **kwargs)


def _with_cache(forward: Callable, layer: nn.Module, own: StaticCache, /, *args: Any, **kwargs: Any) -> Any:
    name = next(name for name in CACHE_NAMES if kwargs.get(name) is not None)
    return forward(layer, *args, **kwargs | {name: own})


def _only(layer: Any, cache: StaticCache) -> StaticCache:
    """`cache` with this layer alone."""
    only = copy.copy(cache)
    only.layers = [layer]
    return only


@contextmanager
def _alike(attention: nn.Module) -> Iterator[None]:
    """Give every attention module one and the same index, that of the only layer of its cache."""
    before = {name: getattr(attention, name) for name in ("layer_idx", "uniattn_leader") if hasattr(attention, name)}
    for name in before:
        setattr(attention, name, 0)
    try:
        yield
    finally:
        for name, index in before.items():
            setattr(attention, name, index)
