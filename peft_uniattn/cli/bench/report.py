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
    if (shape := result.get("dimensions")) is not None:
        heads = f"{shape['query_heads']}/{shape['key_value_heads']} heads of {shape['head_dim']}"
        widths = f"hidden size {shape['hidden_size']:,}, vocabulary {shape['vocab_size']:,}"
        card.add_row("shape", f"{shape['layers']} layers, {heads}, {widths}")
    blocks = " ".join(f"[{block[0]}-{block[-1]}]" for block in result["superblocks"])
    card.add_row("Superblocks", f"{blocks}, compensation {models['rank'] or 'full'}")
    for name, value in result["conditions"].items():
        if name == "measured_rates":
            value = f"{value['flops_per_s'] / 1e12:.3g} TFLOP/s, {value['bytes_per_s'] / 1e9:.0f} GB/s"
            name = "measured here"
        card.add_row(name, str(value))
    Console().print(card)


def print_contenders(row: dict[str, Any], title: str) -> None:
    """Bounds, times, rates, memory and errors of one shape, every ratio to the fastest base, and profiles."""
    for name, bounds in row["bounds_ms"].items():
        work = row["work"][name]
        by_bytes = f"{work['bytes'] / 1e9:.3g} GB in {bounds['bytes']:.2f} ms"
        by_flops = f"{work['flops'] / 1e12:.3g} TFLOP in {bounds['flops']:.2f} ms"
        Console(soft_wrap=True, highlight=False).print(f"{title}, bounds of {name}: {by_bytes}, {by_flops}")
    table = Table("", "ms", "of fastest base", "TFLOP/s", "GB/s", "peak GiB", "error", title=title)
    for name, contender in row["contenders"].items():
        table.add_row(name, *_cells(contender, row["ratios"].get(name)))
    Console().print(table)
    if (paper := row["ratios"].get("unified eager / base eager")) is not None:
        Console().print(f"unfused, as the paper compares: {paper:.3f}")
    profiles = {name: one["profile"] for name, one in row["contenders"].items() if "profile" in one}
    if profiles:
        _print_profiles(profiles)


def _print_profiles(profiles: dict[str, dict[str, Any]]) -> None:
    """Milliseconds by group of kernels, a row for each contender."""
    groups = list(dict.fromkeys(group for profile in profiles.values() for group in profile["groups_ms"]))
    table = Table("ms of one run", *groups, "between kernels, profiled", title="where the time goes")
    for name, profile in profiles.items():
        times = [profile["groups_ms"].get(group) for group in groups]
        cells = ["-" if time is None else f"{time:.3f}" for time in times]
        table.add_row(name, *cells, f"{profile['between_ms']:.3f}")
    Console().print(table)


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


def save(result: dict[str, Any], output: Path | None) -> None:
    """Write the JSON document of a result, complete or not, to the file `output` if there is one."""
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(output, _document(result) + "\n")


def finish(result: dict[str, Any], output: Path | None) -> None:
    """Print and write the JSON document; in this order, so that a full disk takes no measurement away."""
    print(_document(result))
    save(result, output)


def _document(result: dict[str, Any]) -> str:
    return json.dumps({"command": shlex.join(["peft-uniattn", *sys.argv[1:]]), **result})
