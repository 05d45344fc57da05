"""
Which pages of a paged KV cache a plan needs, in whole pages. Plain arithmetic: no engine, no tensors.

Stock allocators give every layer pages of one size, a half for K and a half for V. A follower stores V only, so two
followers share a page: the V of one lies in the half for K, that of the other in the half for V.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

K_HALF, V_HALF = 0, 1


@dataclass(frozen=True)
class ValuePage:
    """
    Where a follower's V lies.

    Attributes:
        owner: the follower for which the allocator reserves the page; the layer itself, or its partner.
        half: `K_HALF` or `V_HALF` of that page.
    """

    owner: int
    half: int


def value_pages(superblocks: Sequence[Sequence[int]]) -> dict[int, ValuePage]:
    """
    The place of every follower's V.

    Followers are paired from the lowest up, across Superblocks too; of an odd number the last has a page to itself.
    That is sound where all layers share one block table, so that the same page numbers hold for all of them.

    Args:
        superblocks: lists of layer indices, the leader first.
    """
    followers = sorted(layer for block in superblocks for layer in block[1:])
    return {layer: ValuePage(followers[i - i % 2], i % 2) for i, layer in enumerate(followers)}


def num_pages(num_layers: int, superblocks: Sequence[Sequence[int]]) -> int:
    """How many pages one block of tokens takes in all layers together."""
    places = value_pages(superblocks)
    return num_layers - len(places) + len({place.owner for place in places.values()})


def capacity_ratio(num_layers: int, superblocks: Sequence[Sequence[int]]) -> Fraction:
    """How many times the tokens of the unshared model fit into the same memory, before rounding to blocks."""
    return Fraction(num_layers, num_pages(num_layers, superblocks))


def num_tokens(memory: int, page_bytes: int, block_size: int, num_pages: int) -> int:
    """
    The tokens that a cache holds.

    Args:
        memory: bytes reserved for the cache.
        page_bytes: bytes of one page of one layer: K and V of `block_size` tokens.
        block_size: tokens per page.
        num_pages: pages per block of tokens, see [`num_pages`].
    """
    return memory // (page_bytes * num_pages) * block_size
