"""
Prints what `peft-uniattn bench train --output FILE` measured as a Markdown table:

    python docs/make_train_table.py docs/results/train_llama-3.2-1b.json
"""

import json
import sys
from pathlib import Path

REFERENCES = {"stage 2": "full fine-tuning"}
LORA = "LoRA on all linear layers"


def table(result: dict) -> str:
    """One row per contender: figures, and ratios to what it is compared with."""
    rows = result["contenders"]
    lines = [
        "| | trainable | step, ms | tokens/s | peak memory, GiB | step and memory against |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        reference = LORA if name.startswith("stage 1") else REFERENCES.get(name)
        figures = f"{row['trainable_parameters']:,} | {_times(row, 1e3, 'step_seconds')} | "
        figures += f"{_times(row, 1, 'tokens_per_second')} | {_times(row, 2**-30, 'peak_memory_bytes')}"
        lines.append(f"| {name} | {figures} | {_against(row, rows[reference], reference) if reference else ''} |")
    return "\n".join(lines)


def conditions(result: dict) -> str:
    """What the table holds for, as one line."""
    settings = result["settings"]
    batch = f"{settings['batch_size']} x {settings['length']} tokens, {settings['dtype']}, {settings['attention']}"
    checkpointing = "with" if settings["gradient_checkpointing"] else "without"
    versions = ", ".join(f"{name} {value}" for name, value in result["conditions"].items())
    model = settings["model"] or f"{settings['shape']} (random weights)"
    return f"{model}, {batch}, {checkpointing} gradient checkpointing, seed {settings['seed']}; {versions}."


def _times(row: dict, factor: float, figure: str) -> str:
    return "-" if row[figure] is None else f"{row[figure] * factor:,.2f}"


def _against(row: dict, other: dict, name: str) -> str:
    ratios = [
        "-" if row[figure] is None or other[figure] is None else f"{row[figure] / other[figure]:.3f}"
        for figure in ("step_seconds", "peak_memory_bytes")
    ]
    return f"{name}: {', '.join(ratios)}"


if __name__ == "__main__":
    for path in map(Path, sys.argv[1:]):
        result = json.loads(path.read_text())
        print(f"`{result['command']}`\n\n{conditions(result)}\n\n{table(result)}\n")
