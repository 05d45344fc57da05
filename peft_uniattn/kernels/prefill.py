"""
Followers of a causal prompt that leave out what hardly counts; see `naive` for what is computed and for all shapes.

The leader weighs every tile of s while it computes its own output. Followers recompute the tiles that matter from its
queries, keys and denominators: that takes no memory, and was faster than to store tiles and read them again
(`bench.prefill_attention`), unless a Superblock is very long.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from . import decode_launch, naive
from . import prefill_launch as launch

_TYPES = (torch.float16,) if decode_launch.INTERPRETED else (torch.bfloat16, torch.float16)


class SharedTiles(NamedTuple):
    """
    A leader's s over a prompt, as followers obtain it.

    Attributes:
        query, key: of the leader, of one length.
        denominator: (batch, query heads, length) natural logarithm of the softmax's denominators, float32.
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

    def apply(self, value: torch.Tensor) -> torch.Tensor:
        """s·V of a follower, (batch, length, query heads, head_dim), by PyTorch where the kernels do not support V."""
        value = value[:, :, : self.query.shape[2]]
        if not _fits(self.query, self.key, value):
            return naive.follower_prefill(self.query, self.key, value, scaling=self.scaling)
        return launch.recompute(self.query, self.key, value, self.denominator, self.scaling, self.kept, self.count)


def supports(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None) -> bool:
    """Whether the kernels compute this leader, judged by shapes and types alone."""
    length = query.shape[2]
    if mask is not None or query.ndim != 4 or length < 2 or key.shape[2] < length:
        return False
    return _fits(query, key[:, :, :length], value[:, :, :length])


def _fits(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    states = query, key, value
    return (
        decode_launch.runs_on(query.device)
        and all(tensor.dtype == query.dtype and tensor.device == query.device for tensor in states)
        and all(tensor.stride(3) == 1 and tensor.shape[::2] == query.shape[::2] for tensor in states)
        and query.dtype in _TYPES
        and query.shape[3] in launch.RECOMPUTE
        and all(tensor.shape[3] == query.shape[3] for tensor in states)
        and key.shape[1] == value.shape[1]
        and query.shape[1] % key.shape[1] == 0
        and not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in states))
    )


def leader_prefill(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scaling: float | None = None,
    skip_mass: float,
) -> tuple[torch.Tensor, SharedTiles]:
    """
    Causal attention of a prompt, and which tiles of s its followers need.

    Args:
        query, key, value: as `supports` says; keys and values beyond the queries' length are not looked at.
        scaling: default head_dim ** -0.5.
        skip_mass: how much of a row's mass followers may leave out. The leader's own output is exact.

    Returns:
        output (batch, length, query heads, head_dim) and s.
    """
    length = query.shape[2]
    key, value = key[:, :, :length], value[:, :, :length]
    scaling = query.shape[3] ** -0.5 if scaling is None else scaling
    output, denominator, maxima = launch.lead(query, key, value, scaling)
    kept = decode_launch.select(maxima.unsqueeze(-1), None, skip_mass)
    return output, SharedTiles(query, key, denominator, scaling, *kept)
