"""A leader's and a follower's attention layer in vLLM, made from the stock layers in place."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention import Attention
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec, SlidingWindowSpec

from .back_ends import follower_impl
from .pages import ValuePage


@dataclass
class HandOver:
    """What a leader hands over within one forward: post-RoPE queries and keys, (tokens, heads * head_dim)."""

    query: torch.Tensor | None = None
    key: torch.Tensor | None = None


class LeaderAttention(Attention):
    """The stock layer, which also leaves its queries and keys to its followers."""

    handover: HandOver

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        self.handover.query, self.handover.key = query, key
        return super().forward(query, key, value)


class FollowerAttention(Attention):
    """Attention on the leader's queries and key pages with own value pages."""

    handover: HandOver
    is_last: bool  # of its Superblock

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        query, key = self.handover.query, self.handover.key
        if self.is_last:  # so that a traced forward leaves no tensor behind
            self.handover.query = self.handover.key = None
        return super().forward(query, key, value)


class WholeContext:
    """
    Pages for the whole context also where a sliding window sees only part of it.

    vLLM gives layers with different windows different block tables, and may spread those with equal windows over
    several. Followers need the table of their leader and of their partner, so all layers get one kind of page.
    """

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec | None:
        spec = super().get_kv_cache_spec(vllm_config)
        if not isinstance(spec, SlidingWindowSpec):
            return spec
        return FullAttentionSpec(
            block_size=vllm_config.cache_config.block_size,
            num_kv_heads=spec.num_kv_heads,
            head_size=spec.head_size,
            head_size_v=spec.head_size_v,
            dtype=spec.dtype,
            kv_quant_mode=spec.kv_quant_mode,
            sliding_window=spec.sliding_window,
        )


def become_leader(attention: Attention) -> None:
    """Turn a stock layer into a leader's."""
    attention.__class__ = LeaderAttention
    attention.handover = HandOver()


def become_follower(
    attention: Attention, leader: LeaderAttention, page: ValuePage, owner: Attention, is_last: bool
) -> None:
    """
    Turn a stock layer into a follower's.

    Args:
        attention: the layer.
        leader: its leader's layer.
        page: where its V lies.
        owner: the layer of `page.owner`; `attention` itself if that is this follower.
        is_last: whether it is the last of its Superblock.
    """
    attention.__class__ = FollowerAttention
    attention.handover = leader.handover
    attention.is_last = is_last
    attention.sliding_window = leader.sliding_window
    attention.impl = follower_impl(leader, page.half)
    if owner is not attention:
        attention.kv_sharing_target_layer_name = owner.layer_name


def share_one_block_table(attentions: list[Attention]) -> None:
    """Make layers with different windows use pages of one kind, after they became leaders and followers."""
    if len({attention.sliding_window for attention in attentions}) == 1:
        return
    for attention in attentions:
        attention.__class__ = _with_whole_context(type(attention))


@cache
def _with_whole_context(plain: type[Attention]) -> type[Attention]:
    return type(plain.__name__, (WholeContext, plain), {})
