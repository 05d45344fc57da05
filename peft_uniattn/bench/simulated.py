"""Skipping at a given share of tiles, for random weights, whose attention is nothing like a real model's."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def kept_share(share: float, seed: int = 0) -> Iterator[None]:
    """
    Let followers keep this share of the visible tiles or blocks, drawn at random, whatever they weigh.

    Weighing and selecting run as always, so that times are those of a model whose attention is as concentrated.
    Results mean nothing.
    """
    from ..kernels import decode_launch

    select = decode_launch.select

    def draw(sums: torch.Tensor, factors: torch.Tensor | None, bound: float):
        _, _, dropped = select(sums, factors, bound)
        drawn = _draw(sums.shape[:-1], share, factors is None, sums.device, seed)
        # A copy each time: compiled code reuses the memory of what an operator returned.
        return *(part.clone() for part in drawn), dropped

    decode_launch.select = draw
    try:
        yield
    finally:
        decode_launch.select = select


@functools.lru_cache(maxsize=8)
def _draw(shape: torch.Size, share: float, causal: bool, device: torch.device, seed: int):
    """Kept indices and counts of random blocks; of a prompt, the diagonal and random tiles below it."""
    generator = torch.Generator(device).manual_seed(seed)
    keep = torch.rand(shape, generator=generator, device=device) < share
    if causal:
        rows, columns = shape[-2:]
        row = torch.arange(rows, device=device)[:, None] * (columns // rows) + columns // rows - 1
        column = torch.arange(columns, device=device)
        keep = (keep | (column == row)) & (column <= row)
    order = torch.sort(keep.to(torch.int8), dim=-1, descending=True, stable=True).indices
    return order.to(torch.int32), keep.sum(-1, dtype=torch.int32)
