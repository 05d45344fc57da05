"""`peft-uniattn bench`: what UniAttn costs and saves, measured on your machine; one file per command."""

from __future__ import annotations

import typer

from .train import train

app = typer.Typer(no_args_is_help=True, help="Measure cost on this machine; the last line printed is JSON.")
app.command()(train)
# With a single command typer would leave its name out.
app.callback()(lambda: None)
