"""
The decode kernels against their specification in float64.

Unmarked tests are tiny and also run in Triton's interpreter (TRITON_INTERPRET=1, see test_kernels.py); those marked
`gpu` need the real thing. All memory that nobody writes is NaN here.
"""

from __future__ import annotations

import os

import pytest
import torch

from peft_uniattn.kernels import naive

pytest.importorskip("triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("needs a GPU or Triton's interpreter", allow_module_level=True)

from peft_uniattn import kernels  # noqa: E402
from peft_uniattn.kernels import decode, decode_kernels, decode_launch  # noqa: E402

DEVICE = "cpu" if INTERPRETED else "cuda"
# The interpreter has no bfloat16.
DTYPE = torch.float16 if INTERPRETED else torch.bfloat16
TOLERANCE = {torch.float16: 6e-4, torch.bfloat16: 5e-3}


@pytest.fixture(autouse=True)
def poisoned():
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def kernels_at_every_size():
    before = kernels._mode
    kernels.use("triton")
    yield
    kernels.use(before)


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


def inputs(batch=2, query_heads=4, kv_heads=2, length=300, head_dim=64, dtype=DTYPE, seed=0):
    """Query, keys, values of the leader and values of a follower."""
    generator = torch.Generator(DEVICE).manual_seed(seed)

    def random(heads, length):
        return torch.randn(batch, heads, length, head_dim, device=DEVICE, generator=generator).to(dtype)

    return random(query_heads, 1), random(kv_heads, length), random(kv_heads, length), random(kv_heads, length)


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative error in the Euclidean norm."""
    return ((actual.double() - expected).norm() / expected.norm()).item()


def check(query, key, value, follower_value, mask=None, *, span=None, use_span=None, **options) -> None:
    """Leader, probabilities and follower are what the specification says in float64."""
    assert decode.supports(query, key, value, mask)
    use_span = span if use_span is None else use_span
    output, shared = decode.leader_decode(query, key, value, mask, span=use_span, **options)
    tolerance = TOLERANCE[query.dtype]
    wide = [tensor.double() for tensor in (query, key, value)]
    expected, probabilities = naive.leader_decode(*wide, mask, span=span, **options)
    expected_follower = naive.follower_decode(probabilities, follower_value.double())
    actual = shared.probabilities()
    assert actual.shape == probabilities.shape
    assert error(output, expected) < tolerance
    assert error(actual, probabilities) < tolerance
    assert (actual[probabilities == 0] == 0).all()
    assert error(decode.follower_decode(shared, follower_value), expected_follower) < tolerance
    assert error(decode.follower_decode(actual, follower_value, span=use_span), expected_follower) < 2 * tolerance


@pytest.mark.parametrize("length", [1, 63, 300])
@pytest.mark.parametrize("query_heads, kv_heads", [(2, 2), (4, 2), (6, 2), (5, 1)])
def test_decode_is_the_specification(query_heads, kv_heads, length):
    check(*inputs(query_heads=query_heads, kv_heads=kv_heads, length=length))


@pytest.mark.parametrize("head_dim", [16, 32, 64, 128, 256])
def test_head_dimensions(head_dim):
    check(*inputs(head_dim=head_dim, length=517))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("query_heads, kv_heads", [(8, 8), (32, 8), (28, 4), (64, 1)])
@pytest.mark.parametrize("length", [1, 127, 4999])
def test_decode_is_the_specification_on_the_gpu(dtype, head_dim, query_heads, kv_heads, length):
    check(*inputs(3, query_heads, kv_heads, length, head_dim, dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("batch, length", [(1, 131_072), (300, 257), (2, 16_384)])
def test_long_and_wide_shapes(batch, length):
    check(*inputs(batch, 32, 8, length, 128))


@pytest.mark.parametrize("options", [{"scaling": 0.5}, {"softcap": 2.0}, {"softcap": 30.0, "scaling": 1.0}])
def test_scaling_and_softcap(options):
    check(*inputs(), **options)


def left_padded(length):
    mask = torch.ones(2, 1, 1, length, dtype=torch.bool, device=DEVICE)
    mask[0, ..., :77] = False
    return mask


def sliding_window(length):
    return (torch.arange(length, device=DEVICE) >= length - 100)[None, None, None, :]


def holes(length):
    return torch.rand(2, 1, 1, length, device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(5)) > 0.5


@pytest.mark.parametrize("additive", [None, DTYPE, torch.float32])
@pytest.mark.parametrize("make", [left_padded, sliding_window, holes])
def test_masks(make, additive):
    query, *states = inputs(length=601)
    mask = make(601)
    if additive is not None:
        mask = torch.where(mask, 0.0, torch.finfo(additive).min).to(additive)
    check(query, *states, mask)
    # with the mask's own span nothing outside of it is looked at
    span = decode.visible_span(mask)
    boolean = mask if mask.dtype == torch.bool else mask == 0
    seen = [torch.nonzero(row.flatten()).flatten() for row in boolean]
    assert span.amin(1)[:, 0].tolist() == [positions.min().item() for positions in seen]
    assert span.amax(1)[:, 1].tolist() == [positions.max().item() + 1 for positions in seen]
    expected = torch.stack([span.amin(1)[:, 0], span.amax(1)[:, 1]], -1).expand(2, 2)
    check(query, *states, mask, span=expected, use_span=span)


def test_additive_bias():
    bias = torch.randn(2, 1, 1, 300, device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(7))
    check(*inputs(), bias)


@pytest.mark.parametrize("span", [[[0, 130], [0, 300]], [[77, 300], [299, 300]], [[128, 256], [10, 11]]])
def test_spans_of_padded_batches_and_static_caches(span):
    query, key, value, follower_value = inputs()
    for sequence, (start, stop) in enumerate(span):
        key[sequence, :, :start] = key[sequence, :, stop:] = float("nan")
        # zeros there: the specification multiplies keys outside as well
    clean = key.nan_to_num()
    span = torch.tensor(span, device=DEVICE)
    output, shared = decode.leader_decode(query, key, value, span=span)
    expected, expected_shared = decode.leader_decode(query, clean, value, span=span)
    assert torch.equal(output, expected)
    assert torch.equal(shared.probabilities(), expected_shared.probabilities())
    check(query, clean, value, follower_value, span=span)


def test_a_row_that_sees_nothing_is_zero():
    query, key, value, follower_value = inputs()
    mask = torch.ones(2, 1, 1, 300, dtype=torch.bool, device=DEVICE)
    mask[1] = False
    for span in (None, decode.visible_span(mask)):
        output, shared = decode.leader_decode(query, key, value, mask, span=span)
        follower = decode.follower_decode(shared, follower_value)
        for tensor in (output, shared.probabilities(), follower):
            assert (tensor[1] == 0).all()
            assert torch.isfinite(tensor).all()


def test_nan_comes_out():
    query, key, value, follower_value = inputs()
    query[1, 2] = float("nan")
    output, shared = decode.leader_decode(query, key, value)
    follower = decode.follower_decode(shared, follower_value)
    for tensor in (output, follower):
        rows = tensor.isnan().all(-1)[:, :, 0]
        assert rows[1, 2]
        assert rows.sum() == 1


def test_strided_states():
    query, key, value, follower_value = inputs(length=400)
    # a slice of a longer static cache
    check(query, *(states[:, :, :301] for states in (key, value, follower_value)))
    # (batch, length, heads, head_dim) in memory
    check(query, *(states.transpose(1, 2).contiguous().transpose(1, 2) for states in (key, value, follower_value)))
    # rows that the copy engine cannot fetch
    check(query, *(torch.cat([states, states[..., :1]], -1)[..., :-1] for states in (key, value, follower_value)))
    # one sequence's cache for all of the batch
    check(query, *(states[:1].expand(2, -1, -1, -1) for states in (key, value, follower_value)))


def test_what_is_not_supported_is_left_to_pytorch():
    query, key, value, _ = inputs()
    assert decode_kernels(query, key, value) is decode
    per_head = torch.ones(2, 4, 1, 300, dtype=torch.bool, device=DEVICE)
    short = torch.ones(2, 1, 1, 299, dtype=torch.bool, device=DEVICE)
    assert decode_kernels(query, key, value, per_head) is None
    assert decode_kernels(query, key, value, short) is None
    assert decode_kernels(query.expand(-1, -1, 2, -1), key, value) is None
    assert decode_kernels(query.float(), key.float(), value.float()) is None
    assert decode_kernels(query[..., :48], key[..., :48], value[..., :48]) is None
    assert decode_kernels(query, key, value[..., :32]) is None
    assert decode_kernels(*inputs(query_heads=65, kv_heads=1)[:3]) is None
    with torch.enable_grad():
        assert decode_kernels(query.clone().requires_grad_(), key, value) is None


def test_a_follower_that_does_not_fit_its_leader_is_left_to_pytorch():
    query, key, value, follower_value = inputs()
    _, shared = decode.leader_decode(query, key, value)
    assert decode.supports_follower(shared, follower_value)
    assert not decode.supports_follower(shared, follower_value[:, :, :299])
    assert not decode.supports_follower(shared, follower_value[:, :1])
    assert not decode.supports_follower(shared, follower_value.float())
    assert not decode.supports_follower(shared, follower_value[..., :48])


def test_splits_cover_all_blocks_and_few_stay_empty():
    for pairs in (1, 8, 128, 256, 4000):
        for blocks in (1, 2, 7, 64, 1024):
            splits = decode_launch.choose_splits(pairs, blocks, 264)
            assert 1 <= splits <= blocks
            assert (splits - 1) * -(-blocks // splits) < blocks + splits


def test_small_launches_are_left_to_pytorch_unless_compiled():
    kernels.use("auto")
    query, key, value, _ = inputs()
    assert decode_kernels(query, key, value) is None
    compiled = torch.compile(lambda *states: decode_kernels(*states) is decode, fullgraph=True, backend="eager")
    assert compiled(query, key, value)


def decode_step(query, key, value, follower_value, mask):
    module = decode_kernels(query, key, value, mask)
    output, shared = module.leader_decode(query, key, value, mask, span=module.visible_span(mask))
    return output, module.follower_decode(shared, follower_value)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.gpu)])
def test_compiles_to_one_graph(backend):
    arguments = (*inputs(), left_padded(300))
    expected = decode_step(*arguments)
    for actual, eager in zip(
        torch.compile(decode_step, fullgraph=True, backend=backend)(*arguments), expected, strict=True
    ):
        assert torch.equal(actual, eager)


@pytest.mark.parametrize(
    "operator", ["decode_leader", "decode_select", "decode_follower", "decode_probabilities", "visible_span"]
)
def test_operators_are_described_truthfully(operator):
    query, key, value, follower_value = inputs()
    mask = left_padded(300)
    span = decode.visible_span(mask)
    _, shared = decode.leader_decode(query, key, value, mask, span=span)
    arguments = {
        "decode_leader": (query, key, value, mask, span, 0.1, 0.0, True),
        "decode_select": (shared.factors, None, 0.1),
        "decode_follower": (shared.weights, shared.factors, follower_value, span, None, None),
        "decode_probabilities": (shared.weights, shared.factors, 300),
        "visible_span": (mask,),
    }[operator]
    utilities = ("test_schema", "test_faketensor")
    torch.library.opcheck(getattr(torch.ops.uniattn, operator).default, arguments, test_utils=utilities)


def concentrated(length=1500, **options):
    """Inputs whose queries look at every third block of keys for the most part."""
    query, key, value, follower_value = inputs(length=length, **options)
    looked_at = torch.arange(length, device=DEVICE) // 128 % 3 == 0
    return query * 3, torch.where(looked_at[:, None], key, key * 0.05), value, follower_value


@pytest.mark.parametrize("mask", [None, left_padded])
@pytest.mark.parametrize("skip_mass", [0.05, 0.3])
def test_followers_leave_out_no_more_than_the_bound_and_account_for_it(mask, skip_mass):
    query, key, value, follower_value = concentrated()
    mask = mask and mask(1500)
    output, shared = decode.leader_decode(query, key, value, mask, skip_mass=skip_mass)
    assert torch.equal(output, decode.leader_decode(query, key, value, mask)[0])
    block, blocks = shared.weights.shape[-1], shared.weights.shape[2]
    wide = [tensor.double() for tensor in (query, key, value)]
    _, probabilities = naive.leader_decode(*wide, mask)
    kept = torch.zeros(2, 2, blocks, dtype=torch.bool, device=DEVICE)
    for sequence in range(2):
        for head in range(2):
            kept[sequence, head, shared.kept[sequence, head, : shared.count[sequence, head]].long()] = True
    assert kept.sum() < 0.8 * kept.numel()
    visible = kept.repeat_interleave(block, -1)[..., :1500].repeat_interleave(2, 1).unsqueeze(2)
    lost = probabilities.masked_fill(visible, 0.0).sum(-1).reshape(2, 2, 2)
    assert (lost <= shared.dropped[..., None] + 1e-3).all()
    assert (shared.dropped <= skip_mass).all()
    expected = naive.follower_decode(probabilities.masked_fill(~visible, 0.0), follower_value.double())
    assert error(decode.follower_decode(shared, follower_value), expected) < TOLERANCE[DTYPE]


def test_nothing_is_skipped_at_a_bound_of_zero():
    query, key, value, _ = concentrated()
    _, shared = decode.leader_decode(query, key, value)
    assert shared.kept is None
    kept = decode_launch.select(torch.full((3, 9, 1), 1 / 9, device=DEVICE), None, 0.0)
    assert kept[0].tolist() == [list(range(9))] * 3
    assert kept[1].tolist() == [9] * 3


def test_nan_comes_out_of_skipping_followers_too():
    query, key, value, follower_value = concentrated()
    query[1, 2:] = float("nan")
    _, shared = decode.leader_decode(query, key, value, skip_mass=0.1)
    assert decode.follower_decode(shared, follower_value)[1, 2:].isnan().all()


@pytest.mark.gpu
def test_a_cuda_graph_follows_a_growing_static_cache():
    query, key, value, follower_value = inputs(4, 32, 8, 1000, 128)
    mask = torch.zeros(4, 1, 1, 1000, dtype=torch.bool, device=DEVICE)
    mask[..., :1] = True
    decode_step(query, key, value, follower_value, mask)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = decode_step(query, key, value, follower_value, mask)
    for filled in (1, 500, 1000):
        mask[..., :filled] = True
        query.copy_(torch.randn_like(query))
        for tensor in captured:
            tensor.fill_(float("nan"))
        graph.replay()
        wide = [tensor.double() for tensor in (query, key, value)]
        expected, probabilities = naive.leader_decode(*wide, mask)
        expected = expected, naive.follower_decode(probabilities, follower_value.double())
        for actual, reference in zip(captured, expected, strict=True):
            assert error(actual, reference) < TOLERANCE[DTYPE]
