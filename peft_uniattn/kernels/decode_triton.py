"""
Triton kernels for one decoded token: flash-decoding that also hands over s, and s·V.

The key/value positions of one sequence and key/value head (a "pair") are divided into blocks of BLOCK positions and
the visible blocks evenly into `splits` programs, so that a mostly empty static cache keeps the GPU as busy as a full
one. All query heads of a key/value head (GROUP) are one tile: keys and values are read once. Scores are in base 2.

s is handed over as it falls out of the online softmax: `weights` = 2^(score - reference), rounded once, with one
reference per row and block (the running maximum at that block); `factors` = 2^(reference - maximum) / sum turn them
into probabilities. A second pass over s would read and write it again, only to round it twice. Both are stored block
by block, (pairs, blocks, GROUP, BLOCK) and (pairs, blocks, GROUP), so that a program writes and reads one stream.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _visible(span_ptr, span_batch, batch, length, SPAN_PARTS: tl.constexpr, SPAN_PADDED: tl.constexpr):
    """First visible position of a sequence and one past the last; (0, length) without a span."""
    start = 0
    stop = length
    if SPAN_PARTS > 0:
        part = tl.arange(0, SPAN_PADDED)
        inside = part < SPAN_PARTS
        start = tl.min(tl.load(span_ptr + batch * span_batch + part * 2, mask=inside, other=2147483647))
        stop = tl.max(tl.load(span_ptr + batch * span_batch + part * 2 + 1, mask=inside, other=0))
        start = tl.maximum(start, 0)
        stop = tl.minimum(stop, length)
    return start, stop


@triton.jit
def _share_of(split, splits, start, stop, BLOCK: tl.constexpr):
    """The blocks [first, last) of program `split`."""
    low = start // BLOCK
    high = tl.cdiv(stop, BLOCK)
    share = tl.cdiv(tl.maximum(high - low, 0), splits)
    first = low + split * share
    return first, tl.minimum(first + share, high)


@triton.jit
def _pair(states, batch_stride, head_stride, batch, head, TMA: tl.constexpr):
    """Where the keys or values of one sequence and key/value head begin; a descriptor knows by itself."""
    if not TMA:
        states += batch.to(tl.int64) * batch_stride + head.to(tl.int64) * head_stride
    return states


@triton.jit
def _tile(
    states, row_stride, batch, head, block, length, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr, TMA: tl.constexpr
):  # fmt: skip
    """One block of keys or values, zero past the end: by the copy engine from a descriptor, or through a pointer."""
    if TMA:
        tile = states.load([batch, head, block * BLOCK, 0]).reshape(BLOCK, HEAD_DIM)
    else:
        position = block * BLOCK + tl.arange(0, BLOCK)
        column = tl.arange(0, HEAD_DIM)
        tile = tl.load(
            states + position[:, None] * row_stride + column[None, :],
            mask=(position < length)[:, None], other=0.0, eviction_policy="evict_first",
        )  # fmt: skip
    return tile


@triton.jit(do_not_specialize=["length", "blocks", "splits"])
def leader_split(
    query_ptr, key_ptr, value_ptr, mask_ptr, mask_batch, span_ptr, span_batch,
    weights_ptr, reference_ptr, sums_ptr, max_ptr, sum_ptr, partial_ptr,
    query_batch, query_head, key_batch, key_head, key_row, value_batch, value_head, value_row,
    length, blocks, splits, scale, softcap,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr,
    MASK: tl.constexpr, LOWEST: tl.constexpr, SOFTCAP: tl.constexpr,
    SPAN_PARTS: tl.constexpr, SPAN_PADDED: tl.constexpr, SUMS: tl.constexpr, TMA: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """
    Attention of one split: unnormalised output, maximum and sum of the split; weights and references of s, and with
    SUMS the sum of each row and block.
    """
    split = tl.program_id(0)
    pair = tl.program_id(1)
    batch = pair // KV_HEADS
    head = pair % KV_HEADS
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    start, stop = _visible(span_ptr, span_batch, batch, length, SPAN_PARTS, SPAN_PADDED)
    first, last = _share_of(split, splits, start, stop, BLOCK)

    row = tl.arange(0, ROWS)
    column = tl.arange(0, HEAD_DIM)
    here = tl.arange(0, BLOCK)
    real = row < GROUP
    query = tl.load(
        query_ptr + batch.to(tl.int64) * query_batch + (head * GROUP + row)[:, None] * query_head + column[None, :],
        mask=real[:, None], other=0.0,
    )  # fmt: skip
    key_ptr = _pair(key_ptr, key_batch, key_head, batch, head, TMA)
    value_ptr = _pair(value_ptr, value_batch, value_head, batch, head, TMA)
    mask_ptr += batch.to(tl.int64) * mask_batch

    maximum = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    accumulator = tl.zeros([ROWS, HEAD_DIM], tl.float32)
    for block in range(first, last):
        key = _tile(key_ptr, key_row, batch, head, block, length, HEAD_DIM, BLOCK, TMA)
        scores = tl.dot(query, tl.trans(key)) * scale
        if SOFTCAP:
            # tanh(x) = 1 - 2 / (e^2x + 1), and `scale` already holds 2 log2(e) / softcap
            scores = softcap * (1.0 - 2.0 / (tl.exp2(scores) + 1.0))
        position = block * BLOCK + here
        inside = (position >= start) & (position < stop)
        if MASK == 1:
            inside = inside & (tl.load(mask_ptr + position, mask=inside, other=0) != 0)
        if MASK == 2:
            bias = tl.load(mask_ptr + position, mask=inside, other=0.0).to(tl.float32)
            inside = inside & (bias > LOWEST)
            scores += bias[None, :] * 1.4426950408889634
        scores = tl.where(inside[None, :], scores, float("-inf"))

        highest = tl.maximum(maximum, tl.max(scores, 1))
        reference = tl.where(highest == float("-inf"), 0.0, highest)
        weights = tl.exp2(scores - reference[:, None])
        decay = tl.exp2(maximum - reference)
        sums = tl.sum(weights, 1)
        total = total * decay + sums
        maximum = highest

        value = _tile(value_ptr, value_row, batch, head, block, length, HEAD_DIM, BLOCK, TMA)
        rounded = weights.to(value.dtype)
        accumulator = tl.dot(rounded, value, accumulator * decay[:, None])
        line = (pair.to(tl.int64) * blocks + block) * GROUP + row
        # Kept in the L2 cache, where the followers find it: written back amid the reads, these few bytes cost four
        # times their share of the bandwidth.
        tl.store(
            weights_ptr + line[:, None] * BLOCK + here[None, :], rounded,
            mask=real[:, None], eviction_policy="evict_last",
        )  # fmt: skip
        tl.store(reference_ptr + line, maximum, mask=real)
        if SUMS:
            tl.store(sums_ptr + line, sums, mask=real)

    slot = (pair * GROUP + row).to(tl.int64) * splits + split
    tl.store(max_ptr + slot, maximum, mask=real)
    tl.store(sum_ptr + slot, total, mask=real)
    tl.store(partial_ptr + slot[:, None] * HEAD_DIM + column[None, :], accumulator, mask=real[:, None])


@triton.jit(do_not_specialize=["length", "blocks", "splits"])
def leader_combine(
    reference_ptr, max_ptr, sum_ptr, partial_ptr, span_ptr, span_batch, output_ptr, factors_ptr,
    length, blocks, splits,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr,
    SPLITS_PADDED: tl.constexpr, SPAN_PARTS: tl.constexpr, SPAN_PADDED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One row: its output from the splits, and its factors."""
    row = tl.program_id(0).to(tl.int64)
    if PDL:
        tl.extra.cuda.gdc_wait()
    split = tl.arange(0, SPLITS_PADDED)
    real = split < splits
    maxima = tl.load(max_ptr + row * splits + split, mask=real, other=float("-inf"))
    sums = tl.load(sum_ptr + row * splits + split, mask=real, other=0.0)
    maximum = tl.max(maxima)
    maximum = tl.where(maximum == float("-inf"), 0.0, maximum)
    total = tl.sum(sums * tl.exp2(maxima - maximum))
    # Not `total > 0`: a NaN among the inputs has to come out.
    inverse = tl.where(total == 0.0, 0.0, 1.0 / total)

    column = tl.arange(0, HEAD_DIM)
    output = tl.zeros([HEAD_DIM], tl.float32)
    for first in range(0, splits, 16):
        some = first + tl.arange(0, 16)
        exists = some < splits
        partial = tl.load(
            partial_ptr + (row * splits + some)[:, None] * HEAD_DIM + column[None, :], mask=exists[:, None], other=0.0
        )
        highest = tl.load(max_ptr + row * splits + some, mask=exists, other=float("-inf"))
        output += tl.sum(partial * tl.exp2(highest - maximum)[:, None], 0)
    tl.store(output_ptr + row * HEAD_DIM + column, (output * inverse).to(output_ptr.dtype.element_ty))

    pair = row // GROUP
    start, stop = _visible(span_ptr, span_batch, pair // KV_HEADS, length, SPAN_PARTS, SPAN_PADDED)
    for first in range(0, blocks, 1024):
        block = first + tl.arange(0, 1024)
        line = (pair * blocks + block) * GROUP + row % GROUP
        written = (block >= start // BLOCK) & (block < tl.cdiv(stop, BLOCK))
        reference = tl.load(reference_ptr + line, mask=written, other=float("-inf"))
        factor = tl.where(written, tl.exp2(reference - maximum) * inverse, 0.0)
        tl.store(factors_ptr + line, factor, mask=block < blocks)


@triton.jit(do_not_specialize=["length", "blocks", "splits"])
def follower_split(
    weights_ptr, factors_ptr, value_ptr, span_ptr, span_batch, kept_ptr, count_ptr, partial_ptr,
    weights_pair, weights_block, weights_row, value_batch, value_head, value_row, length, blocks, splits,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr,
    FACTORS: tl.constexpr, SPAN_PARTS: tl.constexpr, SPAN_PADDED: tl.constexpr, KEPT: tl.constexpr,
    TMA: tl.constexpr, PDL: tl.constexpr, COMBINED: tl.constexpr,
):  # fmt: skip
    """
    s·V of one split, in the type of `partial_ptr` (the output itself where there is one split); with KEPT of the
    listed blocks only.
    """
    split = tl.program_id(0)
    pair = tl.program_id(1)
    batch = pair // KV_HEADS
    head = pair % KV_HEADS
    if PDL:
        tl.extra.cuda.gdc_wait()
        if COMBINED:
            tl.extra.cuda.gdc_launch_dependents()
    if KEPT:
        count = tl.load(count_ptr + pair)
        share = tl.cdiv(count, splits)
        first = split * share
        last = tl.minimum(first + share, count)
    else:
        start, stop = _visible(span_ptr, span_batch, batch, length, SPAN_PARTS, SPAN_PADDED)
        first, last = _share_of(split, splits, start, stop, BLOCK)

    row = tl.arange(0, ROWS)
    column = tl.arange(0, HEAD_DIM)
    here = tl.arange(0, BLOCK)
    real = row < GROUP
    value_ptr = _pair(value_ptr, value_batch, value_head, batch, head, TMA)
    weights_ptr += pair.to(tl.int64) * weights_pair
    factors_ptr += pair.to(tl.int64) * blocks * GROUP

    accumulator = tl.zeros([ROWS, HEAD_DIM], tl.float32)
    for index in range(first, last):
        block = index
        if KEPT:
            block = tl.load(kept_ptr + pair.to(tl.int64) * blocks + index)
        value = _tile(value_ptr, value_row, batch, head, block, length, HEAD_DIM, BLOCK, TMA)
        pointer = weights_ptr + block * weights_block + row[:, None] * weights_row + here[None, :]
        if FACTORS:
            weights = tl.load(pointer, mask=real[:, None], other=0.0)
            factor = tl.load(factors_ptr + block * GROUP + row, mask=real, other=0.0)
            accumulator += tl.dot(weights, value) * factor[:, None]
        else:
            position = block * BLOCK + here
            inside = (position >= start) & (position < stop)
            weights = tl.load(pointer, mask=real[:, None] & inside[None, :], other=0.0).to(value.dtype)
            accumulator = tl.dot(weights, value, accumulator)

    slot = (pair * GROUP + row).to(tl.int64) * splits + split
    tl.store(
        partial_ptr + slot[:, None] * HEAD_DIM + column[None, :],
        accumulator.to(partial_ptr.dtype.element_ty), mask=real[:, None],
    )  # fmt: skip


@triton.jit(do_not_specialize=["splits"])
def follower_combine(partial_ptr, output_ptr, splits, HEAD_DIM: tl.constexpr, PDL: tl.constexpr):
    """One row: the sum of its splits."""
    row = tl.program_id(0).to(tl.int64)
    if PDL:
        tl.extra.cuda.gdc_wait()
    column = tl.arange(0, HEAD_DIM)
    output = tl.zeros([HEAD_DIM], tl.float32)
    for first in range(0, splits, 16):
        some = first + tl.arange(0, 16)
        partial = tl.load(
            partial_ptr + (row * splits + some)[:, None] * HEAD_DIM + column[None, :],
            mask=(some < splits)[:, None], other=0.0,
        )  # fmt: skip
        output += tl.sum(partial, 0)
    tl.store(output_ptr + row * HEAD_DIM + column, output.to(output_ptr.dtype.element_ty))
