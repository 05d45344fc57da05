"""The adapter around one attention module, as far as all methods have it in common."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..attention import LEADER_ATTENTION, intercept_attention, release_attention
from ..compensation import NONE
from ..families import Family
from ..handover import HANDOVER
from ..plan import SOFTMAX
from .config import AttentionConfig


class AttentionTunerLayer(nn.Module, BaseTunerLayer):
    """
    Wraps the attention module of a decoder layer. What it does depends on the active adapter's plan.

    - Leader: the untouched attention, which hands over what its followers need.
    - Changed (a follower, or a dropped layer): what the method puts in its place, `_replace_attention`.
    - Neither, or adapters disabled: the untouched attention, bit for bit.

    All state lives here rather than on the tuner, which transformers' adapter calls throw away.

    Attributes:
        method: name of the method, for messages.
        change: what the method does, for messages.
        shared: what followers take from their leader, as in [`Plan`].
        attention_function: the attention function that stands in for the back end and hands over.
    """

    method: str
    change: str
    shared: str = SOFTMAX
    attention_function: str = LEADER_ATTENTION
    adapter_layer_names = ()
    other_param_names = ("uniattn_leader",)

    def __init__(self, base_layer: nn.Module, family: Family, hidden_size: int) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.family = family
        self.hidden_size = hidden_size
        # Adapter name -> layer index of the leader; this layer's own index if it leads, DROPPED if it is bypassed,
        # None if the plan does not concern it.
        self.uniattn_leader: dict[str, int | None] = {}
        self._disable_adapters = False
        self._active_adapter = []
        self.merged_adapters = []
        # Remembered, because a base that was trained and frozen again cannot be told from one that never was.
        self.base_was_trained = False
        intercept_attention(base_layer, self.attention_function)

    @property
    def layer_idx(self) -> int:
        return self.get_base_layer().layer_idx

    def update_layer(self, adapter_name: str, config: AttentionConfig, leader_idx: int | None) -> None:
        """Add the adapter `adapter_name`, in which this layer follows the layer `leader_idx`."""
        self.uniattn_leader[adapter_name] = leader_idx

    @classmethod
    def saved_shapes(
        cls, attention: nn.Module, family: Family, hidden_size: int, config: AttentionConfig
    ) -> dict[str, tuple[int, ...]]:
        """Shapes of the weights that an adapter adds to a changed layer, by name without the adapter's."""
        return {}

    def compensation_rank(self, adapter_name: str) -> int | None:
        """Rank of the compensation of a follower; None if it is full, or if there is none."""
        return None

    def compensation_design(self, adapter_name: str) -> str:
        """Where the compensation of a follower reads and adds, see [`UniAttnConfig`]."""
        return NONE

    def active_plan_adapter(self) -> str | None:
        """The adapter whose plan is in force here, or None."""
        return None if self.disable_adapters or not self.active_adapters else self.active_adapters[0]

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        if len(names) > 1:
            raise ValueError(
                f"adapter_names={names} activates {len(names)} {self.method} adapters at once, but a layer follows "
                "one plan at a time; activate one of them"
            )
        super().set_adapter(names, inference_mode=inference_mode)

    @classmethod
    def merge_refusal(cls) -> NotImplementedError:
        return NotImplementedError(
            f"{cls.change} changes the graph, so there is nothing to add to a base weight: {cls.method} cannot be "
            "merged in place; merge_and_unload() or to_standalone() returns a model of its own"
        )

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise self.merge_refusal()

    def unmerge(self) -> None:
        raise self.merge_refusal()

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
        return self._replace_attention(adapter, leader_idx, (hidden_states, *args), kwargs)

    def _replace_attention(
        self, adapter: str, leader_idx: int, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[torch.Tensor, Any]:
        """What a changed layer returns: attention output (batch, length, hidden size) and probabilities or None."""
        raise NotImplementedError(f"{type(self).__name__} has to say what takes the place of attention")

    # Hooks on an attention module whose own forward does not run see a replacement as if it had. Among them are those
    # by which transformers collects `output_attentions`, and pairs by which DeepSpeed follows the flow of a forward.

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

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[torch.device, torch.dtype]:
        # PEFT looks for a weight, which an attention module does not have; its value projection does.
        return super()._get_base_layer_device_and_dtype(getattr(base_layer, self.family.value))

    def __repr__(self) -> str:
        return "uniattn." + super().__repr__()
