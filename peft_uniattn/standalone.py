"""From an adapter to a model of its own."""

from __future__ import annotations

import copy

import torch
from peft import PeftModel
from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper
from torch import nn
from transformers import PreTrainedModel

from .families import find_family
from .layer import UniAttnLayer
from .standalone_modeling import standalone_class, standalone_config_class


def to_standalone(
    model: nn.Module,
    adapter_name: str | None = None,
    *,
    share_weights: bool = False,
    check_finite: bool = False,
) -> PreTrainedModel:
    """
    Make a model with a UniAttn adapter into an ordinary `PreTrainedModel` with a `model_type` of its own.

    W_c becomes an ordinary weight in the data type of the base, and the followers' query and key projections are
    gone. The result saves, loads (`AutoModelForCausalLM.from_pretrained` once `peft_uniattn` is imported, or with
    `trust_remote_code=True` where it is not installed), trains fully, and takes LoRA.

    Args:
        model: a `PeftModel`, or a transformers model with an adapter added by `add_adapter` or `load_adapter`.
        adapter_name: the adapter to use. Defaults to the active one.
        share_weights: use the tensors of `model` itself instead of copies; `model` is then used up.
        check_finite: refuse a compensation with NaN or infinite values.

    Raises:
        ValueError: if there is no such adapter, if the base is quantized, or if `check_finite` finds something.
    """
    base = _base_model(model)
    layers = {module.layer_idx: module for module in base.modules() if isinstance(module, UniAttnLayer)}
    if not layers:
        raise ValueError(f"{type(model).__name__} has no UniAttn adapter; apply get_peft_model(model, UniAttnConfig())")
    adapter_name = adapter_name or next(iter(layers.values())).active_plan_adapter()
    if not any(adapter_name in layer.uniattn_leader for layer in layers.values()):
        raise ValueError(f"adapter_name={adapter_name!r} is not a UniAttn adapter of this model, or none is active")
    if getattr(base, "is_quantized", False):
        raise ValueError(
            "the base model is quantized, and a standalone model is saved and trained in floating point; load the base "
            "unquantized, apply the adapter to it, and convert that"
        )

    standalone = _empty_like(base, layers, adapter_name)
    state = _standalone_state(base, layers, adapter_name)
    if check_finite:
        for name, tensor in state.items():
            if ".compensation" in name and not tensor.isfinite().all():
                raise ValueError(f"{name} has NaN or infinite values; calibrate or train the adapter again")
    if not share_weights:
        state = {name: tensor.clone() for name, tensor in state.items()}
    standalone.load_state_dict(state, strict=True, assign=True)
    _copy_buffers(base, standalone)
    standalone.tie_weights()
    for parameter in standalone.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    standalone.generation_config = copy.deepcopy(base.generation_config)
    return standalone.train(base.training)


def _base_model(model: nn.Module) -> PreTrainedModel:
    while not isinstance(model, PreTrainedModel):
        inner = model.get_base_model() if isinstance(model, PeftModel) else getattr(model, "model", None)
        if not isinstance(inner, nn.Module):
            raise ValueError(f"{type(model).__name__} holds no transformers model; pass a PeftModel")
        model = inner
    return model


def _empty_like(base: PreTrainedModel, layers: dict[int, UniAttnLayer], adapter_name: str) -> PreTrainedModel:
    """The standalone model on the meta device: structure without weights."""
    leader_of = {index: layer.uniattn_leader.get(adapter_name) for index, layer in sorted(layers.items())}
    blocks: dict[int, list[int]] = {}
    rank = None
    for index, leader in leader_of.items():
        if leader is not None:
            blocks.setdefault(leader, []).append(index)
        if adapter_name in layers[index].uniattn_A:
            rank = layers[index].uniattn_A[adapter_name].out_features
    fields = {**base.config.to_dict(), "superblocks": list(blocks.values()), "compensation_rank": rank}
    del fields["model_type"]
    config = standalone_config_class(type(base.config)).from_dict(fields)
    config._attn_implementation = base.config._attn_implementation
    with torch.device("meta"):
        return standalone_class(type(base))(config)


def _standalone_state(
    base: PreTrainedModel, layers: dict[int, UniAttnLayer], adapter_name: str
) -> dict[str, torch.Tensor]:
    """The standalone model's weights by name, sharing memory with `base`."""
    state = {}
    unused = {
        f"{name}.base_layer.{projection}."
        for name, module in base.named_modules()
        if isinstance(module, UniAttnLayer) and module.uniattn_leader.get(adapter_name) not in (None, module.layer_idx)
        for projection in module.family.unused
    }
    for name, tensor in _plain_state(base, adapter_name).items():
        if ".uniattn_" in name or any(name.startswith(prefix) for prefix in unused):
            continue
        state[name.replace(".base_layer.", ".")] = tensor
    for name, module in base.named_modules():
        if not isinstance(module, UniAttnLayer):
            continue
        dtype = getattr(module.base_layer, module.family.value).weight.dtype
        for container, key in (("W", "compensation"), ("A", "compensation_A"), ("B", "compensation_B")):
            linears = getattr(module, f"uniattn_{container}")
            if adapter_name in linears:
                state[f"{name}.{key}.weight"] = linears[adapter_name].weight.detach().to(dtype)
    return state


def _plain_state(base: PreTrainedModel, adapter_name: str) -> dict[str, torch.Tensor]:
    """The state dict of `base` with `modules_to_save` and trained tokens of the adapter in place of the originals."""
    state = base.state_dict()
    for name, module in base.named_modules():
        if not isinstance(module, (ModulesToSaveWrapper, TrainableTokensWrapper)):
            continue
        for key in [key for key in state if key.startswith(f"{name}.")]:
            del state[key]
        if isinstance(module, TrainableTokensWrapper):
            state[f"{name}.weight"] = module.token_adapter.get_merged_weights([adapter_name]).detach()
            continue
        saved = module.modules_to_save[adapter_name] if adapter_name in module.modules_to_save else module.original_module
        state.update({f"{name}.{key}": tensor for key, tensor in saved.state_dict().items()})
    return state


def _copy_buffers(base: PreTrainedModel, standalone: PreTrainedModel) -> None:
    """Give buffers that are not saved, such as RoPE's frequencies, to a model that was made without data."""
    for name, buffer in base.named_buffers():
        owner_name, _, buffer_name = name.replace(".base_layer.", ".").rpartition(".")
        owner = standalone.get_submodule(owner_name)
        if buffer_name in owner._buffers:
            owner._buffers[buffer_name] = buffer.clone()
