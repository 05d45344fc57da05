"""`peft-uniattn quickstart`: the whole way on a small real model."""

from __future__ import annotations

import shlex
import sys
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from .errors import reported
from .receipt import show


def quickstart(
    output_dir: Annotated[Path, typer.Option(help="Where adapter, model and receipt go.")] = Path("quickstart-output"),
    model: Annotated[
        str | None, typer.Option(help="Path or Hub name of a chat model. Default: SmolLM2-135M-Instruct.")
    ] = None,
    dataset: Annotated[
        str | None,
        typer.Option(help="Local file or Hub name of instruction data. Default: Python's own reference manual."),
    ] = None,
    superblock_size: Annotated[int, typer.Option(help="Layers per Superblock.")] = 4,
    start_layer: Annotated[int | None, typer.Option(help="First leader. Default: half of the layers.")] = None,
    end_layer: Annotated[int | None, typer.Option(help="Where the Superblocks stop. Default: the top.")] = None,
    rank: Annotated[int | None, typer.Option(help="Rank of the compensation. Default: full.")] = None,
    method: Annotated[str, typer.Option(help="Calibration: ridge or pseudoinverse.")] = "ridge",
    max_length: Annotated[int, typer.Option(help="Tokens per example.", min=8)] = 160,
    batch_size: Annotated[int, typer.Option(help="Examples per optimizer step.", min=1)] = 4,
    stage1_steps: Annotated[int, typer.Option(help="Optimizer steps that train W_c alone.", min=1)] = 16,
    stage2_steps: Annotated[int, typer.Option(help="Optimizer steps that train everything.", min=1)] = 16,
    max_examples: Annotated[int | None, typer.Option(help="Use only so many examples.", min=2)] = None,
    compare: Annotated[bool, typer.Option(help="Also fine-tune the unmodified base, to compare.")] = True,
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
) -> None:
    """
    Unify the softmax of a small real model, calibrate, train in two stages, save, reload and generate.

    Takes some minutes on two CPU cores. Ctrl-C is safe: the same command continues. Example:

        peft-uniattn quickstart --superblock-size 5 --rank 64 --output-dir out
    """
    with reported(continue_with=shlex.join(["peft-uniattn", *sys.argv[1:]])):
        # Only now: trl and datasets take seconds that --help should not.
        import datasets
        import transformers

        from ..quickstart.checkpoint import load_checkpoint
        from ..quickstart.data import load_examples
        from ..quickstart.demonstration import demonstration, tokenized
        from ..training.arguments import PlanArguments
        from ..training.two_stage import TwoStageRun

        # The bars of loading and tokenizing, over in a second.
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        datasets.disable_progress_bars()

        arguments = demonstration(
            output_dir,
            plan=PlanArguments(
                superblock_size=superblock_size, start_layer=start_layer, end_layer=end_layer, rank=rank
            ),
            calibration_method=method,
            max_length=max_length,
            batch_size=batch_size,
            stage1_steps=stage1_steps,
            stage2_steps=stage2_steps,
            compare_with_base=compare,
            seed=seed,
        )
        data = load_examples(dataset, seed=seed, max_examples=max_examples)
        run = TwoStageRun(
            arguments,
            load_base=lambda: load_checkpoint(model),
            load_examples=partial(tokenized, data, arguments),
            data_name=dataset or "Python's reference manual (pydoc_data.topics)",
            question=data["test"][0]["prompt"][-1]["content"],
        )
        receipt = run.run()
        show(receipt)
        typer.echo(f"saved: {output_dir}/adapter, {output_dir}/model, {output_dir}/receipt.json")
