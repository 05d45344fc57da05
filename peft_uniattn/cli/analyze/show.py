"""`peft-uniattn analyze show`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import reported

if TYPE_CHECKING:
    from ...analysis.record import Record


def show(
    result: Annotated[Path, typer.Argument(help="What another analysis wrote with --output.")],
    plot: Annotated[Path | None, typer.Option(help="Where to draw it: .svg, .png or .pdf.")] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the table in Markdown.")] = False,
) -> None:
    """
    Print a result's table, and draw it, from its file alone.

    Example:

        peft-uniattn analyze show similarity.json --plot similarity.svg
    """
    with reported():
        from ...analysis import plots, tables
        from ...analysis.record import Record

        if not result.is_file():
            raise ValueError(
                f"result='{result}' does not exist; give a file that another analysis wrote with --output"
            )
        record = Record.load(result)
        if plot is not None:
            plots.check_format(plot)
        # What an analysis found is known to nothing but its table and its plot, so these find out what a file lacks.
        try:
            if plot is not None:
                plots.plot(record, plot)
            if markdown:
                print(tables.markdown(record))
            else:
                print_table(record)
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            raise ValueError(
                f"{result} is no result of an analysis, or not all of it ({type(error).__name__}: {error}); give a "
                "file that --output wrote"
            ) from error


def print_table(record: Record) -> None:
    """Print a result for a person."""
    from rich.console import Console
    from rich.table import Column, Table

    from ...analysis.tables import rows

    head, *lines = rows(record)
    columns = (Column(title, overflow="fold") for title in head)  # a plan is of no use if its end is cut off
    table = Table(*columns, title=record.analysis, caption=record.caption)
    for line in lines:
        table.add_row(*line)
    Console().print(table)
