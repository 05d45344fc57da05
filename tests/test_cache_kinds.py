"""Every kind of cache and every decoding method: supported and right, or refused before a wrong token."""

import pytest
import stream_stand_in
import torch
from conftest import loud, prompt, specification, tiny_adapter, tiny_model
from oracle import unified_generate
from transformers import DynamicCache, QuantizedCache, StaticCache, cache_utils
from transformers.utils import is_hqq_available, is_optimum_quanto_available

from peft_uniattn import UniAttnConfig, to_standalone
from peft_uniattn.cache import cache_values, kv_bytes

BLOCKS = [[1, 2, 3], [4, 5]]
FOLLOWERS = (2, 3, 5)
RETAINED = 1 - len(FOLLOWERS) / 6 / 2
NEW = 7
WIDE = {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}
LEFT = torch.tensor([[1] * 9, [0] * 4 + [1] * 5])

kinds = pytest.mark.parametrize("convert", [lambda model: model, to_standalone], ids=["adapter", "standalone"])
quanto = pytest.mark.skipif(not is_optimum_quanto_available(), reason="needs optimum-quanto")
fp8 = pytest.mark.skipif(not hasattr(cache_utils, "Fp8QuantizedLayer"), reason="needs transformers with an fp8 cache")
hqq = pytest.mark.skipif(not is_hqq_available(), reason="needs hqq")
quantizers = pytest.mark.parametrize(
    ("quantizer", "options"),
    [
        pytest.param("fp8", {}, id="fp8", marks=fp8),
        pytest.param("hqq", {"nbits": 8, "axis_key": 1, "axis_value": 0, "residual_length": 4}, id="hqq", marks=hqq),
        pytest.param("quanto", {"residual_length": 4}, id="quanto", marks=quanto),
    ],
)


def build(convert=lambda model: model, dtype=torch.float64, **changes):
    return convert(loud(tiny_adapter(tiny_model(dtype=dtype, **changes), superblocks=BLOCKS)))


def generate(model, ids=None, **options):
    return model.generate(prompt() if ids is None else ids, **{"max_new_tokens": NEW, "do_sample": False, **options})


def expected_tokens(model, ids=None, new_tokens=NEW):
    ids = prompt() if ids is None else ids
    return unified_generate(input_ids=ids, new_tokens=new_tokens, **specification(model, BLOCKS))


@kinds
@quantizers
def test_a_quantized_cache_saves_the_followers_keys(quantizer, options, convert):
    base = tiny_model(dtype=torch.float32, **WIDE)
    cache, other = (QuantizedCache(quantizer, base.config, **options) for _ in range(2))
    generate(base, past_key_values=other)
    generate(convert(tiny_adapter(base, superblocks=BLOCKS)), past_key_values=cache)
    assert cache.get_seq_length() == other.get_seq_length() == 9 + NEW - 1
    assert kv_bytes(cache) == RETAINED * kv_bytes(other)


@quantizers
@torch.no_grad()
def test_a_quantized_cache_keeps_the_followers_values_as_it_keeps_any_values(quantizer, options):
    """With the settings for values, although they lie in the slot for keys."""
    model = build(dtype=torch.float32, **WIDE)
    quantized, plain = QuantizedCache(quantizer, model.config, **options), DynamicCache()
    for cache in (quantized, plain):
        model(prompt(), past_key_values=cache)
    stock = QuantizedCache(quantizer, model.config, **options).layers[0]
    for index in FOLLOWERS:
        value = plain.layers[index].keys
        stock.reset()
        stock.update(value, value, 0)
        layer = quantized.layers[index]
        assert torch.equal(layer._dequantize(layer._quantized_keys), stock._dequantize(stock._quantized_values))
        assert not layer._dequantize(layer._quantized_values).numel()


@kinds
@pytest.mark.parametrize("beams", [1, 3])
def test_generation_with_a_quantized_cache_attends_to_rounded_keys_and_values(convert, beams, monkeypatch):
    """The same tokens as with an ordinary cache that gives back every stored tensor rounded."""
    if not hasattr(cache_utils, "Fp8QuantizedLayer"):
        pytest.skip("this transformers has no fp8 cache")
    model, update = build(convert, dtype=torch.float32), cache_utils.DynamicLayer.update
    options = {"num_beams": beams, "max_new_tokens": 12}
    quantized = generate(model, past_key_values=QuantizedCache("fp8", model.config), **options)
    assert not torch.equal(quantized, generate(model, **options)), "rounding makes no difference here"

    def rounded(tensor, first):
        if not tensor.numel():
            return tensor
        scale = first.abs().max() / 448
        return (tensor / scale).to(torch.float8_e4m3fn).float() * scale

    def rounding_update(self, keys, values, *args, **kwargs):
        start = self.get_seq_length() == 0
        if start:
            self.first = keys, values
        stored = update(self, keys, values, *args, **kwargs)
        return stored if start else tuple(rounded(*pair) for pair in zip(stored, self.first, strict=True))

    monkeypatch.setattr(cache_utils.DynamicLayer, "update", rounding_update)
    assert torch.equal(quantized, generate(model, **options))


@pytest.fixture
def streams(monkeypatch):
    stream_stand_in.install(monkeypatch)


DECODING = [{}, {"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 3}, {"do_sample": True, "top_k": 0}]


def tokens(model, kind, ids=None, **options):
    torch.manual_seed(11)
    return generate(model, ids, **{"cache_implementation": kind, "attention_mask": LEFT, **options})


@kinds
@pytest.mark.usefixtures("streams")
@pytest.mark.parametrize("options", DECODING, ids=str)
def test_an_offloaded_cache_gives_the_tokens_of_a_dynamic_one(convert, options):
    model = build(convert)
    assert torch.equal(tokens(model, "offloaded", **options), tokens(model, "dynamic", **options))


@kinds
@pytest.mark.usefixtures("streams")
def test_drafts_are_rolled_back_on_an_offloaded_cache(convert):
    model, ids = build(convert), prompt(batch=1, length=4).repeat(1, 4)
    options = {"attention_mask": None, "prompt_lookup_num_tokens": 3}
    assert torch.equal(tokens(model, "offloaded", ids, **options), tokens(model, "dynamic", ids, **options))


@pytest.mark.usefixtures("streams")
def test_streams_show_that_beam_search_on_an_offloaded_cache_reads_too_early_in_the_base_model():
    """Why followers take the cache's own stream away; where this fails, transformers waits by itself."""
    base = tiny_model()
    assert torch.equal(tokens(base, "offloaded"), tokens(base, "dynamic"))
    assert not torch.equal(tokens(base, "offloaded", num_beams=3), tokens(base, "dynamic", num_beams=3))


@kinds
@pytest.mark.usefixtures("streams")
def test_an_offloaded_cache_saves_the_followers_keys(convert):
    base = tiny_model()
    cache, other = DynamicCache(offloading=True), DynamicCache(offloading=True)
    generate(base, past_key_values=other)
    generate(convert(tiny_adapter(base, superblocks=BLOCKS)), past_key_values=cache)
    assert kv_bytes(cache) == RETAINED * kv_bytes(other)


def test_an_offloaded_static_cache_is_refused_in_words():
    cache = StaticCache(tiny_model().config, max_cache_len=16)
    cache.offloading = True  # not by the constructor, which needs a GPU's stream
    with pytest.raises(ValueError, match=r"an offloaded static cache is not supported .* use cache_implementation"):
        cache_values(cache, torch.zeros(1, 2, 1, 8), layer_idx=2, leader_idx=1)


@pytest.mark.gpu
@kinds
@pytest.mark.parametrize("late", [False, True], ids=["on time", "late"])
@pytest.mark.parametrize("options", DECODING, ids=str)
def test_on_a_gpu_an_offloaded_cache_gives_the_tokens_of_a_dynamic_one_also_when_copies_are_late(
    convert, options, late, monkeypatch
):
    model = build(convert).cuda()
    options = {**options, "attention_mask": LEFT.cuda()}
    expected = tokens(model, "dynamic", prompt().cuda(), **options)
    if late:
        prefetch = cache_utils.DynamicLayer.prefetch

        def slowly(layer):
            torch.cuda._sleep(20_000_000)  # about 10 ms on the stream that fetches
            prefetch(layer)

        monkeypatch.setattr(cache_utils.DynamicLayer, "prefetch", slowly)
    assert torch.equal(tokens(model, "offloaded", prompt().cuda(), **options), expected)


@pytest.mark.gpu
@kinds
def test_on_a_gpu_an_offloaded_cache_lies_on_the_cpu_without_the_followers_keys(convert):
    base = tiny_model(dtype=torch.float32).cuda()
    cache, other = DynamicCache(offloading=True), DynamicCache(offloading=True)
    generate(base, prompt().cuda(), past_key_values=other)
    generate(convert(tiny_adapter(base, superblocks=BLOCKS)), prompt().cuda(), past_key_values=cache)
    assert kv_bytes(cache) == RETAINED * kv_bytes(other)
    # All but the lowest, which has been fetched for the next token.
    assert {str(layer.keys.device) for layer in cache.layers[1:]} == {"cpu"}


@kinds
@pytest.mark.usefixtures("float64")
def test_an_assistant_with_softmax_sharing_and_one_without_draft_for_either_kind_of_model(convert):
    """A draft changes how fast tokens come, never which."""
    ids = prompt(batch=1)
    model = build(convert)
    for assistant in (tiny_model(seed=4), build()):
        assert torch.equal(generate(model, ids, assistant_model=assistant), expected_tokens(model, ids))


@kinds
@pytest.mark.usefixtures("float64")
def test_a_standalone_model_s_and_an_adapter_s_prompts_can_be_looked_up(convert):
    ids = prompt(batch=1, length=4).repeat(1, 4)
    model = build(convert)
    assert torch.equal(generate(model, ids, prompt_lookup_num_tokens=3), expected_tokens(model, ids))


@kinds
@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    "options",
    [{}, {"cache_implementation": "static"}, {"prefill_chunk_size": 4}, {"use_cache": False}],
    ids=str,
)
def test_greedy_decoding_gives_the_tokens_of_equation_14(convert, options):
    model = build(convert)
    assert torch.equal(generate(model, **options), expected_tokens(model))


@kinds
@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("options", [{"do_sample": True, "top_k": 0, "temperature": 1.5}, {"num_beams": 4}], ids=str)
def test_sampling_and_beam_search_do_not_depend_on_the_cache(convert, kind, options):
    model = build(convert)

    def run(**more):
        torch.manual_seed(11)
        return generate(model, attention_mask=LEFT, **options, **more)

    assert torch.equal(run(cache_implementation=kind), run(use_cache=False))


@kinds
@pytest.mark.usefixtures("float64")
def test_several_turns_continue_on_one_cache(convert):
    model, cache, conversation = build(convert), DynamicCache(), prompt()
    for turn in range(3):
        question = torch.cat([conversation, prompt(length=2, seed=20 + turn)], dim=1)
        conversation = generate(model, question, past_key_values=cache)
        assert torch.equal(conversation, expected_tokens(model, question))


@kinds
@pytest.mark.usefixtures("float64")
def test_a_prompt_s_cache_is_expanded_to_several_continuations(convert):
    """One prefill of a common beginning, repeated for a batch of questions, then cut back and used again."""
    model, cache, start = build(convert), DynamicCache(), prompt(batch=1)
    with torch.no_grad():
        model(start, past_key_values=cache)
    cache.batch_repeat_interleave(2)
    questions = torch.cat([start.repeat(2, 1), prompt(length=3, seed=8)], dim=1)
    assert torch.equal(generate(model, questions, past_key_values=cache), expected_tokens(model, questions))
    cache.crop(-(cache.get_seq_length() - 9))
    others = torch.cat([start.repeat(2, 1), prompt(length=2, seed=9)], dim=1)
    assert torch.equal(generate(model, others, past_key_values=cache), expected_tokens(model, others))


def empty_cache(kind, model):
    if kind == "fp8" and not hasattr(cache_utils, "Fp8QuantizedLayer"):
        pytest.skip("this transformers has no fp8 cache")
    return {
        "dynamic": lambda: DynamicCache(config=model.config),
        "static": lambda: StaticCache(model.config, max_cache_len=24),
        "fp8": lambda: QuantizedCache("fp8", model.config),
    }[kind]()


every_kind = pytest.mark.parametrize("kind", ["dynamic", "static", "fp8"])


@every_kind
@kinds
def test_a_cache_of_the_base_model_is_refused(kind, convert):
    base = tiny_model(dtype=torch.float32)
    cache = empty_cache(kind, base)
    with torch.no_grad():
        base(prompt(), past_key_values=cache)
    model = convert(tiny_adapter(base, superblocks=BLOCKS))
    with pytest.raises(ValueError, match="this cache was filled without softmax sharing, or under another plan"):
        generate(model, torch.cat([prompt(), prompt(length=2)], dim=1), past_key_values=cache)


@every_kind
def test_the_base_model_cannot_continue_on_a_cache_without_keys(kind):
    """There is nothing of ours in the base model to say so: widths differ, and PyTorch refuses."""
    model = build(dtype=torch.float32)
    cache = empty_cache(kind, model)
    with torch.no_grad():
        model(prompt(), past_key_values=cache)
        with model.disable_adapter(), pytest.raises((RuntimeError, IndexError), match=r"(?i)size|dimension|promotion"):
            model(prompt(length=1), past_key_values=cache)


@every_kind
@pytest.mark.parametrize("blocks", [[[0, 1, 2]], [[2, 3, 4]], [[1, 2], [3, 4, 5]]], ids=str)
def test_a_cache_of_another_plan_is_refused(kind, blocks):
    model = build(dtype=torch.float32)
    cache = empty_cache(kind, model)
    model.add_adapter("other", UniAttnConfig(superblocks=blocks, task_type="CAUSAL_LM"))
    with torch.no_grad():
        model(prompt(), past_key_values=cache)
        model.set_adapter("other")
        with pytest.raises((ValueError, RuntimeError, IndexError), match=r"(?i)another plan|size|dimension|promotion"):
            model(prompt(length=1), past_key_values=cache)


ENTRANCES = {
    "generate_batch": lambda model: model.generate_batch([[5, 6, 7], [8, 9]], max_new_tokens=3),
    "paged": lambda model: model.generate(prompt(), max_new_tokens=3, cache_implementation="paged"),
    "manager": lambda model: model.init_continuous_batching(),
}


@kinds
@pytest.mark.parametrize("entrance", ENTRANCES)
def test_continuous_batching_is_refused_to_the_caller(convert, entrance):
    """And not to the thread that would run it, whose errors end up in the results."""
    with pytest.raises(ValueError, match="continuous batching is not supported with softmax sharing"):
        ENTRANCES[entrance](build(convert))


def test_continuous_batching_is_refused_by_the_adapted_model_inside_and_allowed_again_without_the_adapter():
    base = tiny_model()
    model = tiny_adapter(base)
    with pytest.raises(ValueError, match="continuous batching is not supported"):
        base.generate_batch([[5, 6, 7]], max_new_tokens=3)
    assert "init_continuous_batching" not in vars(model.unload())
    assert base.init_continuous_batching.__func__ is type(base).init_continuous_batching
