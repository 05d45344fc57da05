"""Tiny runs of the two-stage recipe: a model, a tokenizer and data on disk, and the flags that name them."""

import json
from pathlib import Path

import torch
from conftest import tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from peft_uniattn.training.arguments import Arguments, parse_arguments

WORDS = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{number}" for number in range(90))]
TEMPLATE = (
    "{% for message in messages %}{{ message['content'] + ' ' }}"
    "{% if message['role'] == 'assistant' %}</s>{% endif %}{% endfor %}"
)
FLAGS = {
    "superblock_size": 3,
    "start_layer": 0,
    "max_length": 16,
    "prompt_style": "chat",
    "test_size": 0.1,
    "calibration_examples": 24,
    "held_out_examples": 4,
    "stage1_max_steps": 4,
    "max_steps": 4,
    "stage1_learning_rate": 1e-2,
    "learning_rate": 1e-2,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 8,
    "logging_steps": 1,
    "save_steps": 2,
    "lr_scheduler_type": "cosine",
    "gradient_checkpointing": False,
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "seed": 0,
}


def tokenizer() -> PreTrainedTokenizerFast:
    """A word is a token."""
    words = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    made.chat_template = TEMPLATE
    return made


def example(number: int) -> dict:
    """Two numbers, and as an answer the three after the first; the questions' lengths differ."""
    start = 7 * number
    question = " ".join(f"w{(start + step) % 90}" for step in range(1 + number % 4))
    answer = " ".join(f"w{(start + step) % 90}" for step in range(1, 4 + number % 3))
    return {
        "prompt": [{"role": "user", "content": question}],
        "completion": [{"role": "assistant", "content": answer}],
    }


def write_inputs(directory: Path, *, rows: int = 40, **model: object) -> dict[str, str]:
    """A base model (see `tiny_model`) with its tokenizer, and a file of examples; returns the flags that name them."""
    base = tiny_model(vocab_size=len(WORDS), dtype=torch.float32, eos_token_id=2, **model)
    base.save_pretrained(directory / "base")
    tokenizer().save_pretrained(directory / "base")
    (directory / "data.jsonl").write_text("".join(json.dumps(example(number)) + "\n" for number in range(rows)))
    return {"model_name_or_path": str(directory / "base"), "dataset_name": str(directory / "data.jsonl")}


def flags(inputs: dict[str, str], output_dir: Path, **changes: object) -> list[str]:
    """The command line of a tiny run."""
    merged = {**inputs, **FLAGS, "output_dir": str(output_dir), **changes}
    return [part for name, value in merged.items() for part in (f"--{name}", str(value))]


def arguments(inputs: dict[str, str], output_dir: Path, **changes: object) -> Arguments:
    return parse_arguments(flags(inputs, output_dir, **changes))


def losses(output_dir: Path, step: str) -> list[tuple[int, float, float, float]]:
    """Optimizer step, loss, gradient norm and learning rate of every log of a finished step."""
    log = json.loads((output_dir / "journal.json").read_text())["results"][step]["log"]
    names = ("step", "loss", "grad_norm", "learning_rate")
    return [tuple(entry[name] for name in names) for entry in log if "loss" in entry]
