"""The adapter around one attention module: leader, follower or neither."""

from __future__ import annotations

import math
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from .attention import follow, intercept_attention, past_key_values, release_attention
from .config import UniAttnConfig
from .families import Family
from .handover import HANDOVER
from .quantized import check_trainable


class UniAttnLayer(nn.Module, BaseTunerLayer):
    """
    Wraps the attention module of a decoder layer. What it does depends on the active adapter's plan.

    - Leader: the untouched attention, whose queries, keys and mask are handed to the followers.
    - Follower: s_leader · V · W_o + Norm(x) · W_c (equation 14; the decoder layer adds x). Its query and key
      projections rest.
    - Neither, or adapters disabled: the untouched attention, bit for bit.

    All state lives here rather than on the tuner, which transformers' adapter calls throw away.
    """

    adapter_layer_names = ("uniattn_W", "uniattn_A", "uniattn_B")
    other_param_names = ("uniattn_leader",)

    def __init__(self, base_layer: nn.Module, family: Family, hidden_size: int) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.family = family
        self.hidden_size = hidden_size
        # Adapter name -> nn.Linear: the full compensation, or its two low-rank factors x · A · B.
        self.uniattn_W = nn.ModuleDict()
        self.uniattn_A = nn.ModuleDict()
        self.uniattn_B = nn.ModuleDict()
        # Adapter name -> layer index of the leader; this layer's own index if it leads, None if it is neither.
        self.uniattn_leader: dict[str, int | None] = {}
        self._disable_adapters = False
        self._active_adapter = []
        self.merged_adapters = []
        # Remembered, because a base that was trained and frozen again cannot be told from one that never was.
        self.base_was_trained = False
        intercept_attention(base_layer)

    @property
    def layer_idx(self) -> int:
        return self.get_base_layer().layer_idx

    def update_layer(self, adapter_name: str, config: UniAttnConfig, leader_idx: int | None) -> None:
        """Add the adapter `adapter_name`, in which this layer follows the layer `leader_idx`."""
        self.uniattn_leader[adapter_name] = leader_idx
        if leader_idx in (None, self.layer_idx):
            return
        size = self.hidden_size
        if config.r is None:
            self.uniattn_W[adapter_name] = nn.Linear(size, size, bias=False)
        else:
            self.uniattn_A[adapter_name] = nn.Linear(size, config.r, bias=False)
            self.uniattn_B[adapter_name] = nn.Linear(config.r, size, bias=False)
        self.reset_compensation(adapter_name, config.init_weights)
        self._move_adapter_to_device_of_base_layer(adapter_name)

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
            factors: W_c of shape (hidden size, hidden size), or A (hidden size, r) and B (r, hidden size), as in
                x · W_c and x · A · B.
        """
        for linear, factor in zip(self._compensation(adapter_name), factors, strict=True):
            linear.weight.copy_(factor.T)

    def _compensation(self, adapter_name: str) -> list[nn.Linear]:
        """The linear maps that make up the compensation, in the order in which they are applied."""
        if adapter_name in self.uniattn_W:
            return [self.uniattn_W[adapter_name]]
        return [self.uniattn_A[adapter_name], self.uniattn_B[adapter_name]]

    def active_plan_adapter(self) -> str | None:
        """The adapter whose plan is in force here, or None."""
        return None if self.disable_adapters or not self.active_adapters else self.active_adapters[0]

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        if len(names) > 1:
            raise ValueError(
                f"adapter_names={names} activates {len(names)} UniAttn adapters at once, but a layer follows one plan "
                "at a time; activate one of them"
            )
        super().set_adapter(names, inference_mode=inference_mode)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise merge_refusal()

    def unmerge(self) -> None:
        raise merge_refusal()

    def unwrap(self) -> nn.Module:
        """The attention module as it was before it was wrapped."""
        release_attention(self.base_layer)
        return self.base_layer

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, Any]:
        in_training = self.training and torch.is_grad_enabled()
        if in_training and not self.base_was_trained and any(p.requires_grad for p in self.base_layer.parameters()):
            self.base_was_trained = True
        adapter = self.active_plan_adapter()
        leader_idx = None if adapter is None else self.uniattn_leader.get(adapter)
        if leader_idx is None:
            kwargs.pop(HANDOVER, None)
        if leader_idx in (None, self.layer_idx):
            return self.base_layer(hidden_states, *args, **kwargs)
        args, kwargs = self._run_pre_hooks((hidden_states, *args), kwargs)
        hidden_states = args[0]
        output, probabilities = follow(
            self.base_layer,
            self.family,
            leader_idx,
            hidden_states,
            kwargs.get(HANDOVER),
            past_key_values(kwargs),
        )
        result = output + self._compensate(hidden_states, adapter), probabilities
        return self._run_hooks(args, kwargs, result)

    # Hooks on the attention module see a follower as if that module had run. Among them are those by which
    # transformers collects `output_attentions`, and pairs of hooks by which DeepSpeed follows the flow of a forward.

    def _run_pre_hooks(self, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        for key, hook in self.base_layer._forward_pre_hooks.items():
            if key in self.base_layer._forward_pre_hooks_with_kwargs:
                args, kwargs = hook(self.base_layer, args, kwargs) or (args, kwargs)
            elif (changed := hook(self.base_layer, args)) is not None:
                args = changed if isinstance(changed, tuple) else (changed,)
        return args, kwargs

    def _run_hooks(self, args: tuple, kwargs: dict[str, Any], result: tuple) -> tuple:
        for key, hook in self.base_layer._forward_hooks.items():
            with_kwargs = key in self.base_layer._forward_hooks_with_kwargs
            changed = hook(self.base_layer, args, *((kwargs,) if with_kwargs else ()), result)
            result = result if changed is None else changed
        return result

    def _compensate(self, hidden_states: torch.Tensor, adapter: str) -> torch.Tensor:
        linears = self._compensation(adapter)
        if torch.is_grad_enabled() and linears[0].weight.requires_grad:
            check_trainable(getattr(self.base_layer, self.family.value))
        result = hidden_states
        if not torch.is_autocast_enabled(hidden_states.device.type):  # autocast needs no detour over float32
            result = self._cast_input_dtype(hidden_states, linears[0].weight.dtype)
        for linear in linears:
            result = linear(result)
        return result.to(hidden_states.dtype)

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[torch.device, torch.dtype]:
        # PEFT looks for a weight, which an attention module does not have; its value projection does.
        return super()._get_base_layer_device_and_dtype(getattr(base_layer, self.family.value))

    def __repr__(self) -> str:
        return "uniattn." + super().__repr__()


def merge_refusal() -> NotImplementedError:
    return NotImplementedError(
        "sharing softmax changes the graph, so there is nothing to add to a base weight: UniAttn cannot be merged in "
        "place; merge_and_unload() or to_standalone() returns a model of its own with W_c as ordinary weights"
    )
