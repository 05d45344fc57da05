"""
The two-stage run on a checkpoint of your own, with every setting in one place.

    python examples/real_checkpoints.py PATH_OR_HUB_NAME OUTPUT_DIR --name "what to call it" --result result.json

Writes the receipt, with the command and the environment, to the result file.
"""

import json
import sys
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from peft_uniattn.quickstart.checkpoint import load_checkpoint
from peft_uniattn.quickstart.data import load_examples
from peft_uniattn.quickstart.demonstration import demonstration, tokenized
from peft_uniattn.training.arguments import PlanArguments
from peft_uniattn.training.two_stage import TwoStageRun


def main(
    checkpoint: str,
    output_dir: Path,
    name: Annotated[str | None, typer.Option(help="Honest name of the base for the receipt.")] = None,
    result: Annotated[Path | None, typer.Option(help="Where to put the receipt as JSON.")] = None,
    superblock_size: int = 4,
    max_length: int = 96,
    calibration_examples: int = 24,
    held_out_examples: int = 8,
    stage1_steps: int = 8,
    stage2_steps: int = 4,
) -> None:
    """Run plan, calibration and both stages on Python's own reference manual, and print the receipt."""

    def load_base():
        model, tokenizer, loaded_name = load_checkpoint(checkpoint)
        return model, tokenizer, name or loaded_name

    arguments = demonstration(
        output_dir,
        plan=PlanArguments(superblock_size=superblock_size),
        max_length=max_length,
        calibration_examples=calibration_examples,
        held_out_examples=held_out_examples,
        stage1_steps=stage1_steps,
        stage2_steps=stage2_steps,
        compare_with_base=False,
    )
    data = load_examples()
    run = TwoStageRun(
        arguments,
        load_base=load_base,
        load_examples=partial(tokenized, data, arguments),
        data_name="Python's reference manual (pydoc_data.topics)",
        question=data["test"][0]["prompt"][-1]["content"],
    )
    receipt = run.run()
    for row in receipt.rows():
        print(": ".join(row))
    if result:
        command = ["python", "examples/real_checkpoints.py", checkpoint.rsplit("/", 1)[-1], *sys.argv[2:]]
        result.write_text(json.dumps({"command": " ".join(command), **receipt.to_dict()}, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
