"""Rows of several seeds as one table."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from .cell import CellResult

# The row that the others are compared with, seed by seed.
REFERENCE = "post-train"
# Rows with the cache of the base, which the others' bytes are a share of.
WHOLE_CACHE = ("pre-trained", REFERENCE)


def table(results: Sequence[CellResult]) -> str:
    """
    A Markdown table: a row per cell in the order of their first results, mean ± standard deviation over seeds.

    Accuracy in per cent; bytes of KV cache per token, and in parentheses their share of the base's where a row has its
    cache; milliseconds to the first token, and in parentheses their ratio to the base's in the same turns; the mean
    accuracy's difference from post-train with the same seed, ± its standard error; held-out loss of the last step in
    nats per completion token.

    Raises:
        ValueError: if there are no results, or rows that were asked different things.
    """
    if not results:
        raise ValueError("there are no results to tabulate; run some cells first")
    tasks = list(results[0].accuracy)
    for result in results:
        if list(result.accuracy) != tasks:
            raise ValueError(
                f"{result.cell} was asked {list(result.accuracy)}, other rows {tasks}; use one directory each"
            )
    rows = by_cell(results)
    whole = next((result.kv_bytes for result in results if result.cell in WHOLE_CACHE), None)
    head = ["", "KV bytes per token", "TTFT, ms", *tasks, "mean", "s.e.", f"− {REFERENCE}", "held-out loss", "seeds"]
    lines = [f"| {' | '.join(head)} |".replace("|  |", "| |"), f"|{'---|' * len(head)}"]
    for name, found in rows.items():
        cells = [
            name,
            _bytes(found[0].kv_bytes, whole),
            _time(found[0]),
            *(spread([result.accuracy[task] for result in found]) for task in tasks),
            spread([result.mean_accuracy for result in found]),
            standard_error([result.mean_accuracy for result in found]),
            "–" if name == REFERENCE else difference(found, rows.get(REFERENCE, [])),
            _loss(found),
            str(len(found)),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def notes(results: Sequence[CellResult]) -> str:
    """What the columns of [`table`] mean, as one paragraph of Markdown."""
    parts = [
        'Accuracy in per cent, mean ± standard deviation over seeds; "s.e.": standard error of the mean.',
        f'"− {REFERENCE}": mean accuracy less that of this row with the same seed, ± standard error over seeds.',
        f"KV bytes: measured after a prompt of {results[0].kv_tokens:,} tokens.",
        "Loss: nats per held-out completion token.",
    ]
    if conditions := next((result.ttft_conditions for result in results if result.ttft_conditions), None):
        parts.append(
            f"TTFT: median of {conditions['rounds']} prefills of {conditions['prompts']} x {conditions['tokens']:,} "
            f"tokens in {conditions['dtype']} on {conditions['device']}, in turns with the unmodified base; in "
            "parentheses the ratio to it."
        )
    return " ".join(parts)


def by_cell(results: Sequence[CellResult]) -> dict[str, list[CellResult]]:
    """Results by row, in the order of the rows' first results."""
    rows: dict[str, list[CellResult]] = {}
    for result in results:
        rows.setdefault(result.cell, []).append(result)
    return rows


def spread(values: Sequence[float], *, digits: int = 1) -> str:
    """Mean ± standard deviation of a sample; without a deviation where there is one value."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def standard_error(values: Sequence[float], *, digits: int = 1) -> str:
    """Standard error of the mean of a sample; "–" where there is one value."""
    return "–" if len(values) == 1 else f"{statistics.stdev(values) / math.sqrt(len(values)):.{digits}f}"


def difference(found: Sequence[CellResult], reference: Sequence[CellResult]) -> str:
    """
    Mean accuracy of `found` less that of `reference`, seed by seed: mean ± standard error over the seeds of both.

    Without an error where there is one seed; "–" where there is none.
    """
    expected = {result.seed: result.mean_accuracy for result in reference}
    values = [result.mean_accuracy - expected[result.seed] for result in found if result.seed in expected]
    if not values:
        return "–"
    mean = f"{statistics.mean(values):+.1f}".replace("-", "−")
    return mean if len(values) == 1 else f"{mean} ± {standard_error(values)}"


def _bytes(kv_bytes: int, whole: int | None) -> str:
    return f"{kv_bytes:,}" if whole is None else f"{kv_bytes:,} ({100 * kv_bytes / whole:.1f} %)"


def _time(result: CellResult) -> str:
    if result.ttft_ms is None:
        return "–"
    return f"{result.ttft_ms:.1f} ({result.ttft_ms / result.ttft_base_ms:.2f}×)"


def _loss(found: Sequence[CellResult]) -> str:
    losses = [list(result.losses.values())[-1] for result in found if result.losses]
    return spread(losses, digits=3) if losses else "–"
