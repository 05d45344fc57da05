"""The cheapest Superblocks for given costs, by dynamic programming over consecutive layers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from ..plan import may_share


def best_superblocks(
    costs: Mapping[tuple[int, int], float],
    followers: int,
    *,
    layers: range,
    max_size: int,
    masks: Sequence[str] | None = None,
    follower_mask: str = "own",
) -> list[list[int]]:
    """
    The Superblocks with exactly `followers` followers whose costs add up to the least.

    Optimal for additive costs, in O(layers · followers · max_size) steps: the best choice below layer i with n
    followers leaves layer i - 1 unshared, or ends in a Superblock on top of the best choice below that.

    Args:
        costs: (leader, follower) -> cost, for every pair that may be in one Superblock.
        followers: how many followers, 1 or more.
        layers: the layers that may be used.
        max_size: most layers per Superblock, 2 or more.
        masks: the kind of mask of every layer of the model; None if all are alike.
        follower_mask: which masks may be mixed, as in [`~peft_uniattn.UniAttnConfig`].

    Raises:
        ValueError: if so many followers do not fit; names the most that do.
    """
    first, last = layers.start, layers.stop
    # best[i][n]: cost of n followers among the layers below first + i, and the size of the Superblock that ends there.
    best = [{0: (0.0, 1)}]
    for end in range(first + 1, last + 1):
        row = {count: (cost, 1) for count, (cost, _) in best[-1].items()}
        for size in range(2, min(max_size, end - first) + 1):
            block = range(end - size, end)
            if not may_share(block, masks, follower_mask):
                continue
            block_cost = sum(costs[block[0], follower] for follower in block[1:])
            for below, (cost, _) in best[end - size - first].items():
                count = below + size - 1
                if count <= followers and cost + block_cost < row.get(count, (math.inf, 1))[0]:
                    row[count] = (cost + block_cost, size)
        best.append(row)
    if followers not in best[-1]:
        raise too_many(followers, most_followers(layers, max_size, masks, follower_mask), layers, max_size)

    blocks, end, count = [], last, followers
    while end > first:
        _, size = best[end - first][count]
        if size > 1:
            blocks.append(list(range(end - size, end)))
        end -= size
        count -= size - 1
    return blocks[::-1]


def most_followers(layers: range, max_size: int, masks: Sequence[str] | None, follower_mask: str) -> int:
    """How many followers fit into `layers` at most."""
    most = [0]
    for end in range(layers.start + 1, layers.stop + 1):
        fits = [
            most[end - size - layers.start] + size - 1
            for size in range(2, min(max_size, end - layers.start) + 1)
            if may_share(range(end - size, end), masks, follower_mask)
        ]
        most.append(max([most[-1], *fits]))
    return most[-1]


def too_many(followers: int, most: int, layers: range, max_size: int) -> ValueError:
    return ValueError(
        f"followers={followers} do not fit into layers {layers.start} to {layers.stop - 1} in Superblocks of at most "
        f"max_size={max_size} layers, which hold {most}; ask for fewer followers, or allow more layers or a larger "
        "max_size"
    )
