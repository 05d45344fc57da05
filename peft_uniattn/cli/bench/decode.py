"""`peft-uniattn bench decode`: time of one decoded token."""

from __future__ import annotations

from typing import Annotated

import typer

from ..errors import reported
from ..output import check_output
from .options import (
    BackEnd,
    Device,
    Dtype,
    Kept,
    Model,
    Output,
    Profile,
    Rank,
    Seed,
    Shape,
    SkipMass,
    StartLayer,
    SuperblockSize,
)


def decode(
    shape: Shape = "llama-3.1-8b",
    model: Model = None,
    batch_size: Annotated[
        list[int] | None, typer.Option(help="Sequences; repeatable, together with --length. Default: 16.")
    ] = None,
    length: Annotated[list[int] | None, typer.Option(help="Cached tokens; repeatable. Default: 8192.")] = None,
    superblock_size: SuperblockSize = 4,
    start_layer: StartLayer = None,
    rank: Rank = None,
    skip_mass: SkipMass = 0.0,
    kept: Kept = None,
    back_end: BackEnd = None,
    rounds: Annotated[int, typer.Option(help="Timed steps of every contender.", min=1)] = 20,
    compile: Annotated[
        bool, typer.Option("--compile", help="Compile the decoder layers of every contender, kind by kind.")
    ] = False,
    profile: Profile = False,
    dtype: Dtype = "bfloat16",
    device: Device = None,
    seed: Seed = 0,
    output: Output = None,
) -> None:
    """
    Time of one decoded token of base and unified model, on every fused attention back end, in turns.

    On a GPU from CUDA graphs. With --compile, what base and unified model have in common (norms, rotary embedding,
    cache writes) takes less of both. The last line printed is one JSON document. Examples:

        peft-uniattn bench decode --batch-size 16 --length 8192 --batch-size 32 --length 8192 --output decode.json

        peft-uniattn bench decode --compile --rank 256 --skip-mass 0.01 --kept 0.45 --back-end "sdpa cudnn"

        peft-uniattn bench decode --shape tiny --batch-size 2 --length 256 --rounds 3 --device cpu --dtype float32
    """
    with reported():
        check_output(output)
        # Only now: torch and transformers take seconds that --help should not.
        from ...bench.contenders import Models
        from ...bench.decode import DecodeBenchmark
        from .report import finish, print_card, print_contenders, save

        batches, lengths = batch_size or [16], length or [8192]
        if len(batches) != len(lengths):
            raise ValueError(
                f"{len(batches)} times --batch-size, {len(lengths)} times --length; give every one a mate"
            )
        models = Models(shape, model, superblock_size, start_layer, rank, dtype, device, seed, tuple(back_end or ()))
        shapes = tuple(zip(batches, lengths, strict=True))
        compiler = "inductor" if compile else None
        benchmark = DecodeBenchmark(models, shapes, skip_mass, kept, rounds, compiler, profile)
        result = benchmark.run(save=lambda result: save(result, output))
        print_card(result, "One decoded token")
        for row in result["shapes"]:
            print_contenders(row, f"{row['batch_size']} x {row['length']:,} tokens")
        finish(result, output)
