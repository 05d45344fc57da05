"""Find out what an adapter did to a model."""

from __future__ import annotations

from dataclasses import dataclass

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from .plan import DROPPED, Plan
from .tuner.layer import AttentionTunerLayer


@dataclass(frozen=True)
class Adapter:
    """
    One adapter of this package inside a model.

    Attributes:
        name: the adapter's name.
        base: the transformers model that it is in.
        plan: which layers it concerns, and how.
        layers: the wrapped attention modules by layer index.
    """

    name: str
    base: PreTrainedModel
    plan: Plan
    layers: dict[int, AttentionTunerLayer]

    @property
    def rank(self) -> int | None:
        """Rank of the compensation; None if it is full, or if there is none."""
        return self._changed.compensation_rank(self.name)

    @property
    def compensation(self) -> str:
        """Where the compensation reads and adds, as in [`UniAttnConfig`]; "none" if there is none."""
        return self._changed.compensation_design(self.name)

    @property
    def method(self) -> str:
        """The name of the method: UniAttn, CLA or LLMDrop."""
        return self._changed.method

    @property
    def _changed(self) -> AttentionTunerLayer:
        return self.layers[[*self.plan.followers, *self.plan.dropped][0]]


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


def uniattn_layers(model: nn.Module) -> list[AttentionTunerLayer]:
    """All attention modules of `model` that an adapter of this package has wrapped, bottom to top."""
    return [module for module in model.modules() if isinstance(module, AttentionTunerLayer)]


def find_adapter(model: nn.Module, adapter_name: str | None = None) -> Adapter:
    """
    Describe an adapter of this package in `model`: UniAttn or one of its rivals.

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
    dropped = tuple(blocks.pop(DROPPED, ()))
    num_layers = base.config.get_text_config(decoder=True).num_hidden_layers
    plan = Plan(tuple(map(tuple, blocks.values())), num_layers, first.shared, dropped)
    return Adapter(adapter_name, base, plan, layers)
