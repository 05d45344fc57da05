"""
The kernels' specification in plain PyTorch: what every kernel of this package has to compute.

Shapes, here and in all of this package: query (batch, query heads, 1, head_dim), key and value (batch, key/value
heads, length, head_dim) with any strides, probabilities (batch, query heads, 1, length), mask (1 or batch, 1, 1,
length); for a prompt, queries and probabilities have `length` rows instead of one, and for a chunk of a prompt fewer:
its queries are the last positions of the keys.
Query head i reads key/value head i // (query heads / key/value heads). Made to run in float64 as well.
"""

from __future__ import annotations

import torch


def leader_decode(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None = None,
    *,
    span: torch.Tensor | None = None,
    scaling: float | None = None,
    softcap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    One decoded token's attention, and the probabilities that the followers will reuse.

    Args:
        query, key, value: see the module.
        mask: boolean (True: visible) or additive; None: all visible. Additive entries at or below the smallest finite
            number of their type make a position invisible, as transformers means them.
        span: (batch, 2) integers: first visible position and one past the last, for left-padded batches and for
            caches that are longer than their content. Values outside must be finite, as they must under any mask.
        scaling: default head_dim ** -0.5.
        softcap: scores become softcap * tanh(scores / softcap) before the mask.

    Returns:
        output (batch, query heads, 1, head_dim) and probabilities, both in the type of `query`. Invisible positions
        have probability exactly 0; a row that sees nothing is zero altogether.
    """
    batch, query_heads, _, head_dim = query.shape
    kv_heads, length = key.shape[1], key.shape[2]
    scaling = head_dim**-0.5 if scaling is None else scaling
    precise = torch.promote_types(torch.float32, query.dtype)
    visible, bias = visibility(mask, span, batch, length, query.device)

    grouped = query.to(precise).reshape(batch, kv_heads, -1, head_dim)
    scores = (grouped @ key.to(precise).transpose(2, 3)).reshape(batch, query_heads, 1, length) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias.to(precise)
    scores = scores.masked_fill(~visible, -torch.inf)
    probabilities = torch.softmax(scores, dim=-1).masked_fill(~visible.any(dim=-1, keepdim=True), 0.0)
    probabilities = probabilities.to(query.dtype)
    return follower_decode(probabilities, value), probabilities


def follower_decode(probabilities: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """
    s·V of one decoded token.

    Args:
        probabilities: s of the leader.
        value: the follower's own value states.

    Returns:
        (batch, query heads, 1, head_dim) in the type of `value`.
    """
    batch, query_heads, _, length = probabilities.shape
    kv_heads, head_dim = value.shape[1], value.shape[3]
    precise = torch.promote_types(torch.float32, value.dtype)
    grouped = probabilities.to(precise).reshape(batch, kv_heads, query_heads // kv_heads, length)
    output = grouped @ value.to(precise)
    return output.reshape(batch, query_heads, 1, head_dim).to(value.dtype)


def leader_prefill(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, scaling: float | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    A prompt's causal attention, or that of its last positions.

    Returns:
        output (batch, query heads, query length, head_dim) in the type of `query`, and the natural logarithms of the
        softmax's denominators (batch, query heads, query length) in float32 or better.
    """
    scores = _causal_scores(query, key, scaling)
    output = _weighted(torch.softmax(scores, dim=-1), value)
    return output, torch.logsumexp(scores, dim=-1)


def follower_prefill(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scaling: float | None = None,
    visible: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    s·V of a prompt.

    Args:
        query, key: of the leader.
        value: the follower's own value states.
        visible: boolean, broadcastable to (batch, query heads, query length, length): what is not left out of s. What
            is left out is not made up for: rows then add up to less than 1.

    Returns:
        (batch, query length, query heads, head_dim) in the type of `value`.
    """
    probabilities = torch.softmax(_causal_scores(query, key, scaling), dim=-1)
    if visible is not None:
        probabilities = probabilities.masked_fill(~visible, 0.0)
    return _weighted(probabilities, value).transpose(1, 2)


def _causal_scores(query: torch.Tensor, key: torch.Tensor, scaling: float | None) -> torch.Tensor:
    _, query_heads, rows, head_dim = query.shape
    length = key.shape[2]
    scaling = head_dim**-0.5 if scaling is None else scaling
    precise = torch.promote_types(torch.float32, query.dtype)
    key = key.to(precise).repeat_interleave(query_heads // key.shape[1], dim=1)
    scores = (query.to(precise) @ key.transpose(2, 3)) * scaling
    hidden = torch.ones(rows, length, dtype=torch.bool, device=query.device).triu(length - rows + 1)
    return scores.masked_fill(hidden, -torch.inf)


def _weighted(probabilities: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    repeats = probabilities.shape[1] // value.shape[1]
    return (probabilities @ value.to(probabilities.dtype).repeat_interleave(repeats, dim=1)).to(value.dtype)


def visibility(
    mask: torch.Tensor | None, span: torch.Tensor | None, batch: int, length: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What mask and span say: visible positions (batch, 1, 1, length), and the additive part of the mask or None."""
    visible = torch.ones(batch, 1, 1, length, dtype=torch.bool, device=device)
    bias = None
    if mask is not None and mask.dtype == torch.bool:
        visible = visible & mask
    elif mask is not None:
        visible = visible & (mask > torch.finfo(mask.dtype).min)
        bias = torch.where(visible, mask, 0.0)
    if span is not None:
        position = torch.arange(length, device=device)
        visible = visible & ((position >= span[:, :1]) & (position < span[:, 1:]))[:, None, None, :]
    return visible, bias
