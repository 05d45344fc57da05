"""
A tiny distillation run in one process or, through torchrun, in two; run by tests:

    torchrun --nproc-per-node 2 tests/distill_on_ranks.py "stage 1" out.json

The global batch is the same in both cases. Losses and final weights go to the file.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import datasets
import tokenizers
import torch
from conftest import tiny_adapter, tiny_model
from transformers import PreTrainedTokenizerFast
from trl import SFTConfig

from peft_uniattn import to_standalone
from peft_uniattn.training.distillation import DistillationArguments, DistillationTrainer

WORDS = ["<pad>", "<s>", "</s>", *(f"w{number}" for number in range(29))]
ARGUMENTS = {
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-2,
    "lr_scheduler_type": "constant",
    "logging_steps": 1,
    "save_strategy": "no",
    "seed": 3,
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "disable_tqdm": True,
}


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A word is a token."""
    model = tokenizers.models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<pad>")
    plain = tokenizers.Tokenizer(model)
    plain.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def counting() -> datasets.Dataset:
    """Prompts and completions of unequal lengths that count upward."""
    texts = [[f"w{(start + step) % 29}" for step in range(6 + start % 3)] for start in range(16)]
    halves = [
        (" ".join(words[: 2 + index % 2]), " ".join(words[2 + index % 2 :])) for index, words in enumerate(texts)
    ]
    return datasets.Dataset.from_dict(
        {"prompt": [first for first, _ in halves], "completion": [f" {last}" for _, last in halves]}
    )


def base():
    return tiny_model(vocab_size=len(WORDS), dtype=torch.float32, eos_token_id=2)


def standalone():
    return to_standalone(tiny_adapter(base()))


def main(stage: str, out: Path) -> None:
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    model, teacher = (tiny_adapter(base()), None) if stage == "stage 1" else (standalone(), base())
    with tempfile.TemporaryDirectory() as directory:
        settings = {**ARGUMENTS, "per_device_train_batch_size": 4 // processes, "max_steps": 3}
        trainer = DistillationTrainer(
            model=model,
            teacher=teacher,
            args=SFTConfig(output_dir=directory, **settings),
            train_dataset=counting(),
            processing_class=make_tokenizer(),
            distillation=DistillationArguments(
                distillation_alpha=0.7, distillation_temperature=2.0, distillation_attention_weight=3.0
            ),
        )
        trainer.train()
    if trainer.is_world_process_zero():
        logs = [entry for entry in trainer.state.log_history if "loss" in entry]
        result = {name: [entry[name] for entry in logs] for name in ("loss", "distillation_kl", "attention_error")}
        result |= {name: p.tolist() for name, p in trainer.model.named_parameters() if p.requires_grad}
        out.write_text(json.dumps({"processes": processes, **result}))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
