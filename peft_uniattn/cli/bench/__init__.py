"""`peft-uniattn bench`: what UniAttn costs and saves, measured on your machine; one file per command."""

from __future__ import annotations

import typer

from .decode import decode
from .memory import memory
from .serve import serve
from .train import train
from .ttft import ttft

app = typer.Typer(
    no_args_is_help=True,
    help="Measure cost on this machine; the last line printed is JSON. "
    "Example: peft-uniattn bench memory --shape tiny --device cpu",
)
for command in (ttft, decode, memory, train, serve):
    app.command()(command)
