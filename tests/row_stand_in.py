"""Stands in for rows of a table that are trained in a process of their own: it notes the device that it was given."""

import os


def write_row(folder, cells, seed):
    """Write a result, or return the one that is there, as rows do."""
    (cell,) = cells
    result = folder / f"{cell.name}-{seed}"
    if not result.exists():
        if cell.name == "broken":
            raise ValueError("broken")
        result.write_text(f"{cell.name} on {os.environ['CUDA_VISIBLE_DEVICES']}")
    return result.read_text()
