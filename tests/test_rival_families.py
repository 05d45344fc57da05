"""CLA and LLMDrop through the promises of the family suite; which layers of a model CLA refuses to pair."""

from __future__ import annotations

import pytest
import torch
from conftest import prompt
from family_checks import MASK, REAL, assert_close, attention_modules, in_float64, run
from family_models import BLOCKS, CASES, Case
from oracle import positions
from peft import get_peft_model
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

from peft_uniattn import CLAConfig, LLMDropConfig, to_standalone

NAMED = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "gpt_neox", "olmo2", "gpt_oss", "opt")
# Layers of two kinds that do not turn their queries alike: by RoPE of another base, or by none.
UNLIKE = ("gemma3_text", "cohere2", "exaone4")
DROPPED = (0, 3, 5)


def cases(families) -> list[Case]:
    return [case for case in CASES if case.family in families]


PAIRED = [case for case in cases(NAMED) if not (case.family in UNLIKE and case.follower_mask == "leader")]
every_case = pytest.mark.parametrize(
    ("method", "case"),
    [pytest.param("cla", case, id=f"cla-{case}") for case in PAIRED]
    + [pytest.param("llmdrop", case, id=f"llmdrop-{case}") for case in cases(NAMED) if case.follower_mask == "own"],
)


def config(method: str, case: Case):
    if method == "llmdrop":
        return LLMDropConfig(layers=list(DROPPED), task_type="CAUSAL_LM")
    return CLAConfig(superblocks=BLOCKS, follower_mask=case.follower_mask, task_type="CAUSAL_LM")


def adapter(method: str, case: Case):
    return get_peft_model(case.base(), config(method, case)).eval()


@in_float64
@torch.no_grad()
@every_case
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_cached_logits_are_the_uncached_ones(method, case, kind):
    model, ids = adapter(method, case), prompt(length=13)
    mask = torch.cat([MASK, torch.ones_like(MASK[:, :4])], dim=1)
    expected = run(model, ids, mask, use_cache=False)
    cache = DynamicCache(config=model.config) if kind == "dynamic" else StaticCache(model.config, max_cache_len=16)
    start, actual = 0, []
    for size in (9, 1, 2, 1):
        chunk, until = slice(start, start + size), start + size
        options = {"attention_mask": mask[:, :until], "position_ids": positions(mask)[:, chunk]}
        actual.append(model(ids[:, chunk], past_key_values=cache, **options).logits)
        start = until
    assert_close(torch.cat(actual, dim=1)[mask.bool()], expected)
    changed = (2, 3, 5) if method == "cla" else DROPPED
    for layer in range(6):
        stored = cache.layers[layer]
        assert (stored.keys.numel() + stored.values.numel() == 0) == (layer in changed)


@in_float64
@torch.no_grad()
@every_case
def test_the_standalone_model_is_the_adapted_one(method, case):
    model = adapter(method, case)
    standalone = to_standalone(model)
    assert_close(run(standalone, mask=MASK), run(model, mask=MASK))
    before = sum(p.numel() for p in model.parameters())
    assert sum(p.numel() for p in standalone.parameters()) < before


@torch.no_grad()
@every_case
def test_a_saved_standalone_model_is_the_same_when_loaded(method, case, tmp_path):
    standalone = to_standalone(adapter(method, case))
    standalone.save_pretrained(tmp_path)
    options = {"dtype": torch.float64, "attn_implementation": case.back_ends[-1], "experts_implementation": "eager"}
    assert_close(run(AutoModelForCausalLM.from_pretrained(tmp_path, **options)), run(standalone), 1e-5)


@torch.no_grad()
@every_case
def test_without_the_adapter_the_model_is_the_base_bit_for_bit(method, case):
    base = case.base()
    expected = run(base)
    model = get_peft_model(base, config(method, case)).eval()
    assert not torch.allclose(run(model), expected, rtol=1e-2)
    with model.disable_adapter():
        assert torch.equal(run(model), expected)


@in_float64
@torch.no_grad()
@pytest.mark.parametrize("case", PAIRED, ids=str)
def test_a_follower_with_its_leaders_weights_and_input_is_its_leader(case):
    """Decides CLA's formula without knowing an architecture: with equal queries, equal outputs."""
    model = adapter("cla", case)
    attentions = attention_modules(model)
    for follower, leader in ((2, 1), (3, 1), (5, 4)):
        for own, other in zip(
            attentions[follower].base_layer.parameters(), attentions[leader].base_layer.parameters(), strict=True
        ):
            own.copy_(other)
    seen = {}
    for index, attention in enumerate(attentions):
        if index in (1, 4):
            attention.register_forward_hook(
                lambda _, args, kwargs, output, i=index: seen.update(
                    {i: (args[0] if args else kwargs["hidden_states"], output[0])}
                ),
                with_kwargs=True,
            )
    compared = []

    def feed(index, leader):
        def before(_, args, kwargs):
            fed = seen[leader][0]
            return ((fed, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": fed})

        def after(_, args, kwargs, output):
            compared.append(index)
            assert_close(output[0][REAL], seen[leader][1][REAL])

        attentions[index].register_forward_pre_hook(before, with_kwargs=True)
        attentions[index].register_forward_hook(after, with_kwargs=True)

    for follower, leader in ((2, 1), (3, 1), (5, 4)):
        feed(follower, leader)
    run(model, mask=MASK)
    assert compared == [2, 3, 5]


@pytest.mark.parametrize("case", [case for case in cases(UNLIKE) if case.follower_mask == "leader"], ids=str)
def test_layers_that_turn_their_queries_otherwise_are_not_paired(case):
    base = case.base()
    before = str(base)
    with pytest.raises(ValueError, match=r"does not reproduce decoder layer 1 .* queries of layer 2"):
        get_peft_model(base, config("cla", case))
    assert str(base) == before


@pytest.mark.parametrize("case", cases(("smollm3",)), ids=str)
def test_a_layer_without_rope_is_not_paired_with_one_that_has_it(case):
    with pytest.raises(ValueError, match="queries of layer 3"):
        get_peft_model(case.base(), config("cla", case))
    get_peft_model(case.base(), CLAConfig(superblocks=[[1, 2], [4, 5]], task_type="CAUSAL_LM"))
