"""`peft-uniattn train`: the two-stage recipe on any model and data."""

from __future__ import annotations

import shlex
import sys

import typer

from .errors import reported

CONTEXT = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


def train(context: typer.Context) -> None:
    """
    Post-train a model in two stages: plan, calibrate, stage 1 (W_c alone), stage 2 (everything), save, reload.

    All arguments are TRL's and the recipe's, as flags or in a YAML file; `--help` lists them. Example:

        peft-uniattn train --config recipe.yaml --model_name_or_path Qwen/Qwen2.5-0.5B --output_dir out
    """
    with reported(continue_with=shlex.join(["peft-uniattn", *sys.argv[1:]])):
        from ..training.main import main

        receipt = main(context.args, prog="peft-uniattn train")
        if receipt is not None:
            from .receipt import show

            show(receipt)
