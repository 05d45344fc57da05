"""
UniAttn on a checkpoint of your own: plan, calibrate, a short stage 1, and what that did to loss, KV cache and text.

    python examples/real_checkpoints.py CHECKPOINT DATA OUTPUT_DIR --followers 3 --result result.json

CHECKPOINT is a folder or a Hub name, DATA a file of instructions and answers (.json, .jsonl, .csv, .parquet) or a Hub
name. Shows what the model writes before and after, leaves the adapter in OUTPUT_DIR, and all figures with the command
in the result file.
"""

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import torch
import typer
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedTokenizerBase, set_seed
from trl import SFTConfig, SFTTrainer

from peft_uniattn import UniAttnConfig, calibrate, choose_superblocks
from peft_uniattn.inspection import find_adapter
from peft_uniattn.quickstart.checkpoint import PLAIN_CHAT_TEMPLATE, load_checkpoint
from peft_uniattn.quickstart.data import load_examples
from peft_uniattn.training.data import IGNORE, batches, tokenize
from peft_uniattn.training.evaluation import held_out_loss, sample_answer
from peft_uniattn.training.receipt import environment, measured_kv_bytes_per_token

# For models that answer, and for base models, which continue.
QUESTIONS = (
    "Why does the moon change its shape during a month?",
    "Give me three tips for keeping a house warm in winter without spending much.",
    "Write a Python function that returns the largest number in a list.",
)
OPENINGS = (
    "The moon changes its shape during a month because",
    "There are several ways to keep a house warm in winter without spending much. First,",
    "Photosynthesis is the process by which",
)


@torch.no_grad()
def surprise(model: nn.Module, tokenizer: PreTrainedTokenizerBase, prompt: list[int], answer: str) -> float | None:
    """Mean cross-entropy, in nats per token, of an answer under `model`; None where nothing was answered."""
    answered = tokenizer(answer, add_special_tokens=False)["input_ids"]
    if not answered:
        return None
    ids = torch.tensor([prompt + answered], device=model.device)
    labels = torch.tensor([[IGNORE] * len(prompt) + answered], device=model.device)
    return model(ids, labels=labels).loss.item()


def as_chat(tokenizer: PreTrainedTokenizerBase, question: str) -> list[int]:
    """Token ids of a question, up to where the answer begins."""
    chat = [{"role": "user", "content": question}]
    return list(
        tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=True)["input_ids"]
    )


def repetition(answer: str) -> float:
    """Share of three-word runs that stood in the answer before; near 1 where generation is caught in a loop."""
    words = answer.split()
    runs = [tuple(words[i : i + 3]) for i in range(len(words) - 2)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def train_stage1(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, dataset: object, output_dir: Path, **settings: float
) -> list[dict]:
    """Train W_c alone; returns the trainer's log."""
    arguments = SFTConfig(
        output_dir=str(output_dir),
        lr_scheduler_type="cosine",
        max_length=None,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=not torch.cuda.is_available(),
        save_strategy="no",
        report_to="none",
        logging_steps=4,
        dataloader_pin_memory=False,
        **settings,
    )
    trainer = SFTTrainer(model=model, args=arguments, train_dataset=dataset, processing_class=tokenizer)
    trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def main(
    checkpoint: str,
    data: str,
    output_dir: Path,
    name: Annotated[str | None, typer.Option(help="Honest name of the base for the result.")] = None,
    data_name: Annotated[str | None, typer.Option(help="Likewise of the data.")] = None,
    result: Annotated[Path | None, typer.Option(help="Where to put the figures as JSON.")] = None,
    dtype: Annotated[str, typer.Option(help="Of the base; W_c is trained in float32.")] = "bfloat16",
    followers: Annotated[int, typer.Option(help="How many layers share; which ones is measured.")] = 3,
    rank: Annotated[int | None, typer.Option(help="Rank of the compensation. Default: full.")] = None,
    ridge: float = 1e-2,
    max_length: int = 256,
    calibration_examples: int = 160,
    held_out_examples: int = 32,
    steps: Annotated[int, typer.Option(help="Optimizer steps of stage 1.")] = 32,
    batch_size: int = 4,
    learning_rate: float = 1e-5,
    new_tokens: int = 60,
    repetition_penalty: Annotated[float, typer.Option(help="Small models repeat themselves, base or unified.")] = 1.2,
    seed: int = 0,
) -> None:
    """Plan, calibrate, train W_c for some steps, and print loss, KV cache and texts before and after."""
    started = time.perf_counter()
    set_seed(seed)
    examples = load_examples(data, seed=seed)
    model, tokenizer, loaded_name = load_checkpoint(checkpoint, dtype=getattr(torch, dtype), device="auto")
    train = tokenize(examples["train"].shuffle(seed=seed), tokenizer, max_length).dataset
    test = tokenize(examples["test"].select(range(held_out_examples)), tokenizer, max_length).dataset
    model.generation_config.repetition_penalty = repetition_penalty
    is_base = tokenizer.chat_template == PLAIN_CHAT_TEMPLATE
    questions = OPENINGS if is_base else QUESTIONS
    asked = [tokenizer(text)["input_ids"] if is_base else as_chat(tokenizer, text) for text in questions]
    losses, answers = {}, {}

    def measure(step: str, answering: bool = False) -> None:
        losses[step] = held_out_loss(model, test, tokenizer.pad_token_id)
        if answering:
            answers[step] = [sample_answer(model, tokenizer, ids, max_new_tokens=new_tokens) for ids in asked]
        print(f"{step}: held-out loss {losses[step]:.4f}, {time.perf_counter() - started:.0f} s", flush=True)

    measure("base", answering=True)
    kv_before = measured_kv_bytes_per_token(model)
    sample = train.select(range(min(calibration_examples, len(train))))

    def calibration_batches() -> Iterator[dict[str, torch.Tensor]]:
        return batches(sample, 8, tokenizer.pad_token_id, model.device)

    superblocks = choose_superblocks(model, calibration_batches(), followers=followers, ridge=ridge)
    print(f"Superblocks {superblocks}, {time.perf_counter() - started:.0f} s", flush=True)
    model = get_peft_model(model, UniAttnConfig(task_type="CAUSAL_LM", superblocks=superblocks, r=rank))
    kv_after = measured_kv_bytes_per_token(model)
    measure("unified, no compensation")
    report = calibrate(model, calibration_batches(), ridge=ridge)
    measure("calibrated")
    settings = {"max_steps": steps, "per_device_train_batch_size": batch_size, "learning_rate": learning_rate}
    log = train_stage1(model, tokenizer, train, output_dir, seed=seed, warmup_steps=max(1, steps // 16), **settings)
    measure("after stage 1", answering=True)
    model.save_pretrained(output_dir)

    with model.disable_adapter():  # the base itself, as the judge of both answers
        judged = {
            step: [surprise(model, tokenizer, prompt, text) for prompt, text in zip(asked, texts, strict=True)]
            for step, texts in answers.items()
        }
    plan = find_adapter(model).plan
    figures = {
        "command": " ".join(["python examples/real_checkpoints.py", "CHECKPOINT DATA OUTPUT_DIR", *sys.argv[4:]]),
        "base_model": name or loaded_name,
        "data": data_name or data,
        "superblocks": [list(block) for block in plan.superblocks],
        "followers": len(plan.followers),
        "num_layers": plan.num_layers,
        "kv_bytes_before": kv_before,
        "kv_bytes_after": kv_after,
        "losses": losses,
        "calibration": report.to_dict(),
        "stage 1": {**settings, "trained_parameters": model.get_nb_trainable_parameters()[0], "log": log},
        "questions": questions,
        "repetition_penalty": repetition_penalty,
        "answers": answers,
        "nats_per_token_under_the_base": judged,
        "repeated_three_word_runs": {step: [*map(repetition, texts)] for step, texts in answers.items()},
        "seconds": time.perf_counter() - started,
        "environment": environment(),
    }
    print(f"KV cache: {kv_before} -> {kv_after} bytes per token")
    for index, question in enumerate(questions):
        print(f"\n> {question}")
        for step, texts in answers.items():
            print(f"[{step}] {texts[index]}")
    if result:
        result.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
