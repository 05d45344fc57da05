"""
Group relative policy optimization of a unified model, after the two stages, with TRL's `GRPOTrainer`.

    python examples/grpo.py \
        --model_name_or_path qwen2.5-0.5b-uniattn/model --dataset_name gsm8k/train.jsonl \
        --learning_rate 1e-6 --num_generations 8 --max_completion_length 256 --bf16 \
        --output_dir qwen2.5-0.5b-uniattn-grpo

The model is what `peft-uniattn train` leaves in `model/`. It is asked as it was trained: by the paper's prompt, or by
its chat template with `--prompt_style chat`. Data are questions with answers in any format of `peft-uniattn train`; an
answer is right if it ends on the same number. Generation keeps followers' values only, so that more sequences fit.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from datasets import Dataset, concatenate_datasets
from trl import GRPOConfig, GRPOTrainer, ModelConfig, TrlParser

from peft_uniattn.training.data import PAPER_PROMPT, DataArguments  # importing it is what makes the model load
from peft_uniattn.training.data.formats import converter
from peft_uniattn.training.data.sources import read


def accuracy(completions: list[Any], answer: list[str], **kwargs: Any) -> list[float]:
    """1 for every completion whose last number is that of the answer, otherwise 0."""
    texts = [text if isinstance(text, str) else text[-1]["content"] for text in completions]
    return [float(last_number(text) == last_number(right)) for text, right in zip(texts, answer, strict=True)]


def last_number(text: str) -> str | None:
    numbers = re.findall(r"-?\d+(?:\.\d+)?", text.replace(",", ""))
    return numbers[-1] if numbers else None


def load_prompts(arguments: DataArguments) -> Dataset:
    """Rows of `prompt` and `answer`."""
    parts = []
    for name in arguments.dataset_name:
        rows = read(name, config=arguments.dataset_config)[arguments.dataset_train_split]
        convert = converter(arguments.dataset_format, rows.column_names, list_choices=arguments.list_choices)

        def ask(row: dict[str, Any], convert=convert) -> dict[str, Any]:
            example = convert(row)
            text = PAPER_PROMPT.format(instruction=example.instruction, input=example.input)
            return {
                "prompt": text if arguments.prompt_style == "paper" else example.prompt_messages,
                "answer": example.output,
            }

        names = [column for column in rows.column_names if column not in ("prompt", "answer")]
        parts.append(rows.map(ask, remove_columns=names))
    return concatenate_datasets(parts)


def make_trainer(argv: Sequence[str] | None = None) -> GRPOTrainer:
    """The trainer that the flags (default: the process's) ask for."""
    data, model, training = TrlParser((DataArguments, ModelConfig, GRPOConfig)).parse_args_and_config(argv)
    training.model_init_kwargs = {
        "revision": model.model_revision,
        "dtype": model.dtype,
        "attn_implementation": model.attn_implementation,
        **(training.model_init_kwargs or {}),
    }
    return GRPOTrainer(
        model.model_name_or_path, reward_funcs=accuracy, args=training, train_dataset=load_prompts(data)
    )


if __name__ == "__main__":
    trainer = make_trainer()
    trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
    trainer.save_model()
