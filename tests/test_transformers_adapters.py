"""The adapter calls of transformers models themselves, without a `PeftModel` around."""

from __future__ import annotations

import os

import pytest
import torch
from conftest import aligned, changed, logits, tiny_adapter, tiny_model, transformers_adapters, weights
from peft import PeftModel
from transformers import AutoModelForCausalLM

from peft_uniattn import UniAttnConfig, to_standalone

pytestmark = transformers_adapters
FIRST = {"superblocks": [[0, 1, 2], [3, 4]]}
SECOND = {"superblocks": [[1, 2, 3], [4, 5]], "r": 4}


def add(model, name=None, *, seed=1, **config):
    torch.manual_seed(seed)
    model.add_adapter(UniAttnConfig(init_weights=False, task_type="CAUSAL_LM", **config), name)
    return model.eval()


def both_plans():
    """A model with the adapters "first" and "second", the latter active because it was added last."""
    return add(add(tiny_model(), "first", **FIRST), "second", seed=5, **SECOND)


def alone(name):
    """A `PeftModel` with just that one of them, with the same weights."""
    return tiny_adapter(**FIRST) if name == "first" else tiny_adapter(seed=5, **SECOND)


@pytest.fixture
def adapter_folder(tmp_path):
    """A saved base, and beside it an adapter that was saved from a `PeftModel` of that base."""
    tiny_model().save_pretrained(tmp_path / "base")
    tiny_adapter(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), **FIRST).save_pretrained(tmp_path / "first")
    return tmp_path / "first"


@pytest.mark.parametrize("config", [FIRST, SECOND], ids=["full", "low_rank"])
def test_add_adapter_gives_what_get_peft_model_gives(config):
    assert torch.equal(logits(add(tiny_model(), **config)), logits(tiny_adapter(**config)))


def test_add_adapter_trains_only_the_compensation():
    trainable = {name for name, parameter in add(tiny_model(), **FIRST).named_parameters() if parameter.requires_grad}
    assert trainable == {f"model.layers.{layer}.self_attn.uniattn_W.default.weight" for layer in (1, 2, 4)}


def test_the_adapter_added_last_is_active():
    model = both_plans()
    assert model.active_adapters() == ["second"]
    assert torch.equal(logits(model), logits(alone("second")))


@pytest.mark.parametrize("name", ["first", "second"])
def test_set_adapter_switches_plans_exactly(name):
    model = both_plans()
    model.set_adapter(name)
    assert model.active_adapters() == [name]
    assert torch.equal(logits(model), logits(alone(name)))


def test_activating_two_at_once_is_refused():
    model = both_plans()
    with pytest.raises(ValueError, match=r"activates 2 UniAttn adapters at once.*activate one"):
        model.set_adapter(["first", "second"])
    assert model.active_adapters() == ["second"]
    assert torch.equal(logits(model), logits(alone("second")))


def test_disable_adapters_is_bit_equal_to_the_base():
    model = both_plans()
    model.disable_adapters()
    assert torch.equal(logits(model), logits(tiny_model()))


def test_enable_adapters_brings_the_active_one_back():
    model = both_plans()
    model.disable_adapters()
    model.enable_adapters()
    assert torch.equal(logits(model), logits(alone("second")))


@pytest.mark.parametrize(("deleted", "left"), [("first", "second"), ("second", "first")])
@pytest.mark.parametrize("active", ["first", "second"])
def test_delete_adapter_leaves_the_other_in_force(deleted, left, active):
    model = both_plans()
    model.set_adapter(active)
    model.delete_adapter(deleted)
    assert (model.active_adapters(), list(model.peft_config)) == ([left], [left])
    assert torch.equal(logits(model), logits(alone(left)))


def test_deleting_all_adapters_leaves_the_base():
    model = both_plans()
    model.delete_adapter(["first", "second"])
    assert torch.equal(logits(model), logits(tiny_model()))
    assert not any("uniattn" in name for name in model.state_dict())


def test_an_adapter_can_be_added_after_all_were_deleted():
    model = both_plans()
    model.delete_adapter(["first", "second"])
    assert torch.equal(logits(add(model, "first", **FIRST)), logits(alone("first")))


@pytest.mark.parametrize(("name", "keys"), [("first", ["W"]), ("second", ["A", "B"]), (None, ["A", "B"])])
def test_get_adapter_state_dict_holds_exactly_the_compensation(name, keys):
    followers = (1, 2, 4) if name == "first" else (2, 3, 5)
    assert set(both_plans().get_adapter_state_dict(name)) == {
        f"model.layers.{layer}.self_attn.uniattn_{key}.weight" for layer in followers for key in keys
    }


@pytest.mark.parametrize("name", [None, "other"])
def test_load_adapter_reads_what_peft_wrote(name, adapter_folder):
    model = tiny_model()
    report = model.load_adapter(adapter_folder, name)
    assert not (report.missing_keys or report.unexpected_keys or report.mismatched_keys)
    assert model.active_adapters() == [name or "default"]
    assert torch.equal(logits(aligned(model)), logits(alone("first")))


@pytest.mark.parametrize("is_trainable", [True, False])
def test_load_adapter_trains_only_on_request(is_trainable, adapter_folder):
    model = tiny_model()
    model.load_adapter(adapter_folder, is_trainable=is_trainable)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(trainable) == (3 if is_trainable else 0)
    assert all("uniattn_W" in name for name in trainable)


def test_load_adapter_adds_a_plan_beside_another(adapter_folder):
    model = add(tiny_model(), "second", seed=5, **SECOND)
    model.load_adapter(adapter_folder, "first")
    for name in ("second", "first"):
        model.set_adapter(name)
        assert torch.equal(logits(aligned(model)), logits(alone(name)))


def test_load_adapter_refuses_another_base_and_leaves_it_as_it_was(adapter_folder):
    model = tiny_model(num_hidden_layers=8)
    before, expected, names = weights(model), logits(model), [name for name, _ in model.named_modules()]
    with pytest.raises(ValueError, match=r"made for another base model.*num_hidden_layers=6 instead of 8"):
        model.load_adapter(adapter_folder)
    assert not changed(before, weights(model))
    assert [name for name, _ in model.named_modules()] == names
    assert torch.equal(logits(model), expected)


def test_save_pretrained_writes_an_adapter_that_peft_reads(tmp_path):
    model = add(tiny_model(), **SECOND)
    model.save_pretrained(tmp_path)
    assert {"adapter_config.json", "adapter_model.safetensors"} <= set(os.listdir(tmp_path))
    assert not (tmp_path / "model.safetensors").exists()
    assert torch.equal(logits(aligned(PeftModel.from_pretrained(tiny_model(), tmp_path))), logits(model))


def test_save_pretrained_writes_an_adapter_that_transformers_reads(tmp_path):
    model = add(tiny_model(), **SECOND)
    model.save_pretrained(tmp_path)
    other = tiny_model()
    other.load_adapter(tmp_path)
    assert torch.equal(logits(aligned(other)), logits(model))


def test_save_pretrained_refuses_a_trainable_base(tmp_path):
    model = add(tiny_model(), **FIRST)
    model.model.norm.weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"model\.norm\.weight is trainable.*to_standalone"):
        model.save_pretrained(tmp_path)
    assert not (tmp_path / "adapter_model.safetensors").exists()


def test_auto_model_loads_base_and_adapter_from_the_adapter_folder(adapter_folder):
    model = AutoModelForCausalLM.from_pretrained(adapter_folder)
    assert model.active_adapters() == ["default"]
    assert torch.equal(logits(aligned(model)), logits(alone("first")))


def test_auto_model_loads_base_and_adapter_from_one_folder(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    tiny_adapter(**FIRST).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(aligned(model)), logits(alone("first")))


@pytest.mark.parametrize("name", ["first", "second"])
def test_the_standalone_model_of_an_added_adapter_has_its_logits(name):
    assert torch.equal(logits(to_standalone(both_plans(), name)), logits(alone(name)))


def test_an_adapter_of_a_bfloat16_base_gives_bfloat16_logits(adapter_folder):
    model = tiny_model(dtype=torch.bfloat16)
    model.load_adapter(adapter_folder)
    assert logits(model).dtype == torch.bfloat16


def test_a_training_step_changes_only_the_compensation(ids):
    model = add(tiny_model(), **FIRST).train()
    before = weights(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    assert changed(before, weights(model)) == {
        f"model.layers.{layer}.self_attn.uniattn_W.default.weight" for layer in (1, 2, 4)
    }
