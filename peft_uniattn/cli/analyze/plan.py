"""`peft-uniattn analyze plan`."""

from __future__ import annotations

from typing import Annotated

import typer

from . import options
from .run import Request, run


def plan(
    model: options.Model = None,
    dataset: options.Data = None,
    followers: Annotated[int | None, typer.Option(help="How many layers shall follow.")] = None,
    kv_target: Annotated[float | None, typer.Option(help="Share of the KV cache to leave, such as 0.8.")] = None,
    method: Annotated[str, typer.Option(help="Choose by calibration 'error', 'similarity' or 'loss'.")] = "error",
    max_size: Annotated[int, typer.Option(help="Most layers per Superblock.", min=2)] = 4,
    start_layer: Annotated[int, typer.Option(help="Lowest layer that may be used.")] = 0,
    end_layer: Annotated[int | None, typer.Option(help="Where the layers that may be used stop.")] = None,
    follower_mask: options.FollowerMask = "own",
    length: options.Length = 256,
    sequences: options.Count = 64,
    held_out: Annotated[
        int, typer.Option(help="Score the plan, the paper's fixed one and similar layers on so many sequences.", min=0)
    ] = 0,
    batch_size: options.BatchSize = 8,
    dtype: options.Dtype = "float32",
    attn: options.Attention = None,
    device: options.Device = None,
    threads: options.Threads = None,
    seed: options.Seed = 0,
    output: options.Output = None,
    plot: options.Plot = None,
) -> None:
    """
    Choose the Superblocks that cost a model least on your data, for a number of followers or a KV cache of a given
    size; with --held-out, calibrate and score it against fixed Superblocks of 4 layers from the top.

    Example:

        peft-uniattn analyze plan --kv-target 0.8 --dataset instructions.jsonl --held-out 16 --plot plan.svg
    """
    budget = {"followers": followers, "kv_target": kv_target}
    rules = {
        "method": method,
        "max_size": max_size,
        "start_layer": start_layer,
        "end_layer": end_layer,
        "follower_mask": follower_mask,
    }

    def measure(base, data):
        from ...analysis.choice import measure_choice

        return measure_choice(base, data, **budget, **rules, batch_size=batch_size)

    request = Request(
        analysis="plan",
        model=model,
        dataset=dataset,
        length=length,
        sequences=sequences,
        held_out=held_out,
        batch_size=batch_size,
        dtype=dtype,
        attn=attn,
        device=device,
        threads=threads,
        seed=seed,
        output=output,
        plot=plot,
        settings={**budget, **rules},
    )
    run(request, measure)
