"""CLA and LLMDrop as methods of PEFT: the formula, the cache, and every verb that UniAttn has."""

from __future__ import annotations

import copy
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import (
    CLASSES,
    aligned,
    close,
    logits,
    loud,
    prompt,
    tiny_adapter,
    tiny_model,
    transformers_adapters,
    weights,
)
from oracle import positions
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.utils.peft_types import PeftType
from rivals_oracle import rival_logits
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, DynamicCache, QuantizedCache, StaticCache, cache_utils

from peft_uniattn import CLAConfig, LLMDropConfig, UniAttnConfig, calibrate, to_standalone
from peft_uniattn.cache import cache_nothing, kv_bytes
from peft_uniattn.handover import Handover
from peft_uniattn.inspection import find_adapter

ROOT = Path(__file__).parents[1]
BLOCKS = [[1, 2, 3], [4, 5]]
DROPPED = [0, 3, 5]
# A configuration, and what the oracle calls it.
METHODS = {
    "cla": (lambda **more: CLAConfig(superblocks=BLOCKS, task_type="CAUSAL_LM", **more), {"superblocks": BLOCKS}),
    "llmdrop": (lambda **more: LLMDropConfig(layers=DROPPED, task_type="CAUSAL_LM", **more), {"dropped": DROPPED}),
}
OTHER = {
    "cla": CLAConfig(superblocks=[[0, 1]], task_type="CAUSAL_LM"),
    "llmdrop": LLMDropConfig(layers=[2], task_type="CAUSAL_LM"),
}
every_method = pytest.mark.parametrize("method", METHODS)
every_family = pytest.mark.parametrize("family", CLASSES)
adapter_or_standalone = pytest.mark.parametrize(
    "convert", [lambda model: model, to_standalone], ids=["adapter", "standalone"]
)
copied = pytest.mark.parametrize(
    "happens", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
caches = pytest.mark.parametrize("kind", ["dynamic", "lazy", "static"])


def adapter(method, family="llama", **changes):
    return get_peft_model(loud(tiny_model(family, **changes)), METHODS[method][0]()).eval()


def oracle(model, method, ids, **more):
    named = {
        name.removeprefix("base_model.model.").replace(".base_layer.", "."): parameter
        for name, parameter in model.named_parameters()
    }
    return rival_logits(named, model.config, ids, **METHODS[method][1], **more)


def new_cache(kind, config, length=20):
    if kind == "static":
        return StaticCache(config, max_cache_len=length)
    return DynamicCache(config=config) if kind == "dynamic" else DynamicCache()


# The formula.


@adapter_or_standalone
@pytest.mark.parametrize("back_end", ["eager", "sdpa"])
@every_family
@every_method
def test_logits_equal_the_oracle_s(method, family, back_end, convert, float64, ids):
    model = convert(adapter(method, family, attn_implementation=back_end))
    close(logits(model), oracle(model, method, ids))


def idle(name: str, method: str) -> bool:
    """Whether the parameter `name` has no effect: the norm before attention that is not there."""
    return method == "llmdrop" and any(name == f"model.layers.{layer}.input_layernorm.weight" for layer in DROPPED)


@every_family
@every_method
def test_gradients_of_full_fine_tuning_equal_the_oracle_s(method, family, float64, ids):
    model = to_standalone(adapter(method, family)).train()
    parameters = {name: parameter for name, parameter in model.named_parameters() if not idle(name, method)}
    losses = [
        F.cross_entropy(output[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        for output in (model(ids, use_cache=False).logits, oracle(model, method, ids))
    ]
    actual, expected = (torch.autograd.grad(loss, list(parameters.values())) for loss in losses)
    for name, gradient in zip(parameters, actual, strict=True):
        # Keys' biases shift all scores of a query alike, which softmax does not notice.
        assert gradient.abs().max() > 0 or name.endswith("k_proj.bias"), name
    close(dict(zip(parameters, actual, strict=True)), dict(zip(parameters, expected, strict=True)))


def gradients(model, ids) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(ids, labels=ids, use_cache=False).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@every_method
def test_gradients_with_checkpointing_are_those_without_it_and_none_is_missing(method, ids):
    model = to_standalone(adapter(method)).train()
    expected = gradients(model, ids)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    torch.testing.assert_close(gradients(model, ids), expected)


def test_a_sliding_window_limits_followers_as_their_leaders(float64):
    model, ids = adapter("cla", "mistral", sliding_window=4), prompt(length=12)
    close(logits(model, ids), oracle(model, "cla", ids))


# The cache.


@adapter_or_standalone
@caches
@every_family
@every_method
def test_cached_logits_are_those_of_the_oracle(method, family, kind, convert, float64):
    model, ids = convert(adapter(method, family)), prompt(length=13)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    cache, start, actual = new_cache(kind, model.config), 0, []
    for size in (9, 1, 2, 1):
        chunk, until = slice(start, start + size), start + size
        options = {"attention_mask": mask[:, :until], "position_ids": positions(mask)[:, chunk]}
        with torch.no_grad():
            actual.append(model(ids[:, chunk], past_key_values=cache, **options).logits)
        start = until
    expected = oracle(model, method, ids, attention_mask=mask, position_ids=positions(mask))
    close(torch.cat(actual, dim=1)[mask.bool()], expected[mask.bool()])


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@every_method
def test_cached_logits_of_a_window_are_those_of_the_oracle(method, kind, float64):
    model, ids = adapter(method, "mistral", sliding_window=4), prompt(length=12)
    cache = new_cache(kind, model.config)
    with torch.no_grad():
        parts = [model(part, past_key_values=cache).logits for part in ids.split([7, 1, 1, 2, 1], dim=1)]
    close(torch.cat(parts, dim=1), oracle(model, method, ids))


@torch.no_grad()
@caches
@every_method
def test_changed_layers_store_no_byte_and_know_the_length(method, kind, ids):
    model = adapter(method)
    cache = new_cache(kind, model.config)
    model(ids, past_key_values=cache)
    plan = find_adapter(model).plan
    changed = {*plan.followers, *plan.dropped}
    for index, layer in enumerate(cache.layers):
        assert (layer.keys.numel() + layer.values.numel() == 0) == (index in changed)
        assert int(layer.get_seq_length()) == 9
    assert int(cache.get_seq_length()) == 9


@torch.no_grad()
@every_method
def test_a_static_cache_that_was_made_in_advance_gives_its_room_back(method, ids):
    model = adapter(method)
    cache = StaticCache(model.config, max_cache_len=20)
    cache.early_initialization(2, 2, 8, torch.float64, ids.device)
    full = kv_bytes(cache)
    model(ids, past_key_values=cache)
    assert kv_bytes(cache) == full * find_adapter(model).plan.kv_retain_rate


@torch.no_grad()
@pytest.mark.skipif(not hasattr(cache_utils, "Fp8QuantizedLayer"), reason="needs transformers with an fp8 cache")
@every_method
def test_a_quantized_cache_shrinks_as_much(method, ids):
    model = adapter(method, dtype=torch.float32, hidden_size=256)
    cache, other = (QuantizedCache("fp8", model.config) for _ in range(2))
    for part in (ids, ids[:, :1]):
        model(part, past_key_values=cache)
        with model.disable_adapter():
            model(part, past_key_values=other)
    assert cache.get_seq_length() == other.get_seq_length() == 10
    assert kv_bytes(cache) == kv_bytes(other) * find_adapter(model).plan.kv_retain_rate > 0


@torch.no_grad()
@every_method
def test_crop_and_reorder_leave_the_rest_right(method, float64):
    model, ids = adapter(method), prompt(length=12)
    cache = DynamicCache(config=model.config)
    model(ids[:, :9], past_key_values=cache)
    cache.crop(-2)
    cache.reorder_cache(torch.tensor([1, 0]))
    swapped = ids[[1, 0]]
    actual = model(swapped[:, 7:], past_key_values=cache).logits
    close(actual, oracle(model, method, swapped)[:, 7:])


@torch.no_grad()
@every_method
def test_a_cache_that_was_filled_by_the_base_is_refused(method, ids):
    model = adapter(method)
    with model.disable_adapter():
        cache = model(ids, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="filled without softmax sharing"):
        model(ids[:, :1], past_key_values=cache)


def test_an_unknown_cache_is_refused():
    class Other(DynamicCache):
        pass

    with pytest.raises(ValueError, match="a cache of type Other is not supported"):
        cache_nothing(Other(), torch.zeros(1, 2, 8), 0)


@adapter_or_standalone
@pytest.mark.parametrize("strategy", [{}, {"num_beams": 3}, {"cache_implementation": "static"}], ids=str)
@every_method
def test_generation_equals_generation_without_a_cache(method, strategy, convert, ids):
    model = convert(adapter(method))
    arguments = {"max_new_tokens": 6, "do_sample": False, "num_beams": strategy.get("num_beams", 1)}
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    expected = model.generate(input_ids=ids, attention_mask=mask, use_cache=False, **arguments)
    actual = model.generate(input_ids=ids, attention_mask=mask, **{**arguments, **strategy})
    assert torch.equal(actual, expected)


# The verbs.


@every_method
def test_the_method_is_a_type_of_peft(method):
    kind = PeftType[method.upper()]
    assert METHODS[method][0]().peft_type is kind and pickle.loads(pickle.dumps(kind)) is kind


@every_method
def test_disabled_it_is_the_base_bit_for_bit(method, ids):
    base = loud(tiny_model())
    expected = logits(base)
    model = get_peft_model(base, METHODS[method][0]()).eval()
    assert not torch.allclose(logits(model), expected, rtol=1e-2)
    with model.disable_adapter():
        assert torch.equal(logits(model), expected)
        tokens = model.generate(input_ids=ids, max_new_tokens=4, do_sample=False)
    assert torch.equal(tokens, loud(tiny_model()).generate(ids, max_new_tokens=4, do_sample=False))


@every_method
def test_layers_below_the_first_changed_one_do_what_they_did(method):
    model = adapter(method)
    seen = []
    layer = model.base_model.model.model.layers[0 if method == "llmdrop" else 1]
    layer.register_forward_pre_hook(lambda *args: seen.append(args[1][0].clone()))
    logits(model)
    with model.disable_adapter():
        logits(model)
    assert torch.equal(*seen)


@every_method
def test_unload_returns_the_exact_base(method):
    base = loud(tiny_model())
    before, expected, structure = weights(base), logits(base), str(base)
    base = get_peft_model(base, METHODS[method][0]()).unload()
    assert weights(base).keys() == before.keys() and torch.equal(logits(base), expected)
    assert str(base) == structure


@every_method
def test_an_adapter_file_holds_the_plan_and_no_weights(method, tmp_path):
    adapter(method).save_pretrained(tmp_path)
    assert load_file(tmp_path / "adapter_model.safetensors") == {}
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["peft_type"] == method.upper()
    assert saved.get("superblocks", saved.get("layers")) == (BLOCKS if method == "cla" else DROPPED)
    assert isinstance(PeftConfig.from_pretrained(tmp_path), type(METHODS[method][0]()))


@every_method
def test_a_saved_adapter_is_the_same_model_when_loaded(method, tmp_path):
    model = adapter(method)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(loud(tiny_model()), tmp_path)), logits(model))


@every_method
def test_extra_modules_are_saved_with_the_plan(method, tmp_path):
    model = get_peft_model(loud(tiny_model()), METHODS[method][0](modules_to_save=["lm_head"])).eval()
    with torch.no_grad():
        next(p for p in model.parameters() if p.requires_grad).add_(1.0)
    model.save_pretrained(tmp_path)
    loaded = aligned(PeftModel.from_pretrained(loud(tiny_model()), tmp_path))
    assert torch.equal(logits(loaded), logits(aligned(model)))


@every_method
def test_loading_onto_another_base_is_refused(method, tmp_path):
    adapter(method).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="made for another base model"):
        PeftModel.from_pretrained(tiny_model(hidden_size=40), tmp_path)


@every_method
def test_saving_a_trained_base_as_an_adapter_is_refused(method, tmp_path):
    model = adapter(method)
    model.requires_grad_(True)
    with pytest.raises(ValueError, match="an adapter file holds only the plan"):
        model.save_pretrained(tmp_path)


@every_method
def test_set_adapter_switches_plans_exactly(method):
    model = adapter(method)
    first = logits(model)
    model.add_adapter("other", OTHER[method])
    assert torch.equal(logits(model), first)
    model.set_adapter("other")
    assert torch.equal(logits(model), logits(get_peft_model(loud(tiny_model()), OTHER[method])))
    model.set_adapter("default")
    assert torch.equal(logits(model), first)


@every_method
def test_deleting_the_active_adapter_leaves_the_other_in_force(method):
    model = adapter(method)
    model.add_adapter("other", OTHER[method])
    with pytest.warns(UserWarning, match="Setting active adapter to other"):
        model.delete_adapter("default")
    assert torch.equal(logits(model), logits(get_peft_model(loud(tiny_model()), OTHER[method])))


@every_method
def test_merging_in_place_is_refused(method):
    with pytest.raises(NotImplementedError, match="cannot be merged in place"):
        adapter(method).merge_adapter()


@every_method
def test_merge_and_unload_returns_the_standalone_model(method):
    model = adapter(method)
    expected = logits(model)
    assert torch.equal(logits(model.merge_and_unload()), expected)


@copied
@adapter_or_standalone
@every_method
def test_copies_give_the_same_logits(method, convert, happens):
    model = convert(adapter(method))
    assert torch.equal(logits(aligned(happens(model))), logits(aligned(model)))


@transformers_adapters
@every_method
def test_transformers_own_adapter_calls_add_it(method):
    model = loud(tiny_model())
    model.add_adapter(METHODS[method][0]())
    assert torch.equal(logits(model), logits(adapter(method)))
    assert torch.equal(logits(to_standalone(model)), logits(adapter(method)))


def test_there_is_nothing_to_calibrate():
    for method in METHODS:
        with pytest.raises(ValueError, match="has no compensation to calibrate"):
            calibrate(adapter(method), [{"input_ids": prompt()}], progress=False)


@transformers_adapters
@pytest.mark.parametrize("first", ["cla", "llmdrop"])
def test_two_methods_do_not_go_into_one_model(first):
    model = loud(tiny_model())
    model.add_adapter(METHODS[first][0](), "first")
    with pytest.raises(ValueError, match="adapter already"):
        model.add_adapter(UniAttnConfig(superblocks=BLOCKS, task_type="CAUSAL_LM"), "second")


# The standalone model.


@every_family
@every_method
def test_the_standalone_model_lacks_what_nobody_needs(method, family):
    model = to_standalone(adapter(method, family))
    names = {name for name, _ in model.named_parameters()}
    for layer in range(6):
        own = {name.split(".")[4] for name in names if name.startswith(f"model.layers.{layer}.self_attn.")}
        if method == "cla":
            assert own == ({"q_proj", "o_proj"} if layer in (2, 3, 5) else {"q_proj", "k_proj", "v_proj", "o_proj"})
        else:
            assert own == (set() if layer in DROPPED else {"q_proj", "k_proj", "v_proj", "o_proj"})


@every_method
def test_a_saved_standalone_model_loads_by_the_auto_class(method, tmp_path):
    model = to_standalone(adapter(method))
    model.save_pretrained(tmp_path)
    loaded = aligned(AutoModelForCausalLM.from_pretrained(tmp_path))
    assert type(loaded) is type(model) and torch.equal(logits(loaded), logits(aligned(model)))


@every_method
def test_lora_on_the_standalone_model_trains_and_merges(method, ids):
    model = get_peft_model(
        to_standalone(adapter(method)),
        LoraConfig(target_modules=["q_proj", "k_proj", "v_proj"], init_lora_weights=False),
    )
    model(ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    expected = logits(model)
    torch.testing.assert_close(logits(model.merge_and_unload()), expected)


WITHOUT_THE_PACKAGE = """
import json, sys, torch
sys.modules["peft_uniattn"] = None  # installed here, but as if it were not
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
ids = torch.load(sys.argv[1] + "/ids.pt")
tokens = model.generate(ids, max_new_tokens=6, do_sample=False)
torch.save((model(ids).logits, tokens), sys.argv[1] + "/out.pt")
print(json.dumps([type(model).__module__, sys.modules["peft_uniattn"] is not None]))
"""


@every_method
def test_trust_remote_code_loads_it_without_the_package(method, tmp_path, ids):
    model = to_standalone(adapter(method))
    model.save_pretrained(tmp_path)
    torch.save(ids, tmp_path / "ids.pt")
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    # Isolated mode leaves the environment's paths out, among them that of the tests.
    command = [sys.executable, "-I", "-c", WITHOUT_THE_PACKAGE, str(tmp_path)]
    module, imported = json.loads(subprocess.check_output(command, cwd=tmp_path, env=environment, text=True))
    assert module.startswith("transformers_modules.") and not imported
    actual, tokens = torch.load(tmp_path / "out.pt")
    close(actual, logits(model))
    assert torch.equal(tokens, model.generate(ids, max_new_tokens=6, do_sample=False))


# Refusals.


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([], "must be a non-empty list"),
        ([1, 1], "names a layer twice"),
        ([-1], "must be a non-empty list"),
        ("3", "must be a non-empty list"),
    ],
)
def test_impossible_layers_are_refused(layers, message):
    with pytest.raises(ValueError, match=message):
        LLMDropConfig(layers=layers)


@pytest.mark.parametrize(("layers", "message"), [([6], "names layer 6"), ([*range(6)], "keep one at least")])
def test_layers_that_do_not_fit_the_model_are_refused_before_anything_changes(layers, message):
    model = tiny_model()
    before = str(model)
    with pytest.raises(ValueError, match=message):
        get_peft_model(model, LLMDropConfig(layers=layers))
    assert str(model) == before


@every_method
def test_a_follower_without_its_leader_is_told(method):
    model = adapter(method)
    attention = model.base_model.model.model.layers[5].self_attn
    if method == "cla":
        with pytest.raises(RuntimeError, match="without its leader's hand-over"):
            attention(torch.zeros(1, 2, 32, dtype=torch.float64), position_embeddings=None, attention_mask=None)
    else:
        output, _ = attention(torch.ones(1, 2, 32, dtype=torch.float64))
        assert not output.any()


def test_reentrant_checkpointing_is_refused(ids):
    model = to_standalone(adapter("cla")).train()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    with pytest.raises(RuntimeError, match="reentrant gradient checkpointing"):
        model(ids, labels=ids, use_cache=False).loss.backward()


def test_values_are_kept_for_cla_only(ids):
    kept = []
    for model in (adapter("cla"), tiny_adapter(loud(tiny_model()), superblocks=BLOCKS)):
        handover = Handover()
        model(ids, uniattn_handover=handover)
        kept.append(handover.take(1).value is not None)
    assert kept == [True, False]
