"""Where W_c reads and adds: every design is its formula, calibrates to what it can mend, saves and converts."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from conftest import aligned, close, logits, loud, prompt, tiny_adapter, tiny_model
from family_checks import MASK, assert_close, in_float64, run
from family_models import BLOCKS, CASES
from oracle import unified_logits
from peft import PeftModel, get_peft_model
from rivals_oracle import designed_logits
from transformers import AutoModelForCausalLM, DynamicCache

from peft_uniattn import UniAttnConfig, calibrate, to_standalone
from peft_uniattn.calibration.solve import right_inverse

ELSEWHERE = ("ffn_output", "heads", "values_to_heads", "input_and_heads")
DESIGNS = ("attention_output", *ELSEWHERE)
SUPERBLOCKS = [[0, 1, 2], [3, 4, 5]]
# Coordinates read, coordinates added to: 32 of the hidden states, 48 of the heads (head_dim 12), 24 of the values.
SIZES = {
    **{"attention_output": (32, 32), "ffn_output": (32, 32), "heads": (32, 48), "values_to_heads": (24, 48)},
    "input_and_heads": (80, 32),
}
every_design = pytest.mark.parametrize("design", DESIGNS)
elsewhere = pytest.mark.parametrize("design", ELSEWHERE)
both_ranks = pytest.mark.parametrize("r", [None, 4], ids=["full", "low_rank"])
adapter_or_standalone = pytest.mark.parametrize(
    "convert", [lambda model: model, to_standalone], ids=["adapter", "standalone"]
)


def adapter(design, **config):
    return tiny_adapter(loud(tiny_model(head_dim=12)), compensation=design, **config)


def oracle(model, design, ids):
    named, factors = {}, {}
    for name, parameter in model.named_parameters():
        name = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
        if match := re.search(r"layers\.(\d+)\.self_attn\.(uniattn_|compensation)", name):
            layer = int(match[1])
            factors[layer] = factors[layer] @ parameter.T if layer in factors else parameter.T
        else:
            named[name] = parameter
    arguments = {"superblocks": SUPERBLOCKS, "compensation": factors}
    return designed_logits(named, model.config, ids, design=design, **arguments)


@adapter_or_standalone
@both_ranks
@elsewhere
def test_logits_equal_the_oracle_s(design, r, convert, float64, ids):
    model = loud(adapter(design, r=r))
    expected = oracle(model, design, ids)
    close(logits(convert(model)), expected)


@elsewhere
def test_gradients_equal_the_oracle_s(design, float64, ids):
    model = to_standalone(loud(adapter(design))).train()
    design = model.config.compensation
    parameters = dict(model.named_parameters())
    losses = [
        F.cross_entropy(output[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        for output in (model(ids, use_cache=False).logits, oracle(model, design, ids))
    ]
    actual, expected = (torch.autograd.grad(loss, list(parameters.values())) for loss in losses)
    assert all(gradient.abs().max() > 0 for gradient in actual)
    close(actual, expected)


@pytest.mark.parametrize("checkpointing", [False, True])
@every_design
def test_stage_1_trains_the_compensation_and_nothing_else(design, checkpointing, ids):
    model = adapter(design).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model(ids, labels=ids, use_cache=False).loss.backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert len(trained) == 4 and all("uniattn_W" in name for name in trained)


@torch.no_grad()
@adapter_or_standalone
@every_design
def test_cached_logits_are_the_uncached_ones(design, convert, float64):
    model, ids = convert(loud(adapter(design))), prompt(length=12)
    cache = DynamicCache(config=model.config)
    parts = [model(part, past_key_values=cache).logits for part in ids.split([7, 1, 3, 1], dim=1)]
    close(torch.cat(parts, dim=1), model(ids, use_cache=False).logits)


@every_design
def test_w_c_has_the_sizes_of_what_it_reads_and_adds_to(design):
    inputs, outputs = SIZES[design]
    layer = adapter(design).base_model.model.model.layers[1].self_attn
    assert layer.uniattn_W["default"].weight.shape == (outputs, inputs)
    low = adapter(design, r=4).base_model.model.model.layers[1].self_attn
    assert low.uniattn_A["default"].weight.shape == (4, inputs)
    assert low.uniattn_B["default"].weight.shape == (outputs, 4)


@both_ranks
@every_design
def test_saved_adapters_and_standalone_models_are_the_same_when_loaded(design, r, tmp_path):
    model = adapter(design, r=r)
    expected = logits(aligned(model))
    model.save_pretrained(tmp_path / "adapter")
    loaded = aligned(PeftModel.from_pretrained(loud(tiny_model(head_dim=12)), tmp_path / "adapter"))
    assert torch.equal(logits(loaded), expected)
    to_standalone(model).save_pretrained(tmp_path / "model")
    standalone = aligned(AutoModelForCausalLM.from_pretrained(tmp_path / "model"))
    if design == "input_and_heads":  # part of it is in W_o now
        assert standalone.config.compensation == "attention_output"
        torch.testing.assert_close(logits(standalone), expected)
    else:
        assert standalone.config.compensation == design
        assert torch.equal(logits(standalone), expected)


@every_design
def test_unload_returns_the_exact_base_and_disabling_leaves_it(design):
    base = loud(tiny_model(head_dim=12))
    expected, hooks = logits(base), [len(layer._forward_hooks) for layer in base.model.layers]
    model = tiny_adapter(base, compensation=design)
    with model.disable_adapter():
        assert torch.equal(logits(model), expected)
    base = model.unload()
    assert torch.equal(logits(base), expected)
    assert [len(layer._forward_hooks) for layer in base.model.layers] == hooks


def test_adapters_of_two_designs_live_side_by_side():
    model = adapter("ffn_output")
    first = logits(model)
    torch.manual_seed(1)
    config = UniAttnConfig(superblocks=SUPERBLOCKS, compensation="heads", init_weights=False, task_type="CAUSAL_LM")
    model.add_adapter("other", config)
    model.set_adapter("other")
    assert not torch.allclose(logits(model), first)
    model.set_adapter("default")
    assert torch.equal(logits(model), first)


@in_float64
@torch.no_grad()
@pytest.mark.parametrize(
    "case",
    [c for c in CASES if c.family in ("gemma2", "phi3", "gpt_neox", "qwen3", "opt", "olmo")],
    ids=str,
)
@elsewhere
def test_every_family_converts_every_design(design, case):
    base = case.base()
    config = UniAttnConfig(
        superblocks=BLOCKS,
        follower_mask=case.follower_mask,
        compensation=design,
        init_weights=False,
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(base, config).eval()
    expected = run(model, mask=MASK)
    for name, parameter in model.named_parameters():
        if "uniattn_" in name:
            parameter.normal_(std=0.25)
    changed = run(model, mask=MASK)
    assert not torch.allclose(changed, expected, rtol=1e-3)
    assert_close(run(to_standalone(model), mask=MASK), changed)


# No compensation.


def test_without_compensation_it_is_softmax_sharing_alone(float64, ids):
    model = adapter("none")
    named = {
        name.removeprefix("base_model.model.").replace(".base_layer.", "."): parameter
        for name, parameter in model.named_parameters()
    }
    expected = unified_logits(named, model.config, ids, superblocks=SUPERBLOCKS)
    assert not [name for name in named if "uniattn_" in name]
    close(logits(model), expected)
    close(logits(to_standalone(model)), expected)
    assert not [name for name, _ in to_standalone(model).named_parameters() if "compensation" in name]


def test_a_compensation_of_zero_is_none_until_it_is_trained():
    assert torch.equal(logits(adapter("attention_output", init_weights=True)), logits(adapter("none")))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"compensation": "mlp"}, "compensation='mlp' must be one of"),
        ({"compensation": "none", "r": 4}, "r=4 is the rank"),
    ],
)
def test_impossible_designs_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        UniAttnConfig(**config)


def test_there_is_no_compensation_to_calibrate():
    with pytest.raises(ValueError, match="has no compensation to calibrate"):
        calibrate(adapter("none"), [{"input_ids": prompt()}], progress=False)


# Calibration.


def attention_of(model, layer, ids):
    """Input and output of a layer's attention, the stream before the layer and the stream after it; (tokens, …)."""
    seen = {}
    block = model.base_model.model.model.layers[layer]
    handles = [
        block.register_forward_pre_hook(lambda _, args: seen.update(before=args[0])),
        block.register_forward_hook(lambda _, args, output: seen.update(after=output)),
        block.self_attn.register_forward_hook(
            lambda _, args, kwargs, output: seen.update(x=kwargs["hidden_states"], output=output[0]), with_kwargs=True
        ),
        block.self_attn.base_layer.o_proj.register_forward_pre_hook(lambda _, args: seen.update(heads=args[0])),
    ]
    logits(model, ids)
    for handle in handles:
        handle.remove()
    return {name: tensor.flatten(0, 1) for name, tensor in seen.items()}


@torch.no_grad()
@every_design
def test_calibration_solves_the_least_squares_problem_of_its_design(design, float64):
    """The lowest follower, whose inputs do not depend on W_c: residuals as small as torch's own least squares gets."""
    ids = prompt(16, 12, seed=5)
    model = adapter(design, superblocks=[[1, 2]], init_weights=True)
    layer = 2
    with model.disable_adapter():
        original = attention_of(model, layer, ids)
    unified = attention_of(model, layer, ids)
    attention = model.base_model.model.model.layers[layer].self_attn.base_layer
    x = unified["x"] if design != "values_to_heads" else attention.v_proj(unified["x"])
    if design == "input_and_heads":
        x = torch.cat([x, unified["heads"]], dim=1)
    if design == "ffn_output":
        target = original["after"] - unified["after"]
    else:
        target = original["before"] + original["output"] - unified["before"] - unified["output"]
    best = (target - x @ torch.linalg.lstsq(x, target).solution).norm()

    report = calibrate(model, [{"input_ids": ids}], ridge=1e-12, progress=False)
    calibrated = attention_of(model, layer, ids)
    key = "after" if design == "ffn_output" else "output"
    left = original[key] - calibrated[key]
    if design != "ffn_output":
        left = left + original["before"] - calibrated["before"]
    assert left.norm() == pytest.approx(best.item(), rel=1e-6)
    assert left.norm() < 0.99 * target.norm()
    scale = original["output"].norm().item()
    (follower,) = report.followers
    assert follower.before == pytest.approx(target.norm().item() / scale)
    assert follower.after == pytest.approx(left.norm().item() / scale, rel=1e-6)


@pytest.mark.parametrize("method", ["ridge", "pseudoinverse"])
@both_ranks
@every_design
def test_calibration_lowers_every_follower_s_error(design, r, method):
    model = adapter(design, r=r, init_weights=True)
    batches = [{"input_ids": prompt(16, 40, seed=seed)} for seed in range(3)]
    report = calibrate(model, batches, method, progress=False)
    assert [follower.layer for follower in report.followers] == [1, 2, 4, 5]
    if method == "ridge":
        assert all(follower.after < follower.before for follower in report.followers)
    assert not torch.equal(logits(model), logits(adapter(design, r=r, init_weights=True)))


@pytest.mark.parametrize("ridge", [None, 1e-12])
def test_the_right_inverse_reaches_whatever_can_be_reached(ridge):
    generator = torch.Generator().manual_seed(0)
    wide = torch.randn(48, 32, dtype=torch.float64, generator=generator)
    close(right_inverse(wide, 1e-13 if ridge else None) @ wide, torch.eye(32, dtype=torch.float64))
    narrow = torch.randn(16, 32, dtype=torch.float64, generator=generator)
    target = torch.randn(5, 32, dtype=torch.float64, generator=generator)
    best = torch.linalg.lstsq(narrow.T, target.T).solution.T
    torch.testing.assert_close(target @ right_inverse(narrow, ridge), best, rtol=1e-6, atol=1e-8)
