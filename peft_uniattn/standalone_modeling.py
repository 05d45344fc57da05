"""
Models whose followers share softmax by themselves: ordinary transformers models, with no adapter around.

`UniAttn<Class>` (for instance `UniAttnLlamaForCausalLM`) exists for every supported transformers class and is made on
demand. This file and those it imports depend on torch and transformers only: `save_pretrained` copies them next to
the weights, so that `trust_remote_code=True` loads a checkpoint where this package is not installed.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from .attention import follow, intercept_attention
from .families import FAMILIES, check_back_end, find_decoder, find_family
from .handover import HANDOVER, install_handover
from .plan import make_plan

PREFIX = "UniAttn"
MODEL_TYPE_PREFIX = "uniattn_"

_CAUSAL_LM = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM"}


class UniAttnConfigMixin:
    """
    Adds to a model's configuration what softmax sharing needs.

    Attributes:
        superblocks: lists of consecutive layer indices, the leader first.
        compensation_rank: rank of W_c; None for the full matrix.
    """

    def __init__(
        self,
        *args: Any,
        superblocks: list[list[int]] | None = None,
        compensation_rank: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.superblocks = superblocks
        self.compensation_rank = compensation_rank


class FollowerMixin:
    """Turns an attention module into a follower, keeping its class as a base for whoever looks for instances."""

    def become_follower(self, leader_idx: int, model_type: str, hidden_size: int, rank: int | None) -> None:
        family = find_family(model_type)
        for name in family.unused:
            delattr(self, name)
        self.uniattn_family = family
        self.uniattn_leader = leader_idx
        like = {"device": self.o_proj.weight.device, "dtype": self.o_proj.weight.dtype, "bias": False}
        if rank is None:
            self.compensation = nn.Linear(hidden_size, hidden_size, **like)
        else:
            self.compensation_A = nn.Linear(hidden_size, rank, **like)
            self.compensation_B = nn.Linear(rank, hidden_size, **like)
        self.reset_compensation()

    def reset_compensation(self) -> None:
        """Compensate nothing: W_c = 0."""
        nn.init.zeros_(self.compensation.weight if hasattr(self, "compensation") else self.compensation_B.weight)

    def forward(
        self, hidden_states: torch.Tensor, *args: Any, past_key_values: Any = None, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        output, probabilities = follow(
            self, self.uniattn_family, self.uniattn_leader, hidden_states, kwargs.get(HANDOVER), past_key_values
        )
        if hasattr(self, "compensation"):
            compensation = self.compensation(hidden_states)
        else:
            compensation = self.compensation_B(self.compensation_A(hidden_states))
        return output + compensation, probabilities

    def __reduce_ex__(self, protocol: int) -> tuple:
        # The class is made on demand, so pickle could not find it by name.
        return _empty_follower, (type(self).uniattn_original_class,), self.__dict__


@cache
def follower_class(attention_class: type[nn.Module]) -> type[nn.Module]:
    """The follower version of a transformers attention class."""
    members = {"uniattn_original_class": attention_class, "__module__": __name__}
    return type(f"{PREFIX}{attention_class.__name__}", (FollowerMixin, attention_class), members)


def _empty_follower(attention_class: type[nn.Module]) -> nn.Module:
    cls = follower_class(attention_class)
    return cls.__new__(cls)


class UniAttnModelMixin:
    """Builds the Superblocks of `config.superblocks` into a transformers model."""

    def __init__(self, config: PretrainedConfig, *args: Any, **kwargs: Any) -> None:
        plan = make_plan(config.num_hidden_layers, superblocks=config.superblocks)
        super().__init__(config, *args, **kwargs)
        check_back_end(self.config._attn_implementation)
        model_type = config.model_type.removeprefix(MODEL_TYPE_PREFIX)
        decoder = find_decoder(self, find_family(model_type))
        for layer, leader in plan.leader_of.items():
            attention = decoder.attention(layer)
            if layer == leader:
                intercept_attention(attention)
                continue
            attention.__class__ = follower_class(type(attention))
            attention.become_follower(leader, model_type, config.hidden_size, config.compensation_rank)
        install_handover(decoder.backbone)

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, FollowerMixin):
            module.reset_compensation()


@cache
def standalone_config_class(config_class: type[PretrainedConfig]) -> type[PretrainedConfig]:
    """The configuration class of the standalone models whose base is configured by `config_class`."""
    members = {
        "model_type": MODEL_TYPE_PREFIX + config_class.model_type,
        "__module__": __name__,
        "_auto_class": "AutoConfig",
    }
    return type(PREFIX + config_class.__name__, (UniAttnConfigMixin, config_class), members)


@cache
def standalone_class(model_class: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """The standalone version of a transformers model class."""
    members = {
        "config_class": standalone_config_class(model_class.config_class),
        "__module__": __name__,
        "_auto_class": "AutoModelForCausalLM",
    }
    return type(PREFIX + model_class.__name__, (UniAttnModelMixin, model_class), members)


def __getattr__(name: str) -> type:
    """Make `UniAttn<Class>` when it is first asked for, by auto classes, pickle or the user."""
    original = getattr(transformers, name.removeprefix(PREFIX), None) if name.startswith(PREFIX) else None
    if isinstance(original, type) and issubclass(original, PretrainedConfig):
        return standalone_config_class(original)
    if isinstance(original, type) and issubclass(original, PreTrainedModel):
        return standalone_class(original)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def register_auto_classes() -> None:
    """Teach `AutoConfig` and `AutoModelForCausalLM` the standalone model types."""
    for model_type in FAMILIES:
        model_class = standalone_class(getattr(transformers, _CAUSAL_LM[model_type]))
        AutoConfig.register(model_class.config_class.model_type, model_class.config_class, exist_ok=True)
        AutoModelForCausalLM.register(model_class.config_class, model_class, exist_ok=True)
