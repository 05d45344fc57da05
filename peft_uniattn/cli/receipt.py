"""A run's receipt on the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from ..training.receipt import Receipt


def show(receipt: Receipt) -> None:
    """Print a receipt as a table."""
    table = Table("", "", show_header=False, title="Receipt")
    for row in receipt.rows():
        table.add_row(*row)
    Console().print(table)
