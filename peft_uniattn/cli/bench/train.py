"""`peft-uniattn bench train`: what a training step costs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import reported
from ..output import check_output


def train(
    shape: Annotated[
        str,
        typer.Option(
            help="Random weights of a well-known shape: tiny, smollm2-135m, qwen2.5-0.5b, qwen2.5-1.5b, llama-3.2-1b, "
            "llama-3.2-3b or llama-3.1-8b."
        ),
    ] = "llama-3.2-1b",
    model: Annotated[str | None, typer.Option(help="A checkpoint's folder or Hub name instead of a shape.")] = None,
    batch_size: Annotated[int, typer.Option(help="Sequences per step.", min=1)] = 8,
    length: Annotated[int, typer.Option(help="Tokens per sequence.", min=2)] = 1024,
    superblock_size: Annotated[int, typer.Option(help="Layers per Superblock, in the top half of the layers.")] = 4,
    rank: Annotated[int, typer.Option(help="Rank of the low-rank compensation.", min=1)] = 64,
    lora_rank: Annotated[int, typer.Option(help="Rank of LoRA.", min=1)] = 16,
    dtype: Annotated[str, typer.Option(help="bfloat16 or float32; adapters keep float32 weights.")] = "bfloat16",
    attention: Annotated[str, typer.Option(help="Attention implementation.")] = "sdpa",
    gradient_checkpointing: Annotated[bool, typer.Option(help="Recompute activations, TRL's default.")] = False,
    rounds: Annotated[int, typer.Option(help="How often every contender is built and timed.", min=1)] = 3,
    warmup: Annotated[int, typer.Option(help="Steps before the timed ones.", min=1)] = 5,
    steps: Annotated[int, typer.Option(help="Timed steps per round.", min=1)] = 20,
    device: Annotated[str | None, typer.Option(help="cuda or cpu. Default: the GPU where there is one.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of weights and batch.")] = 0,
    output: Annotated[Path | None, typer.Option(help="Also write the JSON document to this file.")] = None,
) -> None:
    """
    Time training steps: stage 1 and stage 2 against LoRA and full fine-tuning of the unmodified model.

    Same process, same batch, in turns. The last line printed is one JSON document. Examples:

        peft-uniattn bench train --shape llama-3.2-1b --output train.json

        peft-uniattn bench train --shape tiny --length 64 --steps 5 --device cpu
    """
    with reported():
        check_output(output)
        # Only now: torch and transformers take seconds that --help should not.
        from ...bench.train import TrainBenchmark
        from .report import finish

        settings = {name: value for name, value in locals().items() if name in TrainBenchmark.__dataclass_fields__}
        benchmark = TrainBenchmark(**settings)
        result = benchmark.run()
        _print_table(result)
        finish(result, output)


def _print_table(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    settings, hardware = result["settings"], result["conditions"]
    tokens = settings["batch_size"] * settings["length"]
    card = Table(show_header=False, title="Conditions")
    card.add_row("model", settings["model"] or f"{settings['shape']}, random weights")
    card.add_row("batch", f"{settings['batch_size']} x {settings['length']} = {tokens:,} tokens, {settings['dtype']}")
    for name, value in hardware.items():
        card.add_row(name, str(value))
    table = Table("", "trainable", "ms a step", "by round", "tokens/s", "peak GiB", title="Training step, median")
    for name, row in result["contenders"].items():
        table.add_row(name, *_cells(row))
    console = Console()
    console.print(card, table)
    for goal in result["goals"]:
        verdict = {None: "not measured", True: "met", False: "missed"}[goal["met"]]
        ratio = "-" if goal["ratio"] is None else f"{goal['ratio']:.3f}"
        figure = goal["figure"].split("_bytes")[0].replace("_", " ")
        console.print(
            f"{figure}: {goal['contender']} / {goal['reference']} = {ratio}, aim {goal['limit']:.2f}: {verdict}"
        )


def _cells(row: dict[str, Any]) -> list[str]:
    trainable = f"{row['trainable_parameters']:,}"
    if row["step_seconds"] is None:
        return [trainable, "loss did not fall", "", "", ""]
    rounds = " ".join(f"{seconds * 1e3:.1f}" for seconds in row["step_seconds_by_round"])
    peak = "-" if row["peak_memory_bytes"] is None else f"{row['peak_memory_bytes'] / 2**30:.2f}"
    return [trainable, f"{row['step_seconds'] * 1e3:.1f}", rounds, f"{row['tokens_per_second']:,.0f}", peak]
