"""What followers keep in transformers' caches: values, no keys, and nothing that the caches' methods would miss."""

from types import SimpleNamespace

import pytest
import torch
from conftest import close, loud, prompt, specification, tiny_adapter, tiny_model
from oracle import unified_logits
from torch import nn
from transformers import Cache, DynamicCache, EncoderDecoderCache, LlamaConfig, StaticCache
from transformers.cache_utils import DynamicLayer

from peft_uniattn.cache import cache_values, kv_bytes, kv_bytes_per_token
from peft_uniattn.plan import make_plan

BLOCKS = [[1, 2, 3], [4, 5]]
FOLLOWERS = (2, 3, 5)
LENGTH = 9
SLIDING = ("mistral", {"sliding_window": 4})

kinds = pytest.mark.parametrize("kind", ["dynamic", "static"])


def build(family="llama", dtype=torch.float64, blocks=BLOCKS, **changes):
    return loud(tiny_adapter(tiny_model(family, dtype=dtype, **changes), superblocks=blocks))


def new_cache(kind, model, length=16):
    return DynamicCache(config=model.config) if kind == "dynamic" else StaticCache(model.config, max_cache_len=length)


def attention_of(model, layer):
    return model.base_model.model.model.layers[layer].self_attn


def bytes_of(tensor):
    return tensor.numel() * tensor.element_size()


@torch.no_grad()
def fill(model, kind="dynamic", ids=None):
    """A cache after a prefill, and what went into the attention of every layer."""
    inputs, handles = {}, []

    def watch(layer):
        def hook(module, args, kwargs):
            inputs[layer] = args[0] if args else kwargs["hidden_states"]

        return hook

    for layer in range(6):
        handles.append(attention_of(model, layer).register_forward_pre_hook(watch(layer), with_kwargs=True))
    cache = new_cache(kind, model)
    model(prompt() if ids is None else ids, past_key_values=cache)
    for handle in handles:
        handle.remove()
    return cache, inputs


@kinds
@pytest.mark.parametrize("family", [("llama", {}), ("llama", {"num_key_value_heads": 4}), SLIDING, ("qwen2", {})])
def test_followers_cache_no_keys(kind, family):
    name, changes = family
    cache, _ = fill(build(name, **changes), kind)
    for layer in range(6):
        stored = cache.layers[layer]
        if layer in FOLLOWERS:
            assert stored.values.shape[-1] == 0 and bytes_of(stored.values) == 0
        else:
            assert stored.values.shape == stored.keys.shape


@kinds
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_followers_cache_their_value_states(kind, family):
    model = build(family)
    cache, inputs = fill(model, kind)
    for layer in FOLLOWERS:
        projection = attention_of(model, layer).get_base_layer().v_proj
        value = nn.functional.linear(inputs[layer], projection.weight, projection.bias)
        heads = value.reshape(2, LENGTH, 2, 8).permute(0, 2, 1, 3)
        assert torch.equal(cache.layers[layer].keys[:, :, :LENGTH], heads)


@kinds
def test_a_leader_caches_what_it_cached_before(kind):
    model = build()
    with model.disable_adapter():
        before, _ = fill(model, kind)
    cache, _ = fill(model, kind)
    for stored, original in zip(cache.layers[:2], before.layers[:2], strict=True):
        assert torch.equal(stored.keys, original.keys)
        assert torch.equal(stored.values, original.values)


@torch.no_grad()
def test_without_the_adapter_every_layer_caches_keys_and_values():
    model = build()
    with model.disable_adapter():
        cache, _ = fill(model)
    assert kv_bytes(cache) == 2 * LENGTH * kv_bytes_per_token(model.config, 0, torch.float64)


@kinds
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("blocks", "changes"),
    [
        ([[1, 2, 3], [4, 5]], {}),
        ([[0, 1, 2, 3, 4, 5]], {}),
        ([[2, 3]], {"num_key_value_heads": 4}),
        ([[3, 4, 5]], {"num_key_value_heads": 1, "head_dim": 10}),
    ],
)
def test_a_token_takes_exactly_the_bytes_that_are_promised(kind, dtype, blocks, changes):
    model = build(dtype=dtype, blocks=blocks, **changes)
    cache, _ = fill(model, kind)
    tokens = 2 * (LENGTH if kind == "dynamic" else 16)
    followers = len(make_plan(6, superblocks=blocks).followers)
    assert kv_bytes(cache) == tokens * kv_bytes_per_token(model.config, followers, dtype)


@pytest.mark.parametrize(
    ("kv_heads", "head_dim", "followers", "dtype", "expected"),
    [
        (2, 8, 0, torch.bfloat16, 6 * 2 * 2 * 8 * 2),
        (2, 8, 3, torch.bfloat16, (6 * 2 - 3) * 2 * 8 * 2),
        (1, 10, 5, torch.float32, (6 * 2 - 5) * 1 * 10 * 4),
    ],
)
def test_bytes_per_token_count_one_half_less_per_follower(kv_heads, head_dim, followers, dtype, expected):
    config = LlamaConfig(
        hidden_size=32,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
    )
    assert kv_bytes_per_token(config, followers, dtype) == expected


def test_bytes_per_token_of_llama_8b_are_the_papers():
    config = LlamaConfig(hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8)
    plan = make_plan(32)
    assert kv_bytes_per_token(config, 0, torch.bfloat16) == 131_072
    assert kv_bytes_per_token(config, len(plan.followers), torch.bfloat16) == 106_496
    assert plan.kv_retain_rate == 106_496 / 131_072


def test_an_empty_cache_holds_no_bytes():
    assert kv_bytes(DynamicCache(config=tiny_model().config)) == 0


@kinds
def test_the_length_of_a_followers_layer_is_the_number_of_tokens(kind):
    cache, _ = fill(build(), kind)
    assert [int(cache.get_seq_length(layer)) for layer in range(6)] == [LENGTH] * 6


@torch.no_grad()
def assert_decoding_continues(model, cache, history):
    """Two more tokens on `cache` have the logits that they have after `history` without any cache."""
    step = prompt(batch=len(history), length=2, seed=7)
    logits = model(step, past_key_values=cache).logits
    expected = unified_logits(**specification(model, BLOCKS), input_ids=torch.cat([history, step], dim=1))
    close(logits, expected[:, -2:])


@pytest.mark.usefixtures("float64")
def test_decoding_continues_after_a_crop():
    model = build()
    cache, _ = fill(model)
    cache.crop(-4)
    assert_decoding_continues(model, cache, prompt()[:, :-4])


@kinds
@pytest.mark.usefixtures("float64")
def test_decoding_continues_after_beams_are_reordered(kind):
    model = build()
    ids = prompt(batch=3)
    cache, _ = fill(model, kind, ids)
    order = torch.tensor([2, 0, 0])
    cache.reorder_cache(order)
    assert_decoding_continues(model, cache, ids[order])


@pytest.mark.usefixtures("float64")
def test_decoding_continues_after_the_batch_is_repeated():
    model = build()
    cache, _ = fill(model)
    cache.batch_repeat_interleave(3)
    assert_decoding_continues(model, cache, prompt().repeat_interleave(3, dim=0))


@pytest.mark.usefixtures("float64")
def test_decoding_continues_after_a_selection_from_the_batch():
    model = build()
    ids = prompt(batch=3)
    cache, _ = fill(model, ids=ids)
    cache.batch_select_indices(torch.tensor([2, 1]))
    assert_decoding_continues(model, cache, ids[[2, 1]])


@kinds
@pytest.mark.usefixtures("float64")
def test_decoding_starts_anew_after_a_reset(kind):
    model = build()
    cache, _ = fill(model, kind)
    cache.reset()
    if cache.get_seq_length():
        pytest.skip("this transformers keeps a dynamic cache's zeros on reset, for the original model as well")
    with torch.no_grad():
        model(prompt(seed=8), past_key_values=cache)
    assert_decoding_continues(model, cache, prompt(seed=8))


@pytest.mark.usefixtures("float64")
def test_decoding_continues_after_a_crop_within_a_sliding_window():
    name, changes = SLIDING
    model = build(name, **changes)
    ids = prompt(length=3)
    cache, _ = fill(model, ids=ids)
    cache.crop(-1)
    assert_decoding_continues(model, cache, ids[:, :-1])


@kinds
@pytest.mark.usefixtures("float64")
def test_decoding_continues_after_beams_of_a_sliding_window_are_reordered(kind):
    name, changes = SLIDING
    model = build(name, **changes)
    cache, _ = fill(model, kind)
    cache.reorder_cache(torch.tensor([1, 0]))
    assert_decoding_continues(model, cache, prompt()[[1, 0]])


@pytest.mark.usefixtures("float64")
def test_decoding_continues_after_a_rollback_beyond_a_sliding_window():
    name, changes = SLIDING
    model = build(name, **changes)
    cache = new_cache("dynamic", model)
    for layer in cache.layers:
        layer.activate_past_recording()
    with torch.no_grad():
        model(prompt(), past_key_values=cache)
    cache.crop(-3)
    assert_decoding_continues(model, cache, prompt()[:, :-3])


@kinds
def test_a_follower_with_the_mask_of_a_full_leader_caches_the_values_of_all_tokens(kind):
    types = [f"{name}_attention" for name in ("sliding", "full", "sliding", "sliding", "full", "sliding")]
    base = tiny_model("qwen2", use_sliding_window=True, sliding_window=4, layer_types=types)
    model = loud(tiny_adapter(base, superblocks=BLOCKS, follower_mask="leader"))
    cache, inputs = fill(model, kind)
    for layer in FOLLOWERS:
        projection = attention_of(model, layer).get_base_layer().v_proj
        value = nn.functional.linear(inputs[layer], projection.weight, projection.bias)
        heads = value.reshape(2, LENGTH, 2, 8).permute(0, 2, 1, 3)
        assert torch.equal(cache.layers[layer].keys[:, :, :LENGTH], heads)
        assert cache.layers[layer].values.shape[-1] == 0


def test_a_cache_made_in_advance_keeps_no_room_for_keys_of_followers():
    model = build()
    cache = new_cache("static", model)
    cache.early_initialization(2, 2, 8, torch.float64, torch.device("cpu"))
    with torch.no_grad():
        model(prompt(), past_key_values=cache)
    assert kv_bytes(cache) == 2 * 16 * kv_bytes_per_token(model.config, len(FOLLOWERS), torch.float64)


@kinds
@torch.no_grad()
def test_a_cache_that_was_filled_without_the_adapter_is_refused(kind):
    model = build()
    with model.disable_adapter():
        cache, _ = fill(model, kind)
    with pytest.raises(ValueError, match="this cache was filled without softmax sharing"):
        model(prompt(length=1), past_key_values=cache)


class OtherCache(DynamicCache):
    """A cache of a kind that nobody has checked."""


class OtherLayer(DynamicLayer):
    """A cache layer of a kind that nobody has checked."""


@pytest.mark.parametrize("cache_class", [OtherCache, EncoderDecoderCache, Cache])
def test_an_unsupported_cache_is_refused_by_name(cache_class):
    cache = cache_class.__new__(cache_class)
    with pytest.raises(ValueError, match=f"type {cache_class.__name__} is not supported .* DynamicCache or a Static"):
        cache_values(cache, torch.zeros(1, 2, 3, 8), layer_idx=2, leader_idx=1)


def test_an_unsupported_cache_is_refused_by_the_model():
    with pytest.raises(ValueError, match="type OtherCache is not supported"):
        build()(prompt(), past_key_values=OtherCache(config=LlamaConfig(num_hidden_layers=6)))


def test_an_unsupported_cache_layer_is_refused_by_name():
    cache = DynamicCache()
    cache.layer_class_to_replicate = None
    cache.layers = [DynamicLayer(), DynamicLayer(), OtherLayer(), DynamicLayer(), DynamicLayer(), DynamicLayer()]
    with pytest.raises(ValueError, match="type OtherLayer is not supported"):
        build()(prompt(), past_key_values=cache)


def test_bytes_per_token_follow_from_the_hidden_size_where_no_head_dim_is_named():
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 6}
    for head_dim in ({}, {"head_dim": None}):
        assert kv_bytes_per_token(SimpleNamespace(**sizes, **head_dim), 4, torch.float16) == (2 * 6 - 4) * 2 * 8 * 2
