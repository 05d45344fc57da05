"""The command line `peft-uniattn`: one file per command."""

from __future__ import annotations

import warnings
from importlib.metadata import version
from typing import Annotated

import typer

from .analyze import app as analyze
from .bench import app as bench
from .evaluate import evaluate
from .plan import plan
from .quickstart import quickstart
from .reproduce import CONTEXT as REPRODUCE_CONTEXT
from .reproduce import reproduce
from .train import CONTEXT, train

app = typer.Typer(no_args_is_help=True, rich_markup_mode="markdown", pretty_exceptions_enable=False)
app.command()(quickstart)
app.command()(plan)
app.command(context_settings=CONTEXT, add_help_option=False)(train)
app.command("eval")(evaluate)
app.command(context_settings=REPRODUCE_CONTEXT)(reproduce)
app.add_typer(bench, name="bench")
app.add_typer(analyze, name="analyze")


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(version("peft-uniattn"))
        raise typer.Exit


@app.callback()
def main(
    show_version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """
    UniAttn: post-train an open LLM with unified softmax, and serve it with a smaller KV cache.

    Is it worth it for a model? `peft-uniattn plan MODEL`. What is it like? `peft-uniattn quickstart`.
    """
    # What libraries tell one another about their next versions.
    warnings.simplefilter("ignore", FutureWarning)
