"""
What every supported family has to do, one function per promise; each raises an AssertionError where it is broken.

None of this uses the package's own knowledge of families: values, outputs and compensation are computed here from
the weights, probabilities are those that the model's own eager attention returns.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import wraps
from pathlib import Path

import pytest
import stream_stand_in
import torch
import torch.nn.functional as F
from conftest import prompt
from family_models import BLOCKS, SINKS_APART, Case
from oracle import Float64Throughout, positions
from peft import PeftModel
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    Cache,
    DynamicCache,
    PreTrainedModel,
    QuantizedCache,
    StaticCache,
    cache_utils,
)

from peft_uniattn import UniAttnLayer, to_standalone
from peft_uniattn.cache import kv_bytes
from peft_uniattn.families import find_decoder, find_family
from peft_uniattn.probe import check_sharing

OUTPUT_PROJECTIONS = ("o_proj", "dense", "out_proj", "Wo")
LEADER_OF = {follower: block[0] for block in BLOCKS for follower in block[1:]}
# Longer than every window and chunk.
LENGTH = 9
IDS = prompt(length=LENGTH)
MASK = torch.tensor([[1] * LENGTH, [0] * 3 + [1] * (LENGTH - 3)])
# A fully masked row has no meaning: back ends fill it as they like, transformers' eager one with NaN in float64.
REAL, EVERY = MASK.bool(), torch.ones_like(MASK)


def in_float64(check: Callable) -> Callable:
    """Run a check without the float32 that transformers uses inside, so that equal means equal up to 1e-9."""

    @wraps(check)
    def wrapper(*args, **kwargs):
        with Float64Throughout():
            return check(*args, **kwargs)

    return wrapper


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = 1e-9) -> None:
    assert actual.shape == expected.shape
    error, scale = (actual - expected).abs().max(), expected.abs().max()
    assert error <= tolerance * scale, f"an error of {error:.1e} in values up to {scale:.1e}"


def attention_modules(model: nn.Module) -> list[nn.Module]:
    """The attention modules bottom to top, wrapped where they are."""
    names = ("self_attn", "attention", "attn")
    layers = next(
        module.layers for module in model.modules() if isinstance(getattr(module, "layers", None), nn.ModuleList)
    )
    return [next(getattr(layer, name) for name in names if hasattr(layer, name)) for layer in layers]


@contextmanager
def sink_scales(model: nn.Module) -> Iterator[dict[int, Tensor]]:
    """By layer index, what sinks leave of softmax, (batch, heads, length, 1), of what runs in eager."""
    file = sys.modules[type(attention_modules(model)[0]).__module__]
    original, scales = file.eager_attention_forward, {}

    def recording(module, query, key, value, attention_mask, scaling, **kwargs):
        key_of_head = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
        scores = query @ key_of_head.transpose(2, 3) * scaling + attention_mask
        sinks = module.sinks.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scales[module.layer_idx] = 1 - torch.cat([scores, sinks], dim=-1).softmax(-1)[..., -1:]
        return original(module, query, key, value, attention_mask, scaling=scaling, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(file, "eager_attention_forward", recording)
        yield scales


class Watch:
    """What went into every attention module while the `with` lasts, what came out, and the probabilities."""

    def __init__(self, model: nn.Module) -> None:
        self.modules = attention_modules(model)
        self.inputs: dict[int, Tensor] = {}
        self.outputs: dict[int, Tensor] = {}
        self.probabilities: dict[int, Tensor | None] = {}

    def __enter__(self) -> Watch:
        def watch(layer: int):
            def hook(_, args, kwargs, output):
                self.inputs[layer] = args[0] if args else kwargs["hidden_states"]
                self.outputs[layer], self.probabilities[layer] = output

            return hook

        self.handles = [
            module.register_forward_hook(watch(layer), with_kwargs=True) for layer, module in enumerate(self.modules)
        ]
        return self

    def __exit__(self, *_) -> None:
        for handle in self.handles:
            handle.remove()


def run(model: nn.Module, ids: Tensor = IDS, mask: Tensor = EVERY, **options) -> Tensor:
    """Logits of all real tokens, (tokens, vocabulary)."""
    position_ids = positions(mask)
    return model(ids, attention_mask=mask, position_ids=position_ids, **options).logits[mask.bool()]


def separate_values(attention: nn.Module, x: Tensor) -> Tensor:
    """V of shape (batch, key/value heads, length, head_dim), straight from the weights."""
    config = attention.config
    if hasattr(attention, "v_proj"):
        weight, bias = attention.v_proj.weight, attention.v_proj.bias
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    elif hasattr(attention, "qkv_proj"):  # all queries, all keys, all values
        heads = config.num_key_value_heads
        rows = slice((config.num_attention_heads + heads) * config.head_dim, None)
        weight, bias = attention.qkv_proj.weight[rows], None
    else:  # query, key and value of each head in turn
        heads, fused = config.num_attention_heads, attention.query_key_value
        weight = fused.weight.unflatten(0, (heads, 3, -1))[:, 2].flatten(0, 1)
        bias = fused.bias.unflatten(0, (heads, 3, -1))[:, 2].flatten()
    value = F.linear(x, weight, bias)
    if (clip := getattr(config, "clip_qkv", None)) is not None:
        value = value.clamp(-clip, clip)
    return value.unflatten(-1, (heads, -1)).transpose(1, 2)


def expected_output(layer: UniAttnLayer, x: Tensor, probabilities: Tensor) -> Tensor:
    """s·V·W_o + x·W_c (equation 14)."""
    attention = layer.get_base_layer()
    value = separate_values(attention, x)
    value = value.repeat_interleave(probabilities.shape[1] // value.shape[1], dim=1)
    projection = next(getattr(attention, name) for name in OUTPUT_PROJECTIONS if hasattr(attention, name))
    output = F.linear((probabilities @ value).transpose(1, 2).flatten(2), projection.weight, projection.bias)
    return output + x @ layer.uniattn_W["default"].weight.T


def check_probe(case: Case) -> None:
    """A follower made of a layer's own V and W_o reproduces that layer; a layer that does more is refused."""
    model = case.base()
    decoder = find_decoder(model, find_family(model.config))
    expected = run(model).detach()
    check_sharing(model, decoder, [*range(6)])
    assert torch.equal(run(model), expected), "the probe changed the model"

    attention = attention_modules(model)[2]
    forward = attention.forward
    attention.forward = lambda *args, **kwargs: (1.1 * forward(*args, **kwargs)[0], None)
    with pytest.raises(ValueError, match="does not reproduce decoder layer 2"):
        check_sharing(model, decoder, [*range(6)])


@torch.no_grad()
def check_disabled(case: Case, back_end: str) -> None:
    """Without the adapter the model is the base bit for bit; with it, it is not."""
    base = case.base(back_end)
    expected = run(base)
    model = case.adapt(base)
    assert not torch.allclose(run(model), expected, rtol=1e-2)
    with model.disable_adapter():
        assert torch.equal(run(model), expected)


def check_leader(case: Case, back_end: str) -> None:
    """Layers up to the lowest leader do bit for bit what they did before, with autograd and without."""
    model = case.adapter(back_end)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            with model.disable_adapter(), Watch(model) as base:
                run(model)
            with Watch(model) as adapted:
                run(model)
        assert all(torch.equal(adapted.outputs[layer], base.outputs[layer]) for layer in (0, 1))


@in_float64
def check_reconstruction(case: Case, back_end: str) -> None:
    """A follower's output is s·V·W_o + x·W_c, s being what the leader's own eager attention returns."""
    model = case.adapter(back_end)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            apart = sink_scales(model) if case.family in SINKS_APART else nullcontext({})
            with apart as scales, Watch(model) as watch:
                run(model, mask=MASK, use_cache=False)
            probabilities = watch.probabilities
            if back_end != "eager":
                model.base_model.model.set_attn_implementation("eager")
                with Watch(model) as eager:
                    run(model, mask=MASK, use_cache=False)
                model.base_model.model.set_attn_implementation(back_end)
                probabilities = eager.probabilities
        for follower, leader in LEADER_OF.items():
            s = probabilities[leader] * scales.get(leader, 1)
            expected = expected_output(watch.modules[follower], watch.inputs[follower], s)
            assert_close(watch.outputs[follower][REAL], expected[REAL])
            assert_close(probabilities[follower], probabilities[leader])


def check_output_attentions(case: Case) -> None:
    """`output_attentions=True` returns one tensor a layer, a follower's being its leader's."""
    model = case.adapter("eager")
    attentions = model(IDS, output_attentions=True).attentions
    assert len(attentions) == 6
    for follower, leader in LEADER_OF.items():
        assert_close(attentions[follower], attentions[leader], 1e-6)


@in_float64
@torch.no_grad()
def check_cache(case: Case, back_end: str, kind: str) -> None:
    """Tokens given one by one or a few at a time to a cache have the logits that they have without; no keys cached."""
    model = case.adapter(back_end)
    ids = prompt(length=LENGTH + 4)
    mask = torch.cat([MASK, torch.ones_like(MASK[:, :4])], dim=1)
    expected = run(model, ids, mask, use_cache=False)
    config = model.config
    cache = DynamicCache(config=config) if kind == "dynamic" else StaticCache(config, max_cache_len=LENGTH + 7)
    start = 0
    actual = []
    for size in (LENGTH, 1, 2, 1):
        chunk, until = slice(start, start + size), start + size
        options = {"attention_mask": mask[:, :until], "position_ids": positions(mask)[:, chunk]}
        actual.append(model(ids[:, chunk], past_key_values=cache, **options).logits)
        start = until
    assert_close(torch.cat(actual, dim=1)[mask.bool()], expected)
    for layer in range(6):
        width = cache.layers[layer].values.shape[-1]
        assert (width == 0) == (layer in LEADER_OF), f"layer {layer} caches values of width {width}"


def check_offloaded(case: Case, back_end: str) -> None:
    """Tokens, of beams too, are the same from an offloaded cache, whose copies are late (stream_stand_in.py)."""
    model = case.adapter(back_end)
    options = {"attention_mask": MASK, "max_new_tokens": 4, "do_sample": False}
    for beams in (1, 2):
        expected = model.generate(IDS, num_beams=beams, **options)
        with pytest.MonkeyPatch.context() as patch:
            stream_stand_in.install(patch)
            actual = model.generate(IDS, num_beams=beams, cache_implementation="offloaded", **options)
        assert torch.equal(actual, expected)


@torch.no_grad()
def check_quantized_cache(case: Case, back_end: str) -> None:
    """A cache that quantizes: the right logits where it rounds to 32 bits, and no keys of followers where to 8."""
    model = case.adapter(back_end)

    def after_two_steps(cache: Cache) -> Tensor:
        model(IDS, past_key_values=cache)
        return model(prompt(length=1, seed=3), past_key_values=cache).logits

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache_utils.Fp8QuantizedLayer, "fp8_dtype", torch.float32)
        actual = after_two_steps(QuantizedCache("fp8", model.config))
    assert_close(actual, after_two_steps(DynamicCache(config=model.config)), 1e-4)
    shared, own = (QuantizedCache("fp8", model.config) for _ in range(2))
    after_two_steps(shared)
    with model.disable_adapter():
        after_two_steps(own)
    assert kv_bytes(shared) == kv_bytes(own) * (1 - len(LEADER_OF) / 6 / 2)


@in_float64
@torch.no_grad()
def check_padding(case: Case, back_end: str) -> None:
    """A sequence that is padded on the left, beside a longer one, has the logits that it has alone."""
    model = case.adapter(back_end)
    alone = run(model, IDS[1:, REAL[1]], MASK[1:, REAL[1]])
    assert_close(run(model, mask=MASK)[-len(alone) :], alone)


def leader_gradient(model: nn.Module, direction: dict[str, Tensor]) -> Tensor:
    parameters = dict(model.named_parameters())
    chosen = [parameters[name] for name in direction]
    gradients = torch.autograd.grad(run(model, mask=MASK).square().mean(), chosen, allow_unused=True)
    pairs = zip(gradients, direction.values(), strict=True)
    return sum((gradient * step).sum() for gradient, step in pairs if gradient is not None)


@in_float64
def check_gradient(case: Case, back_end: str) -> None:
    """The gradient of a leader's attention is that of the function which the model computes, by finite differences."""
    model = case.adapter(back_end)
    leader = attention_modules(model)[1]
    inside = {id(parameter) for parameter in leader.parameters()}
    torch.manual_seed(5)
    direction = {
        name: 1e-6 * torch.randn_like(parameter.requires_grad_(True))
        for name, parameter in model.named_parameters()
        if id(parameter) in inside
    }
    actual = leader_gradient(model, direction)
    losses = []
    with torch.no_grad():
        for sign in (1, -2):
            for name, parameter in model.named_parameters():
                if name in direction:
                    parameter.add_(direction[name], alpha=sign)
            losses.append(run(model, mask=MASK).square().mean())
    assert_close(actual.detach(), (losses[0] - losses[1]) / 2, 1e-5)


def check_checkpointing(case: Case, back_end: str) -> None:
    """Two forwards before one backward have the same gradients with non-reentrant checkpointing as without."""
    model = case.adapter(back_end).requires_grad_(True).train()

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        losses = [run(model, prompt(seed=seed)).square().mean() for seed in (5, 6)]
        sum(losses).backward()
        return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}

    expected = gradients()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    actual = gradients()
    assert actual.keys() == expected.keys()
    for name, gradient in actual.items():
        assert torch.allclose(gradient, expected[name], rtol=1e-11, atol=1e-12), f"the gradient of {name} differs"


@torch.no_grad()
def check_saving(case: Case, folder: Path) -> None:
    """A saved adapter, loaded onto the base, is the same model."""
    model = case.adapter()
    model.save_pretrained(folder)
    assert torch.equal(run(PeftModel.from_pretrained(case.base(), folder)), run(model))


@in_float64
@torch.no_grad()
def check_standalone(case: Case, back_end: str) -> None:
    """The standalone model is the adapted model, and its followers have no queries and keys."""
    model = case.adapter(back_end)
    standalone = to_standalone(model)
    assert_close(run(standalone, mask=MASK), run(model, mask=MASK))
    for follower in LEADER_OF:
        names = {name for name, _ in attention_modules(standalone)[follower].named_parameters()}
        left = {"v_proj", *OUTPUT_PROJECTIONS, "compensation", "sinks"}
        assert {name.split(".")[0] for name in names} <= left


@torch.no_grad()
def check_standalone_saving(case: Case, folder: Path) -> PreTrainedModel:
    """A saved standalone model, loaded by transformers' auto class, is the same model."""
    standalone = to_standalone(case.adapter())
    standalone.save_pretrained(folder)
    options = {"dtype": torch.float64, "attn_implementation": case.back_ends[-1], "experts_implementation": "eager"}
    loaded = AutoModelForCausalLM.from_pretrained(folder, **options)
    assert type(loaded) is type(standalone)
    assert_close(run(loaded), run(standalone), 1e-5)
    return loaded


@torch.no_grad()
def check_compile(case: Case, back_end: str) -> None:
    """The compiled model, one graph, has the logits of the eager one."""
    torch._dynamo.reset()
    model = case.adapter(back_end)
    # The one way to mix experts that neither branches on data nor lacks float64.
    model.base_model.model.set_experts_implementation("batched_mm")
    expected = run(model)
    # aot_eager does all of the tracing and nothing of the code generation, which takes minutes.
    assert_close(run(torch.compile(model, fullgraph=True, backend="aot_eager")), expected, 1e-9)
