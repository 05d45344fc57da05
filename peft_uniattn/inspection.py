"""Find out what UniAttn did to a model."""

from __future__ import annotations

from dataclasses import dataclass

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from .layer import UniAttnLayer
from .plan import Plan


@dataclass(frozen=True)
class Adapter:
    """
    One UniAttn adapter inside a model.

    Attributes:
        name: the adapter's name.
        base: the transformers model that it is in.
        plan: its Superblocks.
        layers: the wrapped attention modules by layer index.
    """

    name: str
    base: PreTrainedModel
    plan: Plan
    layers: dict[int, UniAttnLayer]

    @property
    def rank(self) -> int | None:
        """Rank of the compensation; None if it is full."""
        factor = self.layers[self.plan.followers[0]].uniattn_A
        return factor[self.name].out_features if self.name in factor else None


def base_model(model: nn.Module) -> PreTrainedModel:
    """
    The transformers model inside a `PeftModel` or tuner, or `model` itself if it is one.

    Raises:
        ValueError: if there is none.
    """
    while not isinstance(model, PreTrainedModel):
        inner = model.get_base_model() if isinstance(model, PeftModel) else getattr(model, "model", None)
        if not isinstance(inner, nn.Module):
            raise ValueError(f"{type(model).__name__} holds no transformers model; pass a PeftModel")
        model = inner
    return model


def uniattn_layers(model: nn.Module) -> list[UniAttnLayer]:
    """All attention modules of `model` that UniAttn has wrapped, bottom to top."""
    return [module for module in model.modules() if isinstance(module, UniAttnLayer)]


def find_adapter(model: nn.Module, adapter_name: str | None = None) -> Adapter:
    """
    Describe a UniAttn adapter of `model`.

    Args:
        model: a `PeftModel`, or a transformers model with an adapter added by `add_adapter` or `load_adapter`.
        adapter_name: default the active adapter.

    Raises:
        ValueError: if `model` has no such adapter.
    """
    base = base_model(model)
    layers = {layer.layer_idx: layer for layer in uniattn_layers(base)}
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no UniAttn adapter; apply get_peft_model(model, UniAttnConfig())"
        )
    first = next(iter(layers.values()))
    adapter_name = adapter_name or first.active_plan_adapter()
    if adapter_name is None:
        raise ValueError(f"no UniAttn adapter is active; pass adapter_name, one of {sorted(first.uniattn_leader)}")
    if adapter_name not in first.uniattn_leader:
        raise ValueError(
            f"adapter_name={adapter_name!r} is not a UniAttn adapter of this model; use one of "
            f"{sorted(first.uniattn_leader)}"
        )
    blocks: dict[int, list[int]] = {}
    for index, layer in layers.items():
        if (leader := layer.uniattn_leader[adapter_name]) is not None:
            blocks.setdefault(leader, []).append(index)
    num_layers = base.config.get_text_config(decoder=True).num_hidden_layers
    return Adapter(adapter_name, base, Plan(tuple(map(tuple, blocks.values())), num_layers), layers)
