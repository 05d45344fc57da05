"""
Train a saved adapter further: stage 1 on other data, with TRL's SFTTrainer.

    python examples/continue_adapter.py ADAPTER OUTPUT_DIR --dataset data.jsonl --max-steps 100

`peft-uniattn train --stages stage1 --adapter ADAPTER` does the same with the whole recipe around it, `--stages stage2`
goes on to full training.
"""

from pathlib import Path
from typing import Annotated

import torch
import typer
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer

import peft_uniattn  # noqa: F401, registers UNIATTN with PEFT
from peft_uniattn.quickstart.data import load_examples


def main(
    adapter: Annotated[str, typer.Argument(help="Folder or Hub name of a UniAttn adapter.")],
    output_dir: Path,
    dataset: Annotated[str | None, typer.Option(help="Instruction data. Default: Python's manual.")] = None,
    max_steps: int = 100,
    batch_size: int = 4,
    learning_rate: float = 1e-4,
    max_length: int = 512,
    seed: int = 0,
) -> None:
    """Load the adapter to be trained, train it, save it."""
    model = AutoPeftModelForCausalLM.from_pretrained(adapter, is_trainable=True)
    tokenizer = AutoTokenizer.from_pretrained(model.active_peft_config.base_model_name_or_path)
    data = load_examples(dataset, seed=seed)
    settings = SFTConfig(
        output_dir=str(output_dir),
        max_steps=max_steps,
        per_device_train_batch_size=batch_size,
        learning_rate=learning_rate,
        max_length=max_length,
        lr_scheduler_type="cosine",
        gradient_checkpointing=False,  # if it is needed, not the reentrant kind
        bf16=torch.cuda.is_available(),
        logging_steps=10,
        save_strategy="no",
        report_to="none",
        seed=seed,
    )
    trainer = SFTTrainer(model, args=settings, train_dataset=data["train"], processing_class=tokenizer)
    trainer.train()
    trainer.save_model()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    if losses:
        print(f"training loss: {losses[0]:.4f} -> {losses[-1]:.4f}")
    print(f"saved: {output_dir}")


if __name__ == "__main__":
    typer.run(main)
