"""`peft-uniattn analyze plot`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import reported


def plot(
    result: Annotated[Path, typer.Argument(help="What another analysis wrote with --output.")],
    output: Annotated[Path, typer.Argument(help="Where to draw it: .svg, .png or .pdf.")],
) -> None:
    """
    Draw a result again. Example:

        peft-uniattn analyze plot similarity.json similarity.svg
    """
    with reported():
        from ...analysis.plots import plot as draw
        from ...analysis.record import Record

        draw(Record.load(result), output)
        print(f"written: {output}")
