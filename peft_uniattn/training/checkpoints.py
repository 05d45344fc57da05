"""Trainer checkpoints that are whole, and how to find the newest of them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SaveStrategy

from .journal import write_through

MARKER = "complete"


class WholeCheckpoints(TrainerCallback):
    """
    Marks a checkpoint once every process has written its part and all of it is on disk.

    Also logs before every checkpoint: a run that continues from it starts a new mean of the loss there, and so does
    one that was never interrupted.
    """

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        may_be_best = control.should_evaluate and args.save_strategy == SaveStrategy.BEST
        control.should_log |= control.should_save or may_be_best

    on_epoch_end = on_step_end

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        PartialState().wait_for_everyone()
        if state.is_world_process_zero:
            checkpoint = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
            write_through(checkpoint)
            (checkpoint / MARKER).touch()
        PartialState().wait_for_everyone()


def whole_checkpoints(directory: Path) -> list[Path]:
    """The checkpoints of a trainer that were written to their end, oldest first; the others are removed."""
    checkpoints = sorted(directory.glob(f"{PREFIX_CHECKPOINT_DIR}-*"), key=lambda path: int(path.name.split("-")[-1]))
    for checkpoint in checkpoints:
        if not (checkpoint / MARKER).exists():
            shutil.rmtree(checkpoint)
    return [checkpoint for checkpoint in checkpoints if checkpoint.exists()]


def is_last(checkpoint: Path) -> bool:
    """Whether training had come to its end when `checkpoint` was written."""
    state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
    return state.global_step >= state.max_steps
