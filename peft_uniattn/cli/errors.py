"""Errors as a user of a command line wants them: one sentence, no traceback."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import typer

# Top-level packages that are not always there, and the extra that brings them.
_EXTRAS = {"matplotlib": "analysis", "lm_eval": "eval", "bitsandbytes": "quantized", "trl": "train"}


@contextmanager
def reported(continue_with: str | None = None) -> Iterator[None]:
    """
    Print what the user can mend in one sentence, a missing package too, and exit with 1; say how to go on after Ctrl-C
    and exit with 130.

    Args:
        continue_with: the command that continues an interrupted run; None if it cannot be continued.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        extra = _EXTRAS.get((error.name or "").partition(".")[0])
        if extra is None:
            raise
        typer.secho(
            f"error: this needs {error.name}, which is not installed; pip install 'peft-uniattn[{extra}]'",
            fg=typer.colors.RED,
            err=True,
        )
        sys.exit(1)
    except (ValueError, OSError, RuntimeError, EOFError) as error:  # a .gz cut short, met in the middle of a stream
        typer.secho(f"error: {error}", fg=typer.colors.RED, err=True)
        sys.exit(1)
    except KeyboardInterrupt:
        hint = f"; continue with: {continue_with}" if continue_with else ""
        typer.secho(f"\ninterrupted{hint}", fg=typer.colors.YELLOW, err=True)
        sys.exit(130)
