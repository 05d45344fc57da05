"""What families.py says apart from the suite: refusals by name and reason, plans over mixed masks, dropout."""

from __future__ import annotations

import pytest
import torch
import transformers
from family_models import ALL_FAMILIES, CASES, EAGER_ONLY, family_model
from packaging import version
from transformers import AutoConfig, Gemma2Config, Gemma3TextConfig, PreTrainedConfig, T5Config
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from peft_uniattn.families import FAMILIES, REFUSED, find_family
from peft_uniattn.plan import make_plan

EXISTING = sorted(REFUSED.keys() & MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.keys())


@pytest.mark.parametrize("model_type", EXISTING)
def test_an_architecture_that_cannot_share_is_refused_by_name_and_reason(model_type):
    with pytest.raises(ValueError) as caught:
        find_family(AutoConfig.for_model(model_type))
    assert f"model_type='{model_type}' is not supported: {REFUSED[model_type]}; " in str(caught.value)


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("deepseek_v3", "multi-head latent attention"),
        ("qwen3_next", "linear attention"),
        ("mamba", "recurrent"),
        ("gemma3n_text", "already share keys and values"),
        ("gptj", "attention interface"),
        ("diffllama", "of its own"),
        ("nemotron", "drop the keyword arguments"),
    ],
)
def test_the_reason_says_what_is_in_the_way(model_type, reason):
    assert reason in REFUSED[model_type]


@pytest.mark.skipif(
    version.parse(transformers.__version__) >= version.parse("5.25"), reason="may have architectures of its own"
)
def test_every_causal_language_model_of_transformers_is_supported_or_refused_by_name():
    # That one cannot be configured without arguments; its text is Gemma-4's.
    configs = map(AutoConfig.for_model, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.keys() - {"gemma4_assistant"})
    texts = [config.get_text_config(decoder=True) for config in configs]
    decoders = {text.model_type for text in texts if not text.is_encoder_decoder}
    assert len(decoders) > 100
    assert not decoders - FAMILIES.keys() - REFUSED.keys()


def test_an_encoder_decoder_is_refused():
    with pytest.raises(ValueError, match="model_type='t5' is an encoder-decoder; UniAttn needs a decoder-only model"):
        find_family(T5Config())


def test_an_unknown_architecture_is_refused():
    with pytest.raises(ValueError, match="model_type='' is not supported: nobody has checked how its attention works"):
        find_family(PreTrainedConfig())


def test_no_architecture_is_both_supported_and_refused():
    assert not FAMILIES.keys() & REFUSED.keys()


def test_every_supported_architecture_has_a_case():
    assert {case.family for case in CASES} == set(ALL_FAMILIES)


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_only_families_without_sdpa_are_tested_without_it(family):
    assert family_model(family)._supports_sdpa == (family not in EAGER_ONLY)


def test_gemma_2_has_the_superblocks_of_the_paper():
    masks = Gemma2Config(num_hidden_layers=42).layer_types
    plan = make_plan(42, masks=masks, follower_mask="leader")
    assert str(plan) == "[21-24] [25-28] [29-32] [33-36] [37-40]"
    assert {masks[leader] for leader in plan.leaders} == {"full_attention"}


def test_gemma_2_has_no_two_neighbours_with_one_mask():
    with pytest.raises(ValueError, match='follower_mask="leader"'):
        make_plan(42, masks=Gemma2Config(num_hidden_layers=42).layer_types)


def test_by_default_superblocks_of_gemma_3_stay_within_its_sliding_layers():
    masks = Gemma3TextConfig(num_hidden_layers=26).layer_types
    plan = make_plan(26, masks=masks)
    assert plan.superblocks
    assert {masks[layer] for layer in plan.leader_of} == {"sliding_attention"}


@pytest.mark.parametrize("model_type", ["starcoder2", "seed_oss", "modernbert-decoder"])
def test_followers_drop_outputs_in_training_as_their_layers_did(model_type):
    family = FAMILIES[model_type]
    attention = getattr(family_model(model_type).model.layers[0], family.attention)
    if hasattr(attention, "out_drop"):
        attention.out_drop.p = 0.5
    else:
        attention.residual_dropout = 0.5
    heads = torch.randn(1, 64, 4, 8, dtype=torch.float64)
    expected = family.project_output(attention.eval(), heads)
    dropped = family.project_output(attention.train(), heads)
    kept = dropped != 0
    assert 0.4 < kept.double().mean() < 0.6
    torch.testing.assert_close(dropped[kept], 2 * expected[kept])
