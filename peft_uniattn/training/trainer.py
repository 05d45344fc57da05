"""One stage of training with TRL's trainer: its arguments, its callbacks, and where it continues."""

from __future__ import annotations

import dataclasses
import os
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import patch_environment
from datasets import Dataset, IterableDataset
from torch import nn
from transformers import PreTrainedTokenizerBase
from transformers.trainer_callback import ProgressCallback
from trl import SFTConfig, SFTTrainer

from .arguments import Arguments
from .checkpoints import WholeCheckpoints, is_last, whole_checkpoints
from .data import LoadedData
from .distillation import DistillationTrainer
from .distributed import on_main_process
from .divergence import StopsAtDivergence
from .loading import load_model
from .progress import StageProgress
from .sound_attention import sound_attention


def make_trainer(arguments: Arguments, stage: str, **options: Any) -> SFTTrainer:
    """
    The trainer of a stage; the one place where its class is chosen.

    Args:
        arguments: of the run.
        stage: "stage1", "stage2" or "plain".
        options: what every `SFTTrainer` takes.
    """
    if not arguments.distillation.applies_to(stage):
        return SFTTrainer(**options)
    teacher = load_model(arguments.model, arguments.training) if stage == "stage2" else None
    return DistillationTrainer(distillation=arguments.distillation, teacher=teacher, **options)


def check_data(arguments: Arguments, data: LoadedData) -> None:
    """
    Refuse data that a stage to come cannot train on, before calibration.

    Raises:
        ValueError: if the arguments ask for evaluation, but there is nothing to evaluate on; if nothing says where a
            stage stops that reads a stream.
    """
    for stage in arguments.recipe.trained:
        training = stage_arguments(arguments, stage)
        if training.eval_strategy != "no" and data.test is None:
            raise ValueError(
                f"eval_strategy={training.eval_strategy.value!r} needs held-out examples, and the data has none; hold "
                "some out, or leave eval_strategy out"
            )
        if training.max_steps <= 0 and not isinstance(data.train, Dataset):
            raise ValueError(
                f"max_steps={training.max_steps} does not say where {stage} stops on a stream; set max_steps (for "
                "stage 1 alone: stage1_max_steps), or leave dataset_streaming out"
            )


def train(
    model: nn.Module,
    arguments: Arguments,
    stage: str,
    *,
    tokenizer: PreTrainedTokenizerBase,
    train_dataset: Dataset | IterableDataset,
    eval_dataset: Dataset | None,
) -> SFTTrainer:
    """
    Train `model` to the end of `stage`, from the newest whole checkpoint if there is one.

    Returns:
        the trainer, with the trained model and its log.

    Raises:
        ValueError: if training diverges.
    """
    training = stage_arguments(arguments, stage)
    checkpoint, is_at_end = on_main_process(partial(_continue_from, training, isinstance(train_dataset, Dataset)))
    if is_at_end:  # transformers would take one more step; so it loads the weights and takes none
        training = dataclasses.replace(training, num_train_epochs=0, max_steps=-1)
    early_stop = arguments.recipe.early_stop() if stage == "stage1" else None
    logs = os.environ.get("TENSORBOARD_LOGGING_DIR", f"{arguments.training.output_dir}/logs")
    with patch_environment(tensorboard_logging_dir=f"{logs}/{stage}"):
        trainer = make_trainer(
            arguments,
            stage,
            model=model,
            args=training,
            train_dataset=train_dataset,
            eval_dataset=None if training.eval_strategy == "no" else eval_dataset,
            processing_class=tokenizer,
            callbacks=[StopsAtDivergence(), WholeCheckpoints(), *([early_stop] if early_stop else [])],
        )
    if trainer.pop_callback(ProgressCallback):
        trainer.add_callback(StageProgress(stage))
    with sound_attention(training.device):
        trainer.train(resume_from_checkpoint=checkpoint)
    return trainer


def _continue_from(training: SFTConfig, has_length: bool) -> tuple[str | None, bool]:
    """The checkpoint to continue from, and whether nothing is left to do after it."""
    checkpoints = whole_checkpoints(Path(training.output_dir))
    if checkpoints and not has_length and is_last(checkpoints[-1]):
        checkpoints.pop()  # on a stream, at least one step has to be taken
    if not checkpoints:
        return None, False
    return str(checkpoints[-1]), is_last(checkpoints[-1])


def stage_arguments(arguments: Arguments, stage: str) -> SFTConfig:
    """The training arguments of a stage: stage 2's, but for what the recipe says of stage 1."""
    training, recipe = arguments.training, arguments.recipe
    changes: dict[str, Any] = {
        "output_dir": str(checkpoints_of(arguments, stage)),
        "run_name": f"{training.run_name or Path(training.output_dir).name}-{stage}",
        "push_to_hub": False,
        "hub_token": None,  # checkpoints keep their arguments
        # One checkpoint may be incomplete, so the one before it has to be there.
        "save_total_limit": max(2, training.save_total_limit or 0),
        "resume_from_checkpoint": None,
    }
    if training.gradient_checkpointing:  # TRL may choose reentrant checkpointing, which cuts followers' gradients
        changes["gradient_checkpointing_kwargs"] = training.gradient_checkpointing_kwargs or {"use_reentrant": False}
    if not training.packing:
        changes["max_length"] = None  # the data are cut already
    if stage == "stage1":
        if recipe.stage1_learning_rate is not None:
            changes["learning_rate"] = recipe.stage1_learning_rate
        if recipe.stage1_num_train_epochs is not None:
            changes.update(num_train_epochs=recipe.stage1_num_train_epochs, max_steps=-1)
        if recipe.stage1_max_steps is not None:
            changes["max_steps"] = recipe.stage1_max_steps
    return dataclasses.replace(training, **changes)


def checkpoints_of(arguments: Arguments, stage: str) -> Path:
    """Where a stage keeps the trainer's checkpoints."""
    return Path(arguments.training.output_dir) / "checkpoints" / stage


def full_state(trainer: SFTTrainer) -> dict[str, torch.Tensor] | None:
    """
    The whole state dict of a trained model whose weights are sharded, to be called in every process and complete in
    the main process; None where the model holds its weights itself.
    """
    if not (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
        return None
    return trainer.accelerator.get_state_dict(trainer.model_wrapped)
