"""
Followers of a causal prompt, or of a chunk of one, that leave out what hardly counts; see `naive` for what is computed
and for all shapes.

The leader weighs every tile of s while it computes its own output. Followers recompute the tiles that matter from its
queries, keys and denominators: that takes no memory, and was faster than to store tiles and read them again
(`bench.prefill_attention`), unless a Superblock is very long. For these, a leader of a whole prompt can store s.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from . import decode_launch, naive
from . import prefill_launch as launch

_TYPES = (torch.float16,) if decode_launch.INTERPRETED else (torch.bfloat16, torch.float16)


class SharedTiles(NamedTuple):
    """
    A leader's s over a prompt or a chunk of one, as followers obtain it.

    Attributes:
        query, key: of the leader; the queries are the last positions of the keys.
        denominator: (batch, query heads, query length) natural logarithm of the softmax's denominators, float32.
        scaling: of the scores.
        kept: (batch, query heads, query tiles, key tiles) which tiles followers need, in front of what means nothing.
        count: (batch, query heads, query tiles) how many these are.
        dropped: (batch, query heads, query tiles) a bound on the mass that any row loses with the other tiles.
    """

    query: torch.Tensor
    key: torch.Tensor
    denominator: torch.Tensor
    scaling: float
    kept: torch.Tensor
    count: torch.Tensor
    dropped: torch.Tensor

    def to(self, device: torch.device) -> SharedTiles:
        """The same on another device, for models that are spread over several."""
        return SharedTiles(*(part.to(device) if isinstance(part, torch.Tensor) else part for part in self))

    def kept_share(self) -> float:
        """Share of the visible tiles that followers recompute; waits for the device."""
        tuning = launch.RECOMPUTE[self.query.shape[3]]
        queries, length = self.query.shape[2], self.key.shape[2]
        ends = range(length - queries + tuning.rows, length + tuning.rows, tuning.rows)
        visible = sum(-(-min(end, length) // tuning.columns) for end in ends)
        return self.count.double().sum(-1).mean().item() / visible

    def apply(self, value: torch.Tensor) -> torch.Tensor:
        """
        s·V of a follower, (batch, query length, query heads, head_dim), by PyTorch where the kernels do not support V.

        Args:
            value: of all positions of `key`; more, as a static cache has, are not looked at.
        """
        value = value[:, :, : self.key.shape[2]]
        if not _fits(self.query, self.key, value):
            return naive.follower_prefill(self.query, self.key, value, scaling=self.scaling)
        return launch.recompute(self.query, self.key, value, self.denominator, self.scaling, self.kept, self.count)


class StoredTiles(NamedTuple):
    """
    A leader's s over a whole prompt, stored for followers that stream it.

    Attributes:
        query, key: of the leader.
        scaling: of the scores.
        weights: the tiles on and below the diagonal, in the type of the queries.
        scales: of 8-bit tiles; empty.
    """

    query: torch.Tensor
    key: torch.Tensor
    scaling: float
    weights: torch.Tensor
    scales: torch.Tensor

    def to(self, device: torch.device) -> StoredTiles:
        """The same on another device, for models that are spread over several."""
        return StoredTiles(*(part.to(device) if isinstance(part, torch.Tensor) else part for part in self))

    def apply(self, value: torch.Tensor) -> torch.Tensor:
        """
        s·V of a follower, (batch, length, query heads, head_dim), by PyTorch where the kernels do not support V.

        Args:
            value: of all positions of `key`; more, as a static cache has, are not looked at.
        """
        value = value[:, :, : self.key.shape[2]]
        if not _fits(self.query, self.key, value):
            return naive.follower_prefill(self.query, self.key, value, scaling=self.scaling)
        tuning = launch.STREAM_STORED[value.shape[3]]
        return launch.stream(self.weights, self.scales, value, self.query, tuning=tuning)


def causal_offset(mask: torch.Tensor) -> int | None:
    """
    The position of the first query if query i sees the keys 0 ... offset + i of every sequence and nothing else.

    By the mask's values, since a padded sequence, a window or several packed sequences have masks of the same shape.
    This reads the whole mask and waits for the device: something for once per forward pass.

    Args:
        mask: boolean (True: visible), (batch, 1 or heads, query length, key length). Keys that no query sees, as the
            empty end of a static cache, may follow.

    Returns:
        the offset, or None for every other mask.
    """
    if mask.dtype != torch.bool or mask.dim() != 4 or 0 in mask.shape:
        return None
    rows, columns = mask.shape[2:]
    if mask.stride(0) == 0:
        mask = mask[:1]  # expanded over the batch
    offset = int(mask[0, 0, 0].sum()) - 1
    if not 0 <= offset <= columns - rows:
        return None
    triangle = torch.ones(rows, rows, dtype=torch.bool, device=mask.device).tril()
    is_causal = mask[..., :offset].all() & (mask[..., offset : offset + rows] == triangle).all()
    return offset if is_causal & ~mask[..., offset + rows :].any() else None


def supports(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None = None) -> bool:
    """Whether the kernels compute this leader, judged by shapes and types alone; a mask has a [`causal_offset`]."""
    length = key.shape[2]
    if query.ndim != 4 or not 2 <= query.shape[2] <= length or value.shape[2] != length:
        return False
    masked = mask is None or (mask.dtype == torch.bool and mask.shape[-2:] == (query.shape[2], length))
    return masked and _fits(query, key, value)


def _fits(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    states = query, key, value
    return (
        decode_launch.runs_on(query.device)
        and all(tensor.dtype == query.dtype and tensor.device == query.device for tensor in states)
        and all(tensor.stride(3) == 1 and tensor.shape[0] == query.shape[0] for tensor in states)
        and query.dtype in _TYPES
        and query.shape[3] in launch.RECOMPUTE
        and all(tensor.shape[3] == query.shape[3] for tensor in states)
        and key.shape[1:3] == value.shape[1:3]
        and query.shape[1] % key.shape[1] == 0
        and not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in states))
    )


def leader_prefill(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    offset: int = 0,
    scaling: float | None = None,
    skip_mass: float,
) -> tuple[torch.Tensor, SharedTiles]:
    """
    Causal attention of a prompt or of a chunk of one, and which tiles of s its followers need.

    Args:
        query, key, value: as `supports` says; keys and values from offset + query length on are not looked at.
        offset: position of the first query.
        scaling: default head_dim ** -0.5.
        skip_mass: how much of a row's mass followers may leave out. The leader's own output is exact.

    Returns:
        output (batch, query length, query heads, head_dim) and s.
    """
    length = offset + query.shape[2]
    key, value = key[:, :, :length], value[:, :, :length]
    scaling = query.shape[3] ** -0.5 if scaling is None else scaling
    output, denominator, maxima = launch.lead(query, key, value, scaling)
    kept = decode_launch.select(maxima.unsqueeze(-1), None, skip_mass)
    return output, SharedTiles(query, key, denominator, scaling, *kept)


def leader_stored(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, scaling: float | None = None
) -> tuple[torch.Tensor, StoredTiles]:
    """
    Causal attention of a whole prompt, and all of s: 2 bytes for half of length² probabilities a query head.

    Returns:
        output (batch, length, query heads, head_dim) and s.
    """
    scaling = query.shape[3] ** -0.5 if scaling is None else scaling
    output, denominator = launch.attend(query, key, value, scaling)
    tuning = launch.STORE[query.shape[3]]
    weights, scales, _ = launch.weigh(query, key, denominator, scaling, query.dtype, mass=False, tuning=tuning)
    return output, StoredTiles(query, key, scaling, weights, scales)
