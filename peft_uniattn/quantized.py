"""Bases quantized by bitsandbytes: their weights in floating point, and a trap of 4-bit weights on CPUs."""

from __future__ import annotations

import copy

import torch
from torch import nn
from transformers import PreTrainedModel

# Some CPUs have a kernel for 4-bit weights that wants them in another layout. bitsandbytes rearranges them in place
# when a layer first runs in evaluation mode, and rounds their scales to bfloat16. Autograd does not see that kernel.
_FOUR_BIT = "Linear4bit"
_QUANTIZED = (_FOUR_BIT, "Linear8bitLt")


def is_four_bit(module: nn.Module) -> bool:
    """Whether `module` may be repacked for inference when it runs in evaluation mode."""
    return any(cls.__name__ == _FOUR_BIT for cls in type(module).__mro__)


def is_repacked(module: nn.Module) -> bool:
    """Whether `module` has been repacked for inference."""
    return getattr(getattr(module.weight, "quant_state", None), "packing_format_for_cpu", False)


def check_trainable(module: nn.Module) -> None:
    """Raise RuntimeError if gradients would get lost in the linear map `module`."""
    if is_repacked(module):
        raise RuntimeError(
            "bitsandbytes has repacked these 4-bit weights for inference on this CPU, and gradients no longer pass "
            "them; load the base anew and train before anything runs in evaluation mode, or first set "
            "support_avx512bf16_for_cpu = False on every Linear4bit of it (for inference, use torch.no_grad())"
        )


def dequantized(model: nn.Module, base: PreTrainedModel) -> nn.Module:
    """
    A copy of `model` with floating-point linear maps in place of quantized ones.

    Args:
        model: a transformers model or a wrapper around one.
        base: the transformers model inside; its data type is that of the new weights.

    Raises:
        ValueError: if weights are quantized by something other than bitsandbytes' linear maps.
    """
    method = getattr(getattr(base.config, "quantization_config", None), "quant_method", None)
    linears = [module for module in base.modules() if type(module).__name__ in _QUANTIZED]
    if method != "bitsandbytes" or not linears:
        raise _refusal()
    # A deepcopy takes what it finds in its memo for copies that were made already.
    result = copy.deepcopy(model, {id(linear): _dequantize(linear, base.dtype) for linear in linears})
    if not all(parameter.is_floating_point() for parameter in result.parameters()):
        raise _refusal()
    return result


@torch.no_grad()
def _dequantize(linear: nn.Linear, dtype: torch.dtype) -> nn.Linear:
    import bitsandbytes
    from transformers.integrations.bitsandbytes import dequantize_bnb_weight

    if is_repacked(linear):  # only its own kernel knows the layout
        identity = torch.eye(linear.in_features, dtype=torch.bfloat16, device=linear.weight.device)
        weight = bitsandbytes.matmul_4bit(identity, linear.weight, quant_state=linear.weight.quant_state).T
    else:
        weight = dequantize_bnb_weight(linear.weight, getattr(linear, "state", None))
    with torch.device("meta"):
        result = nn.Linear(linear.in_features, linear.out_features, bias=linear.bias is not None)
    result.weight = nn.Parameter(weight.to(dtype).contiguous())
    if linear.bias is not None:
        result.bias = nn.Parameter(linear.bias.detach().to(dtype, copy=True))
    return result.train(linear.training)


def _refusal() -> ValueError:
    return ValueError(
        "the base model is quantized in a way other than bitsandbytes' linear layers, and a standalone model is saved "
        "and trained in floating point; load the base unquantized, apply the adapter to it, and convert that"
    )
