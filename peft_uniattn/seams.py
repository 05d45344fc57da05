"""
What this package uses of PEFT and transformers that is not their public interface, checked when it is imported.

Overriding a method that is not called any more would give a wrong number; a missing one here gives a sentence instead.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, requires, version

# Module -> object in it -> attributes that are overridden, called or read.
SEAMS: dict[str, dict[str, tuple[str, ...]]] = {
    "peft.tuners.tuners_utils": {
        "BaseTuner": (
            "_check_merge_allowed",
            "_check_target_module_exists",
            "_create_and_replace",
            "_get_adapter_state_dict",
            "_prepare_adapter_config",
            "_remap_adapter_state_dict_for_load",
            "_replace_module",
            "_unload_and_optionally_merge",
            "inject_adapter",
        ),
        "BaseTunerLayer": (
            "_cast_input_dtype",
            "_get_base_layer_device_and_dtype",
            "_move_adapter_to_device_of_base_layer",
        ),
    },
    "peft.utils.other": {"AuxiliaryTrainingWrapper": (), "ModulesToSaveWrapper": (), "TrainableTokensWrapper": ()},
    "peft.utils.peft_types": {"PeftType": ("_member_map_", "_member_names_", "_value2member_map_")},
    "peft.mapping": {"PEFT_TYPE_TO_TUNER_MAPPING": ()},
    "transformers": {"PretrainedConfig": ("_attn_implementation",), "PreTrainedModel": ("initialize_weights",)},
    "transformers.cache_utils": {"DynamicLayer": ("lazy_initialization", "update")},
    "transformers.modeling_utils": {"ALL_ATTENTION_FUNCTIONS": ("register",)},
    "transformers.models.auto.modeling_auto": {"MODEL_FOR_CAUSAL_LM_MAPPING_NAMES": ()},
}


def check_seams() -> None:
    """
    Raise ImportError, in one sentence, if PEFT or transformers lacks something that this package is built on.
    """
    for module, objects in SEAMS.items():
        for name, attributes in objects.items():
            found = getattr(import_module(module), name, None)
            if found is None:
                raise _incompatible(module, name)
            for attribute in attributes:
                if not hasattr(found, attribute):
                    raise _incompatible(module, f"{name}.{attribute}")


def _incompatible(module: str, name: str) -> ImportError:
    package = module.partition(".")[0]
    try:
        allowed = next(text for text in requires("peft-uniattn") or () if text.startswith(package))
    except (PackageNotFoundError, StopIteration):  # used from its source tree
        allowed = "a release that peft-uniattn allows"
    return ImportError(
        f"{package} {version(package)} has no {module}.{name}, which peft_uniattn builds on; install {allowed}"
    )


check_seams()
