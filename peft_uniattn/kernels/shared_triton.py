"""Triton kernels around a shared softmax: the blocks that followers need, s as one tensor, the span of a mask."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["blocks", "bound"])
def select(
    sums_ptr, factors_ptr, kept_ptr, count_ptr, dropped_ptr, blocks, bound,
    GROUP: tl.constexpr, GROUP_PADDED: tl.constexpr, BLOCKS_PADDED: tl.constexpr, FACTORS: tl.constexpr,
):  # fmt: skip
    """
    The blocks of one group of rows that hold all of the mass but `bound`, in order, and how much the others hold.

    A block counts with the row in which it weighs most, so that the bound holds in every row. The lightest blocks are
    left out, below a threshold that is found by halving an interval.
    """
    pair = tl.program_id(0).to(tl.int64)
    block = tl.arange(0, BLOCKS_PADDED)
    row = tl.arange(0, GROUP_PADDED)
    real = (block < blocks)[:, None] & (row < GROUP)[None, :]
    line = (pair * blocks + block[:, None]) * GROUP + row[None, :]
    if FACTORS:
        factor = tl.load(factors_ptr + line, mask=real, other=0.0)
        # A factor of zero also marks what was never written.
        mass = factor * tl.load(sums_ptr + line, mask=real & (factor != 0.0), other=0.0)
    else:
        mass = tl.load(sums_ptr + line, mask=real, other=0.0)
    mass = tl.max(mass, 1)

    threshold = bound * 0.0
    highest = bound
    for _ in range(24):
        middle = 0.5 * (threshold + highest)
        fits = tl.sum(tl.where(mass <= middle, mass, 0.0)) <= bound
        threshold = tl.where(fits, middle, threshold)
        highest = tl.where(fits, highest, middle)
    # Not `mass > threshold`: a NaN has to come out.
    left_out = mass <= threshold
    keep = (left_out == 0) & (block < blocks)
    place = tl.cumsum(keep.to(tl.int32)) - 1
    tl.store(kept_ptr + pair * blocks + place, block, mask=keep)
    tl.store(count_ptr + pair, tl.sum(keep.to(tl.int32)))
    tl.store(dropped_ptr + pair, tl.sum(tl.where(left_out, mass, 0.0)))


@triton.jit(do_not_specialize=["length", "blocks"])
def normalise(
    weights_ptr, factors_ptr, probabilities_ptr, length, blocks,
    GROUP: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The probabilities themselves, for whoever wants them as one tensor (rows, length)."""
    row = tl.program_id(1).to(tl.int64)
    position = tl.program_id(0) * TILE + tl.arange(0, TILE)
    inside = position < length
    line = (row // GROUP * blocks + position // BLOCK) * GROUP + row % GROUP
    factor = tl.load(factors_ptr + line, mask=inside, other=0.0)
    # A factor of zero also marks what was never written.
    weight = tl.load(weights_ptr + line * BLOCK + position % BLOCK, mask=inside & (factor != 0.0), other=0.0)
    probability = (weight.to(tl.float32) * factor).to(probabilities_ptr.dtype.element_ty)
    tl.store(probabilities_ptr + row * length + position, probability, mask=inside)


@triton.jit(do_not_specialize=["length"])
def mask_span(
    mask_ptr, mask_batch, span_ptr, length, MASK: tl.constexpr, LOWEST: tl.constexpr, CHUNK: tl.constexpr
):  # fmt: skip
    """First visible position of one chunk of one sequence's mask and one past the last; (2^31 - 1, 0) without any."""
    chunk = tl.program_id(0)
    batch = tl.program_id(1).to(tl.int64)
    position = chunk * CHUNK + tl.arange(0, CHUNK)
    inside = position < length
    if MASK == 2:
        entry = tl.load(mask_ptr + batch * mask_batch + position, mask=inside, other=float("-inf")).to(tl.float32)
        visible = entry > LOWEST
    else:
        visible = tl.load(mask_ptr + batch * mask_batch + position, mask=inside, other=0) != 0
    slot = (batch * tl.num_programs(0) + chunk) * 2
    tl.store(span_ptr + slot, tl.min(tl.where(visible, position, 2147483647)))
    tl.store(span_ptr + slot + 1, tl.max(tl.where(visible, position + 1, 0)))
