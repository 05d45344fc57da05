"""Pictures of a table: accuracy against the cache that is left, and losses on the way."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .cell import CellResult
from .curves import EVALUATIONS, HELD_OUT, TRAINING
from .table import by_cell

_MARKERS = "osD^vP*Xhp<>8d"
_LINES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)))
# Logged training losses that are averaged: a single one is of one batch.
_SMOOTH = 5

# Tables of Figure 4, and what their rows differ in.
SWEEPS = {"number": "number of Superblocks", "size": "layers per Superblock"}


def plot(results: Sequence[CellResult], path: Path, *, caption: str) -> None:
    """
    Draw mean accuracy (with the standard deviation over seeds), a line a row, those of one size of cache together.

    Args:
        results: of the rows.
        path: where the picture goes; its ending decides the format.
        caption: the conditions, below the picture.
    """
    rows = sorted(by_cell(results).values(), key=lambda found: (found[0].kv_bytes, _mean_accuracy(found)))
    with _figure(path, caption, size=(7, 1.2 + 0.27 * len(rows))) as (_, (axes,)):
        for height, found in enumerate(rows):
            means = [result.mean_accuracy for result in found]
            spread = statistics.stdev(means) if len(means) > 1 else None
            axes.errorbar(statistics.mean(means), height, xerr=spread, fmt="o", ms=5, capsize=3, color="0.2")
            if height and found[0].kv_bytes != rows[height - 1][0].kv_bytes:
                axes.axhline(height - 0.5, color="0.85", linewidth=1)
        axes.set_yticks(
            range(len(rows)), [f"{found[0].cell}, {found[0].kv_bytes / 1024:.3g} KiB per token" for found in rows]
        )
        axes.grid(axis="x", color="0.9")
        axes.set_xlabel("mean accuracy, %")


def _mean_accuracy(found: Sequence[CellResult]) -> float:
    return statistics.mean(result.mean_accuracy for result in found)


def sweeps(results: Sequence[CellResult]) -> dict[str, dict[int, list[CellResult]]]:
    """The rows of Figure 4 by sweep ("number", "size") and then by how many or how large Superblocks are."""
    found: dict[str, dict[int, list[CellResult]]] = {}
    for name, rows in by_cell(results).items():
        sweep, _, value = name.partition("-")
        if sweep in SWEEPS and value.isdigit():
            found.setdefault(sweep, {})[int(value)] = rows
    return found


def plot_sweeps(results: Sequence[CellResult], path: Path, *, caption: str) -> None:
    """
    Draw mean accuracy (with the standard deviation over seeds) against the number and the size of Superblocks.

    Args:
        results: of the rows; only those of these two tables are drawn.
        path: where the picture goes; its ending decides the format.
        caption: the conditions, below the picture.

    Raises:
        ValueError: if no row is of these tables.
    """
    found = sweeps(results)
    if not found:
        raise ValueError(f"no row is of the tables {', '.join(SWEEPS)}; run one of them first")
    with _figure(path, caption, size=(4.5 * len(found), 4), panels=len(found)) as (_, panels):
        for (sweep, rows), axes in zip(found.items(), panels, strict=True):
            values = sorted(rows)
            means = [[result.mean_accuracy for result in rows[value]] for value in values]
            errors = [statistics.stdev(mean) if len(mean) > 1 else 0.0 for mean in means]
            axes.errorbar(values, list(map(statistics.mean, means)), yerr=errors, fmt="o-", capsize=3, color="0.2")
            axes.set_xticks(values)
            axes.set_xlabel(SWEEPS[sweep])
            axes.set_ylabel("mean accuracy, %")


def plot_curves(results: Sequence[CellResult], path: Path, *, caption: str) -> None:
    """
    Draw the losses of every row on the way, mean over seeds: in training (moving average of 5 logs) and held out.

    The axes show what the last three quarters of the steps need; at the start losses are several times as high.

    Args:
        results: of the rows; those without curves, and those that H2O was put on later, have no line.
        path: where the picture goes; its ending decides the format.
        caption: the conditions, below the picture.
    """
    trained = {
        name: found for name, found in by_cell(results).items() if found[0].curves and found[0].h2o_budget is None
    }
    with _figure(path, caption, size=(9, 4.4), panels=2) as (figure, (left, right)):
        for index, (name, found) in enumerate(trained.items()):
            look = {
                "color": f"{0.65 * index / max(1, len(trained) - 1):.2f}",
                "linestyle": _LINES[index % len(_LINES)],
                "linewidth": 1,
            }
            left.plot(*_smooth(_mean(found, TRAINING)), **look)
            marker = _MARKERS[index % len(_MARKERS)]
            right.plot(*_mean(found, EVALUATIONS, HELD_OUT), **look, marker=marker, ms=4, label=name)
        left.set_ylabel("training loss, nats per token")
        right.set_ylabel("held-out loss, nats per token")
        for axes in (left, right):
            axes.set_xlabel("optimizer steps, calibration counted")
            _show_the_end(axes)
        if trained:
            figure.legend(loc="outside right upper", fontsize="small")


def _show_the_end(axes: Any) -> None:
    points = [point for line in axes.lines for point in zip(line.get_xdata(), line.get_ydata(), strict=True)]
    late = [loss for step, loss in points if step >= max(step for step, _ in points) / 4]
    if late and min(late) < max(late):
        margin = 0.05 * (max(late) - min(late))
        axes.set_ylim(min(late) - margin, max(late) + margin)


def _mean(found: Sequence[CellResult], *series: str) -> tuple[list[int], list[float]]:
    """Steps that every seed has in these series together, and the mean of their losses."""
    curves = [dict(point for name in series for point in result.curves.get(name, ())) for result in found]
    steps = sorted(set.intersection(*(set(curve) for curve in curves)))
    return steps, [statistics.mean(curve[step] for curve in curves) for step in steps]


def _smooth(curve: tuple[list[int], list[float]]) -> tuple[list[int], list[float]]:
    steps, losses = curve
    return steps, [statistics.mean(losses[max(0, end - _SMOOTH) : end]) for end in range(1, len(losses) + 1)]


@contextmanager
def _figure(
    path: Path, caption: str, *, size: tuple[float, float], panels: int = 1
) -> Iterator[tuple[Any, Sequence[Any]]]:
    """A figure and its axes, saved at the end; the same every time it is made of the same figures."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with matplotlib.rc_context({"svg.hashsalt": "peft_uniattn", "svg.fonttype": "none", "font.size": 9}):
        figure, axes = pyplot.subplots(1, panels, figsize=size, layout="constrained", squeeze=False)
        try:
            yield figure, axes[0]
            figure.supxlabel(caption, fontsize="x-small")
            figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
        finally:
            pyplot.close(figure)
