"""H2O's statistic: how much attention every stored token has received."""

from __future__ import annotations

import torch

from ..attention import _product

# Scores that are in memory at a time: 128 MiB in float32, whatever the length of the prompt.
SCORES_AT_ONCE = 2**25


def received(
    query: torch.Tensor,
    key: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float | None,
    probabilities: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    Column sums of s over the real queries and over the query heads of each key/value head.

    Args:
        query: (batch, query heads, query length, head_dim).
        key: (batch, key/value heads, key length, head_dim), the queries' own tokens last.
        mask: boolean (True: visible) or additive, broadcastable to (batch, query heads, query length, key length);
            None: causal.
        scaling: of q·Kᵀ; default head_dim ** -0.5.
        probabilities: s, of shape (batch, query heads, query length, key length), where it is at hand. None: it is
            computed here, a few queries at a time, in memory that does not grow with the number of queries.

    Returns:
        (batch, key/value heads, key length), float32 or better.
    """
    real = _real_queries(mask, query.shape[2], key.shape[2])
    if probabilities is not None:
        return _columns(probabilities, real, key.shape[1], _accumulator(query.dtype))
    return _columns_in_chunks(query, key, mask, scaling, real)


def visible_to_newest(mask: torch.Tensor | None, kv_heads: int) -> torch.Tensor | None:
    """
    Which stored tokens the newest query sees, (batch, 1 or key/value heads, key length); None: all of them.

    What it does not see, padding for instance, no later query will see either.
    """
    if mask is None:
        return None
    newest = _is_visible(mask[:, :, -1])
    return newest if newest.shape[1] == 1 else newest[:, :: newest.shape[1] // kv_heads]


def _columns_in_chunks(
    query: torch.Tensor,
    key: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float | None,
    real: torch.Tensor | None,
) -> torch.Tensor:
    batch, heads, queries, head_dim = query.shape
    kv_heads, length = key.shape[1], key.shape[2]
    scaling = head_dim**-0.5 if scaling is None else scaling
    rows = max(1, SCORES_AT_ONCE // (batch * heads * length))
    sums = torch.zeros(batch, kv_heads, length, dtype=_accumulator(query.dtype), device=query.device)
    for first in range(0, queries, rows):
        last = min(first + rows, queries)
        # Without a mask, keys after the last query of the chunk are in its future.
        end = length - queries + last if mask is None else length
        chunk_mask = _causal(first, last, length - queries, query.device) if mask is None else mask[:, :, first:last]
        grouped = query[:, :, first:last].reshape(batch, kv_heads, -1, head_dim)
        scores = _product(grouped, key[:, :, :end].transpose(2, 3)).reshape(batch, heads, last - first, end) * scaling
        if chunk_mask.dtype == torch.bool:
            scores = scores.masked_fill(~chunk_mask, torch.finfo(scores.dtype).min)
        else:
            scores = scores + chunk_mask
        real_chunk = None if real is None else real[:, first:last]
        sums[..., :end] += _columns(scores.softmax(-1), real_chunk, kv_heads, sums.dtype)
    return sums


def _columns(
    probabilities: torch.Tensor, real: torch.Tensor | None, kv_heads: int, dtype: torch.dtype
) -> torch.Tensor:
    if real is not None:
        probabilities = probabilities.masked_fill(~real[:, None, :, None], 0)
    return probabilities.unflatten(1, (kv_heads, -1)).sum((2, 3), dtype=dtype)


def _causal(first: int, last: int, past: int, device: torch.device) -> torch.Tensor:
    """Which of the first `past + last` keys the queries from `first` to `last` see, (queries, keys)."""
    queries = torch.arange(first, last, device=device) + past
    return torch.arange(past + last, device=device) <= queries[:, None]


def _real_queries(mask: torch.Tensor | None, queries: int, length: int) -> torch.Tensor | None:
    """Which queries are tokens rather than padding, (batch, query length): those that see themselves."""
    if mask is None:
        return None
    return _is_visible(mask[:, 0].diagonal(length - queries, dim1=-2, dim2=-1))


def _is_visible(mask: torch.Tensor) -> torch.Tensor:
    # What hides a token may be the lowest number of any data type, float16 having the highest of them.
    return mask if mask.dtype == torch.bool else mask > torch.finfo(torch.float16).min / 2


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
