"""Shared softmax against the oracle: values, gradients, and what leaders and followers do and leave alone."""

import math
from collections import Counter

import pytest
import torch
from conftest import close, loud, prompt, specification, tiny_adapter, tiny_model
from oracle import positions, unified_logits
from peft import get_peft_model
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from peft_uniattn import UniAttnConfig, UniAttnLayer
from peft_uniattn.attention import apply_probabilities, decode_probabilities, leader_attention, original_config
from peft_uniattn.handover import HANDOVER, Handover

pytestmark = pytest.mark.usefixtures("float64")

# Layer 0 is ordinary, 1 and 4 lead.
BLOCKS = [[1, 2, 3], [4, 5]]
MASKS = {
    "unpadded": None,
    "left": torch.tensor([[1] * 9, [0] * 4 + [1] * 5]),
    "right": torch.tensor([[1] * 9, [1] * 5 + [0] * 4]),
}
MHA = {"num_key_value_heads": 4}
MQA = {"num_key_value_heads": 1, "head_dim": 10}
SLIDING = {"sliding_window": 3}
HALF_SLIDING = {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 4}
# Both leaders of BLOCKS see everything, all their followers and layer 0 have a window.
LEADERS_FULL = {
    "use_sliding_window": True,
    "sliding_window": 3,
    "layer_types": [f"{kind}_attention" for kind in ("sliding", "full", "sliding", "sliding", "full", "sliding")],
}
CASES = [
    ("llama", {}, "sdpa", "unpadded", None),
    ("llama", {}, "eager", "left", None),
    ("llama", MHA, "sdpa", "right", 3),
    ("llama", MHA, "eager", "unpadded", 3),
    ("llama", MQA, "sdpa", "left", None),
    ("llama", MQA, "eager", "right", None),
    ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}, "sdpa", "left", 3),
    ("mistral", {"sliding_window": None}, "sdpa", "left", None),
    ("mistral", {"sliding_window": None, **MHA}, "eager", "right", 3),
    ("mistral", SLIDING, "sdpa", "unpadded", 3),
    ("mistral", SLIDING, "eager", "left", None),
    ("mistral", {**SLIDING, **MHA}, "sdpa", "right", None),
    ("qwen2", {}, "sdpa", "right", None),
    ("qwen2", MHA, "sdpa", "left", 3),
    ("qwen2", {}, "eager", "unpadded", 3),
    ("qwen2", HALF_SLIDING, "sdpa", "left", None),
    ("qwen2", HALF_SLIDING, "eager", "unpadded", None),
    ("qwen2", LEADERS_FULL, "sdpa", "left", None),
    ("qwen2", LEADERS_FULL, "eager", "right", 3),
]


def case_id(case):
    family, changes, back_end, padding, rank = case
    return "-".join([family, *changes, back_end, padding, "full" if rank is None else "low-rank"])


every_case = pytest.mark.parametrize("case", CASES, ids=case_id)
both_back_ends = pytest.mark.parametrize("back_end", ["eager", "sdpa"])


def build(case=CASES[0], blocks=BLOCKS):
    """A loud adapted model, all of whose weights are trainable, and an attention mask."""
    family, changes, back_end, padding, rank = case
    model = tiny_model(family, attn_implementation=back_end, **changes)
    follower_mask = "leader" if "layer_types" in changes else "own"
    adapted = loud(tiny_adapter(model, superblocks=blocks, r=rank, follower_mask=follower_mask)).requires_grad_(True)
    return adapted, MASKS[padding]


def llama(back_end="sdpa"):
    return build(("llama", {}, back_end, "unpadded", None))[0]


def real(mask):
    return torch.ones(2, 9, dtype=torch.bool) if mask is None else mask.bool()


def loss_of(logits, mask=None):
    return logits[real(mask)].square().mean()


def gradients(loss, model):
    """Gradients by name, of those parameters that have one."""
    parameters = dict(model.named_parameters())
    found = torch.autograd.grad(loss, parameters.values(), allow_unused=True)
    return {name: gradient for name, gradient in zip(parameters, found, strict=True) if gradient is not None}


def attention_of(model, layer):
    """The attention module of a decoder layer, wrapped if it is."""
    return model.base_model.model.model.layers[layer].self_attn


class Record:
    """Inputs and outputs of modules while the `with` lasts, by the names given."""

    def __init__(self, modules):
        self.modules = modules
        self.calls = Counter()
        self.inputs, self.outputs = {}, {}

    def __enter__(self):
        def watch(name):
            def hook(_, args, kwargs, output):
                self.calls[name] += 1
                self.inputs[name] = args[0] if args else kwargs["hidden_states"]
                self.outputs[name] = output[0] if isinstance(output, tuple) else output

            return hook

        self.handles = [
            module.register_forward_hook(watch(name), with_kwargs=True) for name, module in self.modules.items()
        ]
        return self

    def __exit__(self, *_):
        for handle in self.handles:
            handle.remove()


@every_case
def test_padding_on_the_left_gives_the_logits_of_padding_on_the_right(case):
    model, _ = build(case)
    tokens, length = prompt(batch=1, length=5), 9
    found = []
    for before in (4, 2, 0):
        place = slice(before, before + 5)
        ids, mask = torch.zeros(1, length, dtype=torch.long), torch.zeros(1, length, dtype=torch.long)
        ids[:, place], mask[:, place] = tokens, 1
        with torch.no_grad():
            found.append(model(ids, attention_mask=mask, position_ids=positions(mask)).logits[:, place])
    close(found[0], found[2])
    close(found[1], found[2])


@every_case
def test_logits_are_those_of_equation_14(case):
    model, mask = build(case)
    logits = model(prompt(), attention_mask=mask).logits
    expected = unified_logits(**specification(model, BLOCKS), input_ids=prompt(), attention_mask=mask)
    assert expected.std() > 0.5
    close(logits[real(mask)], expected[real(mask)])


@every_case
@torch.no_grad()
def test_logits_without_autograd_are_those_of_equation_14(case):
    model, mask = build(case)
    logits = model(prompt(), attention_mask=mask).logits
    expected = unified_logits(**specification(model, BLOCKS), input_ids=prompt(), attention_mask=mask)
    close(logits[real(mask)], expected[real(mask)])


@every_case
def test_gradients_of_all_weights_are_those_of_equation_14(case):
    model, mask = build(case)
    model.train()
    actual = gradients(loss_of(model(prompt(), attention_mask=mask).logits, mask), model)
    logits = unified_logits(**specification(model, BLOCKS), input_ids=prompt(), attention_mask=mask)
    expected = gradients(loss_of(logits, mask), model)
    assert all(gradient.abs().max() > 1e-3 for gradient in expected.values())
    close(actual, expected)


@both_back_ends
def test_gradients_without_a_cache_are_those_of_equation_14(back_end):
    model = llama(back_end)
    actual = gradients(loss_of(model(prompt(), use_cache=False).logits), model)
    expected = unified_logits(**specification(model, BLOCKS), input_ids=prompt())
    close(actual, gradients(loss_of(expected), model))


@both_back_ends
def test_two_forwards_before_a_backward_give_the_sum_of_their_gradients(back_end):
    model = llama(back_end)
    first, second = prompt(seed=5), prompt(seed=6)
    actual = gradients(loss_of(model(first).logits) + loss_of(model(second).logits), model)
    of = specification(model, BLOCKS)
    expected = loss_of(unified_logits(**of, input_ids=first)) + loss_of(unified_logits(**of, input_ids=second))
    close(actual, gradients(expected, model))


@both_back_ends
def test_a_forward_without_autograd_in_between_does_not_disturb_the_gradients(back_end):
    model = llama(back_end)
    loss = loss_of(model(prompt()).logits)
    with torch.no_grad():
        model(prompt(seed=5))
    expected = unified_logits(**specification(model, BLOCKS), input_ids=prompt())
    close(gradients(loss, model), gradients(loss_of(expected), model))


@both_back_ends
def test_only_the_compensation_is_trainable_at_first(back_end):
    model = tiny_adapter(tiny_model(attn_implementation=back_end), superblocks=BLOCKS)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    prefix = "base_model.model.model.layers"
    assert trainable == {f"{prefix}.{layer}.self_attn.uniattn_W.default.weight" for layer in (2, 3, 5)}


@pytest.mark.parametrize("rank", [None, 3])
def test_the_compensation_gets_its_gradient_while_the_base_is_frozen(rank):
    model = loud(tiny_adapter(superblocks=BLOCKS, r=rank))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert len(trained) == (3 if rank is None else 6)
    actual = torch.autograd.grad(loss_of(model(prompt()).logits), trained)
    expected = loss_of(unified_logits(**specification(model, BLOCKS), input_ids=prompt()))
    close(actual, torch.autograd.grad(expected, trained))


@both_back_ends
def test_packed_sequences_do_not_see_each_other(back_end):
    model = llama(back_end)
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    packed = prompt(batch=1)
    logits = model(packed, position_ids=positions, use_cache=False).logits
    alone = [unified_logits(**specification(model, BLOCKS), input_ids=part) for part in packed.split([4, 5], dim=1)]
    close(logits, torch.cat(alone, dim=1))


@both_back_ends
@pytest.mark.parametrize("grad", [False, True])
def test_the_lowest_leader_does_bit_for_bit_what_it_did_before(back_end, grad):
    model = llama(back_end)
    attention = attention_of(model, 1)
    with torch.set_grad_enabled(grad):
        with model.disable_adapter(), Record({"leader": attention}) as base:
            model(prompt(), attention_mask=MASKS["left"])
        with Record({"leader": attention}) as adapted:
            model(prompt(), attention_mask=MASKS["left"])
    assert torch.equal(adapted.outputs["leader"], base.outputs["leader"])


@both_back_ends
@torch.no_grad()
def test_every_leader_gives_what_the_original_attention_gives_for_the_same_input(back_end):
    model = llama(back_end)
    attention = attention_of(model, 4)
    with Record({"leader": attention}) as adapted:
        model(prompt())

    def same_input(module, args, kwargs):
        return args, {**kwargs, "hidden_states": adapted.inputs["leader"]}

    handle = attention.register_forward_pre_hook(same_input, with_kwargs=True)
    with model.disable_adapter(), Record({"leader": attention}) as base:
        model(prompt())
    handle.remove()
    assert torch.equal(adapted.outputs["leader"], base.outputs["leader"])


@both_back_ends
@pytest.mark.parametrize("grad", [False, True])
def test_queries_and_keys_of_followers_are_never_computed(back_end, grad):
    model = llama(back_end)
    projections = {
        (layer, part): getattr(attention_of(model, layer).get_base_layer(), f"{part}_proj")
        for layer in range(1, 6)
        for part in "qkvo"
    } | {(0, part): getattr(attention_of(model, 0), f"{part}_proj") for part in "qkvo"}
    with torch.set_grad_enabled(grad), Record(projections) as record:
        model(prompt())
    followers = {2, 3, 5}
    assert record.calls == {(layer, part): 1 for layer, part in projections if part in "vo" or layer not in followers}


def test_queries_and_keys_of_followers_get_no_gradient():
    model = llama()
    loss_of(model(prompt()).logits).backward()
    without = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    prefix = "base_model.model.model.layers"
    followers = (2, 3, 5)
    assert without == {f"{prefix}.{i}.self_attn.base_layer.{p}_proj.weight" for i in followers for p in "qk"}


@both_back_ends
@pytest.mark.parametrize("training", [False, True])
def test_without_the_adapter_the_model_is_the_base_bit_for_bit(back_end, training):
    base = loud(tiny_model(attn_implementation=back_end)).train(training)
    expected = base(prompt(), attention_mask=MASKS["left"]).logits
    expected_tokens = base.generate(prompt(), max_new_tokens=5, do_sample=False)
    model = tiny_adapter(base, superblocks=BLOCKS).train(training)
    assert not torch.allclose(model(prompt(), attention_mask=MASKS["left"]).logits, expected)
    with model.disable_adapter():
        assert torch.equal(model(prompt(), attention_mask=MASKS["left"]).logits, expected)
        assert torch.equal(model.generate(prompt(), max_new_tokens=5, do_sample=False), expected_tokens)


@both_back_ends
@torch.no_grad()
def test_without_the_adapter_cached_decoding_is_that_of_the_base_bit_for_bit(back_end):
    base = loud(tiny_model(attn_implementation=back_end))
    ids = prompt()

    def decode(model):
        prefill = model(ids[:, :6])
        return [model(ids[:, i : i + 1], past_key_values=prefill.past_key_values).logits for i in range(6, 9)]

    expected = decode(base)
    model = tiny_adapter(base, superblocks=BLOCKS)
    with model.disable_adapter():
        for actual, logits in zip(decode(model), expected, strict=True):
            assert torch.equal(actual, logits)


@torch.no_grad()
def test_a_layer_outside_all_superblocks_is_not_touched():
    model = llama()
    assert not isinstance(attention_of(model, 0), UniAttnLayer)
    assert all(isinstance(attention_of(model, layer), UniAttnLayer) for layer in range(1, 6))


def test_a_follower_called_by_itself_is_refused():
    follower = attention_of(llama(), 2)
    with pytest.raises(RuntimeError, match="without its leader's hand-over"):
        follower(torch.zeros(1, 3, 32, dtype=torch.float64))


def test_a_follower_whose_leader_has_not_run_is_refused():
    follower = attention_of(llama(), 2)
    with pytest.raises(RuntimeError, match="decoder layer 1, has not run in this forward pass"):
        follower(torch.zeros(1, 3, 32, dtype=torch.float64), uniattn_handover=Handover())


def test_a_leader_of_an_earlier_forward_does_not_count():
    model = llama()
    model(prompt())
    layers = model.base_model.model.model.layers
    layers[1].forward = lambda hidden_states, **kwargs: hidden_states
    with pytest.raises(RuntimeError, match="decoder layer 1, has not run in this forward pass"):
        model(prompt())


@pytest.mark.parametrize(
    ("grad", "back_end", "shared"),
    [(True, "eager", False), (True, "sdpa", False), (False, "eager", True), (False, "sdpa", False)],
)
def test_probabilities_are_handed_over_only_where_they_exist_and_need_no_gradient(grad, back_end, shared, monkeypatch):
    """With autograd they would keep a (length, length) tensor per Superblock alive until the backward."""
    model, given, give = llama(back_end), [], Handover.give
    monkeypatch.setattr(Handover, "give", lambda self, layer, state: given.append(state) or give(self, layer, state))
    with torch.set_grad_enabled(grad):
        model(prompt())
    assert [state.probabilities is not None for state in given] == [shared, shared]


@pytest.mark.parametrize(("first", "second"), [("eager", "sdpa"), ("sdpa", "eager")])
def test_the_back_end_can_be_switched_after_wrapping(first, second, monkeypatch):
    model = llama(first)
    expected = unified_logits(**specification(model, BLOCKS), input_ids=prompt())
    calls = Counter()

    def counting(*args, **kwargs):
        calls["sdpa"] += 1
        return sdpa(*args, **kwargs)

    sdpa = nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", counting)
    for name in (second, first):
        calls.clear()
        model.base_model.model.set_attn_implementation(name)
        close(model(prompt()).logits, expected)
        assert calls["sdpa"] == (6 if name == "sdpa" else 0)


def test_after_switching_the_back_end_the_adapter_can_still_be_disabled_bit_for_bit():
    base = loud(tiny_model(attn_implementation="eager"))
    expected = base(prompt()).logits
    base.set_attn_implementation("sdpa")
    model = tiny_adapter(base, superblocks=BLOCKS)
    base.set_attn_implementation("eager")
    with model.disable_adapter():
        assert torch.equal(model(prompt()).logits, expected)


@pytest.fixture
def other_back_end(monkeypatch):
    """An attention implementation that followers know nothing of."""
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "other", lambda *args, **kwargs: pytest.fail("was called"))
    return "other"


def test_an_unsupported_back_end_is_refused_on_wrapping_and_leaves_the_model_as_it_was(other_back_end):
    base = loud(tiny_model())
    expected = base(prompt()).logits
    base.set_attn_implementation(other_back_end)
    with pytest.raises(ValueError, match=r"attn_implementation='other' is not supported .* eager, sdpa"):
        get_peft_model(base, UniAttnConfig(superblocks=BLOCKS))
    base.set_attn_implementation("sdpa")
    assert not any(isinstance(module, UniAttnLayer) for module in base.modules())
    assert all(layer.self_attn.config is base.config for layer in base.model.layers)
    assert torch.equal(base(prompt()).logits, expected)


@pytest.mark.parametrize("length", [1, 9])
@pytest.mark.parametrize("grad", [False, True])
def test_an_unsupported_back_end_is_refused_at_run_time(grad, length, other_back_end):
    model, _ = build(blocks=[[0, 1]])
    model.base_model.model.set_attn_implementation(other_back_end)
    message = "attn_implementation='other' is not supported .* eager, sdpa"
    with torch.set_grad_enabled(grad), pytest.raises(ValueError, match=message):
        model(prompt(length=length))


def test_a_paged_cache_handed_to_the_attention_function_is_refused():
    attention = attention_of(llama(), BLOCKS[0][0]).get_base_layer()
    states = torch.zeros(1, 4, 3, 8)
    with pytest.raises(ValueError, match="continuous batching is not supported"):
        leader_attention(attention, states, states, states, None, cache=object(), **{HANDOVER: Handover()})


def test_the_models_own_configuration_keeps_the_real_back_end():
    model = llama("eager")
    assert model.config._attn_implementation == "eager"
    assert original_config(attention_of(model, 1).get_base_layer()) is model.config


@pytest.mark.parametrize("blocks", [[[1, 2, 3]], [[0, 1], [2, 3, 4]]])
def test_a_superblock_of_layers_with_different_masks_is_refused(blocks):
    kinds = ["full_attention"] * 3 + ["sliding_attention"] * 3
    base = tiny_model("qwen2", use_sliding_window=True, sliding_window=3, layer_types=kinds)
    with pytest.raises(ValueError, match="mixes layers with different masks"):
        get_peft_model(base, UniAttnConfig(superblocks=blocks))
    assert not any(isinstance(module, UniAttnLayer) for module in base.modules())


def test_a_layer_whose_attention_adds_nothing_can_follow():
    """As in models that were made deeper by layers that start as the identity."""
    base = loud(tiny_model())
    nn.init.zeros_(base.model.layers[2].self_attn.o_proj.weight)
    model = tiny_adapter(base, superblocks=BLOCKS)
    close(model(prompt()).logits, unified_logits(**specification(model, BLOCKS), input_ids=prompt()))


def test_attention_dropout_is_warned_of():
    with pytest.warns(UserWarning, match=r"attention_dropout=0\.1: .* set config\.attention_dropout = 0"):
        tiny_adapter(tiny_model(attention_dropout=0.1), superblocks=BLOCKS)


def test_without_attention_dropout_there_is_no_such_warning(recwarn):
    tiny_adapter(tiny_model(attention_dropout=0.0), superblocks=BLOCKS)
    assert not [warning for warning in recwarn if "attention_dropout" in str(warning.message)]


@pytest.mark.parametrize("grad", [False, True])
def test_probabilities_that_are_asked_for_are_those_of_the_leader(grad):
    """One entry per layer, so that `outputs.attentions[i]` belongs to layer i."""
    model = llama("eager")
    with torch.set_grad_enabled(grad):
        attentions = model(prompt(), output_attentions=True).attentions
    assert len(attentions) == 6
    for leader, *followers in BLOCKS:
        for follower in followers:
            assert torch.equal(attentions[follower], attentions[leader])


def formula(query, key, mask, scaling):
    """softmax(q·Kᵀ·scaling) over the visible keys in float64, with K repeated for its group of query heads."""
    groups = query.shape[1] // key.shape[1]
    query, key = query.double(), key.double()
    probabilities = torch.zeros(*query.shape[:3], key.shape[2], dtype=torch.float64)
    for batch in range(query.shape[0]):
        for head in range(query.shape[1]):
            scores = torch.tensor(
                [torch.dot(query[batch, head, 0], k).item() * scaling for k in key[batch, head // groups]],
                dtype=torch.float64,
            )
            weights = (scores - scores.max()).exp() * mask[batch]
            probabilities[batch, head, 0] = weights / weights.sum()
    return probabilities


VISIBLE = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 0]], dtype=torch.float64)


@pytest.mark.parametrize("scaling", [None, 0.7])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 2), (4, 1)], ids=str)
@pytest.mark.parametrize("kind", ["none", "bool", "additive", "per head"])
def test_decode_probabilities_are_the_softmax_formula(kind, heads, scaling):
    torch.manual_seed(0)
    query_heads, kv_heads = heads
    query = torch.randn(2, query_heads, 1, 8, dtype=torch.float64)
    key = torch.randn(2, kv_heads, 5, 8, dtype=torch.float64)
    visible = torch.ones_like(VISIBLE) if kind == "none" else VISIBLE
    boolean = visible.bool()[:, None, None]
    masks = {
        "none": None,
        "bool": boolean,
        "additive": torch.zeros(2, 1, 1, 5, dtype=torch.float64).masked_fill(~boolean, -torch.inf),
        "per head": boolean.expand(2, query_heads, 1, 5),
    }
    actual = decode_probabilities(query, key, masks[kind], scaling)
    close(actual, formula(query, key, visible, scaling or 1 / math.sqrt(8)))


def test_decode_probabilities_take_an_additive_mask_at_its_value():
    torch.manual_seed(0)
    query, key = torch.randn(1, 2, 1, 4, dtype=torch.float64), torch.randn(1, 2, 3, 4, dtype=torch.float64)
    bias = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
    actual = decode_probabilities(query, key, bias[None, None, None], None)
    plain = formula(query, key, torch.ones(1, 3), 0.5)
    close(actual, plain * bias.exp() / (plain * bias.exp()).sum(-1, keepdim=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_decode_probabilities_of_half_precision_differ_from_float64_only_by_rounding(dtype):
    """Scores are rounded once to the data type, the softmax is not, and its result is rounded once."""
    torch.manual_seed(0)
    query, key = torch.randn(2, 4, 1, 64).to(dtype), torch.randn(2, 2, 50, 64).to(dtype)
    actual = decode_probabilities(query, key, None, None)
    expected = formula(query, key, torch.ones(2, 50), 0.125)
    epsilon = torch.finfo(dtype).eps
    largest = (query.double() @ key.double().repeat_interleave(2, 1).transpose(2, 3) * 0.125).abs().max().item()
    assert actual.dtype == dtype
    torch.testing.assert_close(actual.double(), expected, rtol=epsilon * (1 + largest), atol=1e-6)


def test_decoding_in_bfloat16_is_as_exact_as_fused_attention():
    """Scores of 10 and more, as real models have them, may not be rounded to bfloat16 before the exponential."""
    torch.manual_seed(0)
    query, key, value = 4 * torch.randn(2, 4, 1, 64), torch.randn(2, 2, 500, 64), torch.randn(2, 2, 500, 64)
    query, key, value = query.bfloat16(), key.bfloat16(), value.bfloat16()
    expected = formula(query, key, torch.ones(2, 500), 0.125) @ value.double().repeat_interleave(2, 1)
    fused = nn.functional.scaled_dot_product_attention(query, key, value, enable_gqa=True)
    ours = apply_probabilities(decode_probabilities(query, key, None, None), value).transpose(1, 2)
    assert (ours - expected).norm() < 1.5 * (fused - expected).norm()


def test_decode_probabilities_of_a_row_that_sees_nothing_are_finite():
    query, key = torch.ones(1, 2, 1, 4, dtype=torch.float64), torch.ones(1, 1, 3, 4, dtype=torch.float64)
    nothing = torch.zeros(1, 1, 1, 3, dtype=torch.bool)
    assert decode_probabilities(query, key, nothing, None).isfinite().all()


@pytest.mark.parametrize("length", [1, 3])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 2), (4, 1)], ids=str)
def test_apply_probabilities_is_a_weighted_sum_of_each_groups_values(heads, length):
    torch.manual_seed(0)
    query_heads, kv_heads = heads
    probabilities = torch.rand(2, query_heads, length, 5, dtype=torch.float64)
    value = torch.randn(2, kv_heads, 5, 8, dtype=torch.float64)
    actual = apply_probabilities(probabilities, value)
    assert actual.shape == (2, length, query_heads, 8)
    for head in range(query_heads):
        own = value[:, head // (query_heads // kv_heads)]
        close(actual[:, :, head], sum(probabilities[:, head, :, [t]] * own[:, [t]] for t in range(5)))
