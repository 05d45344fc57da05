"""`peft-uniattn bench ttft`: time to the first token."""

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


def ttft(
    shape: Shape = "llama-3.1-8b",
    model: Model = None,
    length: Annotated[
        list[int] | None,
        typer.Option(help="Tokens of the prompt; repeatable. Default: 8192, minutes on a CPU."),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Prompts.", min=1)] = 1,
    superblock_size: SuperblockSize = 4,
    start_layer: StartLayer = None,
    rank: Rank = None,
    skip_mass: SkipMass = 0.0,
    kept: Kept = None,
    back_end: BackEnd = None,
    chunk: Annotated[
        int | None, typer.Option(help="Tokens of the prompt at once, with a growing cache. Default: all.", min=2)
    ] = None,
    text: Annotated[
        str | None, typer.Option(help="With --model: a file of text for prompts, so that skipping is real.")
    ] = None,
    rounds: Annotated[int, typer.Option(help="Timed forwards of every contender.", min=1)] = 7,
    tiles_gib: Annotated[
        float,
        typer.Option(help="Also measure leaders that store s in so many GiB at most: 34 at 32,768 tokens.", min=0.0),
    ] = 0.0,
    profile: Profile = False,
    dtype: Dtype = "bfloat16",
    device: Device = None,
    seed: Seed = 0,
    output: Output = None,
) -> None:
    """
    Time to the first token of base and unified model, on every attention back end, in turns.

    The last line printed is one JSON document. Examples:

        peft-uniattn bench ttft --length 8192 --length 32768 --rank 256 --output ttft.json

        peft-uniattn bench ttft --model Qwen/Qwen2.5-0.5B --length 32768 --text novel.txt --skip-mass 0.01

        peft-uniattn bench ttft --shape tiny --length 64 --device cpu --dtype float32
    """
    with reported():
        check_output(output)
        # Only now: torch and transformers take seconds that --help should not.
        from ...bench.contenders import Models
        from ...bench.ttft import TtftBenchmark
        from .report import finish, print_card, print_contenders, save

        models = Models(shape, model, superblock_size, start_layer, rank, dtype, device, seed, tuple(back_end or ()))
        lengths = tuple(length or [8192])
        options = {"chunk": chunk, "text": text, "profile": profile, "tiles_gib": tiles_gib}
        benchmark = TtftBenchmark(models, lengths, batch_size, skip_mass, kept, rounds, **options)
        result = benchmark.run(save=lambda result: save(result, output))
        print_card(result, "Time to the first token")
        for row in result["lengths"]:
            title = f"{batch_size} x {row['length']:,} tokens"
            print_contenders(row, title if chunk is None else f"{title}, {chunk:,} at once")
        finish(result, output)
