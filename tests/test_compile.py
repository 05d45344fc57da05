"""torch.compile: one graph without breaks, no recompilation at each token, and the results of eager execution."""

import pytest
import torch
from conftest import loud, prompt, tiny_adapter, tiny_model
from torch._dynamo.utils import counters
from transformers import CompileConfig, StaticCache

from peft_uniattn import to_standalone

BLOCKS = [[1, 2]]
LEFT = torch.tensor([[1] * 9, [0] * 4 + [1] * 5])

kinds = pytest.mark.parametrize("convert", [lambda model: model, to_standalone], ids=["adapter", "standalone"])
# aot_eager does all of the tracing and nothing of the code generation.
compilers = pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
back_ends = pytest.mark.parametrize("back_end", ["eager", "sdpa"])


pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def build(convert, family="llama", **changes):
    base = tiny_model(family, dtype=torch.float32, num_hidden_layers=3, **changes)
    return convert(loud(tiny_adapter(base, superblocks=BLOCKS)))


def same(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@kinds
@compilers
@back_ends
@torch.no_grad()
def test_the_forward_is_one_graph_with_the_logits_of_eager_execution(convert, compiler, back_end):
    model = build(convert, attn_implementation=back_end)
    expected = model(prompt(), attention_mask=LEFT).logits
    compiled = torch.compile(model, fullgraph=True, backend=compiler)
    same(compiled(prompt(), attention_mask=LEFT).logits[LEFT.bool()], expected[LEFT.bool()])
    with torch.compiler.set_stance("fail_on_recompile"):
        other = compiled(prompt(seed=5), attention_mask=LEFT).logits
    same(other[LEFT.bool()], model(prompt(seed=5), attention_mask=LEFT).logits[LEFT.bool()])
    assert counters["stats"]["unique_graphs"] == 1


def step(model, call):
    model.zero_grad()
    loss = call(prompt(), labels=prompt(), use_cache=False).loss
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), found


@kinds
@compilers
@back_ends
def test_a_training_step_is_one_graph_with_the_gradients_of_eager_execution(convert, compiler, back_end):
    model = build(convert, attn_implementation=back_end).requires_grad_(True).train()
    expected = step(model, model)
    same(step(model, torch.compile(model, fullgraph=True, backend=compiler)), expected)
    assert len(expected[1]) > 20


@kinds
@compilers
def test_a_training_step_with_checkpointing_is_one_graph_too(convert, compiler):
    """By a switch of torch.compile: the hand-over is a side effect of the forward, not to be repeated."""
    model = build(convert).requires_grad_(True).train()
    expected = step(model, model)
    inner = getattr(model, "base_model", model)
    inner.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    with torch._dynamo.config.patch(skip_fwd_side_effects_in_bwd_under_checkpoint=True):
        same(step(model, torch.compile(model, fullgraph=True, backend=compiler)), expected)


def compile_config(compiler, **settings):
    mode = "default" if compiler == "inductor" else None
    config = CompileConfig(**{"fullgraph": True, "dynamic": False, "mode": mode, "backend": compiler, **settings})
    config._compile_all_devices = True  # as on a GPU, where generate() compiles by itself
    return config


@kinds
@compilers
def test_decoding_with_a_static_cache_compiles_once_and_gives_the_same_tokens(convert, compiler):
    model = build(convert)
    options = {"attention_mask": LEFT, "max_new_tokens": 10, "do_sample": False, "cache_implementation": "static"}
    first = model.generate(prompt(), compile_config=compile_config(compiler), **options)
    graphs = counters["stats"]["unique_graphs"]
    assert graphs == 1
    assert torch.equal(first, model.generate(prompt(), disable_compile=True, **options))
    with torch.compiler.set_stance("fail_on_recompile"):
        second = model.generate(prompt(seed=5), compile_config=compile_config(compiler), **options)
    assert counters["stats"]["unique_graphs"] == graphs
    assert torch.equal(second, model.generate(prompt(seed=5), disable_compile=True, **options))


def test_with_a_sliding_window_decoding_compiles_no_more_often_than_the_base_model_does():
    """
    That is once per length until dynamic shapes set in: transformers' cache counts with a Python integer there.

    With fixed shapes and one graph the base model itself fails after a few tokens.
    """
    model = build(lambda model: model, "mistral", sliding_window=4)
    options = {"max_new_tokens": 10, "do_sample": False, "cache_implementation": "static"}
    settings = {"compile_config": compile_config("aot_eager", fullgraph=False, dynamic=None)}
    tokens = model.generate(prompt(), **settings, **options)
    graphs = counters["stats"]["unique_graphs"]
    assert torch.equal(tokens, model.generate(prompt(), disable_compile=True, **options))
    torch._dynamo.reset()
    counters.clear()
    model.unload().generate(prompt(), **settings, **options)
    assert 0 < graphs <= counters["stats"]["unique_graphs"]


@kinds
@torch.no_grad()
def test_a_compiled_step_stores_no_keys_of_followers(convert):
    model = build(convert)
    cache = StaticCache(model.config, max_cache_len=16)
    model(prompt(), past_key_values=cache)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for seed in (5, 6):
        compiled(prompt(length=1, seed=seed), past_key_values=cache)
    assert [layer.values.shape[-1] for layer in cache.layers] == [8, 8, 0]
    assert int(cache.get_seq_length(2)) == 11


@pytest.mark.gpu
@kinds
def test_generate_compiles_by_itself_on_a_gpu_and_gives_the_same_tokens(convert):
    """With CUDA graphs, transformers' default there."""
    model = build(convert).cuda()
    options = {"max_new_tokens": 10, "do_sample": False, "cache_implementation": "static"}
    for seed in (2, 5):
        ids = prompt(seed=seed).cuda()
        tokens = model.generate(ids, **options)
        assert torch.equal(tokens, model.generate(ids, disable_compile=True, **options))
    assert counters["stats"]["unique_graphs"] >= 1
