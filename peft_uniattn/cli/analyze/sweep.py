"""`peft-uniattn analyze sweep`."""

from __future__ import annotations

from typing import Annotated

import typer

from . import options
from .run import Request, run


def sweep(
    model: options.Model = None,
    dataset: options.Data = None,
    length: options.Length = 256,
    sequences: options.Count = 64,
    held_out: options.HeldOut = 16,
    superblock_size: Annotated[int, typer.Option(help="Layers per Superblock while their number varies.", min=2)] = 4,
    followers: Annotated[int, typer.Option(help="Followers while the size varies.", min=1)] = 12,
    vary: Annotated[str, typer.Option(help="What to vary: 'number', 'size' or 'both'.")] = "both",
    rank: options.Rank = None,
    method: options.CalibrationMethod = "ridge",
    follower_mask: options.FollowerMask = "own",
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
    Number and size of Superblocks against held-out loss, accuracy and time to first token (the paper's Figure 4), of
    calibrated models before any training.

    Example:

        peft-uniattn analyze sweep --dataset instructions.jsonl --output sweep.json --plot sweep.svg
    """
    settings = {
        "superblock_size": superblock_size,
        "followers": followers,
        "vary": vary,
        "rank": rank,
        "method": method,
        "follower_mask": follower_mask,
        "batch_size": batch_size,
        "ttft_length": ttft_length,
        "ttft_repetitions": ttft_repetitions,
    }

    def measure(base, data):
        from ...analysis.sweep import SweepSettings
        from ...analysis.sweep import sweep as measure_sweep

        return measure_sweep(base, data, SweepSettings(**settings))

    request = Request(
        analysis="sweep",
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
        settings=settings,
    )
    run(request, measure)
