"""`peft-uniattn analyze`: one file per analysis."""

from __future__ import annotations

import typer

from .compensation import compensation
from .depth import depth
from .plan import plan
from .show import show
from .similarity import similarity
from .sweep import sweep

app = typer.Typer(no_args_is_help=True, rich_markup_mode="markdown", pretty_exceptions_enable=False)
for command in (similarity, plan, sweep, depth, compensation, show):
    app.command()(command)


@app.callback()
def main() -> None:
    """
    Measure where a model's softmax is alike, what sharing it costs, and which plan costs least.

    Example: `peft-uniattn analyze plan --kv-target 0.8 --dataset instructions.jsonl`
    """
