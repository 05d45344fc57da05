"""Stands in for a row of a table that is trained in a process of its own: it notes the device that it was given."""

import os


def write_row(folder, cell, seed):
    """Write a result, or return the one that is there, as a row does."""
    result = folder / f"{cell.name}-{seed}"
    if not result.exists():
        if cell.name == "broken":
            raise ValueError("broken")
        result.write_text(f"{cell.name} on {os.environ['CUDA_VISIBLE_DEVICES']}")
    return result.read_text()
