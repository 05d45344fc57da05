"""Adapters on disk: what is written, what comes back, and what is refused before anything is changed."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import conftest
import pytest
import torch
import transformers.utils.hub
from conftest import aligned, changed, moved, prompt, tiny_adapter, tiny_model, weights
from huggingface_hub import ModelCard
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from peft_uniattn import UniAttnConfig, UniAttnLayer
from peft_uniattn.inspection import find_adapter

CONFIGS = {
    "full": {},
    "low_rank": {"r": 4},
    "explicit": {"superblocks": [[1, 2, 3], [4, 5]]},
    "modules_to_save": {"modules_to_save": ["lm_head"]},
    "tokens": {"trainable_token_indices": [3, 5]},
    "unclassified": {"task_type": None},
}
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def logits(model):
    """Of a prompt that holds the trained tokens."""
    return conftest.logits(model, torch.cat([prompt(), torch.tensor([[3, 5], [5, 3]])], dim=1))


def adapter(base=None, **config):
    """An adapter whose trainable parts all have values of their own."""
    return moved(tiny_adapter(base, **config))


def loaded(folder, **arguments):
    return aligned(PeftModel.from_pretrained(tiny_model(), folder, **arguments))


def test_saving_writes_an_adapter_and_a_model_card(tmp_path):
    adapter().save_pretrained(tmp_path)
    assert set(os.listdir(tmp_path)) == {"adapter_config.json", "adapter_model.safetensors", "README.md"}


@pytest.mark.parametrize("name", ["default", "other"])
def test_the_readme_of_peft_tells_the_import_that_loading_needs(name, tmp_path):
    base = tiny_model()
    base.save_pretrained(tmp_path / "base")
    model = adapter(tiny_model().from_pretrained(tmp_path / "base"))
    if name != "default":
        model.add_adapter(name, UniAttnConfig(superblock_size=3, start_layer=0, init_weights=False))
    model.save_pretrained(tmp_path / "saved", selected_adapters=[name])
    code = re.search(r"How to Get Started.*?```python\n(.*?)```", (tmp_path / "saved" / "README.md").read_text(), re.S)
    assert code[1].startswith("import peft_uniattn")
    folder = tmp_path / "saved" / ("" if name == "default" else name)
    loaded_by_it = {}
    exec(code[1].replace("path/or/name/of/this/adapter", str(folder)), loaded_by_it)
    assert find_adapter(loaded_by_it["model"]).plan.followers == [1, 2, 4, 5]


def test_a_readme_of_ones_own_stays(tmp_path):
    (tmp_path / "README.md").write_text("---\ntags: [mine]\n---\n\n# Mine\n\nload it as you like\n")
    adapter().save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "load it as you like" in text
    assert "import peft_uniattn" not in text


@pytest.mark.parametrize("name", ["default", "other"])
@pytest.mark.parametrize(
    ("r", "shapes"), [(None, {"uniattn_W": (32, 32)}), (4, {"uniattn_A": (4, 32), "uniattn_B": (32, 4)})]
)
def test_the_file_holds_exactly_the_compensation(r, shapes, name, tmp_path):
    model = adapter(r=r)
    if name != "default":
        model.add_adapter(name, UniAttnConfig(superblock_size=3, start_layer=0, r=r, init_weights=False))
    model.save_pretrained(tmp_path, selected_adapters=[name])
    file = load_file(tmp_path / ("" if name == "default" else name) / "adapter_model.safetensors")
    attention = "base_model.model.model.layers.{}.self_attn.{}.weight"
    expected = {attention.format(layer, key): shape for layer in (1, 2, 4, 5) for key, shape in shapes.items()}
    assert {key: tuple(tensor.shape) for key, tensor in file.items()} == expected
    for key, tensor in file.items():
        assert torch.equal(tensor, model.get_parameter(key.replace(".weight", f".{name}.weight")))


@every_config
@pytest.mark.parametrize("name", ["default", "other"])
def test_a_loaded_adapter_is_bit_equal_under_any_name(name, config, tmp_path):
    model = adapter(**config)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(loaded(tmp_path, adapter_name=name)), logits(model))


def test_low_cpu_mem_usage_loads_the_same_and_leaves_nothing_on_the_meta_device(tmp_path):
    model = adapter()
    model.save_pretrained(tmp_path)
    other = PeftModel.from_pretrained(tiny_model(), tmp_path, low_cpu_mem_usage=True)
    assert not any(parameter.is_meta for parameter in other.parameters())
    assert torch.equal(logits(aligned(other)), logits(model))


def test_pickled_weights_load_as_well(tmp_path):
    model = adapter()
    model.save_pretrained(tmp_path, safe_serialization=False)
    assert (tmp_path / "adapter_model.bin").exists()
    assert torch.equal(logits(loaded(tmp_path)), logits(model))


@pytest.mark.parametrize("is_trainable", [True, False])
def test_is_trainable_decides_what_trains(is_trainable, tmp_path):
    model = adapter()
    model.save_pretrained(tmp_path)
    expected = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    other = loaded(tmp_path, is_trainable=is_trainable)
    assert {name for name, parameter in other.named_parameters() if parameter.requires_grad} == (
        expected if is_trainable else set()
    )


def test_auto_peft_model_finds_base_and_adapter(tmp_path):
    tiny_model().save_pretrained(tmp_path / "base")
    base = aligned(type(tiny_model()).from_pretrained(tmp_path / "base"))
    model = adapter(base)
    model.save_pretrained(tmp_path / "adapter")
    other = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(aligned(other)), logits(model))


@pytest.mark.parametrize("first", ["full", "low_rank", "explicit"])
@pytest.mark.parametrize("second", ["full", "low_rank", "explicit"])
def test_a_second_adapter_loads_beside_the_first(first, second, tmp_path):
    for name in {first, second}:
        adapter(**CONFIGS[name]).save_pretrained(tmp_path / name)
    model = loaded(tmp_path / first)
    model.load_adapter(tmp_path / second, "other")
    for name, source in {"default": first, "other": second}.items():
        model.set_adapter(name)
        assert torch.equal(logits(aligned(model)), logits(adapter(**CONFIGS[source])))


def test_a_second_adapter_is_not_active_after_loading(tmp_path):
    adapter(r=4).save_pretrained(tmp_path)
    model = adapter()
    expected = logits(model)
    model.load_adapter(tmp_path, "other")
    assert model.active_adapters == ["default"]
    assert torch.equal(logits(model), expected)


def test_several_adapters_save_into_folders_of_their_own(tmp_path):
    model = adapter()
    model.add_adapter("other", UniAttnConfig(superblocks=[[1, 2]], init_weights=False))
    model.save_pretrained(tmp_path)
    model.set_adapter("other")
    assert torch.equal(logits(loaded(tmp_path / "other")), logits(model))


def test_saving_twice_gives_the_same_weights(tmp_path):
    model = adapter(r=4)
    for name in ("first", "second"):
        model.save_pretrained(tmp_path / name)
    first, second = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("first", "second"))
    assert not changed(first, second)


class FakeHub:
    """Stands for huggingface_hub's `HfApi`: takes note of what is uploaded."""

    def __init__(self):
        self.commits = []

    def create_repo(self, repo_id, **arguments):
        return type("Repo", (), {"repo_id": repo_id})

    def create_commit(self, repo_id, operations, **arguments):
        files = {operation.path_in_repo: Path(operation.path_or_fileobj).read_bytes() for operation in operations}
        self.commits.append((repo_id, files))


@pytest.fixture
def hub(monkeypatch):
    fake = FakeHub()
    monkeypatch.setattr(transformers.utils.hub, "hf_api", lambda: fake)
    monkeypatch.setattr(
        ModelCard, "load", classmethod(lambda cls, repo_id, **arguments: ModelCard("---\n---\nas it was\n"))
    )
    return fake


def test_push_to_hub_uploads_what_saving_writes(hub, tmp_path):
    model = adapter()
    model.save_pretrained(tmp_path)
    model.push_to_hub("someone/adapter")
    [(repo_id, files)] = hub.commits
    assert repo_id == "someone/adapter"
    assert set(files) == set(os.listdir(tmp_path))
    assert files["adapter_model.safetensors"] == (tmp_path / "adapter_model.safetensors").read_bytes()
    assert json.loads(files["adapter_config.json"])["peft_type"] == "UNIATTN"


def test_the_configuration_file_holds_the_plan_and_the_base_layout(tmp_path):
    adapter(superblocks=[[1, 2, 3], [4, 5]], r=4).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["peft_type"] == "UNIATTN"
    assert config["superblocks"] == [[1, 2, 3], [4, 5]]
    assert config["r"] == 4
    assert config["base_layout"] == {"model_type": "llama", "num_hidden_layers": 6, "hidden_size": 32}
    assert sorted(config["target_modules"]) == [f"model.layers.{layer}.self_attn" for layer in range(1, 6)]


OTHER_BASES = {
    "num_hidden_layers": (lambda: tiny_model(num_hidden_layers=8), "num_hidden_layers=6 instead of 8"),
    "hidden_size": (lambda: tiny_model(hidden_size=64), "hidden_size=32 instead of 64"),
    "model_type": (lambda: tiny_model("mistral"), "model_type='llama' instead of 'mistral'"),
    "several": (
        lambda: tiny_model("qwen2", num_hidden_layers=8),
        "model_type='llama' instead of 'qwen2', num_hidden_layers=6 instead of 8",
    ),
}
other_bases = pytest.mark.parametrize(("make_base", "difference"), OTHER_BASES.values(), ids=OTHER_BASES)


@other_bases
def test_another_base_is_refused_and_left_as_it_was(make_base, difference, tmp_path):
    adapter().save_pretrained(tmp_path)
    base = make_base()
    before, expected = weights(base), logits(base)
    with pytest.raises(ValueError, match=f"made for another base model.*{difference}.*load the base it names"):
        PeftModel.from_pretrained(base, tmp_path)
    assert not changed(before, weights(base))
    assert torch.equal(logits(base), expected)
    assert not any(isinstance(module, UniAttnLayer) or module._forward_pre_hooks for module in base.modules())
    assert not hasattr(base, "peft_config")


@other_bases
def test_a_second_adapter_for_another_base_is_refused_and_the_first_kept(make_base, difference, tmp_path):
    adapter().save_pretrained(tmp_path)
    model = tiny_adapter(make_base(), superblock_size=2)
    before, expected = weights(model), logits(model)
    with pytest.raises(ValueError, match=difference):
        model.load_adapter(tmp_path, "other")
    assert list(model.peft_config) == ["default"]
    assert not changed(before, weights(model))
    assert torch.equal(logits(model), expected)


def test_the_refusal_names_the_right_base(tmp_path):
    tiny_model().save_pretrained(tmp_path / "base")
    adapter(type(tiny_model()).from_pretrained(tmp_path / "base")).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError) as refusal:
        PeftModel.from_pretrained(tiny_model(num_hidden_layers=8), tmp_path / "adapter")
    assert str(tmp_path / "base") in str(refusal.value)


@pytest.mark.parametrize("trained", ["model.norm.weight", "model.layers.1.self_attn.base_layer.v_proj.weight"])
@every_config
def test_a_trainable_base_is_not_saved_as_an_adapter(config, trained, tmp_path):
    model = adapter(**config)
    model.base_model.model.get_parameter(trained).requires_grad_(True)
    with pytest.raises(ValueError, match=rf"{trained} is trainable.*to_standalone\(model\).*requires_grad_\(False\)"):
        model.save_pretrained(tmp_path)
    assert not (tmp_path / "adapter_model.safetensors").exists()


def test_a_base_that_was_trained_and_frozen_again_is_not_saved_as_an_adapter(tmp_path):
    model = adapter().train()
    model.requires_grad_(True)
    model(prompt(), labels=prompt()).loss.backward()
    model.base_model.model.requires_grad_(False)
    with pytest.raises(
        ValueError, match=r"was trained together with the adapter.*save to_standalone\(model\) instead"
    ):
        model.save_pretrained(tmp_path)
    assert not (tmp_path / "adapter_model.safetensors").exists()


def test_evaluating_a_trainable_base_is_no_training(tmp_path):
    model = adapter()
    model.requires_grad_(True)
    model(prompt())
    model.requires_grad_(False)
    model.save_pretrained(tmp_path)


def test_a_truncated_file_gives_an_error(tmp_path):
    adapter().save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(SafetensorError):
        loaded(tmp_path)


@pytest.mark.parametrize("missing", ["adapter_model.safetensors", "adapter_config.json"])
def test_a_missing_file_gives_an_error(missing, tmp_path):
    adapter().save_pretrained(tmp_path)
    (tmp_path / missing).unlink()
    with pytest.raises((ValueError, OSError)):
        loaded(tmp_path)


def test_a_tensor_of_another_shape_gives_an_error(tmp_path):
    adapter(r=4).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "r": 5}))
    with pytest.raises(ValueError, match=r"size mismatch.*uniattn_A.*\(4, 32\) instead of \(5, 32\)"):
        loaded(tmp_path)


def test_a_missing_tensor_gives_an_error_that_names_it(tmp_path):
    adapter().save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file({name: tensor for name, tensor in load_file(file).items() if "layers.4." not in name}, file)
    with pytest.raises(ValueError, match=r"lacks.*layers\.4\.self_attn\.uniattn_W.*1 of 4 tensors"):
        loaded(tmp_path)


def test_a_file_that_names_weights_of_the_base_is_refused(tmp_path):
    adapter().save_pretrained(tmp_path)
    file, name = tmp_path / "adapter_model.safetensors", "base_model.model.model.norm.weight"
    save_file({**load_file(file), name: torch.zeros(32, dtype=torch.float64)}, file)
    with pytest.raises(ValueError, match=r"model\.norm\.weight.*not part of the adapter"):
        loaded(tmp_path)


def test_the_folder_of_an_adapter_without_its_weights_is_refused(tmp_path):
    adapter().save_pretrained(tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    base = tiny_model()
    with pytest.raises(ValueError, match=r"no adapter_model\.safetensors; copy it there"):
        PeftModel.from_pretrained(base, tmp_path)
    assert not any(isinstance(module, UniAttnLayer) for module in base.modules())


def test_a_saved_configuration_can_be_changed_and_used_anew(tmp_path):
    adapter().save_pretrained(tmp_path)
    config = UniAttnConfig.from_pretrained(tmp_path)
    config.r = 2
    assert get_peft_model(tiny_model(), config).peft_config["default"].r == 2


@pytest.mark.parametrize("name", ["", ".", "../up", "a/b", "a.b", "a\\b", "keys"])
def test_an_adapter_name_that_is_no_folder_and_module_is_refused(name, tmp_path):
    adapter().save_pretrained(tmp_path)
    base = tiny_model()
    before = weights(base)
    with pytest.raises(ValueError, match="cannot be the name of a folder and of a module"):
        PeftModel.from_pretrained(base, tmp_path, adapter_name=name)
    assert not changed(before, weights(base))


@pytest.mark.parametrize(
    "field", [{"superblock_size": 1}, {"superblocks": [[1, 3]]}, {"r": 0}, {"start_layer": -1}, {"end_layer": "5"}]
)
def test_an_impossible_configuration_file_is_refused_by_field(field, tmp_path):
    adapter().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, **field}))
    [name] = field
    with pytest.raises(ValueError, match=name):
        loaded(tmp_path)


def without_a_layer(tensors):
    tensors.pop(max(tensors))


def with_a_weight_of_the_base(tensors):
    tensors["base_model.model.model.layers.5.mlp.down_proj.weight"] = torch.zeros(32, 48)


@pytest.mark.parametrize(
    ("other", "change", "words"),
    [
        ({}, without_a_layer, "lack 'model.layers.2.self_attn"),
        ({}, with_a_weight_of_the_base, "hold 'model.layers.5.mlp.down_proj.weight'"),
        ({"superblocks": [[3, 4, 5]]}, None, "lack 'model.layers.1.self_attn"),
        ({"superblocks": [[0, 1, 2], [3, 4]]}, None, "hold 'model.layers.4.self_attn"),
        ({"r": 4}, None, "lack 'model.layers.1.self_attn.uniattn_W.weight'"),
    ],
    ids=["missing", "of-the-base", "other-layers", "more-layers", "low-rank"],
)
def test_weights_for_an_adapter_that_is_there_are_its_own(other, change, words, tmp_path):
    """As a trainer loads them to resume, and at the end for the best model."""
    tiny_adapter(seed=5, **{"superblocks": [[0, 1, 2]], **other}).save_pretrained(tmp_path)
    if change:
        tensors = load_file(tmp_path / "adapter_model.safetensors")
        change(tensors)
        save_file(tensors, tmp_path / "adapter_model.safetensors")
    model = tiny_adapter(superblocks=[[0, 1, 2]])
    before = weights(model)
    with pytest.raises(ValueError, match=rf"adapter 'default' is \[0-2\], and the weights to load into it {words}"):
        model.load_adapter(tmp_path, "default")
    assert not changed(before, weights(model))


def test_weights_of_the_same_configuration_replace_those_of_an_adapter(tmp_path):
    saved = tiny_adapter(seed=5, modules_to_save=["lm_head"])
    saved.save_pretrained(tmp_path)
    model = tiny_adapter(modules_to_save=["lm_head"])
    model.load_adapter(tmp_path, "default")
    assert torch.equal(conftest.logits(model, prompt()), conftest.logits(saved, prompt()))
