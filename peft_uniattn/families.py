"""Per architecture: where the parts of attention live that softmax sharing touches, and what is refused."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

BACK_ENDS = ("eager", "sdpa")


@dataclass(frozen=True)
class Family:
    """
    A decoder architecture whose attention can follow.

    Attributes:
        attention: name of the attention module inside a decoder layer.
        value: name of the value projection inside the attention module.
        output: name of the output projection inside the attention module.
        unused: the modules that a follower has no use for.
    """

    attention: str = "self_attn"
    value: str = "v_proj"
    output: str = "o_proj"
    unused: tuple[str, ...] = ("q_proj", "k_proj")

    def value_states(self, attention: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
        """V of shape (batch, key/value heads, length, head_dim) from hidden states (batch, length, hidden size)."""
        batch, length, _ = hidden_states.shape
        value = getattr(attention, self.value)(hidden_states)
        return value.view(batch, length, -1, attention.head_dim).transpose(1, 2)

    def project_output(self, attention: nn.Module, heads: torch.Tensor) -> torch.Tensor:
        """W_o on the heads' outputs (batch, length, query heads, head_dim): (batch, length, hidden size)."""
        return getattr(attention, self.output)(heads.flatten(2))


FAMILIES = {"llama": Family(), "mistral": Family(), "qwen2": Family()}


def find_family(model_type: str | None) -> Family:
    """
    The family of a `config.model_type`.

    Raises:
        ValueError: if softmax sharing does not support the architecture.
    """
    family = FAMILIES.get(model_type or "")
    if family is None:
        raise ValueError(
            f"model_type={model_type!r} is not supported: UniAttn knows how to share the softmax of "
            f"{', '.join(sorted(FAMILIES))}; use a base model of one of these"
        )
    return family


@dataclass(frozen=True)
class Decoder:
    """
    The decoder of a model: its layers and their way there.

    Attributes:
        backbone: the module that owns the list of decoder layers and calls them in order.
        layers: the decoder layers.
        prefix: dotted name of the layer list inside the model, such as `model.layers`.
        family: the architecture.
    """

    backbone: nn.Module
    layers: nn.ModuleList
    prefix: str
    family: Family

    def attention(self, layer_idx: int) -> nn.Module:
        """The attention module of decoder layer `layer_idx`, as it is now: bare or wrapped."""
        return getattr(self.layers[layer_idx], self.family.attention)

    def attention_name(self, layer_idx: int) -> str:
        return f"{self.prefix}.{layer_idx}.{self.family.attention}"


def find_decoder(model: nn.Module, family: Family) -> Decoder:
    """
    Locate the decoder layers of `model`.

    Raises:
        ValueError: if `model` has no list of decoder layers with this family's attention.
    """
    for name, module in model.named_modules():
        layers = getattr(module, "layers", None)
        if isinstance(layers, nn.ModuleList) and len(layers) and hasattr(layers[0], family.attention):
            return Decoder(module, layers, f"{name}.layers" if name else "layers", family)
    raise ValueError(f"found no list of decoder layers in {type(model).__name__}; pass a decoder-only language model")


def check_back_end(name: str | None) -> None:
    """Raise ValueError if followers cannot share the softmax of the attention implementation `name`."""
    if name not in BACK_ENDS:
        raise ValueError(
            f"attn_implementation={name!r} is not supported with softmax sharing; use one of {', '.join(BACK_ENDS)}, "
            'for example model.set_attn_implementation("sdpa")'
        )


def check_masks(layer_types: list[str] | None, superblocks: tuple[tuple[int, ...], ...]) -> None:
    """Raise ValueError if a Superblock mixes layers with different masks (full and sliding-window attention)."""
    if layer_types is None:
        return
    for block in superblocks:
        kinds = {layer_types[layer] for layer in block}
        if len(kinds) > 1:
            raise ValueError(
                f"Superblock {list(block)} mixes {' and '.join(sorted(kinds))} layers, whose masks differ; choose "
                "superblocks within one kind"
            )
