"""UNIATTN as a method of PEFT: the enumeration member, the configuration, and what else has to stay where it is."""

from __future__ import annotations

import copy
import importlib
import inspect
import json
import pickle
import pydoc
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import CLASSES, tiny_adapter, tiny_model
from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.peft_types import PeftType

import peft_uniattn
from peft_uniattn import UNIATTN, UniAttnConfig, UniAttnLayer, UniAttnModel, registration

ROOT = Path(__file__).parents[1]


def registered() -> dict:
    """What PEFT knows about us, and how many members its enumeration has."""
    return {
        "members": list(PeftType),
        "names": list(PeftType.__members__),
        "config": PEFT_TYPE_TO_CONFIG_MAPPING[UNIATTN],
        "model": PEFT_TYPE_TO_TUNER_MAPPING[UNIATTN],
        "prefix": PEFT_TYPE_TO_PREFIX_MAPPING[UNIATTN],
    }


def test_importing_registers_config_model_and_prefix():
    found = registered()
    assert (found["config"], found["model"], found["prefix"]) == (UniAttnConfig, UniAttnModel, "uniattn_")


def test_importing_adds_exactly_one_member():
    assert list(PeftType).count("UNIATTN") == 1
    assert list(PeftType.__members__).count("UNIATTN") == 1


@pytest.mark.parametrize("module", [peft_uniattn, registration], ids=lambda module: module.__name__)
def test_reloading_registers_nothing_twice(module):
    before = registered()
    importlib.reload(module)
    assert registered() == before
    assert module.UNIATTN is UNIATTN


@pytest.mark.parametrize(
    "look_up",
    [
        lambda: PeftType("UNIATTN"),
        lambda: PeftType["UNIATTN"],
        lambda: PeftType.UNIATTN,
        lambda: PeftType.__members__["UNIATTN"],
        lambda: next(member for member in PeftType if member == "UNIATTN"),
        lambda: pickle.loads(pickle.dumps(UNIATTN)),
        lambda: copy.copy(UNIATTN),
        lambda: copy.deepcopy(UNIATTN),
        lambda: PeftType(UNIATTN),
        lambda: UniAttnConfig().peft_type,
    ],
    ids=["value", "name", "attribute", "members", "iteration", "pickle", "copy", "deepcopy", "itself", "config"],
)
def test_every_way_to_the_member_gives_the_same_object(look_up):
    assert look_up() is UNIATTN


def test_the_member_is_its_name():
    assert (UNIATTN.name, UNIATTN.value, json.dumps(UNIATTN)) == ("UNIATTN", "UNIATTN", '"UNIATTN"')
    assert UNIATTN == "UNIATTN" and hash(UNIATTN) == hash("UNIATTN")


def test_the_member_prints_like_those_of_peft():
    assert str(UNIATTN) == str(PeftType.LORA).replace("LORA", "UNIATTN")
    assert repr(UNIATTN) == repr(PeftType.LORA).replace("LORA", "UNIATTN")


CONFIGS = {
    "default": {},
    "range": {"superblock_size": 2, "start_layer": 1, "end_layer": 5},
    "explicit": {"superblocks": [[1, 2], [3, 4, 5]]},
    "low_rank": {"r": 8, "init_weights": False},
    "other_parts": {"modules_to_save": ["lm_head"], "trainable_token_indices": [3, 5], "task_type": "CAUSAL_LM"},
    "targets": {"target_modules": ["model.layers.2.self_attn", "model.layers.3.self_attn"]},
    "layout": {"base_layout": {"model_type": "llama", "num_hidden_layers": 6, "hidden_size": 32}},
}


@pytest.mark.parametrize("arguments", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("load", [PeftConfig, UniAttnConfig], ids=["PeftConfig", "UniAttnConfig"])
def test_config_survives_saving_and_loading(load, arguments, tmp_path):
    config = UniAttnConfig(**arguments)
    config.save_pretrained(tmp_path)
    loaded = load.from_pretrained(tmp_path)
    assert type(loaded) is UniAttnConfig
    assert loaded == config


def test_config_of_an_injected_adapter_survives_saving_and_loading(tmp_path):
    config = tiny_adapter(superblocks=[[0, 1], [3, 4, 5]], r=4).peft_config["default"]
    config.save_pretrained(tmp_path)
    assert PeftConfig.from_pretrained(tmp_path) == config


FRESH_PROCESS = """
import json, sys
from peft import PeftConfig

try:
    PeftConfig.from_pretrained(sys.argv[1])
    error = None
except KeyError as problem:
    error = problem.args
import peft_uniattn
print(json.dumps({"before": error, "after": type(PeftConfig.from_pretrained(sys.argv[1])).__name__}))
"""


@pytest.fixture(scope="module")
def fresh_process(tmp_path_factory) -> dict:
    """What loading an adapter does before and after this package is imported."""
    folder = tmp_path_factory.mktemp("adapter")
    UniAttnConfig().save_pretrained(folder)
    command = [sys.executable, "-c", FRESH_PROCESS, str(folder)]
    return json.loads(subprocess.check_output(command, cwd=ROOT, text=True).splitlines()[-1])


def test_loading_without_the_import_raises_key_error(fresh_process):
    assert fresh_process["before"] == ["UNIATTN"]


def test_loading_works_after_the_import(fresh_process):
    assert fresh_process["after"] == "UniAttnConfig"


# What the package uses of PEFT and transformers although it is not documented.
SEAMS = {
    "peft.mapping": ["PEFT_TYPE_TO_TUNER_MAPPING"],
    "peft.utils": ["register_peft_method"],
    "peft.utils.other": ["AuxiliaryTrainingWrapper", "ModulesToSaveWrapper", "TrainableTokensWrapper"],
    "peft.tuners.trainable_tokens.TrainableTokensLayer": ["get_merged_weights"],
    "peft.tuners.tuners_utils.BaseTuner": [
        "_check_merge_allowed",
        "_check_target_module_exists",
        "_create_and_replace",
        "_get_adapter_state_dict",
        "_prepare_adapter_config",
        "_replace_module",
        "_unload_and_optionally_merge",
    ],
    "peft.tuners.tuners_utils.BaseTunerLayer": [
        "_active_adapter",
        "_all_available_adapter_names",
        "_cast_input_dtype",
        "_disable_adapters",
        "_get_base_layer_device_and_dtype",
        "_move_adapter_to_device_of_base_layer",
        "adapter_layer_names",
        "merged_adapters",
        "other_param_names",
    ],
    "transformers.cache_utils": [
        "DynamicLayer",
        "DynamicSlidingWindowLayer",
        "StaticLayer",
        "StaticSlidingWindowLayer",
    ],
    "transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS": ["get_interface", "register"],
    "transformers.PreTrainedModel": ["initialize_weights", "tie_weights"],
    "transformers.PretrainedConfig": ["_attn_implementation", "get_text_config"],
    "transformers.models.auto.modeling_auto": ["MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"],
    "transformers.models.llama.modeling_llama": ["eager_attention_forward"],
    "transformers.models.mistral.modeling_mistral": ["eager_attention_forward"],
    "transformers.models.qwen2.modeling_qwen2": ["eager_attention_forward"],
}


@pytest.mark.parametrize("path", [f"{owner}.{name}" for owner, names in SEAMS.items() for name in names])
def test_what_the_package_relies_on_exists(path):
    """Upgrades that move one of these break the package; better here than in the middle of a training."""
    assert pydoc.locate(path) is not None


def overridden(ours: type, theirs: type) -> list[tuple[type, type, str]]:
    names = vars(ours).keys() & {name for base in theirs.__mro__[:-1] for name in vars(base)}
    return [(ours, theirs, name) for name in sorted(names) if inspect.isroutine(getattr(ours, name))]


@pytest.mark.parametrize(
    ("ours", "theirs", "name"),
    [
        pytest.param(*case, id=f"{case[1].__name__}.{case[2]}")
        for case in overridden(UniAttnModel, BaseTuner) + overridden(UniAttnLayer, BaseTunerLayer)
        if case[2] not in ("__init__", "forward")
    ],
)
def test_an_override_takes_what_peft_passes(ours, theirs, name):
    mine, expected = (inspect.signature(getattr(owner, name)).parameters for owner in (ours, theirs))
    any_keyword = any(parameter.kind is parameter.VAR_KEYWORD for parameter in mine.values())
    names = [name for name in expected if name not in ("args", "kwargs")]
    own = [name for name in mine if name in names]
    assert own == names[: len(own)], "the order counts for positional arguments"
    assert own == names or any_keyword


@pytest.mark.parametrize("family", CLASSES)
def test_attention_modules_have_the_parts_that_are_used(family):
    attention = tiny_model(family).model.layers[1].self_attn
    assert attention.layer_idx == 1
    assert attention.head_dim == 8
    assert attention.config is not None
    parts = {name for name, _ in attention.named_children()}
    assert parts == {"q_proj", "k_proj", "v_proj", "o_proj"}


@pytest.mark.parametrize("family", CLASSES)
def test_a_configuration_keeps_its_back_end_where_we_override_it(family):
    config = copy.copy(tiny_model(family).config)
    config._attn_implementation_internal = "anything"
    assert config._attn_implementation == "anything"


def test_torch_keeps_forward_pre_hooks_where_we_remove_them():
    module = torch.nn.Identity()
    module.register_forward_pre_hook(lambda module, args, kwargs: None, with_kwargs=True)
    assert len(module._forward_pre_hooks) == 1
    assert list(module._forward_pre_hooks) == list(module._forward_pre_hooks_with_kwargs)


def test_transformers_derives_our_prefix_from_the_method_name():
    """`model.delete_adapter` forms the prefix itself instead of asking PEFT."""
    assert f"{UNIATTN.value.lower()}_" == PEFT_TYPE_TO_PREFIX_MAPPING[UNIATTN]
