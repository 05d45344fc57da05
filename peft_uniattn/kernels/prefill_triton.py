"""
Triton kernels for a causal prompt or a chunk of one: weigh the tiles of s, and s·V from some or all of them.

Scores are divided into tiles of ROWS queries and COLUMNS key positions (ROWS a multiple of COLUMNS). With the
logarithms of the softmax's denominators at hand, which every fused attention can return, a tile of s is
2^(scores - denominator): no maximum runs along, no tile waits for another.

`length` queries stand at the positions offset, offset + 1, ...; tiles count from the first query and from key
position 0, so that the diagonal may run through any place of a tile: it touches EDGE tiles of every query tile, those
behind the ones that its rows see as a whole (`_whole`). Only tiles on and below the diagonal exist, and the last of
them may lie behind the last key. They are stored one after the other, query tile by query tile (`_before`).
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
def _whole(tile, offset, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """How many key tiles all rows of a query tile see as a whole."""
    return (offset + tile * ROWS) // COLUMNS


@triton.jit
def _before(tile, offset, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """How many key tiles the query tiles before this one see together; `launch.tiles_of` counts alike."""
    return tile * tl.cdiv(offset, COLUMNS) + (tile * (tile + 1) // 2) * (ROWS // COLUMNS)


@triton.jit
def _visible(tile, other, offset, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row = offset + tile * ROWS + tl.arange(0, ROWS)
    column = other * COLUMNS + tl.arange(0, COLUMNS)
    return column[None, :] <= row[:, None]


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
    query, key, denominator, scale, tile, other, offset, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """One tile of s."""
    probabilities = tl.exp2(tl.dot(query, tl.trans(key)) * scale - denominator[:, None])
    if MASKED:
        probabilities = tl.where(_visible(tile, other, offset, ROWS, COLUMNS), probabilities, 0.0)
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
    query, key, value, maximum, total, accumulator, masses_ptr, scale, tile, other, offset,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One tile of an online softmax; the logarithm of the tile's mass before normalisation is written per row."""
    scores = tl.dot(query, tl.trans(key)) * scale
    if MASKED:
        scores = tl.where(_visible(tile, other, offset, ROWS, COLUMNS), scores, float("-inf"))
    highest = tl.maximum(maximum, tl.max(scores, 1))
    weights = tl.exp2(scores - highest[:, None])
    decay = tl.exp2(maximum - highest)
    sums = tl.sum(weights, 1)
    tl.store(masses_ptr + other * ROWS + tl.arange(0, ROWS), highest + tl.log2(sums))
    accumulator = tl.dot(weights.to(value.dtype), value, accumulator * decay[:, None])
    return highest, total * decay + sums, accumulator


@triton.jit(do_not_specialize=["length", "offset", "first", "tiles"])
def lead(
    query, key, value, output_ptr, denominator_ptr, masses_ptr,
    query_batch, query_head, query_row, key_batch, key_head, key_row, value_batch, value_head, value_row,
    length, offset, first, tiles, scale,
    HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    EDGE: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """
    Attention of one of the query tiles first ... first + tiles - 1, its denominators, and the logarithms (base 2) of
    the masses of its tiles.
    """
    tile, pair, batch, head = _place(tiles, HEADS)
    masses_ptr += _masses(pair, tile, offset, first, tiles, ROWS, COLUMNS)
    tile += first
    keys = offset + length
    query = _load(query, query_batch, query_head, query_row, batch, head, tile, length, HEAD_DIM, ROWS, TMA)
    maximum = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    accumulator = tl.zeros([ROWS, HEAD_DIM], tl.float32)
    whole = _whole(tile, offset, ROWS, COLUMNS)
    for other in range(0, whole):
        block = _load(key, key_batch, key_head, key_row, batch, head // GROUP, other, keys, HEAD_DIM, COLUMNS, TMA)
        states = _load(
            value, value_batch, value_head, value_row, batch, head // GROUP, other, keys, HEAD_DIM, COLUMNS, TMA
        )
        maximum, total, accumulator = _attend(
            query, block, states, maximum, total, accumulator, masses_ptr, scale, tile, other, offset,
            ROWS, COLUMNS, False,
        )  # fmt: skip
    for other in range(whole, whole + EDGE):
        block = _load(key, key_batch, key_head, key_row, batch, head // GROUP, other, keys, HEAD_DIM, COLUMNS, TMA)
        states = _load(
            value, value_batch, value_head, value_row, batch, head // GROUP, other, keys, HEAD_DIM, COLUMNS, TMA
        )
        maximum, total, accumulator = _attend(
            query, block, states, maximum, total, accumulator, masses_ptr, scale, tile, other, offset,
            ROWS, COLUMNS, True,
        )  # fmt: skip
    row = tile * ROWS + tl.arange(0, ROWS)
    natural = (maximum + tl.log2(total)) * 0.6931471805599453
    tl.store(denominator_ptr + pair.to(tl.int64) * length + row, natural, mask=row < length)
    _write(output_ptr, accumulator / total[:, None], batch, head, tile, length, HEADS, HEAD_DIM, ROWS)


@triton.jit
def _masses(pair, tile, offset, first, tiles, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Where the masses of the query tile first + tile begin, in memory for those of `tiles` query tiles."""
    start = _before(first, offset, ROWS, COLUMNS)
    many = _before(first + tiles, offset, ROWS, COLUMNS) - start
    return (pair.to(tl.int64) * many + _before(first + tile, offset, ROWS, COLUMNS) - start) * ROWS


@triton.jit(do_not_specialize=["length", "offset", "first", "tiles", "width"])
def heaviest(
    masses_ptr, denominator_ptr, maxima_ptr, length, offset, first, tiles, width,
    HEADS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """Mass of each tile of one query tile in its heaviest row, from what `lead` has written for the same ones."""
    tile, pair, _, _ = _place(tiles, HEADS)
    masses_ptr += _masses(pair, tile, offset, first, tiles, ROWS, COLUMNS)
    tile += first
    denominator = _denominator(denominator_ptr, pair, tile, length, ROWS)
    maxima_ptr += (pair.to(tl.int64) * tl.cdiv(length, ROWS) + tile) * width
    for other in range(0, _whole(tile, offset, ROWS, COLUMNS) + EDGE):
        mass = tl.exp2(tl.load(masses_ptr + other * ROWS + tl.arange(0, ROWS)) - denominator)
        tl.store(maxima_ptr + other, tl.max(mass, 0))


@triton.jit(do_not_specialize=["length", "offset", "tiles", "width"])
def weigh(
    query, key, denominator_ptr, weights, scales_ptr, maxima_ptr,
    query_batch, query_head, query_row, key_batch, key_head, key_row, length, offset, tiles, width, scale,
    HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    EDGE: tl.constexpr, STORE: tl.constexpr, MASS: tl.constexpr, TMA: tl.constexpr,
    STORE_TMA: tl.constexpr,
):  # fmt: skip
    """The tiles of s for one query tile: stored (STORE), and how much the heaviest row of each holds (MASS)."""
    tile, pair, batch, head = _place(tiles, HEADS)
    keys = offset + length
    query = _load(query, query_batch, query_head, query_row, batch, head, tile, length, HEAD_DIM, ROWS, TMA)
    denominator = _denominator(denominator_ptr, pair, tile, length, ROWS)
    begin = pair.to(tl.int64) * _before(tiles, offset, ROWS, COLUMNS) + _before(tile, offset, ROWS, COLUMNS)
    maxima_ptr += (pair.to(tl.int64) * tiles + tile) * width
    whole = _whole(tile, offset, ROWS, COLUMNS)
    for other in range(0, whole):
        block = _load(key, key_batch, key_head, key_row, batch, head // GROUP, other, keys, HEAD_DIM, COLUMNS, TMA)
        probabilities = _probabilities(query, block, denominator, scale, tile, other, offset, ROWS, COLUMNS, False)
        if MASS:
            tl.store(maxima_ptr + other, tl.max(tl.sum(probabilities, 1), 0))
        if STORE:
            _keep(probabilities, weights, scales_ptr, begin + other, ROWS, COLUMNS, STORE, STORE_TMA)
    for other in range(whole, whole + EDGE):
        block = _load(key, key_batch, key_head, key_row, batch, head // GROUP, other, keys, HEAD_DIM, COLUMNS, TMA)
        probabilities = _probabilities(query, block, denominator, scale, tile, other, offset, ROWS, COLUMNS, True)
        if MASS:
            tl.store(maxima_ptr + other, tl.max(tl.sum(probabilities, 1), 0))
        if STORE:
            _keep(probabilities, weights, scales_ptr, begin + other, ROWS, COLUMNS, STORE, STORE_TMA)


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


@triton.jit(do_not_specialize=["length", "offset", "tiles", "width"])
def recompute(
    query, key, value, denominator_ptr, output_ptr, kept_ptr, count_ptr,
    query_batch, query_head, query_row, key_batch, key_head, key_row, value_batch, value_head, value_row,
    length, offset, tiles, width, scale,
    HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    EDGE: tl.constexpr, KEPT: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """s·V of one query tile from the leader's queries and keys, of the listed tiles (KEPT) or of all."""
    tile, pair, batch, head = _place(tiles, HEADS)
    keys = offset + length
    query = _load(query, query_batch, query_head, query_row, batch, head, tile, length, HEAD_DIM, ROWS, TMA)
    denominator = _denominator(denominator_ptr, pair, tile, length, ROWS)
    place = pair.to(tl.int64) * tiles + tile
    kept_ptr += place * width
    count = _whole(tile, offset, ROWS, COLUMNS) + EDGE
    if KEPT:
        count = tl.load(count_ptr + place)
    # The list is in order, so that only its last entries can touch the diagonal.
    free = tl.maximum(count - EDGE, 0)
    accumulator = tl.zeros([ROWS, HEAD_DIM], tl.float32)
    for index in range(0, free):
        other = _listed(kept_ptr, index, KEPT)
        block = _load(key, key_batch, key_head, key_row, batch, head // GROUP, other, keys, HEAD_DIM, COLUMNS, TMA)
        probabilities = _probabilities(query, block, denominator, scale, tile, other, offset, ROWS, COLUMNS, False)
        states = _load(
            value, value_batch, value_head, value_row, batch, head // GROUP, other, keys, HEAD_DIM, COLUMNS, TMA
        )
        accumulator = tl.dot(probabilities.to(states.dtype), states, accumulator)
    for index in range(free, count):
        other = _listed(kept_ptr, index, KEPT)
        block = _load(key, key_batch, key_head, key_row, batch, head // GROUP, other, keys, HEAD_DIM, COLUMNS, TMA)
        probabilities = _probabilities(query, block, denominator, scale, tile, other, offset, ROWS, COLUMNS, True)
        states = _load(
            value, value_batch, value_head, value_row, batch, head // GROUP, other, keys, HEAD_DIM, COLUMNS, TMA
        )
        accumulator = tl.dot(probabilities.to(states.dtype), states, accumulator)
    _write(output_ptr, accumulator, batch, head, tile, length, HEADS, HEAD_DIM, ROWS)


@triton.jit(do_not_specialize=["length", "offset", "tiles", "width"])
def stream(
    weights, scales_ptr, value, output_ptr, kept_ptr, count_ptr, value_batch, value_head, value_row,
    length, offset, tiles, width,
    HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    EDGE: tl.constexpr, SCALED: tl.constexpr, KEPT: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """s·V of one query tile from stored tiles, of the listed ones (KEPT) or of all."""
    tile, pair, batch, head = _place(tiles, HEADS)
    keys = offset + length
    begin = pair.to(tl.int64) * _before(tiles, offset, ROWS, COLUMNS) + _before(tile, offset, ROWS, COLUMNS)
    place = pair.to(tl.int64) * tiles + tile
    kept_ptr += place * width
    count = _whole(tile, offset, ROWS, COLUMNS) + EDGE
    if KEPT:
        count = tl.load(count_ptr + place)
    here = tl.arange(0, ROWS)
    accumulator = tl.zeros([ROWS, HEAD_DIM], tl.float32)
    for index in range(0, count):
        other = _listed(kept_ptr, index, KEPT)
        line = (begin + other) * ROWS
        if TMA:
            tile_of_s = weights.load([line.to(tl.int32), 0])
        else:
            tile_of_s = tl.load(weights + (line + here)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :])
        states = _load(
            value, value_batch, value_head, value_row, batch, head // GROUP, other, keys, HEAD_DIM, COLUMNS, TMA
        )
        if SCALED:
            scale = tl.load(scales_ptr + line + here)
            accumulator += tl.dot(tile_of_s.to(states.dtype), states) * scale[:, None]
        else:
            accumulator = tl.dot(tile_of_s, states, accumulator)
    _write(output_ptr, accumulator, batch, head, tile, length, HEADS, HEAD_DIM, ROWS)
