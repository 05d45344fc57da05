"""
Prefill attention of one layer: what a leader and its followers could do, against fused attention in the same process.

    python -m peft_uniattn.bench.prefill_attention --length 8192 --length 32768 --kept 0.4

Every way to compute a follower is checked against the leader's own attention first; a wrong one gets no time. The last
line of the output is one JSON document.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Annotated

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


def main(
    length: Annotated[list[int], typer.Option(help="Tokens; repeatable.")] = (8192, 32768),
    kept: Annotated[float, typer.Option(help="Share of the tiles that skipping followers keep.", max=1.0)] = 0.4,
    query_heads: Annotated[int, typer.Option(min=1)] = 32,
    kv_heads: Annotated[int, typer.Option(min=1)] = 8,
    head_dim: Annotated[int, typer.Option(min=16)] = 128,
    rounds: Annotated[int, typer.Option(min=1)] = 20,
) -> None:
    """Time prefill attention of one layer. Defaults: the attention of Llama-3.1-8B at two lengths."""
    if not torch.cuda.is_available():
        raise typer.BadParameter("this benchmark needs a CUDA device")
    device = torch.device("cuda")
    result = {"benchmark": "prefill_attention", "conditions": conditions(device), "kept": kept, "rounds": rounds}
    result["lengths"] = [measure(one, kept, query_heads, kv_heads, head_dim, rounds) for one in length]
    for row in result["lengths"]:
        print(f"{row['length']} tokens")
        for name, entry in row["contenders"].items():
            time = f"{entry['median_ms']:9.3f} ms" if "median_ms" in entry else "  no time"
            print(f"  {name:34} {time}  {entry['relative_error']}")
    print(json.dumps(result))


@torch.no_grad()
def measure(length: int, kept: float, query_heads: int, kv_heads: int, head_dim: int, rounds: int) -> dict:
    """Errors and times of one length."""
    generator = torch.Generator("cuda").manual_seed(0)

    def random(heads: int) -> torch.Tensor:
        shape = 1, heads, length, head_dim
        return torch.randn(shape, device="cuda", dtype=torch.bfloat16, generator=generator)

    query, key, value = random(query_heads), random(kv_heads), random(kv_heads)
    scaling = head_dim**-0.5
    expected, denominator, maxima = launch.lead(query, key, value, scaling)
    share = _random_share(maxima, kept, generator)
    # With the gate of those whose result is known.
    runs: dict[str, tuple[Callable[[], torch.Tensor], float | None]] = {
        "cudnn": (lambda: _fused(query, key, value, SDPBackend.CUDNN_ATTENTION), _GATE),
        "flash": (lambda: _fused(query, key, value, SDPBackend.FLASH_ATTENTION), _GATE),
        "leader, weighing": (lambda: launch.lead(query, key, value, scaling)[0], _GATE),
        "weighing alone": (lambda: launch.weigh(query, key, denominator, scaling)[2], None),
        "selection": (lambda: decode_launch.select(maxima.unsqueeze(-1), None, 0.01)[2], None),
        "recomputing": (lambda: launch.recompute(query, key, value, denominator, scaling), _GATE),
        f"recomputing {kept}": (lambda: launch.recompute(query, key, value, denominator, scaling, *share), None),
    }
    for name, store, gate in (("fp8", torch.float8_e4m3fn, _FP8_GATE), ("bf16", torch.bfloat16, _GATE)):
        runs |= _stored(query, key, value, denominator, scaling, name, store, gate, share, kept)
    rows, green = {}, {}
    for name, (run, gate) in runs.items():
        result = run()
        error = None if gate is None else ((result.float() - expected.float()).norm() / expected.float().norm()).item()
        rows[name] = {"relative_error": error}
        if gate is None or error < gate:
            green[name] = run
    for name, times in medians(green, query.device, rounds).items():
        rows[name] |= times
    return {"length": length, "contenders": rows}


def _fused(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, kind: SDPBackend) -> torch.Tensor:
    with sdpa_kernel(kind):
        return scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True).transpose(1, 2)


def _stored(query, key, value, denominator, scaling, name, store, gate, share, kept) -> dict:
    """Storing tiles in one type, and streaming all or some of them."""
    held: list[torch.Tensor] = []

    def weigh() -> torch.Tensor:
        held.clear()  # first: twice the tiles of a long prompt do not fit into a GPU's memory
        held.extend(launch.weigh(query, key, denominator, scaling, store))
        return held[2]

    weigh()
    return {
        f"storing {name}": (weigh, None),
        f"streaming {name}": (lambda: launch.stream(held[0], held[1], value, query), gate),
        f"streaming {name} {kept}": (lambda: launch.stream(held[0], held[1], value, query, *share), None),
    }


def _random_share(maxima: torch.Tensor, kept: float, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Kept lists and counts of a random share of the visible tiles."""
    drawn = (torch.rand(maxima.shape, device=maxima.device, generator=generator) < kept) & (maxima > 0)
    return decode_launch.select(drawn.float().unsqueeze(-1), None, 0.0)[:2]


if __name__ == "__main__":
    typer.run(main)
