"""What the commands of `peft-uniattn bench` print: a card, a table, and one JSON document as the last line."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ...training.journal import write_atomically


def print_card(result: dict[str, Any], title: str) -> None:
    """What was measured, on what."""
    card = Table(show_header=False, title=title)
    models = result["settings"]["models"]
    card.add_row("model", models["model"] or f"{models['shape']}, random weights, {models['dtype']}")
    blocks = " ".join(f"[{block[0]}-{block[-1]}]" for block in result["superblocks"])
    card.add_row("Superblocks", f"{blocks}, compensation {models['rank'] or 'full'}")
    for name, value in result["conditions"].items():
        if name == "measured_rates":
            value = f"{value['flops_per_s'] / 1e12:.1f} TFLOP/s, {value['bytes_per_s'] / 1e9:.0f} GB/s"
            name = "measured here"
        card.add_row(name, str(value))
    Console().print(card)


def print_contenders(row: dict[str, Any], title: str) -> None:
    """Times, rates, memory and errors of one shape, and every ratio to the fastest base."""
    bounds = ", ".join(f"{name} {value:.2f} ms" for name, value in row["bound_ms"].items())
    table = Table(
        "", "ms", "of fastest base", "TFLOP/s", "GB/s", "peak GiB", "error", title=f"{title}; bound: {bounds}"
    )
    for name, contender in row["contenders"].items():
        table.add_row(name, *_cells(contender, row["ratios"].get(name)))
    Console().print(table)
    if (paper := row["ratios"].get("unified eager / base eager")) is not None:
        Console().print(f"unfused, as the paper compares: {paper:.3f}")


def _cells(contender: dict[str, Any], ratio: float | None) -> list[str]:
    error, peak = contender["relative_error"], contender["peak_memory_bytes"]
    error = error if isinstance(error, str) else f"{error:.1e}"
    if "median_ms" not in contender:
        return ["no time", "", "", "", "", error]
    return [
        f"{contender['median_ms']:.2f}",
        "" if ratio is None else f"{ratio:.3f}",
        f"{contender['tflop_per_s']:.3g}",
        f"{contender['gb_per_s']:.0f}",
        "-" if peak is None else f"{peak / 2**30:.1f}",
        error,
    ]


def save(result: dict[str, Any], output: Path | None) -> str:
    """The JSON document of a result, complete or not; also in the file `output` if there is one."""
    text = json.dumps({"command": shlex.join(["peft-uniattn", *sys.argv[1:]]), **result})
    if output is not None:
        write_atomically(output, text + "\n")
    return text


def finish(result: dict[str, Any], output: Path | None) -> None:
    """Write and print the JSON document."""
    print(save(result, output))
