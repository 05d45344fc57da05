"""From a command line to a finished run; behind `peft-uniattn train` and `examples/sft_two_stage.py`."""

from __future__ import annotations

from collections.abc import Sequence

import torch.distributed as dist

from .arguments import parse_arguments
from .distributed import is_main_process
from .receipt import Receipt
from .two_stage import TwoStageRun


def main(argv: Sequence[str] | None = None, *, prog: str | None = None) -> Receipt | None:
    """
    Parse flags and YAML, and do what they ask for.

    Args:
        argv: the flags; default those of the process.
        prog: the program's name in the help.

    Returns:
        the receipt in the main process, None in the others.

    Raises:
        ValueError: for arguments that cannot be meant, or that do not fit the model, the data or the output directory.
    """
    run = TwoStageRun(parse_arguments(argv, prog=prog))
    try:
        receipt = run.run()
        return receipt if is_main_process() else None
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
