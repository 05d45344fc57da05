"""Every allowed attention implementation gives what the oracle, or another back end, gives."""

import copy

import flash_stand_in
import pytest
import torch
from conftest import close, loud, prompt, specification, tiny_adapter, tiny_model
from oracle import unified_generate, unified_logits
from torch import nn
from transformers import DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from peft_uniattn import to_standalone
from peft_uniattn.families import BACK_ENDS
from peft_uniattn.handover import Handover

BLOCKS = [[1, 2, 3], [4, 5]]
MASKS = {
    "unpadded": None,
    "left": torch.tensor([[1] * 9, [0] * 4 + [1] * 5]),
    "right": torch.tensor([[1] * 9, [1] * 5 + [0] * 4]),
}
SLIDING = {"sliding_window": 3}
CASES = [
    ("llama", {}, "unpadded"),
    ("llama", {}, "left"),
    ("llama", {"num_key_value_heads": 4}, "right"),
    ("llama", {"num_key_value_heads": 1, "head_dim": 10}, "left"),
    ("mistral", SLIDING, "unpadded"),
    ("mistral", SLIDING, "left"),
    ("qwen2", {"use_sliding_window": True, **SLIDING, "max_window_layers": 4}, "left"),
]
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join([case[0], *case[1], case[2]]))


def build(family="llama", changes=None, back_end="sdpa", **more):
    model = tiny_model(family, **(changes or {}), **more)
    adapted = loud(tiny_adapter(model, superblocks=BLOCKS)).requires_grad_(True)
    switch(adapted, back_end)
    return adapted


def switch(model, back_end):
    getattr(model, "base_model", model).set_attn_implementation(back_end)
    assert model.config._attn_implementation == back_end


def real(mask):
    return torch.ones(2, 9, dtype=torch.bool) if mask is None else mask.bool()


def gradients(logits, mask, model):
    loss = logits[real(mask)].square().mean()
    found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    return [torch.zeros(()) if gradient is None else gradient for gradient in found]


def must_not_run(*args, **kwargs):
    pytest.fail("the back end ran")


@pytest.fixture
def flash(monkeypatch):
    """transformers' own flash_attention_2 over a stand-in for the kernels, which need a GPU."""
    flash_stand_in.install(monkeypatch)


@pytest.mark.usefixtures("float64", "flash")
class TestFlashAttention:
    @every_case
    @pytest.mark.parametrize("grad", [False, True])
    def test_logits_are_those_of_equation_14(self, case, grad):
        family, changes, padding = case
        model, mask = build(family, changes, "flash_attention_2"), MASKS[padding]
        with torch.set_grad_enabled(grad):
            logits = model(prompt(), attention_mask=mask).logits
        expected = unified_logits(**specification(model, BLOCKS), input_ids=prompt(), attention_mask=mask)
        close(logits[real(mask)], expected[real(mask)])

    @every_case
    def test_gradients_of_all_weights_are_those_of_equation_14(self, case):
        family, changes, padding = case
        model, mask = build(family, changes, "flash_attention_2").train(), MASKS[padding]
        actual = gradients(model(prompt(), attention_mask=mask).logits, mask, model)
        expected = unified_logits(**specification(model, BLOCKS), input_ids=prompt(), attention_mask=mask)
        close(actual, gradients(expected, mask, model))

    @every_case
    @pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}, {"use_cache": False}], ids=str)
    def test_generated_tokens_are_those_of_equation_14(self, case, options):
        family, changes, padding = case
        if padding == "right":
            padding = "left"
        model, mask = build(family, changes, "flash_attention_2"), MASKS[padding]
        batch = model.generate(prompt(), attention_mask=mask, max_new_tokens=5, do_sample=False, **options)
        for sequence, ids, kept in zip(batch, prompt(), real(mask), strict=True):
            alone = unified_generate(input_ids=ids[kept][None], new_tokens=5, **specification(model, BLOCKS))
            assert torch.equal(sequence[-5:], alone[0, -5:])

    def test_a_token_sees_no_further_than_the_window_in_a_cache_that_keeps_more(self):
        """Such a cache, made without the configuration, comes with no mask: the window is up to the kernel."""
        model, cache = build("mistral", SLIDING, "flash_attention_2"), DynamicCache()
        with torch.no_grad():
            logits = [model(part, past_key_values=cache).logits for part in prompt().split([6, 1, 1, 1], dim=1)]
        close(torch.cat(logits, dim=1), unified_logits(**specification(model, BLOCKS), input_ids=prompt()))

    def test_one_token_steps_of_an_unpadded_batch_reuse_the_probabilities(self, monkeypatch):
        model = build(back_end="flash_attention_2")
        given, give = [], Handover.give
        monkeypatch.setattr(Handover, "give", lambda self, i, state: given.append(state) or give(self, i, state))
        with torch.no_grad():
            cache = model(prompt()).past_key_values
            given.clear()
            model(prompt(length=1), past_key_values=cache)
        assert [state.probabilities.shape for state in given] == [(2, 4, 1, 10)] * 2


@pytest.mark.usefixtures("float64", "flash")
@pytest.mark.parametrize("convert", [lambda model: model, to_standalone], ids=["adapter", "standalone"])
def test_every_back_end_can_be_switched_to_after_wrapping(convert):
    adapted = build()
    expected = unified_logits(**specification(adapted, BLOCKS), input_ids=prompt())
    model = convert(adapted)
    for back_end in ("eager", "flash_attention_2", "sdpa", "flash_attention_2", "eager"):
        switch(model, back_end)
        close(model(prompt()).logits, expected)


@pytest.mark.parametrize("back_end", sorted(set(BACK_ENDS) - {"eager", "sdpa"}))
def test_wrapping_runs_no_kernel_that_needs_a_gpu_or_a_compiler(back_end, monkeypatch):
    base = tiny_model()
    base.config._attn_implementation = back_end
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, back_end, must_not_run)
    tiny_adapter(base)
    assert base.config._attn_implementation == back_end


@pytest.mark.usefixtures("float64")
def test_the_denominators_that_flex_attention_returns_on_a_gpu_are_not_taken_for_probabilities(monkeypatch):
    def like_flex(module, query, key, value, mask, scaling=None, **kwargs):
        heads = nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scaling, enable_gqa=True
        )
        return heads.transpose(1, 2), torch.ones(query.shape[:3])

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "flex_attention", like_flex)
    model = build()
    model.base_model.model.config._attn_implementation = "flex_attention"
    with torch.no_grad():
        logits = model(prompt(), attention_mask=torch.ones(2, 1, 9, 9)).logits
    close(logits, unified_logits(**specification(model, BLOCKS), input_ids=prompt()))


def flex(**changes):
    """A model of float32 with heads as wide as flex_attention wants them."""
    return build("mistral", {**SLIDING, "hidden_size": 64, **changes}, "flex_attention", dtype=torch.float32)


@torch.no_grad()
def test_flex_attention_equals_sdpa():
    model, mask = flex(), MASKS["left"]
    actual = model(prompt(), attention_mask=mask).logits
    switch(model, "sdpa")
    expected = model(prompt(), attention_mask=mask).logits
    torch.testing.assert_close(actual[real(mask)], expected[real(mask)], rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("convert", [lambda model: model, to_standalone], ids=["adapter", "standalone"])
def test_flex_attention_generates_what_sdpa_generates(convert):
    """Without padding: PyTorch 2.13 cannot compile decoding with it for a CPU, nor that of the base model."""
    model = convert(flex(sliding_window=None))
    tokens = model.generate(prompt(), max_new_tokens=4, do_sample=False)
    switch(model, "sdpa")
    assert torch.equal(tokens, model.generate(prompt(), max_new_tokens=4, do_sample=False))


PACKED = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])


@pytest.mark.gpu
def test_flex_attention_keeps_packed_examples_apart_on_a_gpu_as_sdpa_does():
    model, found = flex().cuda(), {}
    for back_end in ("flex_attention", "sdpa"):
        switch(model, back_end)
        logits = model(prompt(batch=1).cuda(), position_ids=PACKED.cuda(), use_cache=False).logits
        found[back_end] = logits, gradients(logits.cpu(), torch.ones(1, 9), model)
    torch.testing.assert_close(found["flex_attention"], found["sdpa"], rtol=2e-3, atol=2e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("family", [("llama", {}), ("mistral", SLIDING)], ids=["llama", "sliding"])
@pytest.mark.parametrize("padding", [*MASKS, "packed"])
def test_with_the_flash_attention_kernels_of_pytorch_bfloat16_is_as_exact_as_with_sdpa(padding, family, monkeypatch):
    flash_stand_in.install(monkeypatch, flash_stand_in.torch_dense, flash_stand_in.torch_varlen)
    model = build(*family, dtype=torch.bfloat16, hidden_size=64).cuda()
    exact = copy.deepcopy(model).double().cpu()
    mask, ids = MASKS.get(padding), prompt(batch=1 if padding == "packed" else 2)
    options = {"position_ids": PACKED} if padding == "packed" else {"attention_mask": mask}
    seen = torch.ones_like(ids) if mask is None else mask

    def run(model, back_end):
        switch(model, back_end)
        there = {key: value if value is None else value.to(model.device) for key, value in options.items()}
        logits = model(ids.to(model.device), use_cache=False, **there).logits.double().cpu()
        return [logits[seen.bool()], *(gradient.double().cpu() for gradient in gradients(logits, seen, model))]

    expected, flash, sdpa = run(exact, "sdpa"), run(model, "flash_attention_2"), run(model, "sdpa")
    for actual, other, truth in zip(flash, sdpa, expected, strict=True):
        assert (actual - truth).norm() <= 1.5 * (other - truth).norm() + 1e-3 * truth.norm()


@pytest.mark.gpu
def test_the_flash_attention_kernels_of_pytorch_generate_what_sdpa_generates(monkeypatch):
    """In float16, which is exact enough for the same tokens here."""
    flash_stand_in.install(monkeypatch, flash_stand_in.torch_dense, flash_stand_in.torch_varlen)
    model = build("mistral", SLIDING, dtype=torch.float16, hidden_size=64).cuda()
    for mask in (None, MASKS["left"].cuda()):
        tokens = []
        for back_end in ("flash_attention_2", "sdpa"):
            switch(model, back_end)
            ids = prompt().cuda()
            tokens.append(model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False))
        assert torch.equal(*tokens)


@pytest.mark.gpu
@pytest.mark.parametrize("padding", MASKS)
def test_flex_attention_equals_sdpa_on_a_gpu_in_logits_gradients_and_tokens(padding):
    model, mask = flex().cuda(), MASKS[padding]
    mask = None if mask is None else mask.cuda()
    ids, found = prompt().cuda(), {}
    for back_end in ("flex_attention", "sdpa"):
        switch(model, back_end)
        logits = model(ids, attention_mask=mask, use_cache=False).logits
        with torch.no_grad():
            inference = model(ids, attention_mask=mask).logits
        left = None if padding == "unpadded" else MASKS["left"].cuda()
        tokens = model.generate(ids, attention_mask=left, max_new_tokens=5, do_sample=False)
        seen = real(MASKS[padding]).cuda()
        found[back_end] = logits[seen], inference[seen], gradients(logits.cpu(), MASKS[padding], model), tokens
    torch.testing.assert_close(found["flex_attention"], found["sdpa"], rtol=2e-3, atol=2e-3)
