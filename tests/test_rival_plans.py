"""The tables of the paper: which layers Half and Full variants concern, what they save, how layers are chosen."""

from __future__ import annotations

import pytest
import torch
from conftest import loud, prompt, tiny_model
from family_models import family_model
from peft import get_peft_model
from rivals_oracle import attention_similarity
from transformers import DynamicCache, Gemma2Config, StaticCache

from peft_uniattn import (
    CLAConfig,
    LLMDropConfig,
    UniAttnConfig,
    choose_layers_to_drop,
    half_of,
    measure_attention_similarity,
    num_layers_to_drop,
    to_standalone,
)
from peft_uniattn.cache import kv_bytes

# Layers are counted from 1 in Tables 4 and 5.
CLA_HALF = {32: "[25-28], [29-32]", 42: "[30-33], [34-37], [38-41]"}
CLA_FULL = {
    32: "[17-20], [21-24], [25-28], [29-32]",
    42: "[22-25], [26-29], [30-33], [34-37], [38-41]",
}
# Table 6: LLMDrop-Full, most similar first; LLMDrop-Half is a beginning of it. Counted from 1, Gemma-2 from 0.
LLMDROP = {
    "LLaMA-2 7B": (32, 1, 6, [23, 20, 32, 27, 22, 24, 31, 29, 25, 30, 28, 26]),
    "LLaMA-3.1 8B": (32, 1, 6, [19, 22, 20, 21, 27, 23, 30, 29, 28, 26, 24, 25]),
    "Mistral 7B": (32, 1, 6, [17, 32, 31, 21, 22, 24, 29, 23, 28, 25, 27, 26]),
    "Gemma-2 9B": (42, 0, 8, [29, 26, 21, 30, 27, 40, 38, 31, 32, 33, 35, 39, 36, 37, 34]),
}


def uniattn_plan(layers: int):
    masks = Gemma2Config(num_hidden_layers=42).layer_types if layers == 42 else None
    return UniAttnConfig(follower_mask="leader").make_plan(layers, masks)


def cla_plan(layers: int):
    return CLAConfig(superblocks=[list(block) for block in uniattn_plan(layers).superblocks]).make_plan(layers)


def from_one(plan) -> str:
    return ", ".join(f"[{block[0] + 1}-{block[-1] + 1}]" for block in plan.superblocks)


@pytest.mark.parametrize("layers", [32, 42])
def test_cla_full_and_half_are_those_of_table_5(layers):
    assert from_one(cla_plan(layers)) == CLA_FULL[layers]
    assert from_one(half_of(cla_plan(layers))) == CLA_HALF[layers]


@pytest.mark.parametrize("model", LLMDROP)
def test_llmdrop_full_and_half_are_those_of_table_6(model):
    layers, first, half, table = LLMDROP[model]
    expected = [layer - first for layer in table]
    similarity = [0.0] * layers
    for rank, layer in enumerate(expected):
        similarity[layer] = 1 - 0.01 * rank
    similarity[: layers // 2] = [1.0] * (layers // 2)  # the lower half is out of the range, however similar
    plan = uniattn_plan(layers)
    assert choose_layers_to_drop(similarity, num_layers_to_drop(plan, half=False)) == expected
    assert choose_layers_to_drop(similarity, num_layers_to_drop(plan, half=True)) == expected[:half]


@pytest.mark.parametrize(
    ("layers", "rates"),
    # UniAttn, CLA-Half, CLA-Full, LLMDrop-Half, LLMDrop-Full: Tables 1 and 7.
    [(32, "81.2 81.2 62.5 81.2 62.5"), (42, "82.1 78.6 64.3 81.0 64.3")],
)
def test_retain_rates_are_those_of_tables_1_and_7(layers, rates):
    plan, cla = uniattn_plan(layers), cla_plan(layers)
    drops = [
        LLMDropConfig(layers=[*range(layers - num_layers_to_drop(plan, half=half), layers)]).make_plan(layers)
        for half in (True, False)
    ]
    plans = [plan, half_of(cla), cla, *drops]
    assert " ".join(f"{100 * plan.kv_retain_rate:.1f}" for plan in plans) == rates


def new_cache(kind, config):
    return DynamicCache(config=config) if kind == "dynamic" else StaticCache(config, max_cache_len=12)


CONFIGS = {
    "UniAttn": (UniAttnConfig(compensation="none"), 0.8125),
    "CLA-Full": (CLAConfig(), 0.625),
    "CLA-Half": (CLAConfig(start_layer=24), 0.8125),
    "LLMDrop-Full": (LLMDropConfig(layers=[*range(20, 32)]), 0.625),
    "LLMDrop-Half": (LLMDropConfig(layers=[*range(20, 26)]), 0.8125),
}


@torch.no_grad()
@pytest.mark.parametrize("convert", [lambda model: model, to_standalone], ids=["adapter", "standalone"])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("name", CONFIGS)
def test_measured_bytes_of_32_layers_are_those_of_the_tables(name, kind, convert):
    config, rate = CONFIGS[name]

    def base():
        return tiny_model(num_hidden_layers=32, hidden_size=16, intermediate_size=16)

    measured = []
    for model in (base(), convert(get_peft_model(base(), config))):
        cache = new_cache(kind, model.config)
        model(prompt(), past_key_values=cache)
        measured.append(kv_bytes(cache))
    assert measured[1] == rate * measured[0] > 0


def test_a_plan_without_superblocks_has_no_half():
    with pytest.raises(ValueError, match="has no half"):
        half_of(LLMDropConfig(layers=[1]).make_plan(6))


# Similarity.


def batch():
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, 6:] = 0
    return {"input_ids": prompt(), "attention_mask": mask}


def test_similarity_is_the_oracle_s_over_all_batches_and_no_padding(float64):
    model = loud(tiny_model())
    named = dict(model.named_parameters())
    other = {"input_ids": prompt(1, 5, seed=8)}
    measured = measure_attention_similarity(model, [batch(), other], progress=False)
    first = attention_similarity(named, model.config, batch()["input_ids"], batch()["attention_mask"])
    second = attention_similarity(named, model.config, other["input_ids"], torch.ones(1, 5))
    expected = (first * 15 + second * 5).detach() / 20
    torch.testing.assert_close(torch.tensor(measured, dtype=torch.float64), expected)


@torch.no_grad()
@pytest.mark.parametrize(
    ("family", "norm"),
    [
        ("gemma2", "post_attention_layernorm"),
        ("olmo2", "post_attention_layernorm"),
        *((family, None) for family in ("llama", "granite", "gpt_neox")),
    ],
)
def test_a_norm_or_multiplier_after_attention_counts_as_a_part_of_it(family, norm):
    model = loud(family_model(family))
    if family == "granite":
        model.config.residual_multiplier = 0.3
        for layer in model.model.layers:
            layer.residual_multiplier = 0.3
    layers = (model.gpt_neox if family == "gpt_neox" else model.model).layers
    seen = {}
    for index, layer in enumerate(layers):
        attention = layer.attention if family == "gpt_neox" else layer.self_attn
        layer.register_forward_pre_hook(lambda _, args, i=index: seen.update({(i, "x"): args[0]}))
        attention.register_forward_hook(lambda _, args, output, i=index: seen.update({(i, "a"): output[0]}))
    measured = measure_attention_similarity(model, [{"input_ids": prompt()}], progress=False)
    for index, layer in enumerate(layers):
        added = seen[index, "a"] if norm is None else getattr(layer, norm)(seen[index, "a"])
        x, y = seen[index, "x"], seen[index, "x"] + added * (0.3 if family == "granite" else 1)
        expected = ((x * y).sum(-1) / x.norm(dim=-1) / y.norm(dim=-1)).mean().item()
        assert abs(measured[index] - expected) < 1e-6


@torch.no_grad()
def test_measuring_leaves_the_model_as_it_was():
    model = loud(tiny_model()).train()
    before, hooks = model(prompt()).logits, [len(layer._forward_hooks) for layer in model.model.layers]
    measure_attention_similarity(model, [batch()], progress=False, max_batches=1)
    assert torch.equal(model(prompt()).logits, before) and model.training
    assert [len(layer._forward_hooks) for layer in model.model.layers] == hooks


def test_a_dropped_layer_is_its_input():
    model = get_peft_model(loud(tiny_model()), LLMDropConfig(layers=[2]))
    measured = measure_attention_similarity(model, [batch()], progress=False)
    assert measured[2] == pytest.approx(1) and max(measured[:2] + measured[3:]) < 0.999


def test_no_tokens_are_refused():
    with pytest.raises(ValueError, match="holds no tokens"):
        measure_attention_similarity(tiny_model(), [], progress=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_layers": 4}, "cannot be chosen from layers 3 to 5"),
        ({"num_layers": 0}, "cannot be chosen"),
        ({"num_layers": 1, "start_layer": 6}, "no range"),
        ({"num_layers": 1, "end_layer": 9}, "no range"),
    ],
)
def test_an_impossible_choice_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        choose_layers_to_drop([0.5] * 6, **arguments)


def test_the_range_is_the_users():
    assert choose_layers_to_drop([0.9, 0.8, 0.7, 0.6, 0.5, 0.4], 2, start_layer=1, end_layer=5) == [1, 2]


def test_dropping_a_layer_that_is_not_there_names_those_that_are():
    with pytest.raises(ValueError, match=r"names layer 6, but the model has 6 decoder layers \(0 to 5\)"):
        LLMDropConfig(layers=[6]).make_plan(6)
