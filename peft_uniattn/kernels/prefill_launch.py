"""
How the prefill kernels are launched.

Keys and values may be more than queries: these are the last positions then, a chunk of a prompt. Keys that no query is
to see, such as the empty end of a static cache, have to be cut off before.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from . import prefill_triton as kernels
from .decode_launch import _copy_engine, _on_its_device, _states

_LOG2_E = 1.4426950408889634

# Bytes that a leader may take for the masses of its tiles, one number a row and tile, while it weighs them: 8.6 GB for
# 32 heads at 128k tokens. What needs more is computed a few query tiles at a time. For 32k tokens this is enough.
MASSES_BUDGET = 2**30
# Of the copy engine, by which stored tiles are fetched: at 128k tokens those of 32 heads have more rows.
_LARGEST_COORDINATE = 2**31 - 1


class Tuning(NamedTuple):
    """
    Attributes:
        rows, columns: query and key positions of a tile, rows a multiple of columns.
        warps, stages: of Triton.
    """

    rows: int
    columns: int
    warps: int
    stages: int


# By head_dim; all four have to have the same rows and the same columns, since the kernels exchange tiles. With 256 a
# tile of 128 columns would need more than an H100's 227 KiB of shared memory: 64 for the queries, and twice 64 + 64.
WEIGH = {
    16: Tuning(64, 64, 4, 2),
    64: Tuning(128, 128, 8, 3),
    128: Tuning(128, 128, 8, 2),
    256: Tuning(128, 64, 8, 2),
}
LEAD = {**WEIGH, 128: Tuning(128, 128, 8, 3)}
RECOMPUTE = WEIGH
STREAM = {**WEIGH, 128: Tuning(128, 128, 8, 3)}
# Of tiles in 16 bits, whose rows and columns have to be the same in both. At 8k narrow ones are stored in 0.96 instead
# of 1.56 ms, and at 32k they are streamed as fast as wide ones.
STORE = {**WEIGH, 128: Tuning(128, 64, 8, 3)}
STREAM_STORED = {**WEIGH, 128: Tuning(128, 64, 8, 4)}


@_on_its_device
def weigh(query, key, denominator, scaling, store=None, mass=True, tuning=None, by_pointers=False):
    """
    Tiles of s in the type `store` (None: not stored), their scales if that is an 8-bit type, and the mass of each tile
    in its heaviest row, (batch, query heads, query tiles, key tiles).

    The copy engine fetches and stores where it can; with `by_pointers` it does not store.
    """
    batch, heads, length, head_dim = query.shape
    tuning = tuning or WEIGH[head_dim]
    offset, tiles, width = _grid(query, key, tuning)
    stored = 0 if store is None else batch * heads * tiles_of(tiles, offset, tuning)
    weights = torch.empty(stored * tuning.rows, tuning.columns, dtype=store or query.dtype, device=query.device)
    scaled = store is not None and store.itemsize == 1
    scales = torch.empty(stored * tuning.rows if scaled else 0, dtype=torch.float32, device=query.device)
    many = batch, heads, tiles, width if mass else 0
    maxima = torch.zeros(many, dtype=torch.float32, device=query.device)
    tma = _copy_engine(query, key) and len(weights) <= _LARGEST_COORDINATE
    store_tma = tma and stored > 0 and not by_pointers
    kernels.weigh[(tiles * batch * heads,)](
        _states(query, tuning.rows, tma), _states(key, tuning.columns, tma), denominator,
        _tiles(weights, tuning, store_tma), scales, maxima, *query.stride()[:3], *key.stride()[:3],
        length, offset, tiles, width, scaling * _LOG2_E,
        HEADS=heads, GROUP=heads // key.shape[1], HEAD_DIM=head_dim, **_shape(offset, tuning),
        STORE=(2 if scaled else 1) if stored else 0, MASS=mass, TMA=tma, STORE_TMA=store_tma,
        num_warps=tuning.warps, num_stages=tuning.stages,
    )  # fmt: skip
    return weights, scales, maxima


@_on_its_device
def lead(query, key, value, scaling, tuning=None, budget=None):
    """
    Causal attention (batch, length, query heads, head_dim), natural logarithms of its denominators (batch, query
    heads, length), and the mass of each tile in its heaviest row, as [`weigh`] returns it, in one pass.

    Beside these it takes no more than `budget` bytes (default: MASSES_BUDGET), or what one query tile needs.
    """
    batch, heads, length, head_dim = query.shape
    tuning = tuning or LEAD[head_dim]
    (offset, tiles, width), pairs = _grid(query, key, tuning), batch * heads
    at_once = min(tiles, max(1, (budget or MASSES_BUDGET) // (pairs * width * tuning.rows * 4)))
    tma = _copy_engine(query, key, value)
    output = query.new_empty(batch, length, heads, head_dim)
    denominator = query.new_empty(batch, heads, length, dtype=torch.float32)
    maxima = torch.zeros(batch, heads, tiles, width, dtype=torch.float32, device=query.device)
    # The last query tiles see most: memory that is enough for them is enough for those before.
    needed = tiles_of(tiles, offset, tuning) - tiles_of(tiles - at_once, offset, tuning)
    masses = query.new_empty(pairs * needed * tuning.rows, dtype=torch.float32)
    states = (
        _states(query, tuning.rows, tma), _states(key, tuning.columns, tma), _states(value, tuning.columns, tma)
    )  # fmt: skip
    for first in range(0, tiles, at_once):
        many = min(at_once, tiles - first)
        part = length, offset, first, many
        kernels.lead[(many * pairs,)](
            *states, output, denominator, masses, *query.stride()[:3], *key.stride()[:3], *value.stride()[:3],
            *part, scaling * _LOG2_E,
            HEADS=heads, GROUP=heads // key.shape[1], HEAD_DIM=head_dim, **_shape(offset, tuning),
            TMA=tma, num_warps=tuning.warps, num_stages=tuning.stages,
        )  # fmt: skip
        kernels.heaviest[(many * pairs,)](
            masses, denominator, maxima, *part, width, HEADS=heads, **_shape(offset, tuning)
        )
    return output, denominator, maxima


def attend(query, key, value, scaling):
    """
    Causal attention of a whole prompt (batch, length, query heads, head_dim), and natural logarithms of its
    denominators (batch, query heads, length): by cuDNN where it can, else by `lead`.
    """
    if query.is_cuda:
        try:
            output, denominator, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
                query, key, value, None, True, 0.0, True, False, scale=scaling
            )
            return output.transpose(1, 2), denominator.reshape(query.shape[:3])
        except RuntimeError:
            pass
    return lead(query, key, value, scaling)[:2]


@_on_its_device
def recompute(query, key, value, denominator, scaling, kept=None, count=None, tuning=None):
    """s·V (batch, length, query heads, head_dim) from queries and keys, of the kept tiles or of all."""
    batch, heads, length, head_dim = query.shape
    tuning = tuning or RECOMPUTE[head_dim]
    (offset, tiles, width), tma = _grid(query, key, tuning), _copy_engine(query, key, value)
    output = value.new_empty(batch, length, heads, head_dim)
    kernels.recompute[(tiles * batch * heads,)](
        _states(query, tuning.rows, tma), _states(key, tuning.columns, tma), _states(value, tuning.columns, tma),
        denominator, output, output if kept is None else kept, output if count is None else count,
        *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], length, offset, tiles, width, scaling * _LOG2_E,
        HEADS=heads, GROUP=heads // key.shape[1], HEAD_DIM=head_dim, **_shape(offset, tuning),
        KEPT=kept is not None, TMA=tma, num_warps=tuning.warps, num_stages=tuning.stages,
    )  # fmt: skip
    return output


@_on_its_device
def stream(weights, scales, value, query, kept=None, count=None, tuning=None):
    """
    s·V (batch, length, query heads, head_dim) from stored tiles, of the kept ones or of all; of `query`, the
    leader's, only the shape counts.
    """
    (batch, heads, length, head_dim), kv_heads = query.shape, value.shape[1]
    tuning = tuning or STREAM[head_dim]
    offset, tiles, width = _grid(query, value, tuning)
    tma = _copy_engine(value) and len(weights) <= _LARGEST_COORDINATE
    output = value.new_empty(batch, length, heads, head_dim)
    kernels.stream[(tiles * batch * heads,)](
        _tiles(weights, tuning, tma), scales, _states(value, tuning.columns, tma), output,
        output if kept is None else kept, output if count is None else count, *value.stride()[:3],
        length, offset, tiles, width,
        HEADS=heads, GROUP=heads // kv_heads, HEAD_DIM=head_dim, **_shape(offset, tuning),
        SCALED=scales.numel() > 0, KEPT=kept is not None, TMA=tma,
        num_warps=tuning.warps, num_stages=tuning.stages,
    )  # fmt: skip
    return output


def tiles_of(tiles, offset, tuning):
    """Number of tiles on and below the diagonal of the first so many query tiles of one head, as `kernels._before`."""
    return tiles * triton.cdiv(offset, tuning.columns) + tiles * (tiles + 1) // 2 * (tuning.rows // tuning.columns)


def _grid(query, key, tuning):
    """Position of the first query, number of query tiles, and number of key tiles that the last of them sees."""
    length = query.shape[2]
    offset, tiles = key.shape[2] - length, triton.cdiv(length, tuning.rows)
    return offset, tiles, triton.cdiv(offset, tuning.columns) + tiles * (tuning.rows // tuning.columns)


def _shape(offset, tuning):
    """Of tiles, and how many of a query tile's the diagonal touches; few values, since each is a compilation."""
    edge = tuning.rows // tuning.columns + (offset % tuning.columns > 0)
    return {"ROWS": tuning.rows, "COLUMNS": tuning.columns, "EDGE": edge}


def _tiles(weights, tuning, tma):
    if not tma:
        return weights
    return TensorDescriptor(weights, list(weights.shape), [tuning.columns, 1], [tuning.rows, tuning.columns])
