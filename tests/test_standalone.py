"""The standalone model: an ordinary transformers model that computes what the adapter computes, and stands alone."""

from __future__ import annotations

import copy
import json
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
from conftest import (
    CLASSES,
    aligned,
    changed,
    close,
    logits,
    loud,
    moved,
    prompt,
    specification,
    tiny_adapter,
    tiny_model,
    weights,
)
from huggingface_hub.errors import StrictDataclassError
from oracle import unified_logits
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from peft_uniattn import UniAttnConfig, standalone_modeling, to_standalone
from peft_uniattn.cache import kv_bytes

ROOT = Path(__file__).parents[1]
SUPERBLOCKS = [[0, 1, 2], [3, 4, 5]]
LEADERS, FOLLOWERS = (0, 3), (1, 2, 4, 5)

every_family = pytest.mark.parametrize("family", CLASSES)
both_ranks = pytest.mark.parametrize("r", [None, 4], ids=["full", "low_rank"])
extra_parts = pytest.mark.parametrize(
    "extra",
    [{"modules_to_save": ["lm_head"]}, {"modules_to_save": ["embed_tokens"]}, {"trainable_token_indices": [3, 5]}],
    ids=["lm_head", "embed_tokens", "tokens"],
)
tied_or_not = pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])


def adapter(family="llama", *, tied=False, r=None, dtype=torch.float64, **config):
    return tiny_adapter(tiny_model(family, tie_word_embeddings=tied, dtype=dtype), r=r, **config)


def standalone(family="llama", **arguments):
    return to_standalone(adapter(family, **arguments))


def reloaded(model, folder, **arguments):
    model.save_pretrained(folder)
    return aligned(AutoModelForCausalLM.from_pretrained(folder, **arguments))


def last_factor(r) -> str:
    """Name of the module that is zero while there is no compensation."""
    return "compensation" if r is None else "compensation_B"


def compensation_keys(r=None) -> set[str]:
    keys = ["compensation"] if r is None else ["compensation_A", "compensation_B"]
    return {f"model.layers.{layer}.self_attn.{key}.weight" for layer in FOLLOWERS for key in keys}


@tied_or_not
@both_ranks
@every_family
def test_logits_are_bit_equal_to_the_adapter_s(family, r, tied):
    model = adapter(family, tied=tied, r=r)
    assert torch.equal(logits(to_standalone(model)), logits(model))


@tied_or_not
@both_ranks
@every_family
def test_logits_equal_the_oracle_s(family, r, tied, float64, ids):
    model = to_standalone(loud(adapter(family, tied=tied, r=r)))
    close(logits(model), unified_logits(input_ids=ids, **specification(model, SUPERBLOCKS)))


@tied_or_not
@both_ranks
@every_family
def test_gradients_of_full_fine_tuning_equal_the_oracle_s(family, r, tied, float64, ids):
    model = to_standalone(loud(adapter(family, tied=tied, r=r))).train()
    parameters = dict(model.named_parameters())
    losses = [
        F.cross_entropy(output[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        for output in (model(ids).logits, unified_logits(input_ids=ids, **specification(model, SUPERBLOCKS)))
    ]
    actual, expected = (torch.autograd.grad(loss, list(parameters.values())) for loss in losses)
    for name, gradient in zip(parameters, actual, strict=True):
        assert gradient.abs().max() > 0, name
    close(dict(zip(parameters, actual, strict=True)), dict(zip(parameters, expected, strict=True)))


@pytest.mark.parametrize("back_end", ["sdpa", "eager"])
def test_the_back_end_is_kept(back_end):
    model = tiny_adapter(tiny_model(attn_implementation=back_end))
    other = to_standalone(model)
    assert other.config._attn_implementation == back_end
    assert torch.equal(logits(other), logits(model))


def test_any_plan_is_kept():
    model = tiny_adapter(superblocks=[[1, 2], [4, 5]])
    other = to_standalone(model)
    assert other.config.superblocks == [[1, 2], [4, 5]]
    assert torch.equal(logits(other), logits(model))


def test_the_named_adapter_is_used_whichever_is_active():
    model = tiny_adapter()
    model.add_adapter("other", UniAttnConfig(superblocks=[[2, 3, 4]], r=4, init_weights=False))
    model.set_adapter("other")
    expected = logits(model)
    model.set_adapter("default")
    assert torch.equal(logits(to_standalone(model, "other")), expected)


@extra_parts
@tied_or_not
def test_other_trained_parts_are_kept(tied, extra):
    ids = torch.tensor([[3, 5, 8, 3]])
    model = moved(adapter(tied=tied, **extra))
    assert torch.equal(logits(to_standalone(model), ids), logits(model, ids))


@extra_parts
@tied_or_not
def test_other_trained_parts_survive_saving_and_loading(tied, extra, tmp_path):
    ids = torch.tensor([[3, 5, 8, 3]])
    model = moved(adapter(tied=tied, **extra))
    assert torch.equal(logits(reloaded(to_standalone(model), tmp_path), ids), logits(model, ids))


@both_ranks
@every_family
def test_state_dict_has_compensation_in_place_of_the_followers_queries_and_keys(family, r):
    base = set(tiny_model(family).state_dict())
    gone = {f"model.layers.{layer}.self_attn.{part}_proj" for layer in FOLLOWERS for part in "qk"}
    expected = {name for name in base if name.rpartition(".")[0] not in gone} | compensation_keys(r)
    assert set(standalone(family, r=r).state_dict()) == expected


@tied_or_not
@both_ranks
@every_family
def test_saving_and_loading_is_bit_equal(family, r, tied, tmp_path):
    model = standalone(family, r=r, tied=tied)
    other = reloaded(model, tmp_path)
    assert type(other) is type(model)
    assert not changed(weights(model), weights(other))
    assert torch.equal(logits(other), logits(model))


def test_a_sharded_checkpoint_loads_bit_equal(tmp_path):
    model = standalone()
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    other = aligned(AutoModelForCausalLM.from_pretrained(tmp_path))
    assert torch.equal(logits(other), logits(model))


def test_weights_are_copies_by_default():
    model = adapter()
    expected = logits(model)
    other = to_standalone(model)
    pointers = {parameter.data_ptr() for parameter in model.parameters()}
    assert not pointers & {parameter.data_ptr() for parameter in other.parameters()}
    moved(other)
    assert torch.equal(logits(model), expected)


def test_training_the_adapter_afterwards_does_not_change_the_standalone_model():
    model = adapter()
    other = to_standalone(model)
    expected = logits(other)
    moved(model.requires_grad_(True))
    assert torch.equal(logits(other), expected)


def test_share_weights_copies_nothing():
    model = adapter()
    pointers = {parameter.data_ptr() for parameter in model.parameters()}
    other = to_standalone(model, share_weights=True)
    assert {parameter.data_ptr() for parameter in other.parameters()} <= pointers


def test_everything_is_trainable():
    assert all(parameter.requires_grad for parameter in standalone().parameters())


@pytest.mark.parametrize("mode", [True, False])
def test_training_mode_is_kept(mode):
    assert {module.training for module in to_standalone(adapter().train(mode)).modules()} == {mode}


def test_the_adapted_model_keeps_its_configuration():
    model = adapter()
    before = model.config.to_dict()
    to_standalone(model)
    assert model.config.to_dict() == before
    assert model.config.model_type == "llama"


def test_saving_writes_weights_as_safetensors_only(tmp_path):
    standalone().save_pretrained(tmp_path)
    assert {file.suffix for file in tmp_path.iterdir()} == {".safetensors", ".json", ".py"}


@both_ranks
@every_family
def test_configuration_is_the_base_s_with_plan_and_rank(family, r):
    base, config = tiny_model(family).config, standalone(family, r=r).config
    assert config.model_type == f"uniattn_{family}"
    assert type(config).__name__ == f"UniAttn{type(base).__name__}"
    assert isinstance(config, type(base))
    assert (config.superblocks, config.compensation_rank) == (SUPERBLOCKS, r)
    own = {"model_type", "superblocks", "compensation_rank", "follower_mask", "uniattn_version"}
    others = {"compensation": "attention_output", "shared": "softmax", "dropped_layers": None}
    others |= {"kernels": "auto", "skip_mass": 0.0}
    assert {key: getattr(config, key) for key in others} == others
    own |= set(others)
    assert {key: value for key, value in config.to_dict().items() if key not in own} == {
        key: value for key, value in base.to_dict().items() if key not in own
    }


@both_ranks
@every_family
def test_auto_config_reads_the_saved_configuration(family, r, tmp_path):
    model = standalone(family, r=r)
    model.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config) is type(model.config)
    assert (config.superblocks, config.compensation_rank) == (SUPERBLOCKS, r)


@every_family
def test_plan_and_rank_are_fields_of_the_configuration(family):
    config = AutoConfig.for_model(f"uniattn_{family}")
    assert (config.superblocks, config.compensation_rank) == (None, None)


def test_a_configuration_without_a_rank_means_full_compensation(tmp_path):
    model = standalone()
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["compensation_rank"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert torch.equal(logits(aligned(AutoModelForCausalLM.from_pretrained(tmp_path))), logits(model))


def test_the_checkpoint_says_how_to_load_itself(tmp_path):
    standalone("qwen2").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["UniAttnQwen2ForCausalLM"]
    assert config["auto_map"] == {
        "AutoConfig": "standalone_modeling.UniAttnQwen2Config",
        "AutoModelForCausalLM": "standalone_modeling.UniAttnQwen2ForCausalLM",
    }


@both_ranks
@every_family
def test_a_new_random_model_compensates_nothing(family, r):
    config = standalone(family, r=r).config
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    zero = {name for name, weight in weights(model).items() if not weight.count_nonzero() and "bias" not in name}
    assert zero == {f"model.layers.{layer}.self_attn.{last_factor(r)}.weight" for layer in FOLLOWERS}


@pytest.mark.parametrize("missing", [FOLLOWERS, (4,)], ids=["all", "one"])
@both_ranks
def test_compensation_that_a_checkpoint_lacks_starts_at_zero(r, missing, tmp_path):
    model = standalone(r=r)
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    lacking = tuple(f"model.layers.{layer}.self_attn.compensation" for layer in missing)
    save_file({k: v for k, v in load_file(file).items() if not k.startswith(lacking)}, file, {"format": "pt"})
    other = AutoModelForCausalLM.from_pretrained(tmp_path)
    last = {i: other.model.layers[i].self_attn.get_submodule(last_factor(r)).weight for i in FOLLOWERS}
    assert [i for i, weight in last.items() if not weight.count_nonzero()] == list(missing)
    untouched = {k: v for k, v in weights(model).items() if not k.startswith(lacking)}
    assert not changed(untouched, {k: v for k, v in weights(other).items() if not k.startswith(lacking)})


def test_tied_embeddings_are_one_parameter(tmp_path):
    for model in (standalone(tied=True), reloaded(standalone(tied=True), tmp_path)):
        assert model.lm_head.weight is model.model.embed_tokens.weight
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")


def test_untied_embeddings_are_two_parameters():
    model = standalone()
    assert model.lm_head.weight.data_ptr() != model.model.embed_tokens.weight.data_ptr()


@tied_or_not
def test_token_embeddings_can_be_resized(tied):
    model = standalone(tied=tied)
    expected = logits(model)
    model.resize_token_embeddings(110, mean_resizing=False)
    assert (model.config.vocab_size, model.lm_head.weight.shape[0]) == (110, 110)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    close(logits(model)[..., :97], expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_dtype_argument_reaches_every_weight(dtype, tmp_path):
    model = reloaded(standalone(), tmp_path, dtype=dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert logits(model).dtype == dtype


def test_compensation_takes_the_type_of_the_base():
    model = adapter(dtype=torch.bfloat16)
    assert model.get_parameter("base_model.model.model.layers.1.self_attn.uniattn_W.default.weight").dtype == (
        torch.float32
    )
    assert {parameter.dtype for parameter in to_standalone(model).parameters()} == {torch.bfloat16}


def test_generation_settings_are_carried_over(tmp_path):
    model = adapter()
    model.base_model.model.generation_config.max_new_tokens = 7
    other = to_standalone(model)
    model.base_model.model.generation_config.max_new_tokens = 5
    assert other.generation_config.max_new_tokens == 7
    assert reloaded(other, tmp_path).generation_config.max_new_tokens == 7


@both_ranks
@every_family
def test_generation_with_a_cache_equals_generation_without(family, r, ids):
    model = to_standalone(loud(adapter(family, r=r)))
    arguments = {"max_new_tokens": 12, "do_sample": False}
    cached = model.generate(ids, use_cache=True, **arguments)
    assert torch.equal(cached, model.generate(ids, use_cache=False, **arguments))


@every_family
def test_generation_equals_the_adapter_s(family, ids):
    model = loud(adapter(family))
    arguments = {"max_new_tokens": 12, "do_sample": False}
    assert torch.equal(to_standalone(model).generate(ids, **arguments), model.generate(ids, **arguments))


@every_family
def test_followers_cache_no_keys(family, ids):
    model, cache = standalone(family), DynamicCache()
    model(ids, past_key_values=cache)
    batch, length = ids.shape
    half = batch * length * 2 * 8 * 8  # key/value heads, head_dim, bytes of a float64
    assert kv_bytes(cache) == (2 * len(LEADERS) + len(FOLLOWERS)) * half


def test_output_attentions_has_one_entry_per_layer_and_followers_show_their_leader_s(ids):
    model = to_standalone(tiny_adapter(tiny_model(attn_implementation="eager")))
    attentions = model(ids, output_attentions=True).attentions
    assert [attention.shape for attention in attentions] == [(2, 4, 9, 9)] * 6
    for block in SUPERBLOCKS:
        for follower in block[1:]:
            assert torch.equal(attentions[follower], attentions[block[0]])
    assert not torch.equal(attentions[0], attentions[3])


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda model: pickle.loads(pickle.dumps(model))}


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
@every_family
def test_a_copy_gives_the_same_logits_and_is_independent(family, copied):
    model = standalone(family)
    expected = logits(model)
    other = aligned(copied(model))
    assert type(other) is type(model) and type(other.config) is type(model.config)
    assert torch.equal(logits(other), expected)
    moved(other)
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_a_copy_saves_and_loads(copied, tmp_path):
    model = standalone()
    assert torch.equal(logits(reloaded(copied(model), tmp_path)), logits(model))


LORA = {
    "attention": ["v_proj", "o_proj", "q_proj"],
    "everything": "all-linear",
    "compensation": ["compensation"],
}


def with_lora(model, targets):
    torch.manual_seed(4)
    config = LoraConfig(r=2, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM")
    return get_peft_model(model, config).eval()


def test_lora_finds_queries_in_leaders_only():
    names = {name for name, _ in with_lora(standalone(), LORA["attention"]).named_parameters() if "lora_A" in name}
    having = {
        part: {int(name.split("layers.")[1].split(".")[0]) for name in names if f".{part}_proj." in name}
        for part in "qvo"
    }
    assert having == {"q": set(LEADERS), "v": set(range(6)), "o": set(range(6))}


@pytest.mark.parametrize("targets", LORA.values(), ids=LORA)
def test_lora_merges_into_a_standalone_model(targets):
    model = standalone()
    before, keys = logits(model), set(model.state_dict())
    lora = with_lora(model, targets)
    expected = logits(lora)
    assert not torch.allclose(expected, before, rtol=0, atol=1e-3)
    merged = lora.merge_and_unload()
    assert type(merged).__name__ == "UniAttnLlamaForCausalLM"
    assert set(merged.state_dict()) == keys
    close(logits(merged), expected)


def test_lora_saves_and_loads_on_a_standalone_checkpoint(tmp_path):
    lora = with_lora(standalone(), LORA["attention"])
    lora.save_pretrained(tmp_path / "lora")
    other = PeftModel.from_pretrained(reloaded(standalone(), tmp_path / "base"), tmp_path / "lora")
    assert torch.equal(logits(aligned(other)), logits(lora))


def test_a_lora_step_changes_only_lora(ids):
    lora = with_lora(standalone(), LORA["attention"]).train()
    before = weights(lora)
    optimizer = torch.optim.AdamW(lora.parameters(), lr=1e-2)
    lora(ids, labels=ids).loss.backward()
    optimizer.step()
    moved = changed(before, weights(lora))
    assert moved == {name for name in before if ".lora_" in name}


@pytest.mark.skipif(not hasattr(transformers, "InternLM3Config"), reason="needs transformers with InternLM-3")
def test_an_architecture_that_borrows_a_model_class_has_a_standalone_class_of_its_own():
    found = standalone_modeling.UniAttnLlamaForCausalLMWithInternLM3Config
    assert issubclass(found, transformers.LlamaForCausalLM)
    assert found.config_class.model_type == "uniattn_internlm3"
    assert found.config_class is standalone_modeling.UniAttnInternLM3Config
    assert pickle.loads(pickle.dumps(found)) is found


@pytest.mark.parametrize("name", ["Nothing", "LlamaForCausalLMWithNothing", "LlamaConfigWithLlamaConfig", "LlamaMLP"])
def test_other_names_are_no_standalone_classes(name):
    with pytest.raises(AttributeError, match=f"no attribute 'UniAttn{name}'"):
        getattr(standalone_modeling, f"UniAttn{name}")


WITHOUT_THE_PACKAGE = """
import filecmp, glob, importlib.abc, json, os, sys

class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "peft_uniattn":
            raise ModuleNotFoundError(name, name=name)

absent = Absent()
sys.meta_path.insert(0, absent)
import torch
from transformers import AutoModelForCausalLM

torch.set_num_threads(1)

def load(folder, **arguments):
    model = AutoModelForCausalLM.from_pretrained(folder, **arguments)
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model

ids = torch.load("ids.pt")
found = {}
for name in sys.argv[2:]:
    model = load(name, trust_remote_code=True)
    again = f"{name}-again"
    model.save_pretrained(again)
    other = load(again, trust_remote_code=True)
    with torch.no_grad():
        torch.save([model(ids).logits, other(ids).logits], f"{name}.pt")
        torch.save(model.generate(ids, max_new_tokens=6, do_sample=False), f"{name}-generated.pt")
    found[name] = {
        "module": type(model).__module__,
        "same_files": sorted(os.listdir(name)) == sorted(os.listdir(again)),
        "same_code": not any(filecmp.cmpfiles(name, again, glob.glob("*.py", root_dir=name), False)[1:]),
    }
found["peft_imported"] = "peft" in sys.modules

sys.meta_path.remove(absent)
sys.path.insert(0, sys.argv[1])
import peft_uniattn
with_package = load(name)
with torch.no_grad():
    torch.save([with_package(ids).logits, model(ids).logits], "both.pt")
found["modules"] = [type(with_package).__module__, type(model).__module__]
print(json.dumps(found))
"""

REMOTE = {"llama": {}, "mistral": {"tied": True}, "qwen2": {"r": 4}}


@pytest.fixture(scope="module")
def remote(tmp_path_factory):
    """The folder, and the report, of a process that loads checkpoints with `trust_remote_code=True` only."""
    folder = tmp_path_factory.mktemp("remote")
    torch.save(prompt(), folder / "ids.pt")
    for family, arguments in REMOTE.items():
        standalone(family, **arguments).save_pretrained(folder / family)
    command = [sys.executable, "-I", "-c", WITHOUT_THE_PACKAGE, str(ROOT), *REMOTE]
    environment = {**os.environ, "HF_MODULES_CACHE": str(folder / "modules")}
    output = subprocess.check_output(command, cwd=folder, env=environment, text=True)
    return folder, json.loads(output.splitlines()[-1])


every_remote = pytest.mark.parametrize("family", REMOTE)


@every_remote
def test_trust_remote_code_gives_bit_equal_logits_without_the_package(family, remote):
    folder, report = remote
    assert report[family]["module"].startswith("transformers_modules.")
    assert torch.equal(torch.load(folder / f"{family}.pt")[0], logits(standalone(family, **REMOTE[family])))


@every_remote
def test_trust_remote_code_generates_without_the_package(family, remote, ids):
    expected = standalone(family, **REMOTE[family]).generate(ids, max_new_tokens=6, do_sample=False)
    assert torch.equal(torch.load(remote[0] / f"{family}-generated.pt"), expected)


@every_remote
def test_a_model_from_remote_code_saves_and_loads_again(family, remote):
    folder, report = remote
    assert report[family]["same_files"] and report[family]["same_code"]
    assert torch.equal(*torch.load(folder / f"{family}.pt"))


@every_remote
def test_what_remote_code_saved_loads_with_the_package(family, remote):
    other = aligned(AutoModelForCausalLM.from_pretrained(remote[0] / f"{family}-again"))
    assert torch.equal(logits(other), logits(standalone(family, **REMOTE[family])))


def test_remote_code_does_not_import_peft(remote):
    assert remote[1]["peft_imported"] is False


def test_remote_code_and_the_package_live_in_one_process(remote):
    folder, report = remote
    assert report["modules"][0] == "peft_uniattn.standalone_modeling"
    assert report["modules"][1].startswith("transformers_modules.")
    assert torch.equal(*torch.load(folder / "both.pt"))


def test_the_package_s_own_code_is_used_where_it_is_imported(tmp_path):
    model = reloaded(standalone(), tmp_path, trust_remote_code=True)
    assert type(model).__module__ == "peft_uniattn.standalone_modeling"


def test_weights_that_a_checkpoint_lacks_are_refused_and_not_invented(tmp_path):
    standalone = to_standalone(tiny_adapter())
    standalone.save_pretrained(tmp_path)
    file, name = tmp_path / "model.safetensors", "model.layers.2.self_attn.v_proj.weight"
    save_file({key: tensor for key, tensor in load_file(file).items() if key != name}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"lacks '{re.escape(name)}' \(1 weights are missing\)"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("rank", [0, -1, 33, 2.0, True, "4"])
def test_an_impossible_rank_of_the_compensation_is_refused(rank, tmp_path):
    to_standalone(tiny_adapter()).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "compensation_rank": rank}))
    with pytest.raises((ValueError, StrictDataclassError), match="compensation_rank"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


class Operations(TorchDispatchMode):
    """How many operations a model asks its device for; with small tensors, it is their number that takes time."""

    def __init__(self):
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.number += 1
        return function(*args, **(kwargs or {}))


@torch.inference_mode()
@pytest.mark.parametrize("tokens", [1, 8], ids=["decode", "prefill"])
@both_ranks
def test_it_asks_for_fewer_operations_than_its_base(tokens, r):
    base = tiny_model()
    counts = []
    for each in (base, to_standalone(get_peft_model(tiny_model(), UniAttnConfig(superblocks=SUPERBLOCKS, r=r)))):
        cache = each(torch.tensor([[1, 2, 3]]), use_cache=True).past_key_values
        with Operations() as operations:
            each(torch.arange(tokens)[None], past_key_values=cache, use_cache=True)
        counts.append(operations.number)
    assert counts[1] < counts[0]


@pytest.mark.parametrize("convert", [to_standalone, lambda model: model.merge_and_unload()], ids=["copy", "merge"])
def test_frequencies_that_a_long_text_has_stretched_shrink_again(convert):
    dynamic = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
    model = tiny_adapter(loud(tiny_model(max_position_embeddings=32, rope_parameters=dynamic)))
    expected = logits(model, prompt())
    logits(model, prompt(length=60))
    assert torch.equal(logits(convert(model), prompt()), expected)


@pytest.mark.parametrize("inside", [True, False], ids=["lora-below", "lora-above"])
def test_another_adapter_in_the_way_of_a_conversion_is_named(inside):
    lora = LoraConfig(target_modules=["down_proj"], r=2)
    model = tiny_adapter(get_peft_model(tiny_model(), lora).base_model.model) if inside else tiny_adapter()
    if not inside:
        get_peft_model(model.base_model.model, lora, adapter_name="other")
    with pytest.raises(
        ValueError, match=r"mlp.down_proj is a layer of another adapter.*; merge_and_unload\(\) that one"
    ):
        to_standalone(model)
