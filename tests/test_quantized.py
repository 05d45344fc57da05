"""Bases that bitsandbytes has quantized: everything an adapter does on them, and standalone models made from them."""

import copy

import pytest
import torch
from conftest import logits, loud, moved, prompt, tiny_adapter, tiny_model
from family_models import family_model
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from peft_uniattn import UniAttnConfig, UniAttnLayer, calibrate, to_standalone
from peft_uniattn.cache import kv_bytes
from peft_uniattn.modes import evaluation_mode
from peft_uniattn.quickstart.checkpoint import load_checkpoint

bitsandbytes = pytest.importorskip("bitsandbytes")

SIZES = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 128}
QUANTIZATION = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4-double": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "int8": {"load_in_8bit": True},
}
EXACT = {"rtol": 1e-5, "atol": 1e-6}
# Activations are rounded too: to bfloat16 where a CPU has a kernel of its own for 4-bit weights, to integers in int8.
ROUNDED = {"rtol": 0.05, "atol": 0.03}

every_quantization = pytest.mark.parametrize("bits", QUANTIZATION)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("base")
    tiny_model(dtype=torch.float32, **SIZES).save_pretrained(directory)
    return directory


def quantized(checkpoint, bits, dtype=torch.float32):
    settings = dict(QUANTIZATION[bits])
    if "load_in_4bit" in settings:
        settings["bnb_4bit_compute_dtype"] = dtype
    return AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=dtype, quantization_config=BitsAndBytesConfig(**settings)
    )


def adapted(checkpoint, bits, **config):
    return tiny_adapter(quantized(checkpoint, bits), **config)


def on_dequantized_weights(checkpoint, bits, **config):
    return tiny_adapter(quantized(checkpoint, bits).dequantize(), **config)


def gradients(model):
    ids = prompt()
    model.zero_grad()
    model.train()(ids, labels=ids).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def train(model, steps):
    """Losses of stage 1 on a single batch."""
    ids, losses = prompt(), []
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()
    for _ in range(steps):
        loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def data(batches=3):
    return [{"input_ids": prompt(4, 12, seed=seed)} for seed in range(batches)]


@every_quantization
def test_wrapping_leaves_quantized_weights_as_they_were(checkpoint, bits):
    base = quantized(checkpoint, bits)
    before = {name: parameter.clone() for name, parameter in base.named_parameters()}
    tiny_adapter(base)
    for name, tensor in before.items():
        assert torch.equal(tensor, base.get_parameter(name.replace("self_attn.", "self_attn.base_layer."))), name


@every_quantization
def test_a_disabled_adapter_is_the_quantized_base_bit_for_bit(checkpoint, bits):
    expected = logits(quantized(checkpoint, bits))
    model = adapted(checkpoint, bits)
    assert not torch.equal(logits(model), expected)
    with model.disable_adapter():
        assert torch.equal(logits(model), expected)
    assert torch.equal(logits(model.unload()), expected)


@every_quantization
def test_the_compensation_stays_in_floating_point(checkpoint, bits):
    model = adapted(checkpoint, bits)
    trainable = {name: p.dtype for name, p in model.named_parameters() if p.requires_grad}
    assert len(trainable) == 4
    assert set(trainable.values()) == {torch.float32}


@every_quantization
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_stage_1_trains_on_a_base_that_computes_in_16_bits(checkpoint, bits, dtype):
    model = tiny_adapter(quantized(checkpoint, bits, dtype))
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    losses = train(model, 8)
    assert losses[-1] < losses[0] - 0.1
    assert to_standalone(model).dtype == dtype


@every_quantization
@pytest.mark.parametrize("checkpointed", [False, True])
def test_gradients_are_those_on_the_dequantized_weights(checkpoint, bits, checkpointed):
    model = adapted(checkpoint, bits)
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    actual, expected = gradients(model), gradients(on_dequantized_weights(checkpoint, bits))
    assert len(actual) == 4 and all("uniattn_W" in name for name in actual)
    torch.testing.assert_close(actual, expected, **EXACT)


@every_quantization
@pytest.mark.parametrize("method", ["ridge", "pseudoinverse"])
def test_calibration_finds_what_it_finds_on_the_dequantized_weights(bits, method, tmp_path):
    loud(tiny_model(dtype=torch.float32, **SIZES)).save_pretrained(tmp_path)
    report = calibrate(adapted(tmp_path, bits), data(), method, progress=False)
    expected = calibrate(on_dequantized_weights(tmp_path, bits), data(), method, progress=False)
    # int8 matrix products round activations too.
    tolerance = {"rtol": 0.05, "atol": 0.0} if bits == "int8" else {"rtol": 1e-3, "atol": 0.0}
    for found, known in zip(report.followers, expected.followers, strict=True):
        assert found.after < found.before or method == "pseudoinverse"
        torch.testing.assert_close([found.before, found.after], [known.before, known.after], **tolerance)


@every_quantization
def test_stage_1_after_calibration_lowers_the_loss(checkpoint, bits):
    model = adapted(checkpoint, bits)
    calibrate(model, data(), progress=False)
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    losses = train(model, 8)
    assert losses[-1] < losses[0] - 0.1
    assert all(torch.equal(model.get_parameter(name), tensor) for name, tensor in frozen.items())


@every_quantization
def test_an_adapter_reloads_onto_a_quantized_base(checkpoint, bits, tmp_path):
    model = moved(adapted(checkpoint, bits)).eval()
    expected = logits(model)
    model.save_pretrained(tmp_path)
    reloaded = PeftModel.from_pretrained(quantized(checkpoint, bits), tmp_path).eval()
    torch.testing.assert_close(logits(reloaded), expected, **EXACT)


@every_quantization
def test_generation_is_that_of_the_uncached_model_and_caches_no_keys_of_followers(checkpoint, bits):
    model = adapted(checkpoint, bits)
    out = model.generate(prompt(1, 5), max_new_tokens=6, do_sample=False, return_dict_in_generate=True)
    ids = prompt(1, 5)
    for _ in range(6):
        ids = torch.cat([ids, logits(model, ids)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(out.sequences, ids)
    base = quantized(checkpoint, bits).generate(
        prompt(1, 5), max_new_tokens=6, do_sample=False, return_dict_in_generate=True
    )
    assert kv_bytes(out.past_key_values) * 3 == kv_bytes(base.past_key_values) * 2


@every_quantization
@pytest.mark.parametrize("convert", [to_standalone, lambda model: model.merge_and_unload()], ids=["to", "merge"])
@pytest.mark.parametrize("rank", [None, 4])
def test_a_standalone_model_has_the_dequantized_weights(checkpoint, bits, convert, rank):
    model, reference = adapted(checkpoint, bits, r=rank), on_dequantized_weights(checkpoint, bits, r=rank)
    standalone = convert(model)
    assert all(p.dtype == torch.float32 and p.requires_grad for p in standalone.parameters())
    torch.testing.assert_close(logits(standalone), logits(reference), **EXACT)
    torch.testing.assert_close(logits(standalone), logits(adapted(checkpoint, bits, r=rank)), **ROUNDED)


@every_quantization
def test_making_a_standalone_model_leaves_the_adapted_model_as_it_was(checkpoint, bits):
    model = adapted(checkpoint, bits)
    expected = logits(model)
    with torch.no_grad():
        for parameter in to_standalone(model).parameters():
            parameter.zero_()
    assert torch.equal(logits(model), expected)


@every_quantization
def test_a_standalone_model_from_a_model_in_use_has_nearly_the_same_weights(checkpoint, bits):
    used = adapted(checkpoint, bits)
    logits(used)  # on some CPUs bitsandbytes now rearranges its 4-bit weights and rounds their scales
    expected = to_standalone(adapted(checkpoint, bits)).state_dict()
    for name, tensor in to_standalone(used).state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=0.01, atol=1e-6)


@every_quantization
def test_a_standalone_model_saves_and_loads_without_a_trace_of_quantization(checkpoint, bits, tmp_path):
    standalone = to_standalone(adapted(checkpoint, bits))
    standalone.save_pretrained(tmp_path)
    assert "quantization_config" not in (tmp_path / "config.json").read_text()
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(reloaded), logits(standalone), **EXACT)
    train(reloaded, 1)


@every_quantization
@pytest.mark.parametrize("family", ["phi3", "gpt_neox"])
def test_fused_and_biased_projections_are_dequantized_too(bits, family, tmp_path):
    heads = {"head_dim": None, "hidden_size": 64, "intermediate_size": 128, "vocab_size": 128}
    family_model(family, dtype=torch.float32, **heads).save_pretrained(tmp_path)
    standalone = to_standalone(adapted(tmp_path, bits))
    torch.testing.assert_close(logits(standalone), logits(on_dequantized_weights(tmp_path, bits)), **EXACT)


@every_quantization
def test_preparing_for_training_in_few_bits_works_without_reentrance(checkpoint, bits):
    options = {"gradient_checkpointing_kwargs": {"use_reentrant": False}}
    model = tiny_adapter(prepare_model_for_kbit_training(quantized(checkpoint, bits), **options))
    torch.testing.assert_close(gradients(model), gradients(on_dequantized_weights(checkpoint, bits)), **EXACT)


@every_quantization
@pytest.mark.parametrize("options", [{}, {"gradient_checkpointing_kwargs": {"use_reentrant": True}}], ids=str)
def test_preparing_for_training_in_few_bits_is_reentrant_by_default_and_refused_with_the_way_out(
    checkpoint, bits, options
):
    model = tiny_adapter(prepare_model_for_kbit_training(quantized(checkpoint, bits), **options))
    with pytest.raises(RuntimeError, match=r'use gradient_checkpointing_kwargs=\{"use_reentrant": False}'):
        gradients(model)


def test_4_bit_weights_that_were_repacked_for_inference_are_not_trained_on(checkpoint):
    model = adapted(checkpoint, "nf4")
    linear = model.base_model.model.model.layers[1].self_attn.base_layer.v_proj
    linear.weight.quant_state.packing_format_for_cpu = True  # what some CPUs' kernels want
    with pytest.raises(RuntimeError, match="load the base anew"):
        gradients(model)


def test_evaluation_mode_does_not_repack_4_bit_weights(checkpoint):
    model = quantized(checkpoint, "nf4")
    before = [module.training for module in model.modules()]
    with evaluation_mode(model):
        logits(model)
        assert not model.training and not model.model.layers[0].training
    assert [module.training for module in model.modules()] == before
    linears = [module for module in model.modules() if isinstance(module, bitsandbytes.nn.Linear4bit)]
    assert linears
    assert not any(getattr(linear.weight.quant_state, "packing_format_for_cpu", False) for linear in linears)


def test_other_quantization_is_refused_when_converting(checkpoint):
    model = adapted(checkpoint, "int8")
    model.base_model.model.config = copy.deepcopy(model.base_model.model.config)
    model.base_model.model.config.quantization_config.quant_method = "gptq"
    with pytest.raises(ValueError, match="load the base unquantized"):
        to_standalone(model)


@pytest.mark.slow
@pytest.mark.parametrize("bits", ["nf4", "int8"])
def test_a_real_quantized_checkpoint_goes_the_whole_way(bits, tmp_path):
    _, tokenizer, _ = load_checkpoint()
    base, _, _ = load_checkpoint(dtype=torch.float32)
    base.save_pretrained(tmp_path / "base")

    texts = ["The capital of France is Paris, and that of Italy is Rome.", "Water boils at 100 degrees Celsius."]
    batches = [dict(tokenizer([text], return_tensors="pt")) for text in texts * 2]
    model = get_peft_model(quantized(tmp_path / "base", bits), UniAttnConfig(task_type="CAUSAL_LM", r=16))
    assert sum(isinstance(module, UniAttnLayer) for module in model.modules()) == 12
    report = calibrate(model, batches, progress=False)
    assert all(error.after < error.before for error in report.followers)

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    losses = []
    for _ in range(3):
        for batch in batches[:2]:
            loss = model.train()(**batch, labels=batch["input_ids"]).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert sum(losses[-2:]) < sum(losses[:2])

    ids = batches[0]["input_ids"]
    standalone = to_standalone(model).eval()
    model.save_pretrained(tmp_path / "adapter")
    expected = logits(model.eval(), ids)
    dequantized = quantized(tmp_path / "base", bits).dequantize()
    reference = PeftModel.from_pretrained(dequantized, tmp_path / "adapter").eval()
    torch.testing.assert_close(logits(standalone, ids), logits(reference, ids), rtol=1e-3, atol=1e-3)
    reloaded = PeftModel.from_pretrained(quantized(tmp_path / "base", bits), tmp_path / "adapter").eval()
    torch.testing.assert_close(logits(reloaded, ids), expected, rtol=1e-3, atol=1e-3)
    answer = reloaded.generate(ids[:, :6], max_new_tokens=5, do_sample=False)
    assert answer.shape[1] == 11
