"""
Triton kernels for a causal prompt: weigh the tiles of s, and s·V from some or all of them.

Scores are divided into tiles of ROWS query positions and COLUMNS key positions (ROWS a multiple of COLUMNS). With the
logarithms of the softmax's denominators at hand, which every fused attention can return, a tile of s is
2^(scores - denominator): no maximum runs along, no tile waits for another.

Only tiles on and below the diagonal exist. They are stored one after the other, query tile by query tile: those of
query tile i begin at i (i + 1) / 2 · ROWS / COLUMNS.
"""

from __future__ import annotations

import triton
import triton.language as tl

_LARGEST_FP8 = tl.constexpr(448.0)


@triton.jit
def _place(tiles, HEADS: tl.constexpr):
    """Query tile, sequence and head of this program; the longest rows of tiles first."""
    program = tl.program_id(0)
    pair = program // tiles
    return tiles - 1 - program % tiles, pair, pair // HEADS, pair % HEADS


@triton.jit
def _load(
    states, batch_stride, head_stride, row_stride, batch, head, block, length,
    HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """One block of queries, keys or values, zero past the end: by the copy engine, or through a pointer."""
    if TMA:
        tile = states.load([batch, head, block * BLOCK, 0]).reshape(BLOCK, HEAD_DIM)
    else:
        position = block * BLOCK + tl.arange(0, BLOCK)
        column = tl.arange(0, HEAD_DIM)
        states += batch.to(tl.int64) * batch_stride + head.to(tl.int64) * head_stride
        tile = tl.load(
            states + position[:, None].to(tl.int64) * row_stride + column[None, :],
            mask=(position < length)[:, None], other=0.0,
        )  # fmt: skip
    return tile


@triton.jit
def _probabilities(
    query, key, denominator, scale, tile, other, ROWS: tl.constexpr, COLUMNS: tl.constexpr, MASKED: tl.constexpr
):
    """One tile of s."""
    probabilities = tl.exp2(tl.dot(query, tl.trans(key)) * scale - denominator[:, None])
    if MASKED:
        row = tile * ROWS + tl.arange(0, ROWS)
        column = other * COLUMNS + tl.arange(0, COLUMNS)
        probabilities = tl.where(column[None, :] <= row[:, None], probabilities, 0.0)
    return probabilities


@triton.jit
def _denominator(denominator_ptr, pair, tile, length, ROWS: tl.constexpr):
    """In base 2; infinite past the end, where probabilities are zero."""
    row = tile * ROWS + tl.arange(0, ROWS)
    natural = tl.load(denominator_ptr + pair.to(tl.int64) * length + row, mask=row < length, other=float("inf"))
    return natural * 1.4426950408889634


@triton.jit
def _keep(
    probabilities, weights, scales_ptr, index, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STORE: tl.constexpr,
    TMA: tl.constexpr,
):  # fmt: skip
    """Store a tile of s in 16 bits (STORE 1), or in fp8 with one scale a row (STORE 2)."""
    here = tl.arange(0, ROWS)
    if STORE == 2:
        top = tl.max(probabilities, 1)
        tl.store(scales_ptr + index * ROWS + here, top / _LARGEST_FP8)
        probabilities *= tl.where(top > 0.0, _LARGEST_FP8 / top, 0.0)[:, None]
    if TMA:
        weights.store([(index * ROWS).to(tl.int32), 0], probabilities.to(weights.dtype))
    else:
        pointer = weights + index * ROWS * COLUMNS + here[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
        tl.store(pointer, probabilities.to(weights.dtype.element_ty))


@triton.jit
def _attend(
    query, key, value, maximum, total, accumulator, masses_ptr, scale, tile, other,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One tile of an online softmax; the logarithm of the tile's mass before normalisation is written per row."""
    scores = tl.dot(query, tl.trans(key)) * scale
    if MASKED:
        row = tile * ROWS + tl.arange(0, ROWS)
        column = other * COLUMNS + tl.arange(0, COLUMNS)
        scores = tl.where(column[None, :] <= row[:, None], scores, float("-inf"))
    highest = tl.maximum(maximum, tl.max(scores, 1))
    weights = tl.exp2(scores - highest[:, None])
    decay = tl.exp2(maximum - highest)
    sums = tl.sum(weights, 1)
    tl.store(masses_ptr + other * ROWS + tl.arange(0, ROWS), highest + tl.log2(sums))
    accumulator = tl.dot(weights.to(value.dtype), value, accumulator * decay[:, None])
    return highest, total * decay + sums, accumulator


@triton.jit(do_not_specialize=["length", "tiles"])
def lead(
    query, key, value, output_ptr, denominator_ptr, masses_ptr,
    query_batch, query_head, query_row, key_batch, key_head, key_row, value_batch, value_head, value_row,
    length, tiles, scale,
    HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    TMA: tl.constexpr,
):  # fmt: skip
    """Attention of one query tile, its denominators, and the logarithms (base 2) of the masses of its tiles."""
    RATIO: tl.constexpr = ROWS // COLUMNS
    tile, pair, batch, head = _place(tiles, HEADS)
    query = _load(query, query_batch, query_head, query_row, batch, head, tile, length, HEAD_DIM, ROWS, TMA)
    masses_ptr += (pair.to(tl.int64) * (tiles * (tiles + 1) // 2) + tile * (tile + 1) // 2) * RATIO * ROWS
    maximum = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    accumulator = tl.zeros([ROWS, HEAD_DIM], tl.float32)
    for other in range(0, tile * RATIO):
        block = _load(key, key_batch, key_head, key_row, batch, head // GROUP, other, length, HEAD_DIM, COLUMNS, TMA)
        states = _load(
            value, value_batch, value_head, value_row, batch, head // GROUP, other, length, HEAD_DIM, COLUMNS, TMA
        )
        maximum, total, accumulator = _attend(
            query, block, states, maximum, total, accumulator, masses_ptr, scale, tile, other, ROWS, COLUMNS, False
        )
    for other in range(tile * RATIO, (tile + 1) * RATIO):
        block = _load(key, key_batch, key_head, key_row, batch, head // GROUP, other, length, HEAD_DIM, COLUMNS, TMA)
        states = _load(
            value, value_batch, value_head, value_row, batch, head // GROUP, other, length, HEAD_DIM, COLUMNS, TMA
        )
        maximum, total, accumulator = _attend(
            query, block, states, maximum, total, accumulator, masses_ptr, scale, tile, other, ROWS, COLUMNS, True
        )
    row = tile * ROWS + tl.arange(0, ROWS)
    natural = (maximum + tl.log2(total)) * 0.6931471805599453
    tl.store(denominator_ptr + pair.to(tl.int64) * length + row, natural, mask=row < length)
    _write(output_ptr, accumulator / total[:, None], batch, head, tile, length, HEADS, HEAD_DIM, ROWS)


@triton.jit(do_not_specialize=["length", "tiles"])
def heaviest(
    masses_ptr, denominator_ptr, maxima_ptr, length, tiles,
    HEADS: tl.constexpr, ROWS: tl.constexpr, RATIO: tl.constexpr,
):  # fmt: skip
    """Mass of each tile of one query tile in its heaviest row, from what `lead` has written."""
    tile, pair, _, _ = _place(tiles, HEADS)
    denominator = _denominator(denominator_ptr, pair, tile, length, ROWS)
    masses_ptr += (pair.to(tl.int64) * (tiles * (tiles + 1) // 2) + tile * (tile + 1) // 2) * RATIO * ROWS
    maxima_ptr += (pair.to(tl.int64) * tiles + tile) * tiles * RATIO
    for other in range(0, (tile + 1) * RATIO):
        mass = tl.exp2(tl.load(masses_ptr + other * ROWS + tl.arange(0, ROWS)) - denominator)
        tl.store(maxima_ptr + other, tl.max(mass, 0))


@triton.jit(do_not_specialize=["length", "tiles"])
def weigh(
    query, key, denominator_ptr, weights, scales_ptr, maxima_ptr,
    query_batch, query_head, query_row, key_batch, key_head, key_row, length, tiles, scale,
    HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    STORE: tl.constexpr, MASS: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """The tiles of s for one query tile: stored (STORE), and how much the heaviest row of each holds (MASS)."""
    RATIO: tl.constexpr = ROWS // COLUMNS
    tile, pair, batch, head = _place(tiles, HEADS)
    query = _load(query, query_batch, query_head, query_row, batch, head, tile, length, HEAD_DIM, ROWS, TMA)
    denominator = _denominator(denominator_ptr, pair, tile, length, ROWS)
    first = (pair.to(tl.int64) * (tiles * (tiles + 1) // 2) + tile * (tile + 1) // 2) * RATIO
    maxima_ptr += (pair.to(tl.int64) * tiles + tile) * tiles * RATIO
    for other in range(0, tile * RATIO):
        block = _load(key, key_batch, key_head, key_row, batch, head // GROUP, other, length, HEAD_DIM, COLUMNS, TMA)
        probabilities = _probabilities(query, block, denominator, scale, tile, other, ROWS, COLUMNS, False)
        if MASS:
            tl.store(maxima_ptr + other, tl.max(tl.sum(probabilities, 1), 0))
        if STORE:
            _keep(probabilities, weights, scales_ptr, first + other, ROWS, COLUMNS, STORE, TMA)
    for other in range(tile * RATIO, (tile + 1) * RATIO):
        block = _load(key, key_batch, key_head, key_row, batch, head // GROUP, other, length, HEAD_DIM, COLUMNS, TMA)
        probabilities = _probabilities(query, block, denominator, scale, tile, other, ROWS, COLUMNS, True)
        if MASS:
            tl.store(maxima_ptr + other, tl.max(tl.sum(probabilities, 1), 0))
        if STORE:
            _keep(probabilities, weights, scales_ptr, first + other, ROWS, COLUMNS, STORE, TMA)


@triton.jit
def _listed(kept_ptr, index, KEPT: tl.constexpr):
    other = index
    if KEPT:
        other = tl.load(kept_ptr + index)
    return other


@triton.jit
def _write(
    output_ptr, accumulator, batch, head, tile, length,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """To (batch, length, heads, head_dim)."""
    row = tile * ROWS + tl.arange(0, ROWS)
    line = (batch.to(tl.int64) * length + row) * HEADS + head
    tl.store(
        output_ptr + line[:, None] * HEAD_DIM + tl.arange(0, HEAD_DIM)[None, :],
        accumulator.to(output_ptr.dtype.element_ty), mask=(row < length)[:, None],
    )  # fmt: skip


@triton.jit(do_not_specialize=["length", "tiles"])
def recompute(
    query, key, value, denominator_ptr, output_ptr, kept_ptr, count_ptr,
    query_batch, query_head, query_row, key_batch, key_head, key_row, value_batch, value_head, value_row,
    length, tiles, scale,
    HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    KEPT: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """s·V of one query tile from the leader's queries and keys, of the listed tiles (KEPT) or of all."""
    RATIO: tl.constexpr = ROWS // COLUMNS
    tile, pair, batch, head = _place(tiles, HEADS)
    query = _load(query, query_batch, query_head, query_row, batch, head, tile, length, HEAD_DIM, ROWS, TMA)
    denominator = _denominator(denominator_ptr, pair, tile, length, ROWS)
    place = pair.to(tl.int64) * tiles + tile
    kept_ptr += place * tiles * RATIO
    count = (tile + 1) * RATIO
    if KEPT:
        count = tl.load(count_ptr + place)
    # The list is in order, so that only its last entries can touch the diagonal.
    free = tl.maximum(count - RATIO, 0)
    accumulator = tl.zeros([ROWS, HEAD_DIM], tl.float32)
    for index in range(0, free):
        other = _listed(kept_ptr, index, KEPT)
        block = _load(key, key_batch, key_head, key_row, batch, head // GROUP, other, length, HEAD_DIM, COLUMNS, TMA)
        probabilities = _probabilities(query, block, denominator, scale, tile, other, ROWS, COLUMNS, False)
        states = _load(
            value, value_batch, value_head, value_row, batch, head // GROUP, other, length, HEAD_DIM, COLUMNS, TMA
        )
        accumulator = tl.dot(probabilities.to(states.dtype), states, accumulator)
    for index in range(free, count):
        other = _listed(kept_ptr, index, KEPT)
        block = _load(key, key_batch, key_head, key_row, batch, head // GROUP, other, length, HEAD_DIM, COLUMNS, TMA)
        probabilities = _probabilities(query, block, denominator, scale, tile, other, ROWS, COLUMNS, True)
        states = _load(
            value, value_batch, value_head, value_row, batch, head // GROUP, other, length, HEAD_DIM, COLUMNS, TMA
        )
        accumulator = tl.dot(probabilities.to(states.dtype), states, accumulator)
    _write(output_ptr, accumulator, batch, head, tile, length, HEADS, HEAD_DIM, ROWS)


@triton.jit(do_not_specialize=["length", "tiles"])
def stream(
    weights, scales_ptr, value, output_ptr, kept_ptr, count_ptr, value_batch, value_head, value_row, length, tiles,
    HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    SCALED: tl.constexpr, KEPT: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """s·V of one query tile from stored tiles, of the listed ones (KEPT) or of all."""
    RATIO: tl.constexpr = ROWS // COLUMNS
    tile, pair, batch, head = _place(tiles, HEADS)
    first = (pair.to(tl.int64) * (tiles * (tiles + 1) // 2) + tile * (tile + 1) // 2) * RATIO
    place = pair.to(tl.int64) * tiles + tile
    kept_ptr += place * tiles * RATIO
    count = (tile + 1) * RATIO
    if KEPT:
        count = tl.load(count_ptr + place)
    here = tl.arange(0, ROWS)
    accumulator = tl.zeros([ROWS, HEAD_DIM], tl.float32)
    for index in range(0, count):
        other = _listed(kept_ptr, index, KEPT)
        line = (first + other) * ROWS
        if TMA:
            tile_of_s = weights.load([line.to(tl.int32), 0])
        else:
            tile_of_s = tl.load(weights + (line + here)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :])
        states = _load(
            value, value_batch, value_head, value_row, batch, head // GROUP, other, length, HEAD_DIM, COLUMNS, TMA
        )
        if SCALED:
            scale = tl.load(scales_ptr + line + here)
            accumulator += tl.dot(tile_of_s.to(states.dtype), states) * scale[:, None]
        else:
            accumulator = tl.dot(tile_of_s, states, accumulator)
    _write(output_ptr, accumulator, batch, head, tile, length, HEADS, HEAD_DIM, ROWS)
