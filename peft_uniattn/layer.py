"""The adapter around one attention module: leader, follower or neither."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from .attention import follow, past_key_values
from .compensation import DESIGNS, NONE, Compensation
from .config import UniAttnConfig
from .families import Family
from .handover import HANDOVER
from .quantized import check_trainable
from .tuner.layer import AttentionTunerLayer


class UniAttnLayer(AttentionTunerLayer):
    """
    Wraps the attention module of a decoder layer. What it does depends on the active adapter's plan.

    - Leader: the untouched attention, whose queries, keys and mask are handed to the followers.
    - Follower: s_leader · V · W_o + Norm(x) · W_c (equation 14; the decoder layer adds x), or with W_c elsewhere. Its
      query and key projections rest.
    - Neither, or adapters disabled: the untouched attention, bit for bit.
    """

    method = "UniAttn"
    change = "sharing softmax"
    adapter_layer_names = ("uniattn_W", "uniattn_A", "uniattn_B")
    other_param_names = ("uniattn_leader", "uniattn_design", "uniattn_kernels", "uniattn_followers")

    def __init__(self, base_layer: nn.Module, family: Family, hidden_size: int) -> None:
        super().__init__(base_layer, family, hidden_size)
        # Adapter name -> nn.Linear: the full compensation, or its two low-rank factors x · A · B.
        self.uniattn_W = nn.ModuleDict()
        self.uniattn_A = nn.ModuleDict()
        self.uniattn_B = nn.ModuleDict()
        # Adapter name -> where the compensation of this follower reads and adds, a key of DESIGNS or NONE.
        self.uniattn_design: dict[str, str] = {}
        # Adapter name -> what its configuration says about kernels.
        self.uniattn_kernels: dict[str, tuple[str, float]] = {}
        # Adapter name -> how many layers follow this one, where it leads; told once the whole plan is in place.
        self.uniattn_followers: dict[str, int] = {}

    def update_layer(self, adapter_name: str, config: UniAttnConfig, leader_idx: int | None) -> None:
        """Add the adapter `adapter_name`, in which this layer follows the layer `leader_idx`."""
        super().update_layer(adapter_name, config, leader_idx)
        self.uniattn_kernels[adapter_name] = (config.kernels, config.skip_mass)
        if leader_idx in (None, self.layer_idx):
            return
        self.uniattn_design[adapter_name] = config.compensation
        if config.compensation == NONE:
            return
        inputs, outputs = DESIGNS[config.compensation].sizes(self.base_layer, self.family, self.hidden_size)
        if config.r is None:
            self.uniattn_W[adapter_name] = nn.Linear(inputs, outputs, bias=False)
        else:
            self.uniattn_A[adapter_name] = nn.Linear(inputs, config.r, bias=False)
            self.uniattn_B[adapter_name] = nn.Linear(config.r, outputs, bias=False)
        self.reset_compensation(adapter_name, config.init_weights)
        self._move_adapter_to_device_of_base_layer(adapter_name)

    @classmethod
    def saved_shapes(
        cls, attention: nn.Module, family: Family, hidden_size: int, config: UniAttnConfig
    ) -> dict[str, tuple[int, ...]]:
        if config.compensation == NONE:
            return {}
        inputs, outputs = DESIGNS[config.compensation].sizes(attention, family, hidden_size)
        if config.r is None:
            return {"uniattn_W.weight": (outputs, inputs)}
        return {"uniattn_A.weight": (config.r, inputs), "uniattn_B.weight": (outputs, config.r)}

    def reset_compensation(self, adapter_name: str, init_weights: bool = True) -> None:
        """Set the compensation to zero, or to small random values if not `init_weights`."""
        if adapter_name in self.uniattn_W:
            weight = self.uniattn_W[adapter_name].weight
        else:
            nn.init.kaiming_uniform_(self.uniattn_A[adapter_name].weight, a=math.sqrt(5))
            weight = self.uniattn_B[adapter_name].weight
        if init_weights:
            nn.init.zeros_(weight)
        else:
            nn.init.normal_(weight, std=0.02)

    @torch.no_grad()
    def set_compensation(self, adapter_name: str, *factors: torch.Tensor) -> None:
        """
        Replace the compensation of a follower.

        Args:
            adapter_name: the adapter.
            factors: W_c of shape (coordinates read, coordinates added to), or A (coordinates read, r) and B
                (r, coordinates added to), as in x · W_c and x · A · B.
        """
        for linear, factor in zip(self._compensation(adapter_name), factors, strict=True):
            linear.weight.copy_(factor.T)

    def compensation_source(self, adapter_name: str, hidden_states: torch.Tensor, heads: torch.Tensor) -> torch.Tensor:
        """What the compensation of a follower reads where its attention gets `hidden_states` and s·V is `heads`."""
        value = self.family.value_states(self.base_layer, hidden_states)
        return DESIGNS[self.uniattn_design[adapter_name]].source(hidden_states, value, heads)

    def compensation_rank(self, adapter_name: str) -> int | None:
        return self.uniattn_A[adapter_name].out_features if adapter_name in self.uniattn_A else None

    def compensation_design(self, adapter_name: str) -> str:
        return self.uniattn_design[adapter_name]

    def _compensation(self, adapter_name: str) -> list[nn.Linear]:
        """The linear maps that make up the compensation, if any, in the order in which they are applied."""
        if self.uniattn_design[adapter_name] == NONE:
            return []
        if adapter_name in self.uniattn_W:
            return [self.uniattn_W[adapter_name]]
        return [self.uniattn_A[adapter_name], self.uniattn_B[adapter_name]]

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, Any]:
        handover, adapter = kwargs.get(HANDOVER), self.active_plan_adapter()
        if handover is not None and adapter in self.uniattn_kernels:
            handover.kernels = self.uniattn_kernels[adapter]
            handover.followers = self.uniattn_followers.get(adapter)
        return super().forward(hidden_states, *args, **kwargs)

    def _replace_attention(
        self, adapter: str, leader_idx: int, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[torch.Tensor, Any]:
        args, kwargs = self._run_pre_hooks(args, kwargs)
        design = self.uniattn_design[adapter]
        compensation = None
        if design != NONE:
            compensation = Compensation(DESIGNS[design], lambda source: self._compensate(source, adapter))
        result = follow(
            self.base_layer,
            self.family,
            leader_idx,
            args[0],
            kwargs.get(HANDOVER),
            past_key_values(kwargs),
            compensation,
        )
        return self._run_hooks(args, kwargs, result)

    def _compensate(self, source: torch.Tensor, adapter: str) -> torch.Tensor:
        linears = self._compensation(adapter)
        if torch.is_grad_enabled() and linears[0].weight.requires_grad:
            check_trainable(getattr(self.base_layer, self.family.value))
        result = source
        if not torch.is_autocast_enabled(source.device.type):  # autocast needs no detour over float32
            result = self._cast_input_dtype(source, linears[0].weight.dtype)
        for linear in linears:
            result = linear(result)
        return result.to(source.dtype)
