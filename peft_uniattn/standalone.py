"""From an adapter to a model of its own."""

from __future__ import annotations

import copy

import torch
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper
from torch import nn
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from .compensation import DESIGNS, INPUT_AND_HEADS, NONE
from .inspection import Adapter, find_adapter
from .plan import SOFTMAX, Plan
from .quantized import dequantized
from .standalone_modeling import standalone_class, standalone_config_class
from .tuner.layer import AttentionTunerLayer


def to_standalone(
    model: nn.Module,
    adapter_name: str | None = None,
    *,
    share_weights: bool = False,
    check_finite: bool = False,
) -> PreTrainedModel:
    """
    Make a model with an adapter of this package into an ordinary `PreTrainedModel` with a `model_type` of its own.

    W_c becomes an ordinary weight in the data type of the base, and the followers' query and key projections are
    gone; with CLA their key and value projections are, with LLMDrop all weights of dropped attention. The result
    saves, loads (`AutoModelForCausalLM.from_pretrained` once `peft_uniattn` is imported, or with
    `trust_remote_code=True` where it is not installed), trains fully, and takes LoRA. A base that bitsandbytes has
    quantized is de-quantized, in a copy.

    Args:
        model: a `PeftModel`, or a transformers model with an adapter added by `add_adapter` or `load_adapter`.
        adapter_name: the adapter to use. Defaults to the active one.
        share_weights: use the tensors of `model` itself instead of copies; `model` is then used up.
        check_finite: refuse a compensation with NaN or infinite values.

    Raises:
        ValueError: if there is no such adapter, if the base is quantized by other means, if the compensation is too
            large for the data type of the base, or if `check_finite` finds something.
    """
    adapter = find_adapter(model, adapter_name)
    base = adapter.base
    if type(base).__name__ != MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(base.config.model_type):
        raise ValueError(
            f"{type(base).__name__} is not the causal language model of its architecture, and standalone models are; "
            "convert a causal language model"
        )
    if getattr(base, "is_quantized", False):
        adapter = find_adapter(dequantized(model, base), adapter.name)
        base = adapter.base
        share_weights = True

    _check_no_other_tuner(base)
    state = _standalone_state(adapter)
    if any(tensor.is_meta for tensor in state.values()):
        raise ValueError("the model or its adapter has weights on the meta device; load them before converting")
    standalone = _empty_like(adapter, tied=_embeddings_are_equal(adapter, state))
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


def _check_no_other_tuner(base: PreTrainedModel) -> None:
    for name, module in base.named_modules():
        if isinstance(module, BaseTunerLayer) and not isinstance(module, (AttentionTunerLayer, TrainableTokensLayer)):
            raise ValueError(
                f"{name} is a layer of another adapter ({type(module).__name__}), which has no place in a standalone "
                "model; merge_and_unload() that one first, or put it on the standalone model instead"
            )


def _embeddings_are_equal(adapter: Adapter, state: dict[str, torch.Tensor]) -> bool:
    """Whether tied embeddings still are alike; training one of them with the adapter unties them."""
    if not adapter.base.config.tie_word_embeddings:
        return False
    names = {module: name for name, module in adapter.base.named_modules()}
    inputs, outputs = adapter.base.get_input_embeddings(), adapter.base.get_output_embeddings()
    return torch.equal(state[f"{names[inputs]}.weight"], state[f"{names[outputs]}.weight"])


def _empty_like(adapter: Adapter, tied: bool) -> PreTrainedModel:
    """The standalone model on the meta device: structure without weights."""
    base = adapter.base
    fields = base.config.to_dict()
    del fields["model_type"]
    fields.pop("quantization_config", None)
    fields.update(
        superblocks=[list(block) for block in adapter.plan.superblocks] or None,
        follower_mask=getattr(base.peft_config[adapter.name], "follower_mask", "own"),
        kernels=getattr(base.peft_config[adapter.name], "kernels", "auto"),
        skip_mass=getattr(base.peft_config[adapter.name], "skip_mass", 0.0),
        compensation=_standalone_design(adapter),
        compensation_rank=adapter.rank,
        shared=adapter.plan.shared,
        dropped_layers=list(adapter.plan.dropped) or None,
        tie_word_embeddings=tied,
    )
    config = standalone_config_class(type(base.config)).from_dict(fields)
    config._attn_implementation = base.config._attn_implementation
    with torch.device("meta"):
        return standalone_class(type(base), type(base.config))(config)


def _standalone_state(adapter: Adapter) -> dict[str, torch.Tensor]:
    """The standalone model's weights by name, sharing memory with the adapted model's."""
    names = {module: name for name, module in adapter.base.named_modules()}
    layers = {names[adapter.layers[index]]: adapter.layers[index] for index in adapter.plan.role_of}
    unused = tuple(
        f"{name}.base_layer.{part}"
        for name, layer in layers.items()
        if layer.layer_idx not in adapter.plan.leaders
        for part in _unused(adapter.plan, layer)
    )
    state = {
        name.replace(".base_layer.", "."): tensor
        for name, tensor in _plain_state(adapter).items()
        if ".uniattn_" not in name and not name.startswith(unused)
    }
    for name, layer in layers.items():
        if layer.layer_idx in adapter.plan.followers:
            state.update({f"{name}.{key}": tensor for key, tensor in _separated(adapter.plan, layer).items()})
            state.update({f"{name}.{key}": tensor for key, tensor in _compensation(adapter.name, layer).items()})
    return state


def _standalone_design(adapter: Adapter) -> str:
    """The design of compensation that is left when what reads s·V has become part of W_o."""
    corrects_output = adapter.compensation in DESIGNS and DESIGNS[adapter.compensation].reads == INPUT_AND_HEADS
    return adapter.compensation if adapter.method == "UniAttn" and not corrects_output else "attention_output"


def _unused(plan: Plan, layer: AttentionTunerLayer) -> list[str]:
    """How the names of those weights begin that the attention module of a changed layer has no use for."""
    if layer.layer_idx in plan.dropped:
        return [""]
    find = layer.family.unused if plan.shared == SOFTMAX else layer.family.unused_by_borrower
    return [f"{part}." for part in find(layer.base_layer)]


def _separated(plan: Plan, layer: AttentionTunerLayer) -> dict[str, torch.Tensor]:
    """What a follower needs of a projection into which Q, K and V are fused, as a projection of its own."""
    family = layer.family
    if family.fused is None:
        return {}
    name, rows = ("v_proj", family.value_rows) if plan.shared == SOFTMAX else ("q_proj", family.query_rows)
    fused = getattr(layer.base_layer, family.value).state_dict()
    return {f"{name}.{key}": tensor[rows(layer.base_layer)] for key, tensor in fused.items()}


def _compensation(adapter_name: str, layer: AttentionTunerLayer) -> dict[str, torch.Tensor]:
    """W_c or its factors in the data type of the base, and W_o where a part of W_c corrects it."""
    design = layer.compensation_design(adapter_name)
    if design == NONE:
        return {}
    dtype = getattr(layer.base_layer, layer.family.value).weight.dtype
    containers = (("W", "compensation"), ("A", "compensation_A"), ("B", "compensation_B"))
    weights = {
        f"{key}.weight": linears[adapter_name].weight.detach()
        for container, key in containers
        if adapter_name in (linears := getattr(layer, f"uniattn_{container}"))
    }
    if DESIGNS[design].reads == INPUT_AND_HEADS:
        weights = _with_output(layer, weights)
    for key, weight in weights.items():
        _check_fits(f"{key} of decoder layer {layer.layer_idx}", weight, dtype)
    return {key: weight.to(dtype) for key, weight in weights.items()}


def _check_fits(name: str, weight: torch.Tensor, dtype: torch.dtype) -> None:
    # float16 ends where float32 goes on.
    largest = torch.finfo(dtype).max
    if torch.finfo(weight.dtype).max > largest and (weight.isfinite() & (weight.abs() > largest)).any():
        raise ValueError(
            f"{name} exceeds what the base's {dtype} can hold; load the base in torch.bfloat16 or torch.float32"
        )


def _with_output(layer: AttentionTunerLayer, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """W_c or its factors without what they read of s·V, and W_o with it."""
    first, *others = weights
    reads_input, reads_heads = weights[first].split(
        [layer.hidden_size, weights[first].shape[1] - layer.hidden_size], 1
    )
    for key in others:
        reads_heads = weights[key] @ reads_heads
    output = f"{layer.family.output}.weight"
    corrected = layer.base_layer.get_parameter(output).detach() + reads_heads
    return {**weights, first: reads_input.contiguous(), output: corrected}


def _plain_state(adapter: Adapter) -> dict[str, torch.Tensor]:
    """The base's state dict with `modules_to_save` and trained tokens of the adapter in place of the originals."""
    state = adapter.base.state_dict()
    for name, module in adapter.base.named_modules():
        if not isinstance(module, (ModulesToSaveWrapper, TrainableTokensWrapper)):
            continue
        for key in [key for key in state if key.startswith(f"{name}.")]:
            del state[key]
        if isinstance(module, TrainableTokensWrapper):
            state[f"{name}.weight"] = module.token_adapter.get_merged_weights([adapter.name]).detach()
            continue
        own = adapter.name in module.modules_to_save
        saved = module.modules_to_save[adapter.name] if own else module.original_module
        state.update({f"{name}.{key}": tensor for key, tensor in saved.state_dict().items()})
    return state


_NOTED_BY_ROPE = ("max_seq_len_cached", "attention_scaling")


def _copy_buffers(base: PreTrainedModel, standalone: PreTrainedModel) -> None:
    """Give buffers that are not saved, such as RoPE's frequencies, to a model that was made without data."""
    owners = dict(standalone.named_modules())
    for name, buffer in base.named_buffers():
        owner_name, _, buffer_name = name.replace(".base_layer.", ".").rpartition(".")
        owner = owners.get(owner_name)  # None inside PEFT's own wrappers
        if owner is not None and buffer_name in owner._buffers:
            owner._buffers[buffer_name] = buffer.clone()
    # What belongs to them: "dynamic" RoPE notes the longest text it has seen, and shrinks its frequencies by that.
    for name, module in base.named_modules():
        if (owner := owners.get(name)) is not None:
            noted = {key: value for key, value in vars(module).items() if key.endswith(_NOTED_BY_ROPE)}
            vars(owner).update(noted)
