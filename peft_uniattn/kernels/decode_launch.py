"""How the decode kernels are launched, and their operators for torch.compile (namespace `uniattn`)."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from . import decode_triton as kernels
from . import shared_triton

INTERPRETED = not isinstance(kernels.leader_split, triton.JITFunction)

_LOG2_E = 1.4426950408889634
_SPAN_CHUNK = 4096
# Room for the deepest pipeline below.
_SHARED_MEMORY = 200 * 1024


class Tuning(NamedTuple):
    """
    How a split kernel is launched.

    Attributes:
        warps, stages: of Triton.
        programs: splits are chosen to give about so many programs per multiprocessor.
    """

    warps: int
    stages: int
    programs: int


# By head_dim, as measured on an H200. BLOCK: positions that one factor of s covers, hence the same for both kernels.
BLOCK = {16: 128, 32: 128, 64: 128, 128: 128, 256: 64}
LEADER = {16: Tuning(4, 2, 3), 32: Tuning(4, 2, 3), 64: Tuning(4, 2, 3), 128: Tuning(4, 2, 2), 256: Tuning(4, 2, 2)}
FOLLOWER = {16: Tuning(4, 4, 2), 32: Tuning(4, 4, 2), 64: Tuning(4, 4, 2), 128: Tuning(4, 3, 2), 256: Tuning(4, 3, 2)}


def _on_its_device(launch):
    # Triton launches on the current device, which need not be the one that this layer's tensors are on.
    @functools.wraps(launch)
    def launched(tensor, *arguments, **options):
        with torch.cuda.device_of(tensor):
            return launch(tensor, *arguments, **options)

    return launched


@_on_its_device
def leader(query, key, value, mask, span, scaling, softcap, sums=False, tuning=None, block=None):
    """
    Output, weights, factors and sums of a leader; `span` is (1 or batch, parts, 2), `softcap` 0.0 where there is none,
    and sums are empty unless asked for.
    """
    batch, query_heads, _, head_dim = query.shape
    kv_heads, length = key.shape[1], key.shape[2]
    tuning, block = tuning or LEADER[head_dim], block or BLOCK[head_dim]
    group, blocks, rows = query_heads // kv_heads, triton.cdiv(length, block), batch * query_heads
    splits = choose_splits(batch * kv_heads, blocks, tuning.programs * _multiprocessors(query.device))
    pdl, tma = query.is_cuda, _copy_engine(key, value)

    output, weights, factors, block_sums = leader_outputs(query, key, block, sums)
    statistic = functools.partial(torch.empty, dtype=torch.float32, device=query.device)
    maximum, total, partial = statistic(rows, splits), statistic(rows, splits), statistic(rows, splits, head_dim)
    reference = torch.empty_like(factors)
    # With softcap, scores come as 2 log2(e) / softcap times themselves, as the tanh wants them.
    scale = 2 * _LOG2_E * scaling / softcap if softcap else _LOG2_E * scaling
    spans = _span_arguments(span)
    shape = {"KV_HEADS": kv_heads, "GROUP": group, "HEAD_DIM": head_dim, "BLOCK": block}
    kernels.leader_split[(splits, batch * kv_heads)](
        query, _states(key, block, tma), _states(value, block, tma), *_mask_pointer(mask, query),
        query if span is None else span, *_span_stride(span), weights, reference, block_sums, maximum, total, partial,
        query.stride(0), query.stride(1), *key.stride()[:3], *value.stride()[:3],
        length, blocks, splits, scale, softcap * _LOG2_E,
        **shape, ROWS=_tile_rows(group), **_mask_kind(mask), SOFTCAP=bool(softcap), **spans, SUMS=sums, TMA=tma,
        PDL=pdl, num_warps=tuning.warps, num_stages=tuning.stages, **_dependent(pdl),
    )  # fmt: skip
    kernels.leader_combine[(rows,)](
        reference, maximum, total, partial, query if span is None else span, *_span_stride(span), output, factors,
        length, blocks, splits,
        **shape, SPLITS_PADDED=triton.next_power_of_2(splits), **spans, PDL=pdl, **_dependent(pdl),
    )  # fmt: skip
    return output, weights, factors, block_sums


def leader_outputs(query, key, block=None, sums=False):
    """Empty output, weights, factors and sums."""
    batch, query_heads, _, head_dim = query.shape
    block = block or BLOCK[head_dim]
    blocks, kv_heads = (key.shape[2] + block - 1) // block, key.shape[1]
    return (
        query.new_empty(batch, query_heads, 1, head_dim),
        query.new_empty(batch, kv_heads, blocks, query_heads // kv_heads, block),
        query.new_empty(batch, kv_heads, blocks, query_heads // kv_heads, dtype=torch.float32),
        query.new_empty(batch, kv_heads, blocks if sums else 0, query_heads // kv_heads, dtype=torch.float32),
    )


def follower_output(weights, factors, value):
    """Empty output of a follower."""
    query_heads = weights.shape[1] if factors is None else weights.shape[1] * weights.shape[3]
    return value.new_empty(value.shape[0], query_heads, 1, value.shape[3])


@_on_its_device
def follower(weights, factors, value, span, kept=None, count=None, tuning=None):
    """
    s·V from weights and factors as a leader leaves them, or (`factors` None) from contiguous probabilities; of the
    blocks that [`select`] kept, or of all.
    """
    batch, kv_heads, length, head_dim = value.shape
    tuning = tuning or FOLLOWER[head_dim]
    if factors is None:
        block, group = BLOCK[head_dim], weights.shape[1] // kv_heads
        strides = group * length, block, length
    else:
        group, block = weights.shape[3:]
        strides = weights.stride()[1:4]
    blocks, rows = triton.cdiv(length, block), batch * kv_heads * group
    splits = choose_splits(batch * kv_heads, blocks, tuning.programs * _multiprocessors(value.device))
    pdl, tma = value.is_cuda, _copy_engine(value)

    output = follower_output(weights, factors, value)
    partial = output if splits == 1 else value.new_empty(rows, splits, head_dim, dtype=torch.float32)
    kernels.follower_split[(splits, batch * kv_heads)](
        weights, weights if factors is None else factors, _states(value, block, tma),
        value if span is None else span, *_span_stride(span), value if kept is None else kept,
        value if count is None else count, partial,
        *strides, *value.stride()[:3], length, blocks, splits,
        KV_HEADS=kv_heads, GROUP=group, ROWS=_tile_rows(group), HEAD_DIM=head_dim, BLOCK=block,
        FACTORS=factors is not None, **_span_arguments(span), KEPT=kept is not None, TMA=tma, PDL=pdl,
        COMBINED=splits > 1,
        num_warps=tuning.warps, num_stages=tuning.stages, **_dependent(pdl),
    )  # fmt: skip
    if splits > 1:
        kernels.follower_combine[(rows,)](partial, output, splits, HEAD_DIM=head_dim, PDL=pdl, **_dependent(pdl))
    return output


@_on_its_device
def select(sums, factors, bound):
    """
    Which blocks followers need so that no row loses more than `bound` of its mass.

    Args:
        sums: (..., blocks, rows), the mass of each row and block; before multiplication with `factors` if these are
            not None.

    Returns:
        (..., blocks) indices of the kept blocks, (...) their number, both int32, and (...) a bound on the mass that is
        left out.
    """
    kept, count, dropped = select_outputs(sums)
    blocks, group = sums.shape[-2:]
    shared_triton.select[(count.numel(),)](
        sums, sums if factors is None else factors, kept, count, dropped, blocks, bound, GROUP=group,
        GROUP_PADDED=triton.next_power_of_2(group), BLOCKS_PADDED=triton.next_power_of_2(blocks),
        FACTORS=factors is not None,
    )  # fmt: skip
    return kept, count, dropped


def select_outputs(sums):
    """Empty kept blocks, counts and left-out mass."""
    many = sums.shape[:-2]
    integers = {"dtype": torch.int32, "device": sums.device}
    return sums.new_empty(sums.shape[:-1], dtype=torch.int32), torch.empty(many, **integers), sums.new_empty(many)


@_on_its_device
def normalise(weights, factors, length):
    """Probabilities (batch, query heads, 1, length) of weights and factors."""
    batch, kv_heads, blocks, group, block = weights.shape
    probabilities = weights.new_empty(batch, kv_heads * group, 1, length)
    shared_triton.normalise[(triton.cdiv(length, 1024), batch * kv_heads * group)](
        weights, factors, probabilities, length, blocks, GROUP=group, BLOCK=block, TILE=1024
    )
    return probabilities


@_on_its_device
def mask_span(mask):
    """The span of each part of a mask's length, (1 or batch, parts, 2), of a mask (1 or batch, 1, 1, length)."""
    batch, length = mask.shape[0], mask.shape[3]
    span = torch.empty(batch, span_parts(length), 2, dtype=torch.int32, device=mask.device)
    shared_triton.mask_span[(span.shape[1], batch)](
        *_mask_pointer(mask, mask), span, length, **_mask_kind(mask), CHUNK=_SPAN_CHUNK
    )
    return span


def span_parts(length):
    """Parts in which a mask's span is found; a power of two, for parts beyond the length see nothing."""
    return 1 << (max(length + _SPAN_CHUNK - 1, 1) // _SPAN_CHUNK - 1).bit_length()


@functools.lru_cache(maxsize=4096)
def choose_splits(pairs: int, blocks: int, programs: int) -> int:
    """
    How many programs share the blocks of one pair.

    With enough pairs to fill the GPU the last, partly filled wave is what costs: of all candidates up to two waves'
    worth, take the one whose waves times blocks per program is smallest, and the fewest splits among equals.
    """
    most = min(blocks, max(1, 2 * programs // pairs), 512)
    cost = [-(-pairs * splits // programs) * (-(-blocks // splits) + 1) for splits in range(1, most + 1)]
    return 1 + cost.index(min(cost))


def _mask_pointer(mask, placeholder):
    if mask is None:
        return placeholder, 0
    return mask.view(torch.uint8) if mask.dtype == torch.bool else mask, mask.stride(0) if mask.shape[0] > 1 else 0


def _mask_kind(mask):
    if mask is None:
        return {"MASK": 0, "LOWEST": 0.0}
    if mask.dtype == torch.bool:
        return {"MASK": 1, "LOWEST": 0.0}
    return {"MASK": 2, "LOWEST": torch.finfo(mask.dtype).min}


def _span_stride(span):
    return (0 if span is None or span.shape[0] == 1 else span.stride(0),)


def _span_arguments(span):
    parts = 0 if span is None else span.shape[1]
    return {"SPAN_PARTS": parts, "SPAN_PADDED": triton.next_power_of_2(max(parts, 1))}


def _dependent(pdl):
    # Programmatic dependent launch hides most of a launch's latency; Triton's interpreter does not know the option.
    return {"launch_pdl": True} if pdl else {}


def _tile_rows(group):
    return max(16, triton.next_power_of_2(group))


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def _copy_engine(*states):
    """Whether the tensor memory accelerator can fetch tiles of all of `states`."""
    return all(
        tensor.is_cuda
        and tensor.data_ptr() % 16 == 0
        and all(stride > 0 and stride * tensor.element_size() % 16 == 0 for stride in tensor.stride()[:3])
        for tensor in states
    )


def _states(tensor, block, tma):
    if not tma:
        return tensor
    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), [1, 1, block, tensor.shape[3]])


@torch.compiler.assume_constant_result
def runs_on(device: torch.device) -> bool:
    """Whether the kernels run on this device: NVIDIA from Hopper on, with room for the tiles, or the interpreter."""
    return _runs_on(device)


@functools.cache
def _runs_on(device: torch.device) -> bool:
    if INTERPRETED or device.type != "cuda" or torch.version.hip is not None:
        return INTERPRETED and device.type == "cpu"
    properties = torch.cuda.get_device_properties(device)
    return properties.major >= 9 and properties.shared_memory_per_block_optin >= _SHARED_MEMORY


def _operator(schema, implementation, shapes):
    name = f"uniattn::{schema.split('(')[0]}"
    operator = torch.library.custom_op(name, implementation, mutates_args=(), schema=schema[schema.index("(") :])
    operator.register_fake(shapes)

    def call(*arguments):
        # Outside of torch.compile the operator would only add the dispatcher's microseconds.
        return (operator if torch.compiler.is_compiling() else implementation)(*arguments)

    return call


decode_leader = _operator(
    "decode_leader(Tensor query, Tensor key, Tensor value, Tensor? mask, Tensor? span, float scaling, float softcap,"
    " bool sums) -> (Tensor, Tensor, Tensor, Tensor)",
    lambda query, key, value, mask, span, scaling, softcap, sums: leader(
        query, key, value, mask, span, scaling, softcap, sums
    ),
    lambda query, key, value, mask, span, scaling, softcap, sums: leader_outputs(query, key, sums=sums),
)
decode_select = _operator(
    "decode_select(Tensor sums, Tensor? factors, float bound) -> (Tensor, Tensor, Tensor)",
    lambda sums, factors, bound: select(sums, factors, bound),
    lambda sums, factors, bound: select_outputs(sums),
)
decode_follower = _operator(
    "decode_follower(Tensor weights, Tensor? factors, Tensor value, Tensor? span, Tensor? kept, Tensor? count)"
    " -> Tensor",
    lambda weights, factors, value, span, kept, count: follower(weights, factors, value, span, kept, count),
    lambda weights, factors, value, span, kept, count: follower_output(weights, factors, value),
)
decode_probabilities = _operator(
    "decode_probabilities(Tensor weights, Tensor factors, int length) -> Tensor",
    lambda weights, factors, length: normalise(weights, factors, length),
    lambda weights, factors, length: weights.new_empty(
        weights.shape[0], weights.shape[1] * weights.shape[3], 1, length
    ),
)
visible_span = _operator(
    "visible_span(Tensor mask) -> Tensor",
    lambda mask: mask_span(mask),
    lambda mask: mask.new_empty(mask.shape[0], span_parts(mask.shape[3]), 2, dtype=torch.int32),
)
