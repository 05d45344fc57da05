"""UniAttn as a PEFT adapter: what trains, several plans on one base, switching off, deletion, unloading, merging."""

from __future__ import annotations

import copy
import io
import pickle
import warnings

import pytest
import torch
from conftest import CLASSES, aligned, changed, logits, moved, prompt, tiny_adapter, tiny_model, weights
from peft import get_peft_model

from peft_uniattn import UniAttnConfig, UniAttnLayer, to_standalone

# Two plans that disagree: layer 1 follows in FIRST and leads in SECOND, 3 leads and follows, 0 and 5 are in one only.
FIRST = {"superblocks": [[0, 1, 2], [3, 4]]}
SECOND = {"superblocks": [[1, 2, 3], [4, 5]], "r": 4}


def both_plans():
    """One base with the adapters "default" (FIRST, active) and "other" (SECOND)."""
    model = tiny_adapter(**FIRST)
    torch.manual_seed(5)
    model.add_adapter("other", UniAttnConfig(init_weights=False, task_type="CAUSAL_LM", **SECOND))
    return model.eval()


def alone(name):
    """A base with just that one of them, with the same weights."""
    return tiny_adapter(**FIRST) if name == "default" else tiny_adapter(seed=5, **SECOND)


def layers(model) -> dict[int, UniAttnLayer]:
    return {module.layer_idx: module for module in model.modules() if isinstance(module, UniAttnLayer)}


def trainable(model) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def compensation(containers="W", adapter="default", followers=(1, 2, 4, 5)) -> set[str]:
    """Names of the parameters of a `PeftModel`'s compensation."""
    attention = "base_model.model.model.layers.{}.self_attn.uniattn_{}.{}.weight"
    return {attention.format(follower, container, adapter) for follower in followers for container in containers}


@pytest.mark.parametrize(("r", "containers"), [(None, "W"), (4, "AB")])
def test_only_the_compensation_is_trainable(r, containers):
    assert trainable(tiny_adapter(r=r)) == compensation(containers)


def test_parameter_count_is_that_of_the_compensation(capsys):
    tiny_adapter().print_trainable_parameters()
    assert capsys.readouterr().out.startswith("trainable params: 4,096 || all params: ")


@pytest.mark.parametrize(("r", "containers"), [(None, "W"), (4, "AB")])
def test_a_training_step_changes_only_the_compensation(r, containers, ids):
    model = tiny_adapter(r=r).train()
    before = weights(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    assert changed(before, weights(model)) == compensation(containers)


def test_zero_compensation_gets_a_gradient(ids):
    model = tiny_adapter(init_weights=True)
    model(ids, labels=ids).loss.backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in model.parameters() if parameter.requires_grad)


def test_initial_compensation_is_zero():
    for adapted in (tiny_adapter(init_weights=True), tiny_adapter(init_weights=True, r=4)):
        for follower in (1, 2, 4, 5):
            *_, last = layers(adapted)[follower]._compensation("default")
            assert torch.count_nonzero(last.weight) == 0


def test_training_and_evaluation_mode_give_the_same_logits(ids):
    model = tiny_adapter()
    assert torch.equal(logits(model.train()), logits(model.eval()))


@pytest.mark.parametrize("mode", [True, False])
def test_mode_reaches_every_module(mode):
    model = tiny_adapter().train(mode)
    assert {module.training for module in model.modules()} == {mode}


def test_wrapping_keeps_the_mode_of_every_module():
    base = tiny_model().train()
    base.model.layers[0].eval()
    config = UniAttnConfig(superblock_size=3, start_layer=0)
    get_peft_model(base, config)
    assert base.training and base.model.layers[1].training
    assert not base.model.layers[0].self_attn.get_base_layer().training
    assert not base.model.layers[0].mlp.training


def test_layer_status_lists_the_attention_of_every_superblock():
    status = tiny_adapter(**FIRST).get_layer_status()
    assert [layer.name for layer in status] == [f"model.model.layers.{index}.self_attn" for index in range(5)]
    assert [layer.available_adapters for layer in status] == [[], ["default"], ["default"], [], ["default"]]
    assert {layer.module_type for layer in status} == {"uniattn.UniAttnLayer"}


@pytest.mark.parametrize("active", ["default", "other"])
def test_model_status_is_regular_with_unequal_plans(active):
    model = both_plans()
    model.set_adapter(active)
    status = model.get_model_status()
    assert status.peft_types == {"default": "UNIATTN", "other": "UNIATTN"}
    assert (status.enabled, status.active_adapters, status.merged_adapters) == (True, [active], [])
    assert status.requires_grad == {name: name == active for name in ("default", "other")}
    assert (status.num_adapter_layers, status.available_adapters) == (6, ["default", "other"])


def test_the_plans_of_these_tests_differ():
    assert not torch.equal(logits(alone("default")), logits(alone("other")))


@pytest.mark.parametrize("route", [["default"], ["other"], ["other", "default"], ["other", "default", "other"]])
def test_set_adapter_switches_plans_exactly(route):
    model = both_plans()
    for name in route:
        model.set_adapter(name)
    assert torch.equal(logits(model), logits(alone(route[-1])))


def test_an_added_adapter_changes_nothing_until_it_is_set():
    assert torch.equal(logits(both_plans()), logits(alone("default")))


@pytest.mark.parametrize("name", ["default", "other"])
def test_generation_follows_the_active_plan(name, ids):
    model = both_plans()
    model.set_adapter(name)
    arguments = {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(model.generate(ids, **arguments), alone(name).generate(ids, **arguments))


def test_only_the_active_adapter_trains():
    model = both_plans()
    model.set_adapter("other")
    assert trainable(model) == compensation("AB", "other", (2, 3, 5))


@pytest.mark.parametrize("order", [["default", "other"], ["other", "default"]])
def test_activating_two_at_once_is_refused(order):
    model = both_plans()
    expected = logits(model)
    with pytest.raises(ValueError, match=r"adapter_names=\['.*activates 2 UniAttn adapters at once.*activate one"):
        model.base_model.set_adapter(order)
    assert model.active_adapters == model.get_model_status().active_adapters == ["default"]
    assert torch.equal(logits(model), expected)


def test_adapters_of_a_mixed_model_are_refused():
    with pytest.raises(ValueError, match="UNIATTN"):
        get_peft_model(tiny_model(), UniAttnConfig(superblock_size=2), mixed=True)


@pytest.mark.parametrize(("deleted", "left"), [("default", "other"), ("other", "default")])
@pytest.mark.parametrize("active", ["default", "other"])
def test_deleting_one_of_two_leaves_the_other_in_force(deleted, left, active):
    model = both_plans()
    model.set_adapter(active)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.delete_adapter(deleted)
    status = model.get_model_status()
    assert (status.available_adapters, status.active_adapters) == ([left], [left])
    assert model.active_adapter == left
    assert torch.equal(logits(model), logits(alone(left)))


@pytest.mark.parametrize("deleted", ["default", "other"])
def test_a_deleted_adapter_leaves_no_weights_and_no_plan(deleted):
    model = both_plans()
    model.delete_adapter(deleted)
    assert not any(f".{deleted}." in name for name in model.state_dict())
    assert all(deleted not in layer.uniattn_leader for layer in layers(model).values())


def test_deleting_the_last_adapter_leaves_the_base(ids):
    expected = logits(tiny_model())
    model = tiny_adapter(**FIRST)
    model.delete_adapter("default")
    # PeftModel itself cannot be called without an adapter, whatever the method.
    assert torch.equal(logits(model.base_model), expected)
    assert not any("uniattn" in name for name in model.state_dict())


def test_an_adapter_can_be_added_after_the_last_was_deleted():
    model = tiny_adapter(**FIRST)
    model.delete_adapter("default")
    torch.manual_seed(5)
    model.add_adapter("other", UniAttnConfig(init_weights=False, task_type="CAUSAL_LM", **SECOND))
    model.set_adapter("other")
    assert torch.equal(logits(model), logits(alone("other")))


def test_a_deleted_name_can_be_used_again_for_another_plan():
    model = both_plans()
    model.delete_adapter("other")
    torch.manual_seed(1)
    model.add_adapter("other", UniAttnConfig(init_weights=False, superblocks=[[2, 3, 4]]))
    model.set_adapter("other")
    assert torch.equal(logits(model), logits(tiny_adapter(superblocks=[[2, 3, 4]])))


@pytest.mark.parametrize("back_end", ["sdpa", "eager"])
@pytest.mark.parametrize("family", CLASSES)
def test_disabled_adapter_is_bit_equal_to_the_base(family, back_end):
    expected = logits(tiny_model(family, attn_implementation=back_end))
    model = tiny_adapter(tiny_model(family, attn_implementation=back_end))
    with model.disable_adapter():
        assert torch.equal(logits(model), expected)
    assert not torch.equal(logits(model), expected)


def test_disabled_adapter_generates_as_the_base(ids):
    arguments = {"max_new_tokens": 8, "do_sample": False}
    expected = tiny_model().generate(ids, **arguments)
    model = tiny_adapter()
    with model.disable_adapter():
        assert torch.equal(model.generate(ids, **arguments), expected)


def test_disabling_is_undone_on_leaving_and_after_an_error():
    model = tiny_adapter()
    expected = logits(model)
    with pytest.raises(KeyboardInterrupt), model.disable_adapter():
        raise KeyboardInterrupt
    assert torch.equal(logits(model), expected)
    assert trainable(model) == compensation()


def test_nested_disabling_ends_with_the_outermost():
    model = tiny_adapter()
    on, off = logits(model), logits(tiny_model())
    with model.disable_adapter():
        with model.disable_adapter():
            assert torch.equal(logits(model), off)
        assert torch.equal(logits(model), off)
    assert torch.equal(logits(model), on)


def test_switching_while_disabled_takes_effect_on_leaving():
    model = both_plans()
    with model.disable_adapter():
        model.set_adapter("other")
        assert torch.equal(logits(model), logits(tiny_model()))
    assert torch.equal(logits(model), logits(alone("other")))


def use(model):
    model(prompt(), labels=prompt()).loss.backward()


# The adapter's configuration, and what happens to the model before it is unloaded.
HISTORIES = {
    "fresh": ({}, lambda model: None),
    "used": ({}, use),
    "disabled": ({}, lambda model: model.base_model.disable_adapter_layers()),
    "deleted": ({}, lambda model: model.delete_adapter("default")),
    "two_plans": (FIRST, lambda model: model.add_adapter("other", UniAttnConfig(**SECOND))),
    "modules_to_save": ({"modules_to_save": ["lm_head"]}, lambda model: None),
    "tokens": ({"trainable_token_indices": [3, 5]}, lambda model: None),
}


def structure(model) -> dict:
    """Everything about a model that its weights do not say: classes, configurations, attributes, hooks."""
    return {
        name: (
            type(module),
            id(getattr(module, "config", None)),
            sorted(vars(module)),
            {attribute: list(hooks) for attribute, hooks in vars(module).items() if attribute.endswith("_hooks")},
        )
        for name, module in model.named_modules()
    }


@pytest.mark.parametrize(("config", "happens"), HISTORIES.values(), ids=HISTORIES)
def test_unload_returns_the_exact_base(config, happens):
    base = tiny_model()
    expected, before, parts = logits(base), weights(base), structure(base)
    model = tiny_adapter(base, **config)
    happens(model)
    unloaded = model.unload()
    assert unloaded is base
    assert structure(unloaded) == parts
    assert list(unloaded.state_dict()) == list(before)
    assert not changed(before, weights(unloaded))
    assert torch.equal(logits(unloaded), expected)


def test_unload_leaves_no_trace_in_the_configuration():
    before = tiny_model().config.to_dict()
    base = tiny_model()
    config = base.config
    unloaded = tiny_adapter(base).unload()
    assert unloaded.config is config
    assert config.to_dict() == before


def test_an_unloaded_base_can_be_adapted_again():
    base = tiny_adapter(**SECOND).unload()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        again = tiny_adapter(base, **FIRST)
    assert torch.equal(logits(again), logits(alone("default")))


EXTRAS = {
    "modules_to_save": ({"modules_to_save": ["lm_head"]}, "lm_head.modules_to_save.default.weight"),
    "trainable_token_indices": (
        {"trainable_token_indices": [3, 5]},
        "model.embed_tokens.token_adapter.trainable_tokens_delta.default",
    ),
}


@pytest.mark.parametrize(("config", "name"), EXTRAS.values(), ids=EXTRAS)
def test_extra_parts_train_with_the_compensation(config, name):
    ids = torch.tensor([[3, 5, 8, 3]])
    model = tiny_adapter(**config)
    assert trainable(model) == compensation() | {f"base_model.model.{name}"}
    model(ids, labels=ids).loss.backward()
    assert model.get_parameter(f"base_model.model.{name}").grad.abs().max() > 0


@pytest.mark.parametrize(("config", "name"), EXTRAS.values(), ids=EXTRAS)
def test_extra_parts_are_off_while_the_adapter_is_disabled(config, name):
    ids = torch.tensor([[3, 5, 8, 3]])
    model = moved(tiny_adapter(**config))
    with model.disable_adapter():
        assert torch.equal(logits(model, ids), logits(tiny_model(), ids))


def test_low_cpu_mem_usage_creates_the_compensation_on_the_meta_device():
    model = get_peft_model(tiny_model(), UniAttnConfig(superblock_size=3), low_cpu_mem_usage=True)
    assert {name for name, parameter in model.named_parameters() if parameter.is_meta} == compensation(
        followers=(4, 5)
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("autocast", "expected"), [(True, torch.float32), (False, None)])
def test_autocast_adapter_dtype_decides_the_compensation_s_type(dtype, autocast, expected):
    config = UniAttnConfig(superblock_size=3, init_weights=False)
    model = get_peft_model(tiny_model(dtype=dtype), config, autocast_adapter_dtype=autocast)
    assert {parameter.dtype for parameter in model.parameters() if parameter.requires_grad} == {expected or dtype}


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("r", [None, 4])
def test_output_keeps_the_base_s_type(r, autocast):
    config = UniAttnConfig(superblock_size=3, init_weights=False, r=r)
    model = get_peft_model(tiny_model(dtype=torch.bfloat16), config, autocast_adapter_dtype=autocast)
    output = model(prompt(), output_hidden_states=True)
    assert output.logits.dtype == torch.bfloat16
    assert {hidden.dtype for hidden in output.hidden_states} == {torch.bfloat16}


def test_under_autocast_the_compensation_keeps_no_float32_copy_of_its_input():
    model = get_peft_model(tiny_model(dtype=torch.bfloat16), UniAttnConfig(superblock_size=3, init_weights=False))
    layer, kept = layers(model)[4], []
    x = torch.randn(2, 9, 32, dtype=torch.bfloat16)
    hooks = torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor
    )
    with torch.autocast("cpu", torch.bfloat16), hooks:
        output = layer._compensate(x, "default")
    assert layer.uniattn_W["default"].weight.dtype == torch.float32
    assert output.dtype == torch.bfloat16
    assert [tensor.data_ptr() for tensor in kept if tensor.numel() == x.numel()] == [x.data_ptr()]


def through_torch_save(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    return torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": through_torch_save,
}


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize(
    "happens", [lambda model: None, logits, use], ids=["fresh", "after_forward", "after_backward"]
)
def test_a_copy_gives_the_same_logits(copied, happens):
    model = both_plans()
    happens(model)
    other = aligned(copied(model))
    for name in ("default", "other"):
        model.set_adapter(name)
        other.set_adapter(name)
        assert torch.equal(logits(other), logits(model))


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_copies_are_independent(copied):
    model = both_plans()
    use(model)
    expected, before = logits(model), weights(model)
    other = copied(model)
    other.set_adapter("other")
    moved(other)
    other.base_model.model.set_attn_implementation("eager")
    other.unload()
    assert not changed(before, weights(model))
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_a_copy_unloads_to_the_base(copied):
    other = copied(both_plans())
    unloaded = aligned(other.unload())
    assert torch.equal(logits(unloaded), logits(tiny_model()))
    assert not any(module._forward_pre_hooks for module in unloaded.modules())
    assert all(layer.self_attn.config is unloaded.config for layer in unloaded.model.layers)


@pytest.mark.parametrize("verb", ["merge_adapter", "unmerge_adapter"])
def test_merging_in_place_is_refused(verb):
    model = tiny_adapter()
    expected = logits(model)
    with pytest.raises(NotImplementedError, match=r"cannot be merged in place.*merge_and_unload\(\) or to_standalone"):
        getattr(model, verb)()
    assert torch.equal(logits(model), expected)
    assert model.get_model_status().merged_adapters == []


@pytest.mark.parametrize("safe_merge", [False, True])
@pytest.mark.parametrize("name", ["default", "other"])
def test_merge_and_unload_returns_the_standalone_model_of_the_active_adapter(name, safe_merge):
    model = both_plans()
    model.set_adapter(name)
    expected = logits(to_standalone(model))
    merged = model.merge_and_unload(safe_merge=safe_merge)
    assert type(merged).__name__ == "UniAttnLlamaForCausalLM"
    assert torch.equal(logits(merged), expected)
    assert torch.equal(logits(merged), logits(alone(name)))


def test_merge_and_unload_takes_the_name_of_an_inactive_adapter():
    assert torch.equal(logits(both_plans().merge_and_unload(adapter_names=["other"])), logits(alone("other")))


@pytest.mark.parametrize("names", [[], ["default", "other"]])
def test_merge_and_unload_refuses_none_or_several_adapters(names):
    with pytest.raises(ValueError, match=r"adapter_names=.* must name exactly one"):
        both_plans().merge_and_unload(adapter_names=names)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("r", [None, 4])
def test_safe_merge_refuses_values_that_are_not_finite(r, value):
    model = tiny_adapter(r=r)
    layers(model)[4]._compensation("default")[-1].weight.data[0, 0] = value
    with pytest.raises(ValueError, match=r"layers\.4\.self_attn\.compensation.*NaN or infinite.*calibrate or train"):
        model.merge_and_unload(safe_merge=True)


def test_safe_merge_ignores_the_weights_of_other_adapters():
    model = both_plans()
    layers(model)[5]._compensation("other")[0].weight.data.fill_(float("nan"))
    assert torch.equal(logits(model.merge_and_unload(safe_merge=True)), logits(alone("default")))


def test_the_model_s_configuration_keeps_naming_the_real_back_end():
    model = tiny_adapter()
    assert model.config._attn_implementation == "sdpa"
    assert model.config.to_dict() == tiny_model().config.to_dict()


def test_changing_the_back_end_afterwards_reaches_leaders_and_followers():
    model = tiny_adapter()
    model.base_model.model.set_attn_implementation("eager")
    assert torch.equal(logits(model), logits(tiny_adapter(tiny_model(attn_implementation="eager"))))


def test_output_attentions_has_one_entry_per_layer(ids):
    output = tiny_adapter(tiny_model(attn_implementation="eager"))(ids, output_attentions=True)
    assert len(output.attentions) == 6
    for follower, leader in {1: 0, 2: 0, 4: 3, 5: 3}.items():
        assert torch.equal(output.attentions[follower], output.attentions[leader])


def test_the_backbone_alone_can_be_adapted(ids):
    expected = tiny_adapter()(ids, output_hidden_states=True).hidden_states[-1]
    backbone = tiny_adapter(tiny_model().model, task_type=None)
    assert torch.equal(backbone(ids).last_hidden_state, expected)


def test_one_configuration_object_serves_two_equal_bases():
    config = UniAttnConfig(superblock_size=3, start_layer=0)
    first, second = (get_peft_model(tiny_model(), config) for _ in range(2))
    assert torch.equal(logits(first.eval()), logits(second.eval()))


def test_a_follower_without_compensation_takes_none():
    follower = tiny_adapter(compensation="none").base_model.model.model.layers[1].self_attn
    follower.set_compensation("default")
    with pytest.raises(ValueError):
        follower.set_compensation("default", torch.zeros(32, 32))
