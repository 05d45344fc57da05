"""Accuracy against the cache that is left, a point per row."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from .cell import CellResult


def plot(results: Sequence[CellResult], path: Path, *, caption: str) -> None:
    """
    Draw mean accuracy (with the standard deviation over seeds) against KV bytes per token.

    Args:
        results: of the rows.
        path: where the picture goes; its ending decides the format.
        caption: the conditions, below the picture.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.4, 4.4), layout="constrained")
    rows: dict[str, list[CellResult]] = {}
    for result in results:
        rows.setdefault(result.cell, []).append(result)
    for index, (name, found) in enumerate(rows.items()):
        means = [result.mean_accuracy for result in found]
        error = statistics.stdev(means) if len(means) > 1 else None
        marker = "osD^vP*Xhp<>8d"[index % 14]
        axes.errorbar(
            found[0].kv_bytes / 1024,
            statistics.mean(means),
            yerr=error,
            fmt=marker,
            capsize=3,
            color="0.2",
            label=name,
        )
    axes.set_xlabel("KV cache, KiB per token")
    axes.set_ylabel("mean accuracy, %")
    axes.legend(fontsize="small", ncols=2)
    figure.supxlabel(caption, fontsize="x-small")
    figure.savefig(path)
    pyplot.close(figure)
