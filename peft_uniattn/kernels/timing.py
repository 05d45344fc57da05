"""
Whether skipping pays: timed on the GPU at hand, at the first prompt of a size.

No table could say it. What skipping gains is the difference between two kernels that are nearly equally fast, and by
that two GPUs of one kind turn out differently (docs/results/LOG.md).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable
from time import perf_counter
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch.backends import cuda as back_ends

if TYPE_CHECKING:
    from .prefill import SharedTiles

logger = logging.getLogger(__name__)

# So long each way runs before it is timed, and while it is: as in a model. At 32k tokens cuDNN takes 13.2 ms once, and
# 15 each of 13 times in a row; the kernels here slow down less (docs/results/prefill_attention_32k_h200.json).
_SECONDS = 0.1


class Times(NamedTuple):
    """
    One layer's attention of a prompt of some size.

    Attributes:
        fused: ms by the model's own back end.
        weighing: ms of a leader that weighs its tiles and selects among them.
        recomputing: ms of a follower that recomputes every tile. For a share of them it takes about that share, at
            8k to 32k tokens within 0.1 of it, with heads of 64 within 0.15 (docs/results/prefill_attention_*.json).
    """

    fused: float
    weighing: float
    recomputing: float

    def saved(self, followers: int, share: float) -> float:
        """ms that a leader and its followers save by skipping, where these recompute `share` of the tiles."""
        return followers * (self.fused - share * self.recomputing) - (self.weighing - self.fused)


class Trials:
    """
    What has been timed, by size, and what share of its tiles each leader had to keep last.
    """

    def __init__(self) -> None:
        self._times: dict[Hashable, Times] = {}
        self._shares: WeakKeyDictionary[Any, dict[Hashable, float]] = WeakKeyDictionary()

    def lead(
        self,
        leader: Any,
        size: Hashable,
        followers: int,
        value: torch.Tensor,
        fused: Callable[[], Any],
        weighing: Callable[[], tuple[torch.Tensor, SharedTiles]],
    ) -> tuple[torch.Tensor, SharedTiles | None] | None:
        """
        A leader that weighs its tiles if its followers are expected to make up for that.

        The first prompt of a size is timed. A leader is weighed until it has had to keep too much.

        Args:
            leader: whose tiles these are; anything that weak references can point to.
            size: of the prompt, as [`size_of`] has it.
            followers: how many layers share the leader's softmax.
            value: of the leader, to time a follower with.
            fused: the leader's attention by the model's back end.
            weighing: the same, by kernels that weigh the tiles.

        Returns:
            what `weighing` gives, without s where followers are faster by their back end; None where the leader is
            to be computed by its back end, too.
        """
        if size not in self._times:
            self._times[size] = measure(value, fused, weighing)
            logger.info("skipping at %s: %s", size, self._times[size])
        times, shares = self._times[size], self._shares.setdefault(leader, {})
        if times.saved(followers, shares.get(size, 0.0)) <= 0:
            return None
        output, shared = weighing()
        share = shares[size] = shared.kept_share()
        return output, shared if share * times.recomputing < times.fused else None


def size_of(query: torch.Tensor, key: torch.Tensor, visible: int, skip_mass: float) -> tuple:
    """
    What the times depend on: device, types, heads, back ends that PyTorch may use, and by powers of two how many
    queries there are in a batch and how many positions the last of them sees.
    """
    allowed = back_ends.cudnn_sdp_enabled(), back_ends.flash_sdp_enabled(), back_ends.mem_efficient_sdp_enabled()
    shape = query.shape[1], key.shape[1], query.shape[3]
    queries = (query.shape[0] * query.shape[2]).bit_length()
    return query.device, query.dtype, shape, queries, visible.bit_length(), skip_mass, allowed


def measure(
    value: torch.Tensor, fused: Callable[[], Any], weighing: Callable[[], tuple[torch.Tensor, SharedTiles]]
) -> Times:
    """
    Times of one layer, of a follower at the share of tiles that this prompt keeps. Waits for the device, in all for
    about 0.6 s or, where that is longer, 13 runs.
    """
    _, shared = weighing()
    follower = _milliseconds(lambda: shared.apply(value), value.device) / shared.kept_share()
    return Times(_milliseconds(fused, value.device), _milliseconds(weighing, value.device), follower)


def _milliseconds(run: Callable[[], Any], device: torch.device) -> float:
    """Of one run among many without a pause."""
    run()  # may compile
    many = max(1, round(_SECONDS / _seconds(run, 1, device)))
    _seconds(run, many, device)
    return 1e3 * _seconds(run, many, device) / many


def _seconds(run: Callable[[], Any], times: int, device: torch.device) -> float:
    _wait(device)
    start = perf_counter()
    for _ in range(times):
        run()
    _wait(device)
    return perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
