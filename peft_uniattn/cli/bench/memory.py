"""`peft-uniattn bench memory`: what the KV cache takes."""

from __future__ import annotations

from typing import Annotated

import typer

from ..errors import reported
from ..output import check_output
from .options import Device, Dtype, Model, Output, Seed, Shape, StartLayer, SuperblockSize


def memory(
    shape: Shape = "llama-3.1-8b",
    model: Model = None,
    length: Annotated[int, typer.Option(help="Tokens of the prompt.", min=1)] = 1024,
    superblock_size: SuperblockSize = 4,
    start_layer: StartLayer = None,
    dtype: Dtype = "bfloat16",
    device: Device = None,
    seed: Seed = 0,
    output: Output = None,
) -> None:
    """
    Measure the KV cache of base and unified model in bytes per token.

    The last line printed is one JSON document. Example:

        peft-uniattn bench memory --shape llama-3.1-8b --device cpu
    """
    with reported():
        check_output(output)
        # Only now: torch and transformers take seconds that --help should not.
        from rich.console import Console
        from rich.table import Table

        from ...bench.contenders import Models
        from ...bench.memory import MemoryBenchmark
        from .report import finish, print_card

        models = Models(shape, model, superblock_size, start_layer, None, dtype, device, seed)
        result = MemoryBenchmark(models, length).run()
        print_card(result, "KV cache")
        table = Table("", "followers", "bytes per token, in the cache", "by the allocator", "counted")
        for name, row in result["contenders"].items():
            allocated = row.get("allocated_bytes_per_token")
            table.add_row(
                name,
                str(row["followers"]),
                f"{row['cache_bytes_per_token']:,.0f}",
                "-" if allocated is None else f"{allocated:,.0f}",
                f"{row['counted_bytes_per_token']:,}",
            )
        Console().print(table)
        finish(result, output)
