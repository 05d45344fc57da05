"""
Prefill attention of one layer: what a leader and its followers could do, against fused attention in the same process.

    python -m peft_uniattn.bench.prefill_attention --length 8192 --length 32768 --kept 0.4

Every way to compute a follower is checked against the leader's own attention first; a wrong one gets no time. The last
line of the output is one JSON document.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Annotated, NamedTuple

import torch
import typer
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from ..kernels import decode_launch
from ..kernels import prefill_launch as launch
from .conditions import conditions
from .contenders import medians

# Relative error in the Euclidean norm against the leader's own output.
_GATE, _FP8_GATE = 6e-3, 4e-2
# Layers of the largest Superblock in the benchmarks of whole models.
_LONG_SUPERBLOCK = 13

# What a contender runs, and the gate of those whose result is known.
Contender = tuple[Callable[[], torch.Tensor], float | None]


class Tiles(NamedTuple):
    """A way to store s: its type, and how kernels that store and stream it are launched."""

    name: str
    store: torch.dtype
    storing: launch.Tuning
    streaming: launch.Tuning


def main(
    length: Annotated[list[int], typer.Option(help="Tokens; repeatable.")] = (8192, 32768),
    kept: Annotated[float, typer.Option(help="Share of the tiles that skipping followers keep.", max=1.0)] = 0.4,
    query_heads: Annotated[int, typer.Option(min=1)] = 32,
    kv_heads: Annotated[int, typer.Option(min=1)] = 8,
    head_dim: Annotated[int, typer.Option(min=16)] = 128,
    rounds: Annotated[int, typer.Option(min=1)] = 20,
    stored: Annotated[bool, typer.Option(help="Also store tiles of s, which takes 34 GB at 32k tokens.")] = True,
    load: Annotated[float, typer.Option(help="Seconds that each contender runs before it is timed.", min=0)] = 0.1,
) -> None:
    """Time prefill attention of one layer. Defaults: the attention of Llama-3.1-8B at two lengths."""
    if not torch.cuda.is_available():
        raise typer.BadParameter("this benchmark needs a CUDA device")
    device = torch.device("cuda")
    result = {"benchmark": "prefill_attention", "conditions": conditions(device), "kept": kept, "rounds": rounds}
    result |= {"load": load, "query_heads": query_heads, "kv_heads": kv_heads, "head_dim": head_dim, "lengths": []}
    for one in length:
        row = measure(one, kept, query_heads, kv_heads, head_dim, rounds, stored, device, load=load)
        result["lengths"].append(row)
        print(f"{row['length']} tokens")
        for name, entry in row["contenders"].items():
            time = f"{entry['median_ms']:9.3f} ms" if "median_ms" in entry else "  no time"
            print(f"  {name:34} {time}  {entry['relative_error']}")
        print(f"  weighing pays from {row['followers_to_pay']} followers on, keeping {kept}", flush=True)
    print(json.dumps(result))


@torch.no_grad()
def measure(
    length: int,
    kept: float,
    query_heads: int,
    kv_heads: int,
    head_dim: int,
    rounds: int,
    stored: bool,
    device: torch.device,
    dtype: torch.dtype = torch.bfloat16,
    load: float = 0.0,
) -> dict:
    """Errors and times of one length."""
    generator = torch.Generator(device).manual_seed(0)

    def random(heads: int) -> torch.Tensor:
        return torch.randn(1, heads, length, head_dim, device=device, dtype=dtype, generator=generator)

    states = random(query_heads), random(kv_heads), random(kv_heads)
    scaling = head_dim**-0.5
    expected, denominator, maxima = launch.lead(*states, scaling)
    share = _random_share(maxima, kept, generator)
    rows = _timed(_computed(states, denominator, maxima, scaling, share, kept), expected, rounds, load)
    for tiles in kinds_of_tiles(head_dim, dtype) if stored else ():
        # One kind after the other: two do not fit into a GPU's memory.
        held: list[torch.Tensor] = []
        rows |= _timed(_stored(states, denominator, scaling, tiles, share, kept, held), expected, rounds, load)
        held.clear()
    return {"length": length, "contenders": rows, "followers_to_pay": followers_to_pay(rows, kept)}


def _timed(contenders: dict[str, Contender], expected: torch.Tensor, rounds: int, load: float) -> dict[str, dict]:
    """Errors, and the times of those that are right, in turns; those that do not run say why."""
    rows, green = {}, {}
    for name, (run, gate) in contenders.items():
        try:
            result = run()
        except RuntimeError as failure:
            rows[name] = {"relative_error": f"{type(failure).__name__}: {str(failure).splitlines()[0][:160]}"}
            continue
        error = None if gate is None else ((result.float() - expected.float()).norm() / expected.float().norm()).item()
        rows[name] = {"relative_error": error}
        if gate is None or error < gate:
            green[name] = run
    for name, times in medians(green, expected.device, rounds, load).items():
        rows[name] |= times
    return rows


def _computed(states, denominator, maxima, scaling, share, kept) -> dict[str, Contender]:
    """Whatever stores no s."""
    recomputed = (*states, denominator, scaling)
    return {
        "cudnn": (lambda: _fused(*states, SDPBackend.CUDNN_ATTENTION), _GATE),
        "flash": (lambda: _fused(*states, SDPBackend.FLASH_ATTENTION), _GATE),
        "leader, weighing": (lambda: launch.lead(*states, scaling)[0], _GATE),
        "weighing alone": (lambda: launch.weigh(*states[:2], denominator, scaling)[2], None),
        "selection": (lambda: decode_launch.select(maxima.unsqueeze(-1), None, 0.01)[2], None),
        "recomputing": (lambda: launch.recompute(*recomputed), _GATE),
        f"recomputing {kept}": (lambda: launch.recompute(*recomputed, *share), None),
    }


def _stored(states, denominator, scaling, tiles: Tiles, share, kept, held) -> dict[str, Contender]:
    """Storing tiles of one kind, streaming them, and a long Superblock of both; `held` has the tiles."""
    query, key, value = states
    name, gate = tiles.name, _FP8_GATE if tiles.store.itemsize == 1 else _GATE

    def weigh(denominator: torch.Tensor = denominator, **options) -> torch.Tensor:
        held.clear()  # first: twice the tiles of a long prompt do not fit into a GPU's memory
        held.extend(launch.weigh(query, key, denominator, scaling, tiles.store, tuning=tiles.storing, **options))
        return held[2]

    def stream(*share: torch.Tensor) -> torch.Tensor:
        if not held:  # where storing failed, say so here too
            weigh()
        return launch.stream(held[0], held[1], value, query, *share, tuning=tiles.streaming)

    def superblock() -> torch.Tensor:
        weigh(launch.attend(*states, scaling)[1], mass=False)
        for _ in range(_LONG_SUPERBLOCK - 1):
            output = stream()
        return output

    def fused() -> torch.Tensor:
        for _ in range(_LONG_SUPERBLOCK):
            output = _fused(*states, SDPBackend.CUDNN_ATTENTION)
        return output

    contenders = {
        f"storing {name}": (weigh, None),
        f"storing {name} by pointers": (lambda: weigh(by_pointers=True), None),
        f"storing {name} without weighing": (lambda: weigh(mass=False), None),
        f"streaming {name}": (stream, gate),
        f"Superblock of {_LONG_SUPERBLOCK}, {name}": (superblock, gate),
        f"{_LONG_SUPERBLOCK} layers of cudnn, beside {name}": (fused, _GATE),
    }
    if tiles.storing.columns == launch.RECOMPUTE[query.shape[3]].columns:  # as those of `share`
        contenders[f"streaming {name} {kept}"] = (lambda: stream(*share), None)
    return contenders


def kinds_of_tiles(head_dim: int, dtype: torch.dtype = torch.bfloat16) -> list[Tiles]:
    """What s is stored as."""
    wide = launch.WEIGH[head_dim], launch.STREAM[head_dim]
    narrow = launch.STORE[head_dim], launch.STREAM_STORED[head_dim]
    kinds = [Tiles("fp8", torch.float8_e4m3fn, *wide), Tiles("bf16", dtype, *wide)]
    return kinds if narrow == wide else [*kinds, Tiles("narrow bf16", dtype, *narrow)]


def _fused(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, kind: SDPBackend) -> torch.Tensor:
    with sdpa_kernel(kind):
        return scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True).transpose(1, 2)


def followers_to_pay(rows: dict[str, dict], kept: float) -> int | None:
    """With how many followers a leader that weighs its tiles saves time, keeping that share; None: never."""
    times = {name: row["median_ms"] for name, row in rows.items() if "median_ms" in row}
    fused = [times[name] for name in ("cudnn", "flash") if name in times]
    if not fused or not {"leader, weighing", "selection", f"recomputing {kept}"} <= times.keys():
        return None
    spent = times["leader, weighing"] + times["selection"] - min(fused)
    saved = min(fused) - times[f"recomputing {kept}"]
    return max(1, math.floor(spent / saved) + 1) if saved > 0 else None


def _random_share(maxima: torch.Tensor, kept: float, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Kept lists and counts of a random share of the visible tiles."""
    drawn = (torch.rand(maxima.shape, device=maxima.device, generator=generator) < kept) & (maxima > 0)
    return decode_launch.select(drawn.float().unsqueeze(-1), None, 0.0)[:2]


if __name__ == "__main__":
    typer.run(main)
