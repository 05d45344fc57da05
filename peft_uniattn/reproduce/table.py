"""Rows of several seeds as one table."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from .cell import CellResult


def table(results: Sequence[CellResult]) -> str:
    """
    A Markdown table: a row per cell in the order of their first results, mean ± standard deviation over seeds.

    Accuracy in per cent, bytes of KV cache per token, held-out loss of the last step in nats per completion token.

    Raises:
        ValueError: if there are no results, or rows that were asked different things.
    """
    if not results:
        raise ValueError("there are no results to tabulate; run some cells first")
    tasks = list(results[0].accuracy)
    rows: dict[str, list[CellResult]] = {}
    for result in results:
        if list(result.accuracy) != tasks:
            raise ValueError(
                f"{result.cell} was asked {list(result.accuracy)}, other rows {tasks}; use one directory each"
            )
        rows.setdefault(result.cell, []).append(result)
    most = max(result.kv_bytes for result in results)
    lines = [
        f"| | KV bytes per token | {' | '.join(tasks)} | mean | held-out loss | seeds |",
        f"|---|---|{'---|' * len(tasks)}---|---|---|",
    ]
    for name, found in rows.items():
        kv = found[0].kv_bytes
        scores = [spread([result.accuracy[task] for result in found]) for task in tasks]
        mean = spread([result.mean_accuracy for result in found])
        losses = [list(result.losses.values())[-1] for result in found if result.losses]
        loss = spread(losses, digits=3) if losses else "–"
        lines.append(
            f"| {name} | {kv:,} ({100 * kv / most:.1f} %) | {' | '.join(scores)} | {mean} | {loss} | {len(found)} |"
        )
    return "\n".join(lines)


def spread(values: Sequence[float], *, digits: int = 1) -> str:
    """Mean ± standard deviation of a sample; without a deviation where there is one value."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"
