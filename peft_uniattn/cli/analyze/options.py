"""Options that the analyses have in common, and what they mean."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from ...config import UniAttnConfig

Model = Annotated[
    str | None, typer.Option(help="Path or Hub name of a causal language model. Default: SmolLM2-135M-Instruct.")
]
Data = Annotated[
    str | None,
    typer.Option(
        "--dataset",
        help="Text (.txt, .raw, .md, or a column 'text') or instruction data: a file, also .gz, or a Hub name. "
        "Default: Python's own reference manual.",
    ),
]
Length = Annotated[int, typer.Option(help="Tokens per sequence.", min=2)]
Count = Annotated[int, typer.Option("--sequences", help="Sequences to calibrate or measure on.", min=1)]
HeldOut = Annotated[int, typer.Option(help="Sequences to score on.", min=1)]
BatchSize = Annotated[int, typer.Option(help="Sequences per forward pass.", min=1)]
Dtype = Annotated[str, typer.Option(help="Data type of the weights: float32, bfloat16 or float16.")]
Attention = Annotated[
    str | None, typer.Option("--attn", help="Attention back end, such as eager. Default: the model's own choice.")
]
Device = Annotated[str | None, typer.Option(help="Where to compute. Default: the GPU if there is one, else the CPU.")]
Threads = Annotated[int | None, typer.Option(help="CPU threads. Default: as torch decides.", min=1)]
Seed = Annotated[int, typer.Option(help="Decides which sequences are used.")]
Output = Annotated[Path | None, typer.Option(help="Where to write the result as JSON.")]
Plot = Annotated[Path | None, typer.Option(help="Where to draw the result: .svg, .png or .pdf.")]
FirstLeader = Annotated[int | None, typer.Option("--start-layer", help="First leader. Default: half of the layers.")]
SuperblockSize = Annotated[int, typer.Option(help="Layers per Superblock.", min=2)]
Superblocks = Annotated[
    str | None,
    typer.Option(help="Explicit Superblocks as first-last layers, such as 16-19,20-23. Overrides size and start."),
]
Rank = Annotated[int | None, typer.Option(help="Rank of the compensation. Default: full.", min=1)]
CalibrationMethod = Annotated[str, typer.Option("--method", help="Calibration: ridge or pseudoinverse.")]
FollowerMask = Annotated[str, typer.Option(help="'own' or 'leader', for models that mix full and sliding attention.")]
FirstTokenLength = Annotated[int, typer.Option("--ttft-length", help="Tokens of the prompt that is timed.", min=1)]
Repetitions = Annotated[int, typer.Option("--ttft-repetitions", help="How often the prompt is timed.", min=1)]


def plan_config(
    superblock_size: int, start_layer: int | None, superblocks: str | None, follower_mask: str, rank: int | None
) -> UniAttnConfig:
    """
    The configuration that the options of a plan mean.

    Raises:
        ValueError: if they mean none.
    """
    from ...config import UniAttnConfig
    from ...named import parse_superblocks

    return UniAttnConfig(
        task_type="CAUSAL_LM",
        superblock_size=superblock_size,
        start_layer=start_layer,
        superblocks=None if superblocks is None else parse_superblocks(superblocks),
        follower_mask=follower_mask,
        r=rank,
    )
