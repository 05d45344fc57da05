"""
LLMDrop: decoder layers without attention.

He et al., 2024, "What Matters in Transformers? Not All Attention is Needed", https://arxiv.org/abs/2406.15786.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from ..attention import past_key_values
from ..plan import Plan, check_dropped, make_dropped_plan
from ..registration import LLMDROP
from ..skipping import skip_attention
from ..tuner.config import AttentionConfig
from ..tuner.layer import AttentionTunerLayer
from ..tuner.model import AttentionTuner


@dataclass
class LLMDropConfig(AttentionConfig):
    """
    Configuration of an [`LLMDropModel`].

    The attention of the named layers is bypassed, and they cache nothing; their feed-forward parts stay. There is
    nothing to train beside the model itself: the adapter holds the layers' numbers and no weights, and `to_standalone`
    makes it into a model for full fine-tuning.

    Args:
        layers (`list[int]`):
            The layers to drop, in any order; [`choose_layers_to_drop`] finds them from data.
        target_modules, modules_to_save, trainable_token_indices, base_layout, base_commit, uniattn_version,
        transformers_version:
            As in [`UniAttnConfig`].
    """

    layers: list[int] = field(
        default_factory=list, metadata={"help": "Decoder layers whose attention is bypassed, counted from 0."}
    )

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = LLMDROP
        check_dropped(self.layers)
        self.layers = list(self.layers)

    def make_plan(self, num_layers: int, masks: list[str] | None = None) -> Plan:
        return make_dropped_plan(num_layers, self.layers)


class LLMDropLayer(AttentionTunerLayer):
    """Wraps the attention module of a decoder layer that is to go without it."""

    method = "LLMDrop"
    change = "bypassing attention"

    def _replace_attention(
        self, adapter: str, leader_idx: int, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[torch.Tensor, Any]:
        args, kwargs = self._run_pre_hooks(args, kwargs)
        result = skip_attention(args[0], self.layer_idx, past_key_values(kwargs))
        return self._run_hooks(args, kwargs, result)


class LLMDropModel(AttentionTuner):
    """Bypasses the attention of decoder layers; created by `get_peft_model(model, LLMDropConfig(layers=[...]))`."""

    prefix: str = "uniattn_llmdrop_"
    tuner_layer_cls = LLMDropLayer
    adapter_content = "the plan"
