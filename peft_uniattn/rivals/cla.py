"""
Cross-Layer Attention: followers attend with their own queries over the keys and values of their leader.

Brandon et al., 2024, https://arxiv.org/abs/2405.12981; applied to pre-trained models as in the UniAttn paper
(https://arxiv.org/abs/2502.00439, Table 5).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from ..families import Decoder
from ..kv_sharing import KV_ATTENTION, follow_keys_and_values
from ..plan import KEYS_AND_VALUES, Plan
from ..probe import check_kv_sharing
from ..registration import CLA
from ..tuner.config import SuperblockConfig
from ..tuner.layer import AttentionTunerLayer
from ..tuner.model import AttentionTuner


@dataclass
class CLAConfig(SuperblockConfig):
    """
    Configuration of a [`CLAModel`].

    The lowest layer of a Superblock keeps its attention; the others attend with their own queries over its keys and
    values and cache nothing. There is nothing to train beside the model itself: the adapter holds the plan and no
    weights, and `to_standalone` makes it into a model for full fine-tuning.

    Args:
        superblock_size (`int`, defaults to 4):
            Layers per Superblock (CLA block), 2 or more.
        start_layer (`int`, *optional*):
            First layer of the lowest Superblock. Defaults to half of the model's layers, rounded down.
        end_layer (`int`, *optional*):
            Where the Superblocks stop, exclusive. Defaults to the number of layers.
        superblocks (`list[list[int]]`, *optional*):
            Explicit Superblocks as lists of consecutive layer indices; overrides the three arguments above.
        follower_mask (`str`, defaults to `"own"`):
            `"own"` shares only between layers with the same mask; `"leader"` lets followers take the mask of a leader
            with full attention. Refused where such layers also differ in their RoPE.
        target_modules, modules_to_save, trainable_token_indices, base_layout, base_commit, uniattn_version,
        transformers_version:
            As in [`UniAttnConfig`].
    """

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = CLA

    def make_plan(self, num_layers: int, masks: list[str] | None = None) -> Plan:
        return replace(super().make_plan(num_layers, masks), shared=KEYS_AND_VALUES)


class CLALayer(AttentionTunerLayer):
    """
    Wraps the attention module of a decoder layer.

    A leader hands over its keys and values. A follower runs its own module on them; the module still computes keys and
    values of its own, which nobody reads and the standalone model lacks.
    """

    method = "CLA"
    change = "sharing keys and values"
    shared = KEYS_AND_VALUES
    attention_function = KV_ATTENTION

    def _replace_attention(
        self, adapter: str, leader_idx: int, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[torch.Tensor, Any]:
        return follow_keys_and_values(self.base_layer, self.layer_idx, leader_idx, args, kwargs)


class CLAModel(AttentionTuner):
    """Shares keys and values within Superblocks of decoder layers; created by `get_peft_model(model, CLAConfig())`."""

    prefix: str = "uniattn_cla_"
    tuner_layer_cls = CLALayer
    adapter_content = "the plan"

    def _check_model(self, decoder: Decoder, plan: Plan) -> None:
        check_kv_sharing(self.model, decoder, plan.leader_of)
