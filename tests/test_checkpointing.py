"""Gradient checkpointing: exact gradients without reentrance, a clear refusal with it."""

from contextlib import nullcontext

import pytest
import torch
from conftest import close, loud, prompt, specification, tiny_adapter, tiny_model
from oracle import Float64Throughout, unified_logits

from peft_uniattn import to_standalone

BLOCKS = [[1, 2, 3], [4, 5]]
FAMILIES = {"llama": {}, "mistral": {"sliding_window": 3}, "qwen2": {}}

both_forms = pytest.mark.parametrize("form", ["adapter", "standalone"])
both_back_ends = pytest.mark.parametrize("back_end", ["eager", "sdpa"])


def build(form="adapter", back_end="sdpa", family="llama", rank=None):
    model = tiny_model(family, attn_implementation=back_end, **FAMILIES[family])
    model = loud(tiny_adapter(model, superblocks=BLOCKS, r=rank))
    return (model if form == "adapter" else to_standalone(model)).requires_grad_(True).train()


def checkpoint(model, **options):
    model.gradient_checkpointing_enable({"use_reentrant": False, **options})
    model.enable_input_require_grads()
    return model


def checkpoint_in_float64(model):
    """Checkpointing inside `Float64Throughout`, which a backward leaves: what is computed again enters it again."""
    return checkpoint(model, context_fn=lambda: (nullcontext(), Float64Throughout()))


def loss_of(logits):
    return logits.square().mean()


def gradients(loss, model):
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def equal(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def count_runs(model):
    """A list that grows with every run of the first follower's value projection."""
    attention = model.get_submodule(next(name for name, _ in model.named_modules() if name.endswith("2.self_attn")))
    attention = getattr(attention, "base_layer", attention)
    runs = []
    attention.v_proj.register_forward_hook(lambda *_: runs.append(1))
    return runs


@both_forms
@both_back_ends
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rank", [None, 3])
def test_checkpointed_gradients_are_exactly_those_without_it(form, back_end, family, rank):
    model = build(form, back_end, family, rank)
    expected = gradients(loss_of(model(prompt()).logits), model)
    runs = count_runs(checkpoint(model))
    actual = gradients(loss_of(model(prompt()).logits), model)
    assert len(runs) == 2, "layers are computed again in the backward"
    equal(actual, expected)


@both_forms
@both_back_ends
@pytest.mark.usefixtures("float64")
def test_checkpointed_gradients_are_those_of_equation_14(form, back_end):
    model = checkpoint_in_float64(build(form, back_end))
    actual = gradients(loss_of(model(prompt()).logits), model)
    expected = gradients(loss_of(unified_logits(**specification(model, BLOCKS), input_ids=prompt())), model)
    close(actual, expected)


@both_forms
@both_back_ends
@pytest.mark.usefixtures("float64")
def test_two_checkpointed_forwards_before_a_backward_give_the_sum_of_their_gradients(form, back_end):
    model = checkpoint_in_float64(build(form, back_end))
    first, second = prompt(seed=5), prompt(seed=6, length=7)
    actual = gradients(loss_of(model(first).logits) + loss_of(model(second).logits), model)
    of = specification(model, BLOCKS)
    expected = gradients(
        loss_of(unified_logits(**of, input_ids=first)) + loss_of(unified_logits(**of, input_ids=second)), model
    )
    close(actual, expected)


@both_forms
def test_a_forward_without_autograd_in_between_does_not_disturb_checkpointed_gradients(form):
    model = build(form)
    expected = gradients(loss_of(model(prompt()).logits), model)
    loss = loss_of(checkpoint(model)(prompt()).logits)
    with torch.no_grad():
        model(prompt(seed=5))
    actual = gradients(loss, model)
    equal(actual, expected)


@pytest.mark.parametrize("rank", [None, 3])
def test_a_frozen_base_leaves_the_gradient_of_the_compensation_exact(rank):
    model = build(rank=rank)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("uniattn_" in name)
    expected = gradients(loss_of(model(prompt()).logits), model)
    actual = gradients(loss_of(checkpoint(model)(prompt()).logits), model)
    assert len(actual) == (3 if rank is None else 6)
    equal(actual, expected)


def test_checkpointing_is_not_reentrant_unless_asked():
    model = build()
    expected = gradients(loss_of(model(prompt()).logits), model)
    model.gradient_checkpointing_enable()
    runs = count_runs(model)
    actual = gradients(loss_of(model(prompt()).logits), model)
    assert len(runs) == 2
    equal(actual, expected)


@both_forms
@both_back_ends
@pytest.mark.parametrize("frozen", [False, True])
def test_reentrant_checkpointing_is_refused_with_the_way_out(form, back_end, frozen):
    model = checkpoint(build(form, back_end), use_reentrant=True)
    if frozen:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("uniattn_" in name or "compensation" in name)
    with pytest.raises(
        RuntimeError, match=r'reentrant .* use gradient_checkpointing_kwargs=\{"use_reentrant": False}'
    ):
        loss_of(model(prompt()).logits).backward()


@pytest.mark.usefixtures("float64")
def test_reentrant_checkpointing_is_no_obstacle_to_inference():
    model = checkpoint(build(), use_reentrant=True)
    with torch.no_grad():
        logits = model(prompt()).logits
    close(logits, unified_logits(**specification(model, BLOCKS), input_ids=prompt()).detach())
