"""Options that several commands of `peft-uniattn bench` have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Shape = Annotated[
    str,
    typer.Option(
        help="Random weights of a well-known shape: tiny, smollm2-135m, qwen2.5-0.5b, qwen2.5-1.5b, llama-3.2-1b, "
        "llama-3.2-3b or llama-3.1-8b."
    ),
]
Model = Annotated[str | None, typer.Option(help="A checkpoint's folder or Hub name instead of a shape.")]
SuperblockSize = Annotated[int, typer.Option(help="Layers per Superblock.", min=2)]
StartLayer = Annotated[int | None, typer.Option(help="First leader. Default: half of the layers.")]
Rank = Annotated[int | None, typer.Option(help="Rank of the compensation. Default: full.", min=1)]
Dtype = Annotated[str, typer.Option(help="bfloat16, float16 or float32.")]
Device = Annotated[str | None, typer.Option(help="cuda or cpu. Default: the GPU where there is one.")]
Seed = Annotated[int, typer.Option(help="Seed of weights and inputs.")]
SkipMass = Annotated[
    float, typer.Option(help="Also measure followers that leave out so much of a row's mass.", min=0.0)
]
Kept = Annotated[
    float | None,
    typer.Option(help="With --skip-mass: keep this share of the tiles, drawn at random, as random weights need all."),
]
BackEnd = Annotated[
    list[str] | None,
    typer.Option(
        help="Attention back end to measure: eager or sdpa, on a GPU eager, sdpa flash, sdpa cudnn or sdpa efficient; "
        "repeatable. Default: all."
    ),
]
Profile = Annotated[
    bool,
    typer.Option("--profile", help="Also show where the time goes: attention, products, the rest, between kernels."),
]
Output = Annotated[Path | None, typer.Option(help="Also write the JSON document to this file.")]
