"""
The kernels for prompts against their specification in float64.

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
from peft_uniattn.kernels import prefill, prefill_launch  # noqa: E402

DEVICE = "cpu" if INTERPRETED else "cuda"
# The interpreter has no bfloat16.
DTYPE = torch.float16 if INTERPRETED else torch.bfloat16
TOLERANCE = {torch.float16: 6e-4, torch.bfloat16: 5e-3}
# One rounding to 3 bits of mantissa is 1/16 at most, less than half of that in the mean; the interpreter truncates.
FP8_TOLERANCE = 0.06 if INTERPRETED else 0.03


@pytest.fixture(autouse=True)
def poisoned():
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


def inputs(batch=2, query_heads=4, kv_heads=2, length=150, head_dim=16, dtype=DTYPE, seed=0):
    """Query, keys, values of the leader and values of a follower."""
    generator = torch.Generator(DEVICE).manual_seed(seed)

    def random(heads):
        return torch.randn(batch, heads, length, head_dim, device=DEVICE, generator=generator).to(dtype)

    return random(query_heads), random(kv_heads), random(kv_heads), random(kv_heads)


def concentrated(block, **options):
    """Inputs whose queries look at every third tile of keys for the most part."""
    query, key, value, follower_value = inputs(**options)
    looked_at = torch.arange(key.shape[2], device=DEVICE) // block % 3 == 0
    return query * 4, torch.where(looked_at[:, None], key * 2, key * 0.02), value, follower_value


def error(actual, expected) -> float:
    """Relative error in the Euclidean norm."""
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


def check(query, key, value, scaling=0.3):
    """Weighing, streaming and recomputing are what the specification says in float64."""
    wide = [tensor.double() for tensor in (query, key, value)]
    expected = naive.follower_prefill(*wide, scaling=scaling)
    denominator = naive.leader_prefill(*wide, scaling=scaling)[1].float()
    tolerance = TOLERANCE[query.dtype]
    for store, limit in ((query.dtype, tolerance), (torch.float8_e4m3fn, FP8_TOLERANCE)):
        weights, scales, maxima = prefill_launch.weigh(query, key, denominator, scaling, store)
        assert error(prefill_launch.stream(weights, scales, value, query.shape[1]), expected) < limit
    assert error(prefill_launch.recompute(query, key, value, denominator, scaling), expected) < tolerance

    rows, columns = prefill_launch.WEIGH[query.shape[3]][:2]
    identity = torch.eye(key.shape[2], dtype=torch.float64, device=DEVICE).expand(*key.shape[:2], -1, -1)
    probabilities = naive.follower_prefill(*wide[:2], identity, scaling=scaling).transpose(1, 2)
    padding = -query.shape[2] % rows
    tiles = torch.nn.functional.pad(probabilities, (0, padding, 0, padding))
    masses = tiles.unflatten(3, (-1, columns)).sum(-1).unflatten(2, (-1, rows)).amax(3)
    assert error(maxima, masses) < 2 * tolerance
    output, led, maxima = prefill_launch.lead(query, key, value, scaling)
    assert error(output, expected) < tolerance
    assert error(led, denominator) < 1e-3
    assert error(maxima, masses) < 2 * tolerance


@pytest.mark.parametrize("query_heads, kv_heads, length", [(2, 2, 2), (2, 2, 64), (4, 2, 150), (3, 1, 100)])
def test_tiles_are_the_specification(query_heads, kv_heads, length):
    query, key, value, _ = inputs(query_heads=query_heads, kv_heads=kv_heads, length=length)
    check(query, key, value)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("query_heads, kv_heads", [(4, 4), (8, 2)])
@pytest.mark.parametrize("length", [129, 1000, 2048])
def test_tiles_are_the_specification_on_the_gpu(dtype, head_dim, query_heads, kv_heads, length):
    query, key, value, _ = inputs(2, query_heads, kv_heads, length, head_dim, dtype)
    check(query, key, value, head_dim**-0.5)


def test_strided_states():
    query, key, value, _ = inputs()
    # (batch, length, heads, head_dim) in memory, and a slice of a longer static cache
    swapped = [states.transpose(1, 2).contiguous().transpose(1, 2) for states in (query, key, value)]
    check(*swapped)
    check(query, *(torch.cat([states] * 2, 2)[:, :, :150] for states in (key, value)))


def options_for(skip_mass):
    head_dim = 16 if INTERPRETED else 128
    rows, columns = prefill_launch.RECOMPUTE[head_dim][:2]
    return {"length": 5 * rows - 7, "head_dim": head_dim}, rows, columns


@pytest.mark.parametrize("skip_mass", [0.02, 0.3])
def test_followers_leave_out_no_more_than_the_bound_and_account_for_it(skip_mass):
    options, rows, columns = options_for(skip_mass)
    query, key, value, follower_value = concentrated(columns, **options)
    output, shared = prefill.leader_prefill(query, key, value, skip_mass=skip_mass)
    wide = [tensor.double() for tensor in (query, key, value)]
    assert error(output.transpose(1, 2), naive.leader_prefill(*wide)[0]) < TOLERANCE[DTYPE]
    tiles = shared.kept.shape[2]
    kept = torch.zeros(shared.kept.shape, dtype=torch.bool, device=DEVICE)
    for place in torch.cartesian_prod(*(torch.arange(size) for size in shared.count.shape)).tolist():
        kept[tuple(place)][shared.kept[tuple(place)][: shared.count[tuple(place)]].long()] = True
    assert kept.sum() < 0.85 * 2 * 4 * tiles * (tiles + 1) // 2 * (rows // columns)
    length = query.shape[2]
    visible = kept.repeat_interleave(rows, 2).repeat_interleave(columns, 3)[:, :, :length, :length]

    ones = torch.ones(*key.shape[:3], 1, dtype=torch.float64, device=DEVICE)
    held = naive.follower_prefill(*wide[:2], ones, visible=visible).squeeze(-1).transpose(1, 2)
    allowed = shared.dropped.repeat_interleave(rows, 2)[:, :, :length]
    assert (1 - held <= allowed + 1e-3).all()
    assert (shared.dropped <= skip_mass).all()
    expected = naive.follower_prefill(*wide[:2], follower_value.double(), visible=visible)
    assert error(shared.apply(follower_value), expected) < TOLERANCE[DTYPE]


def test_a_longer_static_cache_is_cut_to_the_prompt():
    query, key, value, follower_value = inputs()
    longer = [torch.nn.functional.pad(states, (0, 0, 0, 50), value=float("nan")) for states in (key, value)]
    output, shared = prefill.leader_prefill(query, *longer, skip_mass=0.1)
    expected, exact = prefill.leader_prefill(query, key, value, skip_mass=0.1)
    assert torch.equal(output, expected)
    padded = torch.nn.functional.pad(follower_value, (0, 0, 0, 50), value=float("nan"))
    assert torch.equal(shared.apply(padded), exact.apply(follower_value))


def test_what_is_not_supported_is_left_to_pytorch():
    query, key, value, follower_value = inputs()
    assert kernels.prefill_kernels(query, key, value, 0.1, "triton") is prefill
    assert kernels.prefill_kernels(query, key, value, 0.0, "triton") is None
    assert kernels.prefill_kernels(query, key, value, 0.1, "off") is None
    assert kernels.prefill_kernels(query, key, value, 0.1, "auto") is None
    assert kernels.prefill_kernels(query.float(), key.float(), value.float(), 0.1, "triton") is None
    assert kernels.prefill_kernels(query[..., :8], key[..., :8], value[..., :8], 0.1, "triton") is None
    assert kernels.prefill_kernels(query, key[:, :, :149], value[:, :, :149], 0.1, "triton") is None
    mask = torch.ones(2, 1, 150, 150, dtype=torch.bool, device=DEVICE)
    assert kernels.lead(query, key, value, mask, scaling=None, causal=True, configured=("triton", 0.1)) is None
    assert kernels.lead(query, key, value, None, scaling=None, causal=False, configured=("triton", 0.1)) is None
    _, shared = prefill.leader_prefill(query, key, value, skip_mass=0.1)
    odd = follower_value[..., :8]
    assert error(shared.apply(odd), naive.follower_prefill(query, key, odd)) < TOLERANCE[DTYPE]
