"""
The kernels for prompts against their specification in float64.

Unmarked tests are tiny and also run in Triton's interpreter (TRITON_INTERPRET=1, see test_kernels.py); those marked
`gpu` need the real thing. All memory that nobody writes is NaN here.
"""

from __future__ import annotations

import json
import os
from functools import partial
from unittest.mock import create_autospec

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from peft_uniattn.kernels import naive

pytest.importorskip("triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("needs a GPU or Triton's interpreter", allow_module_level=True)

from peft_uniattn import kernels  # noqa: E402
from peft_uniattn.bench import prefill_attention as bench  # noqa: E402
from peft_uniattn.kernels import prefill, prefill_launch, timing  # noqa: E402

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


def chunk(states, queries):
    """The same inputs with the last so many queries alone."""
    query, *others = states
    return query[:, :, -queries:], *others


def check(query, key, value, scaling=0.3):
    """Weighing, streaming, recomputing and leading are what the specification says in float64."""
    wide = [tensor.double() for tensor in (query, key, value)]
    expected = naive.follower_prefill(*wide, scaling=scaling)
    denominator = naive.leader_prefill(*wide, scaling=scaling)[1].float()
    tolerance = TOLERANCE[query.dtype]
    for store, limit in ((query.dtype, tolerance), (torch.float8_e4m3fn, FP8_TOLERANCE)):
        weights, scales, maxima = prefill_launch.weigh(query, key, denominator, scaling, store)
        assert error(prefill_launch.stream(weights, scales, value, query), expected) < limit
    assert error(prefill_launch.recompute(query, key, value, denominator, scaling), expected) < tolerance

    rows, columns = prefill_launch.WEIGH[query.shape[3]][:2]
    identity = torch.eye(key.shape[2], dtype=torch.float64, device=DEVICE).expand(*key.shape[:2], -1, -1)
    probabilities = naive.follower_prefill(*wide[:2], identity, scaling=scaling).transpose(1, 2)
    beyond = columns * maxima.shape[3] - key.shape[2]
    assert 0 <= beyond < rows + columns
    tiles = torch.nn.functional.pad(probabilities, (0, beyond, 0, -query.shape[2] % rows))
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


@pytest.mark.parametrize(
    "query_heads, kv_heads, length, queries",
    [(1, 1, 192, 64), (2, 1, 150, 70), (2, 2, 130, 129), (1, 1, 130, 3), (2, 1, 65, 33)],
)
def test_a_chunk_at_any_offset_is_the_specification(query_heads, kv_heads, length, queries):
    query, key, value, _ = chunk(inputs(1, query_heads, kv_heads, length), queries)
    check(query, key, value)


@pytest.mark.parametrize("queries", [200, 130])
def test_large_heads(queries):
    query, key, value, _ = chunk(inputs(1, 2, 1, 200, 256), queries)
    check(query, key, value, 0.06)


gpu_heads = pytest.mark.parametrize("head_dim", [64, 128, 256])
all_heads = pytest.mark.parametrize(
    "head_dim", [16, *(pytest.param(head_dim, marks=pytest.mark.gpu) for head_dim in (64, 128, 256))]
)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@gpu_heads
@pytest.mark.parametrize("query_heads, kv_heads", [(4, 4), (8, 2)])
@pytest.mark.parametrize("length", [129, 1000, 2048])
def test_tiles_are_the_specification_on_the_gpu(dtype, head_dim, query_heads, kv_heads, length):
    query, key, value, _ = inputs(2, query_heads, kv_heads, length, head_dim, dtype)
    check(query, key, value, head_dim**-0.5)


@pytest.mark.gpu
@gpu_heads
@pytest.mark.parametrize("query_heads, kv_heads", [(4, 4), (8, 2)])
@pytest.mark.parametrize("length, queries", [(1024, 512), (2048, 1000), (3001, 1024), (4999, 2), (1030, 1029)])
def test_a_chunk_at_any_offset_is_the_specification_on_the_gpu(head_dim, query_heads, kv_heads, length, queries):
    query, key, value, _ = chunk(inputs(1, query_heads, kv_heads, length, head_dim), queries)
    check(query, key, value, head_dim**-0.5)


@pytest.mark.gpu
def test_without_the_copy_engine():
    """Rows of an odd number of bytes are fetched through pointers."""
    states = inputs(1, 4, 2, 1500, 129)
    query, key, value, _ = chunk([tensor[..., :128] for tensor in states], 700)
    assert query.stride(2) * query.element_size() % 16
    check(query, key, value, 0.1)


@all_heads
def test_masses_within_any_budget_give_the_same(head_dim):
    length = 5 * prefill_launch.LEAD[head_dim].rows - 7
    query, key, value, _ = chunk(inputs(1, 2, 1, length, head_dim), length - 40)
    whole = prefill_launch.lead(query, key, value, 0.3)
    widest = query.shape[1] * whole[2].shape[3] * prefill_launch.LEAD[query.shape[3]].rows * 4
    for budget in (1, 2 * widest):
        parts = prefill_launch.lead(query, key, value, 0.3, budget=budget)
        assert all(torch.equal(*pair) for pair in zip(parts, whole, strict=True))


@pytest.mark.gpu
def test_memory_stays_within_the_budget():
    query, key, value, _ = inputs(1, 32, 8, 16384, 128)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before, budget = torch.cuda.memory_allocated(), 32 * 2**20
    outputs = prefill_launch.lead(query, key, value, 0.1, budget=budget)
    kept = sum(tensor.nbytes for tensor in outputs)
    assert torch.cuda.max_memory_allocated() - before <= kept + budget + 2**20


def test_strided_states():
    query, key, value, _ = inputs(query_heads=2, kv_heads=1)
    # (batch, length, heads, head_dim) in memory, and a slice of a longer static cache
    swapped = [states.transpose(1, 2).contiguous().transpose(1, 2) for states in (query, key, value)]
    check(*swapped)
    check(query, *(torch.cat([states] * 2, 2)[:, :, :150] for states in (key, value)))


@pytest.mark.parametrize("skip_mass, offset", [(0.02, 0), (0.3, 0), (0.3, 100), (0.02, 128)])
@all_heads
def test_followers_leave_out_no_more_than_the_bound_and_account_for_it(skip_mass, offset, head_dim):
    tuning = prefill_launch.RECOMPUTE[head_dim]
    rows, columns = tuning[:2]
    states = concentrated(columns, batch=1, length=5 * rows - 7, head_dim=head_dim)
    query, key, value, follower_value = chunk(states, 5 * rows - 7 - offset)
    output, shared = prefill.leader_prefill(query, key, value, offset=offset, skip_mass=skip_mass)
    wide = [tensor.double() for tensor in (query, key, value)]
    assert error(output.transpose(1, 2), naive.leader_prefill(*wide)[0]) < TOLERANCE[DTYPE]
    tiles = shared.kept.shape[2]
    kept = torch.zeros(shared.kept.shape, dtype=torch.bool, device=DEVICE)
    for place in torch.cartesian_prod(*(torch.arange(size) for size in shared.count.shape)).tolist():
        kept[tuple(place)][shared.kept[tuple(place)][: shared.count[tuple(place)]].long()] = True
    assert kept.sum() < 0.85 * 4 * prefill_launch.tiles_of(tiles, offset, tuning)
    length = query.shape[2]
    visible = kept.repeat_interleave(rows, 2).repeat_interleave(columns, 3)[:, :, :length, : key.shape[2]]

    ones = torch.ones(*key.shape[:3], 1, dtype=torch.float64, device=DEVICE)
    held = naive.follower_prefill(*wide[:2], ones, visible=visible).squeeze(-1).transpose(1, 2)
    allowed = shared.dropped.repeat_interleave(rows, 2)[:, :, :length]
    assert (1 - held <= allowed + 1e-3).all()
    assert (shared.dropped <= skip_mass).all()
    expected = naive.follower_prefill(*wide[:2], follower_value.double(), visible=visible)
    assert error(shared.apply(follower_value), expected) < TOLERANCE[DTYPE]


@pytest.mark.parametrize("offset", [0, 43])
@all_heads
def test_a_longer_static_cache_is_cut_to_what_is_filled(offset, head_dim):
    query, key, value, follower_value = chunk(inputs(1, head_dim=head_dim), 150 - offset)
    longer = [torch.nn.functional.pad(states, (0, 0, 0, 50), value=float("nan")) for states in (key, value)]
    output, shared = prefill.leader_prefill(query, *longer, offset=offset, skip_mass=0.1)
    expected, exact = prefill.leader_prefill(query, key, value, offset=offset, skip_mass=0.1)
    assert torch.equal(output, expected)
    padded = torch.nn.functional.pad(follower_value, (0, 0, 0, 50), value=float("nan"))
    assert torch.equal(shared.apply(padded), exact.apply(follower_value))


def causal_mask(rows, columns, offset, batch=2):
    mask = torch.ones(rows, columns, dtype=torch.bool, device=DEVICE).tril(offset)
    return mask.repeat(batch, 1, 1, 1)


def test_the_mask_of_a_chunk_tells_its_offset():
    assert prefill.causal_offset(causal_mask(5, 12, 7)) == 7
    assert prefill.causal_offset(causal_mask(5, 12, 0)) == 0
    assert prefill.causal_offset(causal_mask(5, 20, 3)) == 3  # a static cache
    assert prefill.causal_offset(causal_mask(5, 12, 7, batch=1).expand(3, -1, -1, -1)) == 7


@pytest.mark.parametrize("row, column, visible", [(0, 0, 0), (4, 3, 0), (2, 9, 0), (2, 10, 1), (4, 12, 1), (0, 14, 1)])
def test_a_mask_with_any_other_entry_is_not_a_chunk(row, column, visible):
    mask = causal_mask(5, 15, 7)
    mask[1, 0, row, column] = bool(visible)
    assert prefill.causal_offset(mask) is None


def test_other_masks_are_not_chunks():
    window = causal_mask(5, 12, 7) & ~causal_mask(5, 12, 3)
    padded = causal_mask(5, 12, 7)
    padded[:, :, :, :2] = False
    additive = torch.zeros(2, 1, 5, 12, device=DEVICE).masked_fill(~causal_mask(5, 12, 7), -torch.inf)
    for mask in (window, padded, additive, causal_mask(5, 12, 11), causal_mask(5, 12, 8), causal_mask(5, 3, 0)):
        assert prefill.causal_offset(mask) is None


def dispatched(states, mask, causal=True, mode="triton", **options):
    return kernels.lead(*states, mask, scaling=None, causal=causal, configured=(mode, 0.1), **options)


def test_a_chunk_is_recognised_by_its_mask():
    query, key, value, _ = chunk(inputs(2, 2, 1), 70)
    mask, asked = causal_mask(70, 150, 80), []

    def once(function, tensor):
        asked.append((function, tensor))
        return function(tensor)

    output, shared = dispatched((query, key, value), mask, causal=False, once=once)
    ((function, tensor),) = asked
    assert function is prefill.causal_offset
    assert tensor is mask
    wide = [tensor.double() for tensor in (query, key, value)]
    assert error(output, naive.follower_prefill(*wide)) < TOLERANCE[DTYPE]
    assert shared.query.shape[2] == 70
    assert dispatched((query, key, value), torch.ones_like(mask)) is None
    assert dispatched((query, key, value), mask, mode="auto") is None


@pytest.fixture
def timed(monkeypatch):
    """Has prompts of 128 tokens tried, and its value in place of what one layer takes."""
    monkeypatch.setattr(kernels, "_WORTH_TRYING", 128)
    monkeypatch.setattr(kernels, "_WORTH_WEIGHING", 30)
    monkeypatch.setattr(kernels, "_trials", timing.Trials())
    times = [timing.Times(10.0, 11.0, 12.0)]
    monkeypatch.setattr(timing, "measure", lambda *contenders: times[0])
    return times


def tried(states, mask=None, **options):
    options = {"leader": torch.nn.Identity(), "followers": 3, "back_end": lambda: None, **options}
    return dispatched(states, mask, mode="auto", **options)


def test_of_itself_a_chunk_is_led_where_it_sees_enough(timed):
    query, key, value, _ = chunk(inputs(1, 1, 1), 30)
    states = query, key, value
    assert tried(states, causal_mask(30, 150, 120, batch=1)) is not None
    assert tried(states, causal_mask(30, 150, 97, batch=1)) is None  # 127 positions are filled
    assert tried((query[:, :, :29], key, value), causal_mask(29, 150, 121, batch=1)) is None
    assert dispatched(states, causal_mask(30, 150, 120, batch=1), mode="auto") is None


@pytest.mark.parametrize("queries", [150, 70])
def test_the_share_of_tiles_that_followers_recompute(queries):
    query, key, value, _ = chunk(inputs(2, 2, 1), queries)
    _, everything = prefill.leader_prefill(query, key, value, offset=150 - queries, skip_mass=0.0)
    assert everything.kept_share() == pytest.approx(1.0)
    count = everything.count.clone()
    count[1] = 0
    assert everything._replace(count=count).kept_share() == pytest.approx(0.5)


def test_where_most_tiles_count_followers_keep_to_their_back_end(timed, monkeypatch):
    states, leader = inputs(1, 1, 1)[:3], torch.nn.Identity()
    monkeypatch.setattr(prefill.SharedTiles, "kept_share", lambda shared: 0.84)  # 10.1 of 10 ms
    output, shared = tried(states, leader=leader)
    assert shared is None
    exact, meant = dispatched(states, None)
    assert torch.equal(output, exact)
    assert meant is not None
    assert tried(states, leader=leader) is None
    monkeypatch.setattr(prefill.SharedTiles, "kept_share", lambda shared: 0.83)
    assert tried(states)[1] is not None


def test_what_a_layer_takes_is_timed_on_the_spot():
    query, key, value, _ = inputs(1, 1, 1)
    times = timing.measure(value, lambda: None, lambda: prefill.leader_prefill(query, key, value, skip_mass=0.1))
    assert times.fused < times.weighing
    assert times.recomputing > 0


@pytest.mark.gpu
def test_of_itself_a_long_prompt_skips_where_its_followers_gain(monkeypatch):
    monkeypatch.setattr(kernels, "_trials", timing.Trials())
    size = {"batch": 1, "query_heads": 32, "kv_heads": 8, "length": 16384, "head_dim": 128}

    def leading(states, leader):
        back_end = partial(scaled_dot_product_attention, *states, is_causal=True, enable_gqa=True)
        return tried(states, leader=leader, followers=12, back_end=back_end)

    *states, value = concentrated(128, **size)
    output, shared = leading(states, torch.nn.Identity())
    (times,) = kernels._trials._times.values()
    assert times.fused < times.weighing
    assert times.saved(12, shared.kept_share()) > 0
    exact = scaled_dot_product_attention(*states, is_causal=True, enable_gqa=True).transpose(1, 2)
    assert error(output, exact) < 2 * TOLERANCE[DTYPE]
    assert shared.apply(value).isfinite().all()

    *states, _ = inputs(**size)
    everywhere = torch.nn.Identity()
    assert leading(states, everywhere)[1] is None
    assert leading(states, everywhere) is None
    assert len(kernels._trials._times) == 1


def chosen(query, key, value, mask=None, skip_mass=0.1, mode="triton"):
    return kernels.prefill_kernels(query, key, value, mask, skip_mass, mode)


def test_what_is_not_supported_is_left_to_pytorch():
    query, key, value, follower_value = inputs(1, 2, 1)
    assert chosen(query, key, value) is prefill
    assert chosen(query, key, value, skip_mass=0.0) is None
    assert chosen(query, key, value, mode="off") is None
    assert chosen(query, key, value, mode="auto") is None
    assert chosen(query.float(), key.float(), value.float()) is None
    assert chosen(query[..., :8], key[..., :8], value[..., :8]) is None
    assert chosen(query, key[:, :, :149], value[:, :, :149]) is None
    assert chosen(query, key, value, causal_mask(150, 150, 0)) is prefill
    assert chosen(query, key, value, causal_mask(150, 151, 0)) is None
    assert dispatched((query, key, value), torch.ones(1, 1, 150, 150, dtype=torch.bool, device=DEVICE)) is None
    assert dispatched((query, key, value), None, causal=False) is None
    _, shared = prefill.leader_prefill(query, key, value, skip_mass=0.1)
    odd = follower_value[..., :8]
    assert error(shared.apply(odd), naive.follower_prefill(query, key, odd)) < TOLERANCE[DTYPE]


def measured(length=70, kept=0.5, stored=True):
    """What the benchmark of one layer says of a tiny one."""
    device = torch.device(DEVICE)
    return bench.measure(length, kept, 2, 1, 16, rounds=1, stored=stored, device=device, dtype=DTYPE)


@pytest.fixture
def tiny_benchmark(monkeypatch):
    """A short Superblock, a stand-in for PyTorch's fused attention, and narrow tiles for head_dim 16."""
    monkeypatch.setattr(bench, "_LONG_SUPERBLOCK", 3)
    monkeypatch.setattr(bench, "_fused", lambda *states: naive.follower_prefill(*states[:3]))
    for tunings in (prefill_launch.STORE, prefill_launch.STREAM_STORED):
        monkeypatch.setitem(tunings, 16, prefill_launch.Tuning(64, 32, 4, 2))


def test_the_benchmark_of_one_layer_compares_ways_to_the_same(tiny_benchmark):
    rows = measured()["contenders"]
    assert len(rows) == 7 + 7 + 7 + 6
    assert all("median_ms" in row for row in rows.values())
    errors = {name: row["relative_error"] for name, row in rows.items() if row["relative_error"] is not None}
    assert len(errors) == 4 + 3 * 3
    fp8 = {name for name in errors if name.endswith(" fp8") and "cudnn" not in name}
    assert max(errors[name] for name in fp8) < FP8_TOLERANCE
    assert max(errors[name] for name in errors.keys() - fp8) < 2 * TOLERANCE[DTYPE]


def test_the_benchmark_of_one_layer_need_not_store(tiny_benchmark):
    assert len(measured(stored=False)["contenders"]) == 7


def test_the_benchmark_of_one_layer_says_that_tiles_do_not_fit(tiny_benchmark, monkeypatch):
    def full(*_, **options):
        raise torch.OutOfMemoryError("no room for tiles")

    monkeypatch.setattr(bench, "_computed", lambda *_: {})
    monkeypatch.setattr(prefill_launch, "weigh", full)
    rows = measured()["contenders"]
    without_time = {name for name, row in rows.items() if "median_ms" not in row}
    assert {rows[name]["relative_error"] for name in without_time} == {"OutOfMemoryError: no room for tiles"}
    assert all("cudnn" in name for name in rows.keys() - without_time)


def test_the_command_of_the_benchmark_of_one_layer_ends_in_one_document(monkeypatch, capsys):
    row = {"length": 64, "contenders": {"flash": {"relative_error": 0.0}}, "followers_to_pay": None}
    measure = create_autospec(bench.measure, return_value=row)
    monkeypatch.setattr(bench, "measure", measure)
    monkeypatch.setattr(bench, "conditions", lambda device: {})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    bench.main([64, 96], rounds=3, stored=False)
    assert [call.args[0] for call in measure.call_args_list] == [64, 96]
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert document["rounds"] == 3
    assert document["lengths"] == [row, row]


@pytest.mark.parametrize("saved, followers", [(8.0, 1), (6.25, 2), (2.2, 3), (0.0, None), (-1.0, None)])
def test_the_benchmark_counts_the_followers_that_make_up_for_weighing(saved, followers):
    times = {"cudnn": 14.7, "flash": 25.1, "leader, weighing": 20.9, "selection": 0.05}
    times["recomputing 0.4"] = 14.7 - saved
    rows = {name: {"median_ms": time} for name, time in times.items()}
    assert bench.followers_to_pay(rows, 0.4) == followers
    assert bench.followers_to_pay({**rows, "leader, weighing": {"relative_error": "red"}}, 0.4) is None


@pytest.fixture
def tiles_kept():
    """Lets a test say how many GiB tiles may take."""
    with kernels.tiles_kept(0):
        yield kernels.keep_tiles


@pytest.mark.parametrize("query_heads, kv_heads, length", [(2, 2, 64), (4, 2, 150), (3, 1, 2)])
@all_heads
def test_followers_stream_what_the_leader_of_a_whole_prompt_stored(query_heads, kv_heads, length, head_dim):
    query, key, value, follower_value = inputs(1, query_heads, kv_heads, length, head_dim)
    output, shared = prefill.leader_stored(query, key, value, scaling=0.3)
    wide = [tensor.double() for tensor in (query, key)]
    assert error(output, naive.follower_prefill(*wide, value.double(), scaling=0.3)) < TOLERANCE[DTYPE]
    padded = torch.nn.functional.pad(follower_value, (0, 0, 0, 5), value=float("nan"))  # a static cache
    expected = naive.follower_prefill(*wide, follower_value.double(), scaling=0.3)
    assert error(shared.apply(padded), expected) < 2 * TOLERANCE[DTYPE]
    assert error(shared.apply(padded[..., :8]), expected[..., :8]) < 2 * TOLERANCE[DTYPE]


def test_tiles_are_stored_within_the_budget_and_where_they_pay(tiles_kept, monkeypatch):
    states = inputs(1, 2, 1, 70)[:3]

    def stores(mode="triton", followers=12, mask=None, causal=True, skip_mass=0.0):
        led = kernels.lead(
            *states, mask, scaling=None, causal=causal, configured=(mode, skip_mass), followers=followers
        )
        return led is not None and isinstance(led[1], prefill.StoredTiles)

    assert not stores()
    tiles_kept((2 * 70 * 70 - 1) / 2**30)
    assert not stores()
    tiles_kept(2 * 70 * 70 / 2**30)
    assert stores()
    assert not stores("off")
    assert not stores("auto")
    assert not stores(causal=False)
    assert not stores(mask=causal_mask(70, 70, 0, batch=1))
    assert not stores(skip_mass=0.1)
    monkeypatch.setattr(kernels, "_WORTH_STORING", ((70, 9),))
    assert stores("auto", 9)
    assert not stores("auto", 8)
    monkeypatch.setattr(kernels, "_STORED_HEAD_DIM", 8)
    assert not stores("auto", 9)


def test_a_prompt_too_short_of_queries_is_not_stored(tiles_kept):
    tiles_kept(1)
    query, key, value, _ = chunk(inputs(1, 2, 1, 70), 30)
    assert kernels.lead(query, key, value, None, scaling=None, causal=True, configured=("triton", 0.0)) is None


@pytest.mark.parametrize("gib", ["much", "-1", -0.5, "nan"])
def test_a_budget_for_tiles_that_makes_no_sense_is_refused(gib, tiles_kept):
    with pytest.raises(ValueError, match=r"UNIATTN_TILES_GIB=.* must be a number of GiB, or 0 to store no tiles"):
        tiles_kept(gib)


def test_receipts_say_that_tiles_are_stored(tiles_kept):
    assert "tiles" not in kernels.describe("auto")
    tiles_kept("1.5")
    assert kernels.describe("auto").endswith(", tiles of s in up to 1.5 GiB")
