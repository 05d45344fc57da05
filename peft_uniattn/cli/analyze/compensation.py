"""`peft-uniattn analyze compensation`."""

from __future__ import annotations

from typing import Annotated

import typer

from . import options
from .run import Request, run


def compensation(
    model: options.Model = None,
    dataset: options.Data = None,
    length: options.Length = 720,
    sequences: options.Count = 16,
    held_out: options.HeldOut = 8,
    superblock_size: options.SuperblockSize = 4,
    start_layer: options.FirstLeader = None,
    superblocks: options.Superblocks = None,
    follower_mask: options.FollowerMask = "own",
    rank: Annotated[list[int], typer.Option(help="Ranks to compare with the full matrix; may be repeated.", min=1)] = (
        64,
        16,
    ),
    batch_size: options.BatchSize = 2,
    dtype: options.Dtype = "float32",
    attn: options.Attention = None,
    device: options.Device = None,
    threads: options.Threads = None,
    seed: options.Seed = 0,
    output: options.Output = None,
    plot: options.Plot = None,
) -> None:
    """
    What compensation leaves of every follower's error, in % of the error before it, on long samples (the paper's
    Appendix G), where it was fitted and held out; by pseudoinverse, by ridge, and at low ranks.

    Example:

        peft-uniattn analyze compensation --dataset book.txt --length 2048 --output compensation.json
    """

    def measure(base, data):
        from ...analysis.compensation import Variant
        from ...analysis.compensation import compensation as measure_compensation

        plan = options.plan_config(superblock_size, start_layer, superblocks, follower_mask, None)
        variants = [Variant("pseudoinverse", None), Variant("ridge", None), *(Variant("ridge", r) for r in rank)]
        return measure_compensation(base, plan, data, variants, batch_size=batch_size)

    request = Request(
        analysis="compensation",
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
        settings={"ranks": list(rank), "follower_mask": follower_mask},
    )
    run(request, measure)
