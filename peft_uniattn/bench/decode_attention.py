"""
Decode attention of one layer: leader and follower kernels against the best fused attention of the same process.

    python -m peft_uniattn.bench.decode_attention --batch 16 --length 8192 --batch 1 --length 131072

Contenders are replayed from CUDA graphs, in turn, over more inputs than the L2 cache holds; a contender whose result
is wrong gets no time. The last line of the output is one JSON document.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from typing import Annotated

import torch
import typer
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from ..attention import apply_probabilities, decode_probabilities
from ..kernels import decode_kernels, naive, use

_TYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
# Relative error in the Euclidean norm; one rounding of everything in these types is about half as much.
_GATE = {"bfloat16": 5e-3, "float16": 1e-3}
_SHAPES = {"batch": [16, 32, 1, 4, 1], "length": [8192, 8192, 32768, 32768, 131072]}
_FUSED = ("sdpa cudnn", "sdpa flash", "flex decoding")


@dataclass
class Layer:
    """Random inputs of one layer, shapes as in `kernels.naive`, and its s, as the kernel and as one tensor."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    shared: object = None
    probabilities: torch.Tensor | None = None

    @property
    def states(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.query, self.key, self.value


# What a contender computes: from the number of a layer (of the rotation) to its output.
Contender = Callable[[int], torch.Tensor]


def main(
    batch: Annotated[list[int], typer.Option(help="Sequences; may be repeated, together with --length.")] = (),
    length: Annotated[list[int], typer.Option(help="Key positions.")] = (),
    query_heads: Annotated[int, typer.Option(min=1)] = 32,
    kv_heads: Annotated[int, typer.Option(min=1)] = 8,
    head_dim: Annotated[int, typer.Option(min=16)] = 128,
    dtype: Annotated[str, typer.Option(help="bfloat16 or float16.")] = "bfloat16",
    superblock_size: Annotated[int, typer.Option(min=2)] = 4,
    rounds: Annotated[int, typer.Option(help="Replays of every contender; the median counts.", min=3)] = 60,
    flex: Annotated[bool, typer.Option(help="Also compile FlexDecoding, which takes some seconds a shape.")] = True,
) -> None:
    """Time decode attention of one layer, per shape. Defaults: the attention of Llama-3.1-8B at five shapes."""
    if not torch.cuda.is_available():
        raise typer.BadParameter("this benchmark needs a CUDA device")
    if dtype not in _TYPES or len(batch) != len(length):
        raise typer.BadParameter("dtype is bfloat16 or float16, and every --batch has its --length")
    use("triton")
    result = {"benchmark": "decode_attention", "conditions": conditions(), "dtype": dtype, "rounds": rounds}
    result["superblock_size"] = superblock_size
    print(json.dumps(result["conditions"], indent=1))
    result["copy_gb_per_s"] = copy_bandwidth()
    print(f"copy of 4 GiB: {result['copy_gb_per_s']:.0f} GB/s, read and written bytes together\n")
    heads = query_heads, kv_heads, head_dim
    result["shapes"] = []
    for shape in zip(batch or _SHAPES["batch"], length or _SHAPES["length"], strict=True):
        row = measure(*shape, *heads, dtype, superblock_size, rounds, flex, result["copy_gb_per_s"])
        print_card(row)
        result["shapes"].append(row)
    result["host_us_per_call"] = host_time(*heads, _TYPES[dtype])
    print("host time of one call outside of a graph, us:", result["host_us_per_call"])
    print(json.dumps(result))


def conditions() -> dict:
    """What the numbers hold for."""
    gpu = torch.cuda.get_device_properties(0)
    versions = {"torch": torch.__version__, "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    hardware = {"gpu": gpu.name, "multiprocessors": gpu.multi_processor_count, "l2_mb": gpu.L2_cache_size // 10**6}
    return hardware | versions | {"triton": version("triton")}


def copy_bandwidth(elements: int = 2**31, repeats: int = 20) -> float:
    """GB/s of a large device-to-device copy of random numbers, read and written bytes together."""
    source = torch.empty(elements, dtype=torch.bfloat16, device="cuda").normal_()
    target = torch.empty_like(source)
    times = [_timed(lambda: target.copy_(source)) for _ in range(repeats)]
    torch.cuda.synchronize()
    microseconds = statistics.median(start.elapsed_time(stop) * 1e3 for start, stop in times[2:])
    return 4 * elements / microseconds / 1e3


def measure(batch, length, query_heads, kv_heads, head_dim, dtype, superblock_size, rounds, flex, copy_rate) -> dict:
    """Errors, times, achieved bandwidths and the goals' ratios of one shape."""
    half = batch * kv_heads * length * head_dim * _TYPES[dtype].itemsize
    shared = batch * query_heads * length * _TYPES[dtype].itemsize
    count = max(superblock_size, -(-8 * torch.cuda.get_device_properties(0).L2_cache_size // half))
    generator = torch.Generator("cuda").manual_seed(0)

    def random(heads, positions):
        shape = batch, heads, positions, head_dim
        return torch.randn(shape, device="cuda", dtype=_TYPES[dtype], generator=generator)

    layers = [Layer(random(query_heads, 1), random(kv_heads, length), random(kv_heads, length)) for _ in range(count)]
    contenders, failed = _contenders(layers, superblock_size, flex)
    traffic = {"leader": 2 * half + shared, "follower": half + shared, "pytorch follower": half + shared}
    traffic |= dict.fromkeys((*_FUSED, "pytorch leader"), 2 * half)
    traffic["superblock"] = traffic["leader"] + (superblock_size - 1) * traffic["follower"]

    # Memory that nobody has written is NaN in this mode.
    torch.use_deterministic_algorithms(True, warn_only=True)
    last = {name: layers[superblock_size - 1 if name == "superblock" else 0].value for name in contenders}
    errors = {name: _error(contender(0), layers[0], last[name]) for name, contender in contenders.items()}
    torch.use_deterministic_algorithms(False)
    green = {name: contender for name, contender in contenders.items() if errors[name] < _GATE[dtype]}
    elements = traffic["follower"] // 4
    memory = torch.empty(count, 2, elements, dtype=torch.bfloat16, device="cuda").normal_()
    green["copy of a follower's bytes"] = lambda index: torch.mul(memory[index, 0], 1, out=memory[index, 1])
    traffic["copy of a follower's bytes"] = 4 * elements
    graphs = {name: _graph(contender, count) for name, contender in green.items()}
    times = _medians(graphs, graphs["copy of a follower's bytes"], count, rounds)

    row = {"batch": batch, "length": length, "query_heads": query_heads, "kv_heads": kv_heads, "head_dim": head_dim}
    row |= {"inputs_in_rotation": count, "gate": _GATE[dtype], "not_available": failed, "contenders": {}}
    for name in (*contenders, "copy of a follower's bytes"):
        entry = {"relative_error": errors.get(name), "bytes": traffic[name]}
        if name in times:
            entry |= times[name] | {"gb_per_s": traffic[name] / times[name]["median_us"] / 1e3}
        row["contenders"][name] = entry
    row["bound_us"] = {name: traffic[name] / copy_rate / 1e3 for name in ("leader", "follower", "superblock")}
    return row | {"ratios": _ratios(times, traffic, superblock_size, copy_rate)}


def _contenders(layers: list[Layer], superblock_size: int, flex: bool) -> tuple[dict[str, Contender], dict[str, str]]:
    """All that run here, and why the others do not."""
    if (kernels := decode_kernels(*layers[0].states)) is None:
        raise typer.BadParameter("the kernels do not support this shape here; see kernels.decode.supports")
    for layer in layers:
        layer.shared = kernels.leader_decode(*layer.states)[1]
        layer.probabilities = layer.shared.probabilities()

    def superblock(index):
        output, shared = kernels.leader_decode(*layers[index].states)
        for follower in range(1, superblock_size):
            output = kernels.follower_decode(shared, layers[(index + follower) % len(layers)].value)
        return output

    def pytorch_leader(index):
        layer = layers[index]
        probabilities = decode_probabilities(layer.query, layer.key, None, None)
        return apply_probabilities(probabilities, layer.value).transpose(1, 2)

    def fused(backend):
        def attention(index):
            with sdpa_kernel(backend):
                return scaled_dot_product_attention(*layers[index].states, enable_gqa=True)

        return attention

    candidates = {
        "sdpa cudnn": fused(SDPBackend.CUDNN_ATTENTION),
        "sdpa flash": fused(SDPBackend.FLASH_ATTENTION),
        "leader": lambda index: kernels.leader_decode(*layers[index].states)[0],
        "follower": lambda index: kernels.follower_decode(layers[index].shared, layers[index].value),
        "superblock": superblock,
        "pytorch leader": pytorch_leader,
        "pytorch follower": lambda index: apply_probabilities(
            layers[index].probabilities, layers[index].value
        ).transpose(1, 2),
    }
    if flex:
        from torch.nn.attention.flex_attention import flex_attention

        # Every shape is compiled anew; torch.compile gives up after eight.
        torch.compiler.reset()
        compiled = torch.compile(flex_attention, dynamic=False)
        candidates["flex decoding"] = lambda index: compiled(*layers[index].states, enable_gqa=True)
    failed = {}
    for name, contender in candidates.items():
        try:
            contender(0)
        except Exception as error:
            failed[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
    return {name: contender for name, contender in candidates.items() if name not in failed}, failed


def _error(actual: torch.Tensor, layer: Layer, value: torch.Tensor) -> float:
    """Relative error of s·value with the layer's s, against float64; NaN counts as infinite."""
    difference = norm = 0.0
    for sequence in range(layer.query.shape[0]):
        one = slice(sequence, sequence + 1)
        _, probabilities = naive.leader_decode(layer.query[one].double(), layer.key[one].double(), value[one].double())
        expected = naive.follower_decode(probabilities, value[one].double())
        difference += (actual[one].double() - expected).square().sum().item()
        norm += expected.square().sum().item()
    error = (difference / norm) ** 0.5
    return error if error == error else float("inf")


def _graph(contender: Contender, count: int) -> torch.cuda.CUDAGraph:
    """All layers of the rotation once, as one graph."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for index in range(count):
            contender(index)
    return graph


def _medians(graphs: dict[str, torch.cuda.CUDAGraph], rinse: torch.cuda.CUDAGraph, count: int, rounds: int) -> dict:
    """Quartiles of the microseconds per call, contenders in turn, each with what `rinse` leaves in the L2 cache."""
    times = {name: [] for name in graphs}
    for number in range(rounds + 2):
        for name, graph in graphs.items():
            rinse.replay()
            start, stop = _timed(graph.replay)
            torch.cuda.synchronize()
            if number >= 2:
                times[name].append(start.elapsed_time(stop) * 1e3 / count)
    quartiles = ("lower_quartile_us", "median_us", "upper_quartile_us")
    return {name: dict(zip(quartiles, statistics.quantiles(values), strict=True)) for name, values in times.items()}


def _timed(work: Callable[[], object]) -> tuple[torch.cuda.Event, torch.cuda.Event]:
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    work()
    stop.record()
    return start, stop


def _ratios(times: dict, traffic: dict, superblock_size: int, copy_rate: float) -> dict:
    """What the goals speak of; empty where the gate left nothing to compare."""
    fused = {name: times[name]["median_us"] for name in _FUSED if name in times}
    if not fused or not {"leader", "follower", "superblock"} <= times.keys():
        return {}
    best = min(fused, key=fused.get)
    leader, follower, superblock = (times[name]["median_us"] for name in ("leader", "follower", "superblock"))
    return {
        "best_fused": best,
        "leader_over_fused": leader / fused[best],
        "fused_over_follower": fused[best] / follower,
        "superblock_over_fused": superblock / fused[best] / superblock_size,
        "follower_share_of_copy_bandwidth": traffic["follower"] / follower / 1e3 / copy_rate,
    }


def print_card(row: dict) -> None:
    """One shape as a table."""
    print("batch {batch}, length {length}, heads {query_heads}/{kv_heads}, head_dim {head_dim}".format(**row))
    bounds = ", ".join(f"{name} {value:.1f} us" for name, value in row["bound_us"].items())
    print(f"  bound by bytes at copy bandwidth: {bounds}")
    for name, entry in row["contenders"].items():
        error = "" if entry["relative_error"] is None else f"error {entry['relative_error']:.1e}"
        time_ = (
            f"{entry['median_us']:9.2f} us {entry['gb_per_s']:6.0f} GB/s" if "median_us" in entry else "RED: no time"
        )
        print(f"  {name:28} {time_}  {error}")
    for name, reason in row["not_available"].items():
        print(f"  {name:28} not available: {reason}")
    for name, value in row["ratios"].items():
        print(f"  {name:34} {value if isinstance(value, str) else format(value, '.3f')}")
    print(flush=True)


def host_time(
    query_heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, calls: int = 300
) -> dict[str, float]:
    """Microseconds that one call costs the host, at a size at which the device is not what one waits for."""

    def random(heads, length):
        return torch.randn(1, heads, length, head_dim, device="cuda", dtype=dtype)

    layer = Layer(random(query_heads, 1), random(kv_heads, 256), random(kv_heads, 256))
    contenders, _ = _contenders([layer], 4, flex=False)
    result = {}
    for name, contender in contenders.items():
        contender(0)
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(calls):
            contender(0)
        result[name] = round((time.perf_counter() - begin) / calls * 1e6, 1)
    return result


if __name__ == "__main__":
    with torch.no_grad():
        typer.run(main)
