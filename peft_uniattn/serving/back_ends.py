"""How followers use vLLM's attention back ends: the stock kernels, with keys and values from different pages."""

from __future__ import annotations

import copy

import torch
from vllm import _custom_ops as ops
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import AttentionImpl
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl, CPUAttentionMetadata


class CPUFollowerImpl(CPUAttentionBackendImpl):
    """The kernels of `CPU_ATTN`, whose pages are (blocks, heads, 2 * block size, head_dim): K first, then V."""

    leader: Attention
    half: int

    def do_kv_cache_update(self, *_: object) -> None:
        """Nothing here: layers that use the page of another one are not asked to, so `forward` does it for all."""

    def forward(
        self,
        layer: Attention,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: CPUAttentionMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError("fused quantization of the output is not supported by CPU_ATTN")
        if attn_metadata is None:  # warming up
            return output
        key_cache = _halves(self.leader.kv_cache)[0]
        value_cache = _halves(kv_cache)[self.half]
        # The kernel writes both; the keys are those that the leader wrote there already.
        ops.cpu_attn_reshape_and_cache(
            key,
            value,
            key_cache,
            value_cache,
            attn_metadata.slot_mapping,
            layer.isa,
            k_scale=self.leader._k_scale_float,
            v_scale=layer._v_scale_float,
            kv_cache_dtype=self.kv_cache_dtype,
        )
        tokens = attn_metadata.num_actual_tokens
        ops.cpu_attention_with_kv_cache(
            query=query[:tokens],
            key_cache=key_cache,
            value_cache=value_cache,
            output=output[:tokens],
            query_start_loc=attn_metadata.query_start_loc,
            seq_lens=attn_metadata.seq_lens,
            scale=self.scale,
            causal=attn_metadata.causal,
            alibi_slopes=self.alibi_slopes,
            sliding_window=self.sliding_window,
            block_table=attn_metadata.block_table,
            softcap=self.logits_soft_cap,
            scheduler_metadata=attn_metadata.scheduler_metadata,
            s_aux=self.sinks,
            dynamic_causal=attn_metadata.dynamic_causal,
            k_scale=self.leader._k_scale_float,
            v_scale=layer._v_scale_float,
            kv_cache_dtype=self.kv_cache_dtype,
        )
        return output


def _halves(kv_cache: torch.Tensor) -> tuple[torch.Tensor, ...]:
    blocks, heads, block_size, _ = kv_cache.shape
    return kv_cache.view(blocks, heads, 2 * block_size, -1).chunk(2, dim=2)


FOLLOWER_IMPLS: dict[type[AttentionImpl], type[AttentionImpl]] = {CPUAttentionBackendImpl: CPUFollowerImpl}


def follower_impl(leader: Attention, half: int) -> AttentionImpl:
    """
    The implementation for a follower: its leader's, with the same scale, window and softcap, on own value pages.

    Raises:
        ValueError: if followers have no implementation for the back end that vLLM chose.
    """
    follower_class = FOLLOWER_IMPLS.get(type(leader.impl))
    if follower_class is None:
        raise ValueError(
            f"UniAttn checkpoints are not served with the attention back end {leader.attn_backend.get_name()}, only "
            "with CPU_ATTN; on a GPU, use transformers"
        )
    impl = copy.copy(leader.impl)
    impl.__class__ = follower_class
    impl.leader, impl.half = leader, half
    return impl
