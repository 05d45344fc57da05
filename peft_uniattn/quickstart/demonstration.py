"""The two-stage recipe at the size of a demonstration: minutes on two CPU cores."""

from __future__ import annotations

from pathlib import Path

import torch
from datasets import DatasetDict
from transformers import PreTrainedTokenizerBase
from trl import ModelConfig, SFTConfig

from ..training.arguments import Arguments, PlanArguments, RecipeArguments
from ..training.data import DataArguments, LoadedData, tokenize


def demonstration(
    output_dir: Path,
    *,
    plan: PlanArguments,
    calibration_method: str = "ridge",
    calibration_examples: int = 64,
    held_out_examples: int = 24,
    max_length: int = 160,
    batch_size: int = 4,
    stage1_steps: int = 16,
    stage2_steps: int = 16,
    compare_with_base: bool = True,
    seed: int = 0,
) -> Arguments:
    """
    Arguments of a small run, with learning rates that suit SmolLM2-135M.

    Args:
        output_dir: where everything goes.
        plan: which layers share a softmax.
        calibration_method: "ridge" or "pseudoinverse".
        calibration_examples: how many training examples calibration reads.
        held_out_examples: how many held-out examples losses are measured on.
        max_length: tokens per example.
        batch_size: examples per optimizer step.
        stage1_steps: optimizer steps of stage 1, which trains W_c alone.
        stage2_steps: optimizer steps of stage 2, and of the fine-tuned base beside it.
        compare_with_base: also fine-tune the unmodified base.
        seed: of everything random.
    """
    on_gpu = torch.cuda.is_available()
    training = SFTConfig(
        output_dir=str(output_dir),
        max_steps=stage2_steps,
        per_device_train_batch_size=batch_size,
        learning_rate=1e-4,
        lr_scheduler_type="cosine",
        warmup_steps=0.03,
        weight_decay=0.0,
        max_length=max_length,
        bf16=on_gpu and torch.cuda.is_bf16_supported(),
        gradient_checkpointing=False,
        logging_steps=5,
        save_steps=8,
        report_to="none",
        dataloader_pin_memory=on_gpu,
        seed=seed,
    )
    recipe = RecipeArguments(
        calibration_method=calibration_method,
        calibration_examples=calibration_examples,
        held_out_examples=held_out_examples,
        stage1_learning_rate=5e-4,
        stage1_max_steps=stage1_steps,
        compare_with_base=compare_with_base,
    )
    return Arguments(ModelConfig(), DataArguments(), plan, recipe, training)


def tokenized(data: DatasetDict, arguments: Arguments, tokenizer: PreTrainedTokenizerBase) -> LoadedData:
    """Conversations with splits "train" and "test" as the recipe takes them, the training examples shuffled."""
    max_length, seed = arguments.training.max_length, arguments.training.seed
    train = tokenize(data["train"].shuffle(seed=seed), tokenizer, max_length)
    test = tokenize(data["test"], tokenizer, max_length)
    report = {
        name: {"kept": len(part.dataset), "truncated": part.truncated, "dropped": part.dropped}
        for name, part in (("train", train), ("test", test))
    }
    return LoadedData(train.dataset, test.dataset, report)
