"""The attention module of a follower, from vLLM's own linear classes: V, s·V, W_o and the compensation."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PretrainedConfig
from vllm.distributed import tensor_model_parallel_all_reduce
from vllm.model_executor.layers.linear import ColumnParallelLinear, RowParallelLinear
from vllm.model_executor.layers.quantization import QuantizationConfig

from ..compensation import NONE
from .attention import FollowerAttention


class FollowerSelfAttention(nn.Module):
    """
    Takes the place of a stock attention module whose `attn` has become a follower's.

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
        self.v_proj = ColumnParallelLinear(
            config.hidden_size,
            stock.total_num_kv_heads * stock.head_dim,
            bias=stock.qkv_proj.bias is not None,
            quant_config=quant_config,
            prefix=f"{prefix}.v_proj",
        )
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
