"""The attention module of a follower, from vLLM's own linear classes: V, s·V, W_o and the compensation."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig
from vllm.distributed import tensor_model_parallel_all_reduce
from vllm.model_executor.layers.linear import ColumnParallelLinear, QKVParallelLinear, RowParallelLinear
from vllm.model_executor.layers.quantization import QuantizationConfig
from vllm.model_executor.models.utils import AutoWeightsLoader, extract_layer_index

from ..compensation import NONE
from .attention import FollowerAttention


@contextmanager
def projecting_values_only(model_class: type[nn.Module], followers: Collection[int]) -> Iterator[None]:
    """
    While it lasts, stock attention modules of `followers` are made with a projection of V in place of Q, K and V.

    Making them whole and throwing two thirds away would take memory, and quantized checkpoints are refused whose
    weights of Q and K are missing.
    """

    def projection(
        hidden_size: int,
        head_size: int,
        total_num_heads: int,
        total_num_kv_heads: int,
        *,
        prefix: str,
        **settings: Any,
    ) -> nn.Module:
        if extract_layer_index(prefix) not in followers:
            return QKVParallelLinear(
                hidden_size, head_size, total_num_heads, total_num_kv_heads, prefix=prefix, **settings
            )
        prefix = prefix.replace("qkv_proj", "v_proj")
        return ColumnParallelLinear(hidden_size, total_num_kv_heads * head_size, prefix=prefix, **settings)

    modules = [sys.modules[cls.__module__] for cls in model_class.__mro__]
    patched = [module for module in modules if getattr(module, "QKVParallelLinear", None) is QKVParallelLinear]
    for module in patched:
        module.QKVParallelLinear = projection
    try:
        yield
    finally:
        for module in patched:
            module.QKVParallelLinear = QKVParallelLinear


class FollowerSelfAttention(nn.Module):
    """
    Takes the place of a stock attention module made while `projecting_values_only`, whose `attn` has become a
    follower's.

    Under tensor parallelism every rank holds its heads' rows of V, its columns of W_o, and its columns of W_c; one
    sum over ranks serves W_o and W_c together.
    """

    def __init__(self, stock: nn.Module, config: PretrainedConfig, quant_config: QuantizationConfig | None) -> None:
        super().__init__()
        self.attn: FollowerAttention = stock.attn
        self.o_proj: RowParallelLinear = stock.o_proj
        self.o_proj.reduce_results = False
        self.tp_size = self.o_proj.tp_size
        prefix = self.attn.layer_name.removesuffix(".attn")
        self.v_proj: ColumnParallelLinear = stock.qkv_proj
        like = {"bias": False, "quant_config": quant_config}
        self.compensation = self.compensation_A = None
        if config.compensation == NONE:
            return
        if config.compensation_rank is None:
            self.compensation = RowParallelLinear(
                config.hidden_size,
                config.hidden_size,
                input_is_parallel=False,
                reduce_results=False,
                prefix=f"{prefix}.compensation",
                **like,
            )
            return
        self.compensation_A = ColumnParallelLinear(
            config.hidden_size, config.compensation_rank, prefix=f"{prefix}.compensation_A", **like
        )
        self.compensation_B = RowParallelLinear(
            config.compensation_rank,
            config.hidden_size,
            reduce_results=False,
            prefix=f"{prefix}.compensation_B",
            **like,
        )

    def forward(self, positions: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        value, _ = self.v_proj(hidden_states)
        output, _ = self.o_proj(self.attn(value))
        if self.compensation is not None:
            output = output + self.compensation(hidden_states)[0]
        elif self.compensation_A is not None:
            output = output + self.compensation_B(self.compensation_A(hidden_states)[0])[0]
        return tensor_model_parallel_all_reduce(output) if self.tp_size > 1 else output

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Take the weights of V under the name that stock models give them, as a part of Q, K and V."""
        return AutoWeightsLoader(self).load_weights(
            # A new tensor object, without the mark that says which part.
            (f"v_proj.{name.removeprefix('qkv_proj.')}", tensor.detach())
            if name.startswith("qkv_proj.")
            else (name, tensor)
            for name, tensor in weights
        )
