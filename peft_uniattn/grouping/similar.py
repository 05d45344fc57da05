"""Superblocks of the layers whose softmax activations are most alike (Table 9 of https://arxiv.org/abs/2502.00439)."""

from __future__ import annotations

from collections.abc import Sequence

from ..plan import may_share
from .partition import too_many


def similar_superblocks(
    similarities: Sequence[float],
    followers: int,
    *,
    layers: range,
    max_size: int,
    masks: Sequence[str] | None = None,
    follower_mask: str = "own",
) -> list[list[int]]:
    """
    Join the most similar neighbours first, until there are exactly `followers` followers.

    The paper says no more than that the most similar layers are grouped. Every join of two groups of neighbours makes
    one more follower, so this is as close as one gets to it at a given number.

    Args:
        similarities: Sim(i) = cos(s_i, s_{i-1}) for the layers i = 1, 2, … of the whole model.
        followers: how many followers, 1 or more.
        layers: the layers that may be used.
        max_size: most layers per Superblock.
        masks: the kind of mask of every layer; None if all are alike.
        follower_mask: which masks may be mixed, as in [`~peft_uniattn.UniAttnConfig`].

    Raises:
        ValueError: if joining ends with fewer followers.
    """
    groups = {layer: [layer] for layer in layers}
    joined = 0
    for upper in sorted(layers[1:], key=lambda layer: similarities[layer - 1], reverse=True):
        if joined == followers:
            break
        block = groups[upper - 1] + groups[upper]
        if len(block) <= max_size and may_share(block, masks, follower_mask):
            groups.update(dict.fromkeys(block, block))
            joined += 1
    if joined < followers:
        raise too_many(followers, joined, layers, max_size)
    return [group for layer, group in groups.items() if layer == group[0] and len(group) > 1]
