"""Skipping at a given share of tiles, for random weights, whose attention is nothing like a real model's."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def kept_share(share: float, seed: int = 0, head_dim: int = 128) -> Iterator[None]:
    """
    Let followers keep this share of the visible tiles or blocks, drawn at random, whatever they weigh.

    Weighing and selecting run as always, so that times are those of a model whose attention is as concentrated.
    Results mean nothing. A prompt's tiles are those of `head_dim`.
    """
    from ..kernels import decode_launch, prefill_launch

    select, tuning = decode_launch.select, prefill_launch.RECOMPUTE.get(head_dim, prefill_launch.RECOMPUTE[128])
    ratio = tuning.rows // tuning.columns

    def draw(sums: torch.Tensor, factors: torch.Tensor | None, bound: float):
        _, _, dropped = select(sums, factors, bound)
        return *_draw(sums.shape[:-1], share, ratio if factors is None else None, sums.device, seed), dropped

    decode_launch.select = draw
    try:
        yield
    finally:
        decode_launch.select = select


@functools.lru_cache(maxsize=8)
def _draw(shape: torch.Size, share: float, ratio: int | None, device: torch.device, seed: int):
    """
    Kept indices and counts of random blocks; of a prompt or a chunk of one, which has `ratio` key tiles to a query
    tile, the end of the diagonal and random tiles below it.
    """
    generator = torch.Generator(device).manual_seed(seed)
    keep = torch.rand(shape, generator=generator, device=device) < share
    if ratio is not None:
        rows, columns = shape[-2:]
        last = columns - 1 - ratio * torch.arange(rows - 1, -1, -1, device=device)[:, None]
        column = torch.arange(columns, device=device)
        keep = (keep | (column == last)) & (column <= last)
    order = torch.sort(keep.to(torch.int8), dim=-1, descending=True, stable=True).indices
    return order.to(torch.int32), keep.sum(-1, dtype=torch.int32)
