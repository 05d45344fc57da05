"""The H2O cache in use: generate(), bytes, memory, beams, and what is refused."""

import copy
import gc

import pytest
import torch
from conftest import close, loud, prompt, specification, tiny_adapter, tiny_model
from h2o_oracle import H2OOracle
from peft import LoraConfig, get_peft_model
from test_h2o import KINDS, build, expected, left_padded, oracle_of, run
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, MistralConfig, MistralForCausalLM, StaticCache

from peft_uniattn import CLAConfig, H2OCache, LLMDropConfig, disable_h2o, enable_h2o, h2o, to_standalone
from peft_uniattn.cache import kv_bytes
from peft_uniattn.eviction import statistic
from peft_uniattn.eviction.budget import Budget
from peft_uniattn.eviction.cache import H2OLayer

FEW = {"budget": 7, "recent": 3}
RULES = (lambda seen: min(7, seen), lambda capacity: 3)
NEW = 8


def generate(model, ids, cache=None, mask=None, new: int = NEW, **options):
    mask = torch.ones_like(ids) if mask is None else mask
    options = {"do_sample": False, "max_new_tokens": new, "past_key_values": cache, **options}
    return model.generate(input_ids=ids, attention_mask=mask, **options)


def greedy(oracle: H2OOracle, ids, mask=None, new: int = NEW) -> torch.Tensor:
    next_ids, tokens = ids, [ids]
    for _ in range(new):
        next_ids = oracle(next_ids, mask)[:, -1:].argmax(-1)
        tokens.append(next_ids)
        mask = None if mask is None else torch.ones_like(next_ids)
    return torch.cat(tokens, 1)


@pytest.mark.parametrize("padded", [False, True], ids=["", "left-padded"])
@pytest.mark.parametrize("kind", KINDS)
def test_plain_generate_gives_the_tokens_of_the_oracle(float64, kind, padded):
    model, ids, mask = build(kind), prompt(2, 12), None
    if padded:
        ids, mask = left_padded(ids)
    cache = H2OCache(**FEW)
    with h2o(model):
        tokens = generate(model, ids, cache, mask)
    assert torch.equal(tokens, greedy(oracle_of(model, kind, *RULES), ids, mask))
    assert cache.get_seq_length() == 12 + NEW - 1
    assert not torch.equal(tokens, generate(model, ids, mask=mask))


def test_a_second_turn_goes_on_where_the_first_one_stopped(float64):
    model, cache, oracle = build("adapter"), H2OCache(**FEW), None
    oracle = oracle_of(model, "adapter", *RULES)
    with h2o(model):
        first = generate(model, prompt(1, 12), cache)
        wanted = greedy(oracle, prompt(1, 12))
        longer = torch.cat([first, prompt(1, 4, seed=9)], 1)
        second = generate(model, longer, cache)
    # The last token of the first turn has not been through the model yet.
    assert torch.equal(first, wanted)
    assert torch.equal(second[:, -NEW:], greedy(oracle, longer[:, -5:])[:, -NEW:])


def test_chunked_prefill_evicts_after_every_chunk(float64):
    model, ids = build("adapter"), prompt(2, 13)
    with h2o(model):
        tokens = generate(model, ids, H2OCache(**FEW), prefill_chunk_size=9)
    oracle = oracle_of(model, "adapter", *RULES)
    oracle(ids[:, :9])
    assert torch.equal(tokens[:, 9:], greedy(oracle, ids[:, 9:]))


def test_sampling_draws_from_what_the_oracle_predicts(float64):
    model, ids = build("adapter"), prompt(2, 12)
    with h2o(model):
        options = {"do_sample": True, "top_k": 0, "return_dict_in_generate": True, "output_logits": True}
        sampled = generate(model, ids, H2OCache(**FEW), **options)
    oracle = oracle_of(model, "adapter", *RULES)
    wanted = expected(oracle, sampled.sequences[:, :-1], chunks=(12, *[1] * (NEW - 1)))[:, 11:]
    close(torch.stack(sampled.logits, 1), wanted)


@pytest.mark.parametrize("kind", ["base", "adapter"])
def test_a_number_of_tokens_gives_a_padded_row_what_it_gets_alone(float64, kind):
    model, (ids, mask) = build(kind), left_padded(prompt(2, 12))
    with h2o(model):
        batch = generate(model, ids, H2OCache(budget=6), mask)
        alone = generate(model, ids[1:, 7:], H2OCache(budget=6))
    assert torch.equal(batch[1:, 12:], alone[:, 5:])


@pytest.mark.parametrize("kind", ["base", "adapter"])
def test_beam_search_takes_scores_along_with_the_beams(float64, kind):
    """Short prompts and almost no recent tokens: what is kept depends on which beam a beam came from."""
    model, ids, new = build(kind), prompt(2, 4), 14
    with h2o(model):
        options = {"num_beams": 6, "length_penalty": 0.0, "return_dict_in_generate": True, "output_scores": True}
        beams = generate(model, ids, H2OCache(budget=4, recent=1), new=new, num_return_sequences=6, **options)
    oracle = oracle_of(model, kind, lambda seen: min(4, seen), lambda capacity: 1)
    logits = expected(oracle, beams.sequences[:, :-1], chunks=(4, *[1] * (new - 1)))[:, 3:]
    chosen = beams.sequences[:, 4:, None]
    close(beams.sequences_scores, logits.log_softmax(-1).gather(-1, chosen).sum((1, 2)))


@pytest.mark.parametrize("budget", [1.0, 1000])
@pytest.mark.parametrize("back_end", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_budget_that_keeps_everything_is_bit_equal_to_no_eviction(kind, back_end, budget):
    model = build(kind, attn_implementation=back_end, dtype=torch.float32)
    ids, mask = left_padded(prompt(2, 19))
    cache, plain = H2OCache(budget), DynamicCache(config=model.config)
    evicting = run(model, cache, ids, mask)
    with torch.no_grad():
        parts, first = [], 0
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        for size in (12, 1, 1, 3, 1, 1):
            last = first + size
            now = {"attention_mask": mask[:, :last], "position_ids": positions[:, first:last]}
            parts.append(model(ids[:, first:last], past_key_values=plain, use_cache=True, **now).logits)
            first = last
    assert torch.equal(evicting, torch.cat(parts, 1))
    assert kv_bytes(cache) == kv_bytes(plain)
    for ours, stock in zip(cache.layers, plain.layers, strict=True):
        assert torch.equal(ours.keys, stock.keys) and torch.equal(ours.values, stock.values)


@pytest.mark.parametrize("kind", KINDS)
def test_the_prompt_itself_is_answered_by_the_back_end_before_anything_is_evicted(kind):
    model, ids = build(kind, dtype=torch.float32), prompt(2, 12)
    with torch.no_grad():
        plain = model(ids, use_cache=True).logits
    assert torch.equal(run(model, H2OCache(0.3), ids, chunks=(12,)), plain)


@pytest.mark.parametrize(("compression", "retained"), [(0.0, 0.8125), (0.2, 0.65), (0.4, 0.4875), (0.6, 0.325)])
def test_retain_rates_of_table_3_in_measured_bytes(compression, retained):
    """32 layers, 12 followers, 40 tokens: 65.0 %, 48.8 % and 32.5 % of the base model's cache."""
    base = tiny_model(num_hidden_layers=32, dtype=torch.float32)
    full = DynamicCache(config=base.config)
    with torch.no_grad():
        base(prompt(2, 40), past_key_values=full, use_cache=True)
    blocks = [[16, 17, 18, 19], [20, 21, 22, 23], [24, 25, 26, 27], [28, 29, 30, 31]]
    model, cache = tiny_adapter(base, superblocks=blocks), H2OCache(budget=1 - compression)
    with h2o(model):
        generate(model, prompt(2, 36), cache, new=5)
    assert cache.get_seq_length() == 40
    assert kv_bytes(cache) / kv_bytes(full) == pytest.approx(retained, abs=1e-12)


@pytest.mark.parametrize("grows", [True, False])
def test_the_base_model_keeps_its_share_at_every_step(grows):
    model, cache = build("base"), H2OCache(budget=0.5, grows=grows)
    with h2o(model):
        generate(model, prompt(1, 20), cache, new=21)
    assert all(layer.keys.shape[-2] == (20 if grows else 10) for layer in cache.layers)


def live_bytes(shape_tail: int) -> int:
    """Bytes of the distinct allocations behind all live tensors whose last dimension is `shape_tail`."""
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if type(thing) is torch.Tensor and thing.dim() == 4]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors if t.shape[-1] == shape_tail}
    return sum(storage.nbytes() for storage in storages.values())


@pytest.mark.parametrize("kind", KINDS)
def test_evicted_keys_and_values_are_released(kind):
    model, head_dim = build(kind, hidden_size=40, dtype=torch.float32), 10
    before = live_bytes(head_dim)
    full, cache = DynamicCache(config=model.config), H2OCache(0.25)
    with torch.no_grad():
        model(prompt(2, 40), past_key_values=full, use_cache=True)
        of_full = live_bytes(head_dim) - before
        assert of_full == kv_bytes(full)
        del full
        with h2o(model):
            model(prompt(2, 40), past_key_values=cache, use_cache=True)
    assert live_bytes(head_dim) - before == kv_bytes(cache) == of_full / 4


class LargestTensor(TorchDispatchMode):
    """Notes the number of elements of the largest tensor that any operator returns."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for part in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(part, torch.Tensor):
                self.elements = max(self.elements, part.numel())
        return result


@pytest.mark.parametrize("kind", KINDS)
def test_a_long_prompt_is_not_materialised_as_length_by_length(kind, monkeypatch):
    length = 384
    model = build(kind, dtype=torch.float32, num_attention_heads=2, num_key_value_heads=1, vocab_size=64)
    monkeypatch.setattr(statistic, "SCORES_AT_ONCE", 2**13)
    with LargestTensor() as largest:
        run(model, H2OCache(0.5), prompt(1, length + 1, vocab_size=64), chunks=(length, 1))
    assert 0 < largest.elements < length * length / 2


@pytest.mark.parametrize("at_once", [1, 300, 10**9])
@pytest.mark.parametrize("mask", ["causal", "boolean", "additive"])
def test_chunked_column_sums_are_the_full_ones(monkeypatch, at_once, mask):
    torch.manual_seed(0)
    query, key = torch.randn(2, 4, 7, 8, dtype=torch.float64), torch.randn(2, 2, 10, 8, dtype=torch.float64)
    visible = (torch.arange(10) <= torch.arange(7)[:, None] + 3).expand(2, 1, 7, 10).clone()
    if mask != "causal":
        visible[1, :, :, :4] = False  # padding, the first of the queries among it
    given = {
        "causal": None,
        "boolean": visible,
        "additive": torch.zeros(visible.shape, dtype=torch.float64).masked_fill(~visible, torch.finfo().min),
    }
    wanted = torch.zeros(2, 2, 10, dtype=torch.float64)
    for b in range(2):
        for h in range(4):
            for q in range(7):
                if visible[b, 0, q, q + 3]:
                    scores = key[b, h // 2] @ query[b, h, q] / 3
                    wanted[b, h // 2] += scores.masked_fill(~visible[b, 0, q], -torch.inf).softmax(0)
    monkeypatch.setattr(statistic, "SCORES_AT_ONCE", at_once)
    torch.testing.assert_close(statistic.received(query, key, given[mask], 1 / 3), wanted, rtol=1e-12, atol=1e-13)


def test_in_decode_a_leader_scores_by_the_probabilities_that_it_has_at_hand(monkeypatch):
    model, cache, computed = build("adapter"), H2OCache(**FEW), []
    original = statistic._columns_in_chunks
    with h2o(model), torch.no_grad():
        model(prompt(2, 12), past_key_values=cache, use_cache=True)
        monkeypatch.setattr(statistic, "_columns_in_chunks", lambda *a: computed.append(1) or original(*a))
        model(prompt(2, 1), past_key_values=cache, use_cache=True)
    assert model.config._attn_implementation == "sdpa"
    assert len(computed) == 1  # layer 0, which is in no Superblock; layers 1 and 4 lead


def test_scores_are_summed_in_float32_or_better():
    for dtype, wanted in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        cache = H2OCache(**FEW)
        run(build("adapter", dtype=dtype), cache, prompt(2, 19))
        assert cache.layers[0].scores.dtype == wanted and cache.layers[0].keys.dtype == dtype


def test_padding_is_kept_last_even_if_it_is_recent_and_nothing_else_got_attention():
    layer = H2OLayer(Budget(3, recent=3))
    layer.update(torch.randn(1, 1, 5, 2), torch.randn(1, 1, 5, 2))
    layer.observe(torch.zeros(1, 1, 5), torch.tensor([[[True, True, True, False, False]]]))
    assert layer.positions.tolist() == [[[0, 1, 2]]]


def test_a_mask_follows_what_each_head_has_stored():
    layer = H2OLayer(Budget(2, recent=1))
    layer.update(torch.randn(1, 2, 4, 2), torch.randn(1, 2, 4, 2))
    layer.observe(torch.tensor([[[9.0, 1, 1, 1], [1, 1, 9, 1]]]), None)
    assert layer.positions.tolist() == [[[0, 3], [2, 3]]]
    mask = torch.tensor([[[[10.0, 11, 12, 13]]]])
    assert layer.mask_of_stored(mask, 4)[0, :, 0].tolist() == [[10, 13], [10, 13], [12, 13], [12, 13]]


def test_copies_repeats_selections_and_resets_take_the_bookkeeping_along(float64):
    model, ids = build("adapter"), prompt(2, 19)
    with h2o(model), torch.no_grad():
        cache = H2OCache(**FEW)
        model(ids[:, :12], past_key_values=cache, use_cache=True)
        twin = copy.deepcopy(cache)
        twin.batch_repeat_interleave(2)
        twin.batch_select_indices(torch.tensor([3, 1, 0]))
        rows = torch.tensor([1, 0, 0])
        one, three = (
            [model(tokens[:, [t]], past_key_values=held, use_cache=True).logits for t in range(12, 16)]
            for tokens, held in ((ids, cache), (ids[rows], twin))
        )
        close(three, [step[rows] for step in one])
        cache.reset()
        again = model(ids[:, :12], past_key_values=cache, use_cache=True)
    assert again.logits.shape[1] == 12 and cache.get_seq_length() == 12 and cache.layers[2].keys.shape[-2] == 7


def test_a_disabled_adapter_evicts_as_the_base_model_does(float64):
    model, ids = build("adapter"), prompt(2, 19)
    with model.disable_adapter():
        actual = run(model, H2OCache(**FEW), ids)
    spec = {**specification(model, ()), "compensation": {}}
    close(actual, expected(H2OOracle(**spec, capacity=RULES[0], recent=RULES[1]), ids))


def test_lora_on_a_standalone_model_evicts(float64):
    standalone, ids = build("standalone"), prompt(2, 19)
    wanted = run(standalone, H2OCache(**FEW), ids)
    lora = get_peft_model(standalone, LoraConfig(task_type="CAUSAL_LM", target_modules=["v_proj"]))
    close(run(lora.eval(), H2OCache(**FEW), ids), wanted)  # LoRA starts at zero


@pytest.mark.parametrize("kind", KINDS)
def test_leaving_the_context_leaves_nothing_behind(kind):
    model = build(kind)
    attentions = [m for m in model.modules() if hasattr(m, "layer_idx") and hasattr(m, "config")]

    def state():
        hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
        names = [m.config._attn_implementation for m in attentions]
        owned = [m.config is getattr(m.config, "uniattn_original", model.config) for m in attentions]
        return hooks, names, owned

    before, plain = state(), generate(model, prompt())
    with h2o(model):
        with h2o(model):
            pass
        assert state() != before
        assert torch.equal(generate(model, prompt()), plain)  # with a cache that does not evict
        generate(model, prompt(), H2OCache(3))
    assert state() == before
    disable_h2o(model)
    assert state() == before and torch.equal(generate(model, prompt()), plain)


def test_a_copy_of_an_enabled_model_can_be_disabled():
    model = build("adapter")
    enable_h2o(model)
    twin = copy.deepcopy(model)
    disable_h2o(twin)
    with pytest.raises(RuntimeError, match="nobody told it of them"):
        generate(twin, prompt(), H2OCache(3))
    generate(model, prompt(), H2OCache(3))


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_that_does_not_tell_of_its_attention_is_refused(kind):
    model, cache = build(kind), H2OCache(3)
    with pytest.raises(RuntimeError, match="nobody told it of them"):
        generate(model, prompt(), cache)
    assert cache.get_seq_length() == 0
    with h2o(model):
        generate(model, prompt(), cache)
    with pytest.raises(RuntimeError, match="nobody told it of them"):
        generate(model, torch.cat([prompt()] * 3, 1), cache)


def test_a_layer_that_stops_telling_of_its_attention_is_noticed():
    model, cache = build("adapter"), H2OCache(3)
    enable_h2o(model)
    base = model.unload()  # removes what wrapping has put in, and with it the way to the attention
    with pytest.raises(RuntimeError, match="nobody told it"):
        generate(base, prompt(), cache)


@pytest.mark.parametrize("standalone", [False, True], ids=["adapter", "standalone"])
@pytest.mark.parametrize(
    "config", [CLAConfig(superblock_size=2), LLMDropConfig(layers=[3, 4])], ids=["CLA", "LLMDrop"]
)
def test_rivals_are_refused_by_name(config, standalone):
    model = get_peft_model(tiny_model(), config)
    model = to_standalone(model) if standalone else model
    with pytest.raises(
        ValueError, match=f"H2O is not supported with {config.peft_type.value}".replace("DROP", "Drop")
    ):
        enable_h2o(model)


class Reading(H2OCache):
    """Layer 3 reads what layer 2 has stored, as layers that share keys and values do."""

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        if layer_idx != 3:
            self.last = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        return self.last


def test_a_layer_that_reads_the_keys_of_another_is_refused():
    model = build("base")
    with h2o(model), pytest.raises(ValueError, match="decoder layer 3 attends to keys that are not in its own layer"):
        generate(model, prompt(), Reading(3))


def test_wrapping_inside_the_context_is_refused_and_changes_nothing():
    base = build("base")
    plain = generate(base, prompt())
    with h2o(base), pytest.raises(ValueError, match="hand-over"):
        tiny_adapter(base)
    assert torch.equal(generate(base, prompt()), plain)
    adapter, other = (tiny_adapter(model, superblocks=[[1, 2, 3]]) for model in (base, build("base")))
    assert torch.equal(generate(adapter, prompt()), generate(other, prompt()))


@pytest.mark.parametrize("assist", [{"prompt_lookup_num_tokens": 2}, {"assistant_model": "another"}])
def test_decoding_that_rolls_back_is_refused(assist):
    model = build("adapter")
    if "assistant_model" in assist:
        assist = {"assistant_model": tiny_model()}
    with h2o(model), pytest.raises(ValueError, match="cannot be cropped"):
        generate(model, prompt(1), H2OCache(3), **assist)
    with pytest.raises(ValueError, match="cannot be cropped"):
        H2OCache(3).crop(-1)


def test_caches_that_cannot_evict_are_refused():
    model = build("adapter")
    static = StaticCache(config=model.config, max_cache_len=32)
    with h2o(model), pytest.raises(ValueError, match="StaticCache; static, quantized and other caches cannot evict"):
        generate(model, prompt(), static)
    with h2o(model), pytest.raises(ValueError, match="StaticCache; static, quantized and other caches cannot evict"):
        generate(model, prompt(), cache_implementation="static")
    with h2o(model), pytest.raises(ValueError, match="QuantizedCache"):
        generate(model, prompt(), cache_implementation="quantized", cache_config={"backend": "fp8"})


def test_a_model_whose_layers_all_have_a_window_is_refused():
    settings = tiny_model("mistral", sliding_window=None).config.to_diff_dict() | {"sliding_window": 4}
    model = MistralForCausalLM(MistralConfig(**settings))
    with h2o(model), pytest.raises(ValueError, match="sliding window of 4 tokens"):
        generate(model, prompt(), H2OCache(3))


def test_back_ends_without_probabilities_are_refused():
    model = build("base")
    model.set_attn_implementation("flex_attention")
    with h2o(model), pytest.raises(ValueError, match="attn_implementation='flex_attention' is not supported"):
        generate(model, prompt(), H2OCache(3))


def test_a_cache_filled_under_another_plan_is_refused():
    model, cache = build("adapter"), H2OCache(5)
    with h2o(model):
        with model.disable_adapter():
            generate(model, prompt(), cache)
        with pytest.raises(ValueError, match="start with an empty one"):
            generate(model, torch.cat([prompt()] * 3, 1), cache)


def test_a_mask_that_leaves_out_evicted_tokens_is_refused():
    model, cache = build("base"), H2OCache(3)
    with h2o(model), torch.no_grad():
        model(prompt(), past_key_values=cache, use_cache=True)
        with pytest.raises(ValueError, match="attention_mask covers 4 tokens, but the H2OCache has seen 10"):
            mask = torch.ones(2, 1, 1, 4, dtype=torch.bool)
            model(prompt(2, 1), past_key_values=cache, use_cache=True, attention_mask=mask)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"budget": 0}, "budget=0 must be"),
        ({"budget": 1.5}, "budget=1.5 must be"),
        ({"budget": True}, "budget=True must be"),
        ({"budget": float("nan")}, "budget=nan must be"),
        ({"budget": "0.5"}, "budget='0.5' must be"),
        ({"budget": 4, "recent": 5}, "recent=5 is more than budget=4"),
        ({"budget": 4, "recent": -1}, "recent=-1 must be"),
        ({"budget": 4, "recent": 1.5}, "recent=1.5 must be"),
    ],
)
def test_budgets_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        H2OCache(**arguments)


def test_bookkeeping_is_eight_bytes_a_slot_of_a_deciding_layer():
    model, cache = loud(tiny_adapter(superblocks=[[1, 2, 3], [4, 5]])), H2OCache(**FEW)
    run(model, cache, prompt(2, 19))
    assert cache.bookkeeping_bytes == 3 * 2 * 2 * 7 * (8 + 4)  # float64 model: scores of 8 bytes
