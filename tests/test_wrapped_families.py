"""Flex attention and quantized bases, for a few families that differ: the support table shows which."""

from __future__ import annotations

import family_checks as checks
import pytest
import torch
from conftest import prompt
from family_models import Case, family_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from peft_uniattn import to_standalone

pytestmark = pytest.mark.slow
# The same as under parallel wrappers.
CASES = {name: Case(name, "leader" if name == "gemma2" else "own") for name in ("llama", "gemma2", "phi3", "mixtral")}
CASES["qwen3"] = Case("qwen3")
SIZES = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16, "vocab_size": 128, "dtype": torch.float32}
families = pytest.mark.parametrize("family", CASES)


@families
@torch.no_grad()
def test_flex_attention_gives_the_logits_of_eager(family):
    case = CASES[family]
    model = case.adapt(family_model(family, back_end="eager", **SIZES, **case.masks))
    expected = checks.run(model)
    model.base_model.model.set_attn_implementation("flex_attention")
    checks.assert_close(checks.run(model), expected, 1e-4)


@families
@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_a_quantized_base_trains_w_c_and_becomes_a_standalone_model(family, bits, tmp_path):
    pytest.importorskip("bitsandbytes")
    case, ids = CASES[family], prompt()
    family_model(family, **SIZES, **case.masks).save_pretrained(tmp_path)
    base = AutoModelForCausalLM.from_pretrained(
        tmp_path,
        dtype=torch.float32,
        attn_implementation=case.back_ends[-1],
        quantization_config=BitsAndBytesConfig(**{f"load_in_{bits}": True}),
    )
    model = case.adapt(base)
    model.train()(ids, labels=ids).loss.backward()
    trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 3 and all(gradient.any() for gradient in trained.values())
    standalone = to_standalone(model).eval()
    with torch.no_grad():
        # bitsandbytes rounds activations as well.
        torch.testing.assert_close(standalone(ids).logits, model.eval()(ids).logits, rtol=0.05, atol=0.05)
        assert standalone.generate(ids, max_new_tokens=3).shape == (2, 12)
