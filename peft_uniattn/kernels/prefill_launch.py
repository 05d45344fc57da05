"""How the prefill kernels are launched."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from . import prefill_triton as kernels
from .decode_launch import _copy_engine, _on_its_device, _states

_LOG2_E = 1.4426950408889634


class Tuning(NamedTuple):
    """
    Attributes:
        rows, columns: query and key positions of a tile.
        warps, stages: of Triton.
    """

    rows: int
    columns: int
    warps: int
    stages: int


# By head_dim; rows and columns have to be alike, since the kernels exchange tiles.
WEIGH = {16: Tuning(64, 64, 4, 2), 64: Tuning(128, 128, 8, 3), 128: Tuning(128, 128, 8, 2)}
LEAD = {16: Tuning(64, 64, 4, 2), 64: Tuning(128, 128, 8, 3), 128: Tuning(128, 128, 8, 3)}
RECOMPUTE = {16: Tuning(64, 64, 4, 2), 64: Tuning(128, 128, 8, 3), 128: Tuning(128, 128, 8, 2)}
STREAM = {16: Tuning(64, 64, 4, 2), 64: Tuning(128, 128, 8, 3), 128: Tuning(128, 128, 8, 3)}


@_on_its_device
def weigh(query, key, denominator, scaling, store=None, mass=True, tuning=None):
    """
    Tiles of s in the type `store` (None: not stored), their scales if that is an 8-bit type, and the mass of each tile
    in its heaviest row, (batch, query heads, query tiles, key tiles).
    """
    batch, heads, length, head_dim = query.shape
    tuning = tuning or WEIGH[head_dim]
    tiles, pairs = triton.cdiv(length, tuning.rows), batch * heads
    stored = 0 if store is None else tiles_of(pairs, length, tuning)
    weights = torch.empty(stored * tuning.rows, tuning.columns, dtype=store or query.dtype, device=query.device)
    scaled = store is not None and store.itemsize == 1
    scales = torch.empty(stored * tuning.rows if scaled else 0, dtype=torch.float32, device=query.device)
    many = batch, heads, tiles, tiles * (tuning.rows // tuning.columns) if mass else 0
    maxima = torch.zeros(many, dtype=torch.float32, device=query.device)
    tma = _copy_engine(query, key)
    kernels.weigh[(tiles * pairs,)](
        _states(query, tuning.rows, tma), _states(key, tuning.columns, tma), denominator,
        _tiles(weights, tuning, tma and stored > 0), scales, maxima, *query.stride()[:3], *key.stride()[:3],
        length, tiles, scaling * _LOG2_E,
        HEADS=heads, GROUP=heads // key.shape[1], HEAD_DIM=head_dim, ROWS=tuning.rows, COLUMNS=tuning.columns,
        STORE=(2 if scaled else 1) if stored else 0, MASS=mass, TMA=tma,
        num_warps=tuning.warps, num_stages=tuning.stages,
    )  # fmt: skip
    return weights, scales, maxima


@_on_its_device
def lead(query, key, value, scaling, tuning=None):
    """
    Causal attention (batch, length, query heads, head_dim), natural logarithms of its denominators (batch, query
    heads, length), and the mass of each tile in its heaviest row, as [`weigh`] returns it, in one pass.
    """
    batch, heads, length, head_dim = query.shape
    tuning = tuning or LEAD[head_dim]
    tiles, pairs, ratio = triton.cdiv(length, tuning.rows), batch * heads, tuning.rows // tuning.columns
    tma = _copy_engine(query, key, value)
    output = query.new_empty(batch, length, heads, head_dim)
    denominator = query.new_empty(batch, heads, length, dtype=torch.float32)
    masses = query.new_empty(tiles_of(pairs, length, tuning) * tuning.rows, dtype=torch.float32)
    maxima = torch.zeros(batch, heads, tiles, tiles * ratio, dtype=torch.float32, device=query.device)
    kernels.lead[(tiles * pairs,)](
        _states(query, tuning.rows, tma), _states(key, tuning.columns, tma), _states(value, tuning.columns, tma),
        output, denominator, masses, *query.stride()[:3], *key.stride()[:3], *value.stride()[:3],
        length, tiles, scaling * _LOG2_E,
        HEADS=heads, GROUP=heads // key.shape[1], HEAD_DIM=head_dim, ROWS=tuning.rows, COLUMNS=tuning.columns,
        TMA=tma, num_warps=tuning.warps, num_stages=tuning.stages,
    )  # fmt: skip
    kernels.heaviest[(tiles * pairs,)](
        masses, denominator, maxima, length, tiles, HEADS=heads, ROWS=tuning.rows, RATIO=ratio
    )
    return output, denominator, maxima


@_on_its_device
def recompute(query, key, value, denominator, scaling, kept=None, count=None, tuning=None):
    """s·V (batch, length, query heads, head_dim) from queries and keys, of the kept tiles or of all."""
    batch, heads, length, head_dim = query.shape
    tuning = tuning or RECOMPUTE[head_dim]
    tiles, tma = triton.cdiv(length, tuning.rows), _copy_engine(query, key, value)
    output = value.new_empty(batch, length, heads, head_dim)
    kernels.recompute[(tiles * batch * heads,)](
        _states(query, tuning.rows, tma), _states(key, tuning.columns, tma), _states(value, tuning.columns, tma),
        denominator, output, output if kept is None else kept, output if count is None else count,
        *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], length, tiles, scaling * _LOG2_E,
        HEADS=heads, GROUP=heads // key.shape[1], HEAD_DIM=head_dim, ROWS=tuning.rows, COLUMNS=tuning.columns,
        KEPT=kept is not None, TMA=tma, num_warps=tuning.warps, num_stages=tuning.stages,
    )  # fmt: skip
    return output


@_on_its_device
def stream(weights, scales, value, heads, kept=None, count=None, tuning=None):
    """s·V (batch, length, query heads, head_dim) from stored tiles, of the kept ones or of all."""
    batch, kv_heads, length, head_dim = value.shape
    tuning = tuning or STREAM[head_dim]
    tiles, tma = triton.cdiv(length, tuning.rows), _copy_engine(value)
    output = value.new_empty(batch, length, heads, head_dim)
    kernels.stream[(tiles * batch * heads,)](
        _tiles(weights, tuning, tma), scales, _states(value, tuning.columns, tma), output,
        output if kept is None else kept, output if count is None else count, *value.stride()[:3], length, tiles,
        HEADS=heads, GROUP=heads // kv_heads, HEAD_DIM=head_dim, ROWS=tuning.rows, COLUMNS=tuning.columns,
        SCALED=scales.numel() > 0, KEPT=kept is not None, TMA=tma,
        num_warps=tuning.warps, num_stages=tuning.stages,
    )  # fmt: skip
    return output


def tiles_of(pairs, length, tuning):
    """Number of tiles on and below the diagonal of so many heads."""
    tiles = triton.cdiv(length, tuning.rows)
    return pairs * (tiles * (tiles + 1) // 2) * (tuning.rows // tuning.columns)


def _tiles(weights, tuning, tma):
    if not tma:
        return weights
    return TensorDescriptor(weights, list(weights.shape), [tuning.columns, 1], [tuning.rows, tuning.columns])
