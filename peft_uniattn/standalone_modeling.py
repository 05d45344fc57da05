"""
Models whose layers share softmax, share keys and values, or go without attention by themselves: ordinary transformers
models, with no adapter around.

`UniAttn<Class>` (for instance `UniAttnLlamaForCausalLM`) exists for every supported transformers class and is made on
demand. This file and those it imports depend on torch and transformers only: `save_pretrained` copies them next to
the weights, so that `trust_remote_code=True` loads a checkpoint where this package is not installed.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import torch
import transformers
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from .attention import follow, intercept_attention, past_key_values, refuse_continuous_batching
from .compensation import DESIGNS, FFN_OUTPUT, NONE, Compensation, check_design
from .families import FAMILIES, Decoder, Family, check_back_end, find_decoder
from .handover import HANDOVER, install_deferral, install_handover
from .kv_sharing import KV_ATTENTION, follow_keys_and_values, forget_keys_and_values
from .plan import DROPPED, KEYS_AND_VALUES, SOFTMAX, Plan, make_dropped_plan, make_plan
from .skipping import NoAttention

try:  # by its full name: see attention.py
    from peft_uniattn.kernels import check_kernels
    from peft_uniattn.version import __version__, check_release
except ImportError:
    check_kernels = None

PREFIX = "UniAttn"
# Between the two classes in the name of a standalone class whose configuration is not its model class's own.
WITH = "With"
MODEL_TYPE_PREFIX = "uniattn_"


class ZeroLinear(nn.Linear):
    """A linear map that starts at zero, however the model around it initialises its weights."""

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)


def _add_product(output: torch.Tensor, inputs: torch.Tensor, linear: nn.Module) -> torch.Tensor:
    """`output + linear(inputs)`; on a GPU without autograd inside the matrix product, which saves a pass over both."""
    if torch.is_grad_enabled() or not output.is_cuda or type(linear) is not ZeroLinear:
        return output + linear(inputs)
    if not output.dtype == inputs.dtype == linear.weight.dtype or linear._forward_hooks or linear._forward_pre_hooks:
        return output + linear(inputs)
    output.flatten(0, -2).addmm_(inputs.flatten(0, -2), linear.weight.T)
    return output


class FollowerMixin:
    """Turns an attention module into a follower, keeping its class as a base for whoever looks for instances."""

    def become_follower(
        self, leader_idx: int, family: Family, hidden_size: int, rank: int | None, design: str
    ) -> None:
        inputs, outputs = (0, 0) if design == NONE else DESIGNS[design].sizes(self, family, hidden_size)
        value = getattr(self, family.value)
        like = {"device": value.weight.device, "dtype": value.weight.dtype}
        if family.fused is not None:
            width = value.weight[family.value_rows(self)].shape[0]
            self.v_proj = nn.Linear(value.in_features, width, bias=value.bias is not None, **like)
        for name in family.unused(self):
            delattr(self, name)
        self.uniattn_family = family.separate()
        self.uniattn_leader = leader_idx
        self.uniattn_design = design
        like["bias"] = False
        if design == NONE:
            return
        if rank is None:
            self.compensation = ZeroLinear(inputs, outputs, **like)
        else:
            self.compensation_A = nn.Linear(inputs, rank, **like)
            self.compensation_B = ZeroLinear(rank, outputs, **like)

    def forward(
        self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        design = DESIGNS.get(self.uniattn_design)
        return follow(
            self,
            self.uniattn_family,
            self.uniattn_leader,
            hidden_states,
            kwargs.get(HANDOVER),
            past_key_values(kwargs),
            None if design is None else Compensation(design, self._compensate, self._add_compensation),
        )

    def _compensate(self, source: torch.Tensor) -> torch.Tensor:
        if hasattr(self, "compensation"):
            return self.compensation(source)
        return self.compensation_B(self.compensation_A(source))

    def _add_compensation(self, output: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
        if hasattr(self, "compensation"):
            return _add_product(output, source, self.compensation)
        return _add_product(output, self.compensation_A(source), self.compensation_B)

    def __reduce_ex__(self, protocol: int) -> tuple:
        # The class is made on demand, so pickle could not find it by name.
        return _empty_follower, (FollowerMixin, type(self).uniattn_original_class), self.__dict__


class BorrowerMixin:
    """Turns an attention module into a follower that takes keys and values from its leader (CLA)."""

    def become_borrower(self, leader_idx: int, family: Family) -> None:
        forget_keys_and_values(self, family)
        self.uniattn_leader = leader_idx
        intercept_attention(self, KV_ATTENTION)

    def forward(
        self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        return follow_keys_and_values(
            super().forward, self.layer_idx, self.uniattn_leader, (hidden_states, *args), kwargs
        )

    def __reduce_ex__(self, protocol: int) -> tuple:
        return _empty_follower, (BorrowerMixin, type(self).uniattn_original_class), self.__dict__


@cache
def follower_class(mixin: type, attention_class: type[nn.Module]) -> type[nn.Module]:
    """The follower version of a transformers attention class."""
    members = {"uniattn_original_class": attention_class, "__module__": __name__}
    return type(f"{PREFIX}{attention_class.__name__}", (mixin, attention_class), members)


def _empty_follower(mixin: type, attention_class: type[nn.Module]) -> nn.Module:
    cls = follower_class(mixin, attention_class)
    return cls.__new__(cls)


class UniAttnModelMixin:
    """Builds the plan of its configuration into a transformers model."""

    def __init__(self, config: PretrainedConfig, *args: Any, **kwargs: Any) -> None:
        plan = standalone_plan(config)
        if check_kernels is not None:
            config.uniattn_version = __version__  # what saves this model
        super().__init__(config, *args, **kwargs)
        check_back_end(self.config._attn_implementation)
        family = FAMILIES[config.model_type.removeprefix(MODEL_TYPE_PREFIX)]
        decoder = find_decoder(self, family)
        for layer, leader in plan.role_of.items():
            if leader == DROPPED:
                setattr(decoder.layers[layer], family.attention, NoAttention(layer))
            elif plan.shared == KEYS_AND_VALUES:
                _share_keys_and_values(decoder.attention(layer), leader, family)
            else:
                _share_softmax(decoder, layer, leader, config)
        install_handover(decoder.backbone)

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """
        As transformers has it, which initialises at random what a checkpoint lacks; here only compensation may lack.

        Raises:
            ValueError: if the checkpoint lacks anything else.
        """
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        if lacking := sorted(name for name in info["missing_keys"] if ".compensation" not in name):
            raise ValueError(
                f"the checkpoint lacks {lacking[0]!r} ({len(lacking)} weights are missing); load the files that "
                "save_pretrained() wrote together"
            )
        return (model, info) if output_loading_info else model

    # generate_batch() and generate(cache_implementation="paged") begin with it.
    init_continuous_batching = refuse_continuous_batching

    def initialize_weights(self) -> None:
        # A compensation that a checkpoint lacks. The backbone would initialise it like any other linear map.
        for module in self.modules():
            if isinstance(module, ZeroLinear) and not getattr(module.weight, "_is_hf_initialized", False):
                module.reset_parameters()
                module.weight._is_hf_initialized = True
        super().initialize_weights()


def _share_softmax(decoder: Decoder, layer: int, leader: int, config: PretrainedConfig) -> None:
    attention, family = decoder.attention(layer), decoder.family
    if layer == leader:
        intercept_attention(attention)
        return
    attention.__class__ = follower_class(FollowerMixin, type(attention))
    attention.become_follower(leader, family, config.hidden_size, config.compensation_rank, config.compensation)
    if config.compensation != NONE and DESIGNS[config.compensation].adds == FFN_OUTPUT:
        install_deferral(decoder.layers[layer], layer)


def _share_keys_and_values(attention: nn.Module, leader: int, family: Family) -> None:
    if attention.layer_idx == leader:
        intercept_attention(attention, KV_ATTENTION)
        return
    attention.__class__ = follower_class(BorrowerMixin, type(attention))
    attention.become_borrower(leader, family)


def standalone_plan(config: PretrainedConfig) -> Plan:
    """
    The plan that the configuration of a standalone model names.

    Raises:
        ValueError: if it does not fit the model, is none, or was written by a later release.
    """
    if check_kernels is not None:  # else the code that was saved with the weights is what runs
        check_release(config.uniattn_version)
        check_kernels(config.kernels, config.skip_mass)
    check_design(config.compensation)
    rank = config.compensation_rank
    if rank is not None and not (type(rank) is int and 1 <= rank <= config.hidden_size):
        raise ValueError(
            f"compensation_rank={rank!r} must be None (full compensation) or an integer from 1 to the hidden size of "
            f"{config.hidden_size}"
        )
    if config.shared not in (SOFTMAX, KEYS_AND_VALUES):
        raise ValueError(f"shared={config.shared!r} must be {SOFTMAX!r} or {KEYS_AND_VALUES!r}")
    if config.dropped_layers:
        return make_dropped_plan(config.num_hidden_layers, config.dropped_layers)
    plan = make_plan(
        config.num_hidden_layers,
        superblocks=config.superblocks,
        masks=getattr(config, "layer_types", None),
        follower_mask=config.follower_mask,
    )
    return replace(plan, shared=config.shared)


@cache
def standalone_config_class(config_class: type[PretrainedConfig]) -> type[PretrainedConfig]:
    """
    The configuration class of the standalone models whose base is configured by `config_class`.

    Adds the fields `superblocks` (lists of consecutive layer indices, the leader first), `follower_mask` (see
    [`make_plan`]), `compensation` (its design, a key of DESIGNS or "none"), `compensation_rank` (of W_c; None for the
    full matrix), `shared` ("softmax", or "keys_and_values" for CLA) and `dropped_layers` (those without attention;
    there are no Superblocks then), `kernels`, `skip_mass` and `uniattn_version` (see [`UniAttnConfig`]).
    """
    # Configurations are dataclasses, so new fields have to be annotated.
    fields = {
        "superblocks": list[list[int]] | None,
        "follower_mask": str,
        "compensation": str,
        "compensation_rank": int | None,
        "shared": str,
        "dropped_layers": list[int] | None,
        "kernels": str,
        "skip_mass": float,
        "uniattn_version": str | None,
    }
    members = {
        "__annotations__": fields,
        "kernels": "auto",
        "skip_mass": 0.0,
        "uniattn_version": None,
        "superblocks": None,
        "follower_mask": "own",
        "compensation": "attention_output",
        "compensation_rank": None,
        "shared": SOFTMAX,
        "dropped_layers": None,
        "model_type": MODEL_TYPE_PREFIX + config_class.model_type,
        "__module__": __name__,
        "_auto_class": "AutoConfig",
    }
    return type(PREFIX + config_class.__name__, (config_class,), members)


@cache
def _standalone_class(
    model_class: type[PreTrainedModel], config_class: type[PretrainedConfig]
) -> type[PreTrainedModel]:
    own = config_class is model_class.config_class
    members = {
        "config_class": standalone_config_class(config_class),
        "__module__": __name__,
        "_auto_class": "AutoModelForCausalLM",
    }
    name = model_class.__name__ if own else f"{model_class.__name__}{WITH}{config_class.__name__}"
    return type(PREFIX + name, (UniAttnModelMixin, model_class), members)


def standalone_class(
    model_class: type[PreTrainedModel], config_class: type[PretrainedConfig] | None = None
) -> type[PreTrainedModel]:
    """
    The standalone version of a transformers model class.

    Args:
        model_class: the class of the base model.
        config_class: the class of its configuration, where that is of an architecture that borrows the model class of
            another (InternLM-3 runs as a Llama). Default: what `model_class` names.
    """
    return _standalone_class(model_class, config_class or model_class.config_class)


def standalone_class_of(model_type: str) -> type[PreTrainedModel]:
    """The standalone version of the causal language model of an architecture, by its transformers name."""
    model_class = getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type])
    return standalone_class(model_class, CONFIG_MAPPING[model_type])


def __getattr__(name: str) -> type:
    """Make `UniAttn<Class>` when it is first asked for, by auto classes, pickle or the user."""
    parts = name.removeprefix(PREFIX).split(WITH) if name.startswith(PREFIX) else []
    classes = [getattr(transformers, part, None) for part in parts]
    if all(isinstance(found, type) for found in classes):
        kinds = [issubclass(found, PretrainedConfig) for found in classes]
        if kinds == [True]:
            return standalone_config_class(*classes)
        if kinds in ([False], [False, True]) and issubclass(classes[0], PreTrainedModel):
            return standalone_class(*classes)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def register_auto_classes() -> None:
    """Teach `AutoConfig` and `AutoModelForCausalLM` the standalone model types."""
    for model_type in FAMILIES.keys() & MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.keys():
        standalone = standalone_class_of(model_type)
        AutoConfig.register(standalone.config_class.model_type, standalone.config_class, exist_ok=True)
        AutoModelForCausalLM.register(standalone.config_class, standalone, exist_ok=True)
