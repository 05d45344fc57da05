"""A hundred thousand decoded tokens and a thousand adapters: nothing grows, and nothing drifts."""

from __future__ import annotations

import copy
import gc
import os

import pytest
import torch
from conftest import aligned, changed, logits, loud, tiny_adapter, tiny_model, weights
from peft import get_peft_model
from torch import nn
from transformers import DynamicCache

from peft_uniattn import H2OCache, UniAttnConfig, UniAttnLayer, h2o, to_standalone
from peft_uniattn.cache import kv_bytes

WINDOW, LAYERS = 8, 3
SIZES = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": LAYERS, "max_position_embeddings": 10**6}
# What a token can see through all layers, each of which looks back one window.
REACH = LAYERS * (WINDOW - 1) + 1
MEGABYTE = 2**20
PLANS = [
    {"superblocks": [[0, 1, 2], [3, 4]]},
    {"superblocks": [[1, 2, 3]], "r": 2},
    {"superblocks": [[2, 3]], "compensation": "ffn_output"},
    {"superblocks": [[4, 5]], "compensation": "heads"},
]


def decoder(family: str, **settings):
    return to_standalone(loud(tiny_adapter(tiny_model(family, **SIZES, **settings), superblocks=[[1, 2]])))


class Footprint:
    """Of this process: resident bytes, living tensors, and all objects that Python's collector knows of."""

    def __init__(self) -> None:
        gc.collect()
        objects = gc.get_objects()
        self.objects = len(objects)
        self.tensors = sum(1 for thing in objects if issubclass(type(thing), torch.Tensor))
        with open("/proc/self/statm") as file:
            self.resident = int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def check_same_as(self, before: Footprint, more: int = 8 * MEGABYTE) -> None:
        assert self.tensors <= before.tensors + 5, (before.tensors, self.tensors)
        assert self.objects <= before.objects + 500, (before.objects, self.objects)
        assert self.resident <= before.resident + more, (before.resident, self.resident)


@torch.no_grad()
def decode(model, cache, steps: int, watch, every: int = 10_000) -> torch.Tensor:
    """Greedy tokens after a first one, each fed back; `watch(tokens so far, last logits)` now and then."""
    tokens = torch.zeros(1, steps + 1, dtype=torch.long)
    tokens[0, 0] = 2
    for step in range(steps):
        position = torch.tensor([[step]])
        out = model(tokens[:, step : step + 1], past_key_values=cache, position_ids=position, use_cache=True)
        # Greedy tokens alone would soon go round in circles.
        tokens[0, step + 1] = (out.logits[0, -1].argmax() + step * step) % 97
        if (step + 1) % every == 0:
            watch(tokens[:, : step + 1], out.logits[0, -1])
    return tokens


@pytest.mark.slow
@pytest.mark.parametrize("steps", [100_000])
def test_decoding_with_a_sliding_window_neither_grows_nor_drifts(steps):
    model = decoder("mistral", sliding_window=WINDOW)
    fresh = decoder("mistral", sliding_window=WINDOW)
    cache, footprints, sizes = DynamicCache(config=model.config), [], set()

    def watch(tokens, last):
        seen = tokens.shape[1]
        positions = torch.arange(seen - REACH, seen)[None]
        with torch.no_grad():
            expected = fresh(tokens[:, -REACH:], position_ids=positions, use_cache=False).logits[0, -1]
        torch.testing.assert_close(last, expected, rtol=1e-6, atol=1e-6)
        sizes.add(kv_bytes(cache))
        footprints.append(Footprint())

    decode(model, cache, steps, watch)
    assert cache.get_seq_length() == steps
    assert len(sizes) == 1
    footprints[-1].check_same_as(footprints[1])


@pytest.mark.slow
@pytest.mark.parametrize("steps", [100_000])
def test_decoding_with_a_cache_that_evicts_neither_grows_nor_drifts(steps):
    """The cache is a function of all that went before, so a second model that has decoded nothing takes it over."""
    model, fresh = decoder("llama"), decoder("llama")
    cache, footprints, sizes = H2OCache(budget=16, recent=8), [], set()

    def watch(tokens, last):
        assert last.isfinite().all()
        sizes.add((kv_bytes(cache), cache.bookkeeping_bytes))
        footprints.append(Footprint())

    with h2o(model), h2o(fresh), torch.no_grad():
        tokens = decode(model, cache, steps, watch)
        newest = {int(layer.positions.max()) for layer in cache.layers if hasattr(layer, "positions")}
        assert newest == {steps - 1}
        continued = {"input_ids": tokens[:, -1:], "position_ids": torch.tensor([[steps]]), "use_cache": True}
        copied = copy.deepcopy(cache)
        assert torch.equal(
            fresh(**continued, past_key_values=copied).logits, model(**continued, past_key_values=cache).logits
        )
    assert cache.get_seq_length() == steps + 1
    assert len(sizes) == 1
    footprints[-1].check_same_as(footprints[1])


def hooks(model: nn.Module) -> dict[str, int]:
    return {
        name: len(module._forward_hooks) + len(module._forward_pre_hooks) + len(module._backward_hooks)
        for name, module in model.named_modules()
    }


def cycles(model, count: int, cycle) -> None:
    """Run `cycle(model, number)` again and again; the later ones leave what the first ones left."""
    for number in range(4 * len(PLANS)):
        cycle(model, number)
    before, hooked, modules = Footprint(), hooks(model), [type(module) for module in model.modules()]
    for number in range(count):
        cycle(model, number)
    Footprint().check_same_as(before)
    assert hooks(model) == hooked
    assert [type(module) for module in model.modules()] == modules


@pytest.mark.slow
@pytest.mark.parametrize("count", [1000])
def test_adapters_that_come_and_go_leave_nothing_behind(count):
    model = aligned(tiny_adapter(**PLANS[0]))
    before, expected = weights(model), logits(model)

    def cycle(model, number):
        name = f"number{number}"
        model.add_adapter(name, UniAttnConfig(**PLANS[number % len(PLANS)], init_weights=False))
        model.set_adapter(name)
        assert not torch.equal(logits(model), expected)
        model.set_adapter("default")
        model.delete_adapter(name)

    cycles(model, count, cycle)
    # Layers that an adapter has wrapped stay so, as in PEFT's other methods.
    found = {name.replace(".base_layer.", "."): tensor for name, tensor in weights(model).items()}
    assert not changed({name.replace(".base_layer.", "."): tensor for name, tensor in before.items()}, found)
    assert torch.equal(logits(model), expected)
    assert torch.equal(logits(aligned(tiny_adapter(**PLANS[0]))), expected), "a model that never had another adapter"


@pytest.mark.slow
@pytest.mark.parametrize("count", [1000])
def test_a_base_that_is_wrapped_and_unwrapped_stays_what_it_was(count):
    base = aligned(tiny_model())
    before, expected = weights(base), logits(base)

    def cycle(base, number):
        model = get_peft_model(base, UniAttnConfig(**PLANS[number % len(PLANS)], init_weights=False))
        assert not torch.equal(logits(model), expected)
        assert model.unload() is base

    cycles(base, count, cycle)
    assert not any(isinstance(module, UniAttnLayer) for module in base.modules())
    assert not changed(before, weights(base))
    assert torch.equal(logits(base), expected)
