"""`peft-uniattn analyze depth`."""

from __future__ import annotations

from typing import Annotated

import typer

from . import options
from .run import Request, run


def depth(
    model: options.Model = None,
    dataset: options.Data = None,
    length: options.Length = 256,
    sequences: options.Count = 64,
    held_out: options.HeldOut = 16,
    superblock_size: options.SuperblockSize = 4,
    start_layer: options.FirstLeader = None,
    superblocks: options.Superblocks = None,
    follower_mask: options.FollowerMask = "own",
    rank: options.Rank = None,
    method: options.CalibrationMethod = "ridge",
    max_dropped: Annotated[int | None, typer.Option(help="Most followers to bypass. Default: all.", min=0)] = None,
    batch_size: options.BatchSize = 8,
    ttft_length: options.FirstTokenLength = 512,
    ttft_repetitions: options.Repetitions = 5,
    dtype: options.Dtype = "float32",
    attn: options.Attention = None,
    device: options.Device = None,
    threads: options.Threads = None,
    seed: options.Seed = 0,
    output: options.Output = None,
    plot: options.Plot = None,
) -> None:
    """
    Bypass the attention of more and more followers of a calibrated model, those first whose input and output are most
    alike (the paper's Figure 5), against held-out loss, accuracy and time to first token.

    Example:

        peft-uniattn analyze depth --dataset instructions.jsonl --output depth.json --plot depth.svg
    """
    own = {
        "method": method,
        "max_dropped": max_dropped,
        "batch_size": batch_size,
        "ttft_length": ttft_length,
        "ttft_repetitions": ttft_repetitions,
    }

    def measure(base, data):
        from ...analysis.depth import DepthSettings
        from ...analysis.depth import depth as measure_depth

        plan = options.plan_config(superblock_size, start_layer, superblocks, follower_mask, rank)
        return measure_depth(base, plan, data, DepthSettings(**own))

    request = Request(
        analysis="depth",
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
        settings={**own, "follower_mask": follower_mask, "rank": rank},
    )
    run(request, measure)
