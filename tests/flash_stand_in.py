"""
What the package flash_attn promises, in plain PyTorch: the functions that transformers' flash_attention_2 calls.

Tensors are laid out as there: (batch, length, heads, head_dim), and (all tokens, heads, head_dim) for `varlen`, where
`cu_seqlens` says at which token each sequence begins. A causal mask is aligned with the last query and key.
"""

from __future__ import annotations

import torch
from transformers import PreTrainedModel
from transformers import modeling_flash_attention_utils as utils


def attend(query, key, value, *, scale, causal, window_size, softcap):
    """Attention of one sequence: (query length, heads, head_dim), (key length, key/value heads, head_dim), ..."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = torch.einsum("qhd,khd->hqk", query, key) * (scale or query.shape[-1] ** -0.5)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    last = len(key) - len(query)
    distance = (torch.arange(len(query)) + last)[:, None] - torch.arange(len(key))
    left, right = window_size[0], 0 if causal else window_size[1]
    hidden = torch.zeros_like(distance, dtype=torch.bool)
    if left >= 0:
        hidden |= distance > left
    if right >= 0:
        hidden |= distance < -right
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), value)


def flash_attn_func(
    q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, deterministic=False
):
    assert dropout_p == 0
    options = {"scale": softmax_scale, "causal": causal, "window_size": window_size, "softcap": softcap}
    return torch.stack([attend(*sequence, **options) for sequence in zip(q, k, v, strict=True)])


def flash_attn_varlen_func(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    deterministic=False,
):
    assert dropout_p == 0
    assert max_seqlen_q == cu_seqlens_q.diff().max() and max_seqlen_k == cu_seqlens_k.diff().max()
    options = {"scale": softmax_scale, "causal": causal, "window_size": window_size, "softcap": softcap}
    queries = q.split(cu_seqlens_q.diff().tolist())
    keys, values = (tensor.split(cu_seqlens_k.diff().tolist()) for tensor in (k, v))
    return torch.cat([attend(*sequence, **options) for sequence in zip(queries, keys, values, strict=True)])


def torch_varlen(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    deterministic=False,
):
    """The FlashAttention-2 kernels that are part of PyTorch, on a GPU."""
    lengths = cu_seqlens_q, cu_seqlens_k, int(max_seqlen_q), int(max_seqlen_k)
    windows = {"window_size_left": window_size[0], "window_size_right": 0 if causal else window_size[1]}
    forward = torch.ops.aten._flash_attention_forward
    return forward(q, k, v, *lengths, dropout_p, causal, False, scale=softmax_scale, **windows)[0]


def torch_dense(q, k, v, **options):
    ends = [torch.arange(len(q) + 1, dtype=torch.int32, device=q.device) * tensor.shape[1] for tensor in (q, k)]
    flat = [tensor.flatten(0, 1) for tensor in (q, k, v)]
    return torch_varlen(*flat, *ends, q.shape[1], k.shape[1], **options).unflatten(0, q.shape[:2])


def install(monkeypatch, dense=flash_attn_func, varlen=flash_attn_varlen_func):
    """Let `flash_attention_2` call `dense` and `varlen`, on any device, until the test ends."""
    functions = (dense, varlen, None, utils._pad_input, utils._unpad_input)
    monkeypatch.setattr(utils, "_lazy_imports", lambda *args, **kwargs: functions)
    for name in ("_loaded_implementation", "_flash_fn", "_flash_varlen_fn", "_process_flash_kwargs_fn"):
        monkeypatch.setattr(utils, name, None)
    for name in ("_flash_with_kvcache_fn", "_pad_fn", "_unpad_fn", "_process_with_kvcache_kwargs_fn"):
        monkeypatch.setattr(utils, name, None, raising=False)  # not every release has all of them
    monkeypatch.setattr(PreTrainedModel, "_check_and_adjust_attn_implementation", lambda self, name, *_, **__: name)
