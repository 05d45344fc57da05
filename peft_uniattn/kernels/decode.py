"""Leader and follower of one decoded token on Triton; see `naive` for what they compute and for all shapes."""

from __future__ import annotations

from typing import NamedTuple

import torch

from . import decode_launch as launch
from . import naive

# The interpreter multiplies the bit patterns of bfloat16.
_TYPES = (torch.float16,) if launch.INTERPRETED else (torch.bfloat16, torch.float16)
# Query heads that share a key/value head; they are rows of one tile.
_LARGEST_GROUP = 64
# All blocks of a row are weighed at once in order to skip some.
_LONGEST_SKIPPED = 2**19
# The second dimension of a launch.
_MOST_ROWS = 65535


class SharedSoftmax(NamedTuple):
    """
    A leader's s as its kernel leaves it: probability = weight * factor of its block.

    Attributes:
        weights: (batch, key/value heads, blocks, group, positions per block), meaningless where the factor is zero.
        factors: (batch, key/value heads, blocks, group), float32.
        span: (1 or batch, parts, 2) visible positions, or None.
        length: number of key positions.
        kept: (batch, key/value heads, blocks) the blocks that followers read, in front of what means nothing, or None:
            all.
        count: (batch, key/value heads) how many blocks are kept, or None.
        dropped: (batch, key/value heads) a bound on the mass that any row loses with the other blocks, or None.
    """

    weights: torch.Tensor
    factors: torch.Tensor
    span: torch.Tensor | None
    length: int
    kept: torch.Tensor | None = None
    count: torch.Tensor | None = None
    dropped: torch.Tensor | None = None

    def to(self, device: torch.device) -> SharedSoftmax:
        """The same on another device, for models that are spread over several."""
        return SharedSoftmax(*(part.to(device) if isinstance(part, torch.Tensor) else part for part in self))

    def apply(self, value: torch.Tensor) -> torch.Tensor:
        """s·V of a follower, (batch, 1, query heads, head_dim), by PyTorch where the kernels do not support V."""
        if supports_follower(self, value):
            return follower_decode(self, value).transpose(1, 2)
        return naive.follower_decode(self.probabilities(), value).transpose(1, 2)

    def probabilities(self) -> torch.Tensor:
        """s as one tensor (batch, query heads, 1, length)."""
        return launch.decode_probabilities(self.weights, self.factors, self.length)


def supports(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None = None) -> bool:
    """Whether the kernels compute this leader, judged by shapes and types alone: nothing waits for the device."""
    if query.ndim != 4 or query.shape[2] != 1 or key.shape != value.shape:
        return False
    if not query.dtype == key.dtype == value.dtype or not query.device == key.device == value.device:
        return False
    if query.shape[0] != key.shape[0] or query.shape[3] != key.shape[3] or query.shape[1] % key.shape[1] != 0:
        return False
    if query.shape[1] // key.shape[1] > _LARGEST_GROUP or query.stride(3) != 1:
        return False
    if query.shape[0] * query.shape[1] > _MOST_ROWS or (torch.is_grad_enabled() and query.requires_grad):
        return False
    return _supports_states(key) and _supports_states(value) and (mask is None or _supports_mask(mask, key))


def supports_follower(shared: SharedSoftmax, value: torch.Tensor) -> bool:
    """Whether the kernels compute this follower; if not, there is `shared.probabilities()` for PyTorch."""
    batch, kv_heads, _, _, block = shared.weights.shape
    return (
        _supports_states(value)
        and tuple(value.shape[:3]) == (batch, kv_heads, shared.length)
        and launch.BLOCK[value.shape[3]] == block
        and value.dtype == shared.weights.dtype
        and value.device == shared.weights.device
    )


def _supports_states(states: torch.Tensor) -> bool:
    return (
        launch.runs_on(states.device)
        and states.dtype in _TYPES
        and states.shape[3] in launch.LEADER
        and states.stride(3) == 1
        and states.shape[2] > 0
        and states.shape[2] * states.stride(2) < 2**31
        and not (torch.is_grad_enabled() and states.requires_grad)
    )


def _supports_mask(mask: torch.Tensor, key: torch.Tensor) -> bool:
    return (
        isinstance(mask, torch.Tensor)
        and mask.ndim == 4
        and mask.shape[0] in (1, key.shape[0])
        and tuple(mask.shape[1:]) == (1, 1, key.shape[2])
        and mask.stride(3) == 1
        and mask.dtype in (torch.bool, torch.float32, *_TYPES)
        and mask.device == key.device
    )


def leader_decode(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None = None,
    *,
    span: torch.Tensor | None = None,
    scaling: float | None = None,
    softcap: float | None = None,
    skip_mass: float = 0.0,
) -> tuple[torch.Tensor, SharedSoftmax]:
    """
    [`naive.leader_decode`] in one pass over keys and values.

    Args:
        span: (batch, 2) as specified, or what [`visible_span`] made of the mask.
        skip_mass: how much of a row's mass followers may leave out. The leader's own output is exact.

    Returns:
        output (batch, query heads, 1, head_dim) and s.
    """
    span = _as_parts(span)
    scaling = query.shape[3] ** -0.5 if scaling is None else scaling
    skips = skip_mass > 0 and key.shape[2] <= _LONGEST_SKIPPED
    output, weights, factors, sums = launch.decode_leader(
        query, key, value, mask, span, scaling, softcap or 0.0, skips
    )
    kept = launch.decode_select(sums, factors, skip_mass) if skips else (None, None, None)
    return output, SharedSoftmax(weights, factors, span, key.shape[2], *kept)


def follower_decode(
    shared: SharedSoftmax | torch.Tensor, value: torch.Tensor, *, span: torch.Tensor | None = None
) -> torch.Tensor:
    """
    [`naive.follower_decode`], streaming nothing but V and s.

    Args:
        shared: what the leader returned, or probabilities as one tensor (batch, query heads, 1, length).
        span: where `shared` is a tensor; otherwise the leader's holds.

    Returns:
        (batch, query heads, 1, head_dim).
    """
    if isinstance(shared, SharedSoftmax):
        return launch.decode_follower(shared.weights, shared.factors, value, shared.span, shared.kept, shared.count)
    return launch.decode_follower(shared.contiguous(), None, value, _as_parts(span), None, None)


def visible_span(mask: torch.Tensor) -> torch.Tensor:
    """
    Where the visible positions of a mask begin and end, so that nothing outside is read; without synchronisation.

    Args:
        mask: (1 or batch, 1, 1, length), as for the leader.

    Returns:
        (1 or batch, parts, 2): the span of each part of the length.
    """
    return launch.visible_span(mask)


def _as_parts(span: torch.Tensor | None) -> torch.Tensor | None:
    if span is None or span.ndim == 3:
        return span
    return span[:, None, :].to(torch.int32).contiguous()
