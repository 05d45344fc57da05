"""`peft-uniattn plan`: what sharing would save and cost, before anything is downloaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .analyze.options import FollowerMask, Superblocks
from .bench.options import Dtype, StartLayer, SuperblockSize
from .errors import reported

if TYPE_CHECKING:
    from ..forecast import Forecast, Serving
    from ..forecast.forecast import Step
    from ..forecast.verdict import Verdict


def plan(
    model: Annotated[
        str,
        typer.Argument(help="A checkpoint's folder, its name on the Hub, or a shape of peft-uniattn bench."),
    ],
    batch_size: Annotated[int, typer.Option(help="Sequences that are decoded at a time.", min=1)] = 16,
    context: Annotated[int, typer.Option(help="Cached tokens of each sequence.", min=1)] = 8192,
    superblock_size: SuperblockSize = 4,
    start_layer: StartLayer = None,
    superblocks: Superblocks = None,
    follower_mask: FollowerMask = "own",
    rank: Annotated[int, typer.Option(help="Rank of the compensation to compare with the full one.", min=1)] = 64,
    dtype: Dtype = "bfloat16",
    gb_per_s: Annotated[
        float, typer.Option(help="Memory bandwidth in GB/s. Default: what a large copy reaches on an H100.")
    ] = 3000.0,
    weight_bits: Annotated[
        float | None, typer.Option(help="Bits of a quantized weight, scales included, such as 4.5.")
    ] = None,
    cache_bits: Annotated[float | None, typer.Option(help="Bits of a quantized cache's numbers, such as 8.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Where to draw it: .svg, .png or .pdf.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document instead of tables.")] = False,
) -> None:
    """
    Show which layers would share softmax, what that saves and costs, and whether it is worth it.

    No weights are loaded, only the configuration. Examples:

        peft-uniattn plan Qwen/Qwen2.5-7B --batch-size 32 --context 16384

        peft-uniattn plan llama-3.1-8b --weight-bits 4.5 --cache-bits 8 --plot plan.svg
    """
    with reported():
        from ..forecast import Serving, forecast
        from ..forecast.verdict import judge
        from .analyze.options import plan_config

        if plot is not None:
            from ..forecast.plot import check_format
            from ..forecast.plot import plot as draw

            check_format(plot)
        serving = Serving(batch_size, context, dtype, gb_per_s, weight_bits, cache_bits)
        config = plan_config(superblock_size, start_layer, superblocks, follower_mask, None)
        found = forecast(model, config, serving, rank=rank)
        verdict = judge(found)
        if plot is not None:
            draw(found, plot)
        if as_json:
            typer.echo(json.dumps(found.to_dict() | {"verdict": vars(verdict)}))
            return
        _print(found, verdict)
        if plot is not None:
            typer.echo(f"written: {plot}")


def _print(found: Forecast, verdict: Verdict) -> None:
    from rich.console import Console
    from rich.table import Table

    serving = found.serving
    card = Table(show_header=False, title=f"Plan for {found.model}")
    card.add_row("Superblocks", str(found.plan))
    card.add_row("followers", f"{len(found.plan.followers)} of {found.plan.num_layers} layers")
    before, after = found.kv_bytes_per_token, found.kv_bytes_per_token_unified
    card.add_row("KV cache per token", f"{before:,} → {after:,} bytes ({after / before:.2%}), {_stored_as(serving)}")
    load = f"{serving.batch_size} × {serving.context:,} tokens, {serving.gb_per_s:,.0f} GB/s"
    card.add_row("removed", f"{found.removed_parameters:,} parameters of query and key projections")
    table = Table("", "W_c", "its FLOPs", "weights GB", "KV GB", "ms", "of base")
    table.title = f"Bound on a decoded token, {load}"
    table.add_row("base", "–", "–", *_read(found.base), "1.000")
    for one in found.unified:
        name = "full W_c" if one.rank is None else f"rank {one.rank}"
        mib = serving.stored_weights(one.compensation_parameters * serving.bits // 8) / 2**20
        cost = f"{one.compensation_parameters / 1e6:,.1f} M, {mib:,.1f} MiB"
        share = f"{one.compensation_flops_share:.2%}"
        table.add_row(name, cost, share, *_read(one), f"{one.time_ratio:.3f}")
    console = Console()
    console.print(card, table)
    console.print(verdict.headline, style="bold")
    for reason in verdict.reasons:
        console.print(f"- {reason}", highlight=False)


def _stored_as(serving: Serving) -> str:
    return serving.dtype if serving.cache_bits is None else f"{serving.cache_bits:g} bits"


def _read(step: Step) -> list[str]:
    return [f"{step.weight_bytes / 1e9:.2f}", f"{step.kv_bytes / 1e9:.2f}", f"{step.bound_ms:.2f}"]
