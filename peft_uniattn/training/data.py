"""Prompt-completion examples as token ids, with the loss on the completion only."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from datasets import Dataset, load_dataset
from transformers import PreTrainedTokenizerBase

IGNORE = -100


@dataclass
class DataArguments:
    """Where training and held-out examples come from."""

    dataset_name: list[str] | None = field(
        default=None, metadata={"help": "A JSON lines file with prompt and completion, each a list of messages."}
    )


@dataclass(frozen=True)
class LoadedData:
    """
    Attributes:
        train: `input_ids` and `labels` (-100 on the prompt).
        test: held-out examples, likewise.
        report: counts of rows, truncated and bad ones, as JSON types.
    """

    train: Dataset
    test: Dataset
    report: dict[str, Any]


def load_data(
    arguments: DataArguments, tokenizer: PreTrainedTokenizerBase, *, max_length: int, seed: int
) -> LoadedData:
    """Read, split, shuffle and tokenize."""
    parts = load_dataset("json", data_files=arguments.dataset_name)["train"].train_test_split(0.1, seed=seed)
    tokenized = {name: tokenize(part, tokenizer, max_length) for name, part in parts.items()}
    report = {name: {"rows": len(part.dataset), "truncated": part.truncated} for name, part in tokenized.items()}
    return LoadedData(tokenized["train"].dataset, tokenized["test"].dataset, report)


@dataclass(frozen=True)
class TokenizedData:
    """
    Attributes:
        dataset: `input_ids` and `labels` (-100 on the prompt), ready for `SFTTrainer`.
        tokens: all tokens.
        completion_tokens: tokens that carry loss.
        truncated: examples that were cut to the maximum length.
        dropped: examples with no completion token left after that.
    """

    dataset: Dataset
    tokens: int
    completion_tokens: int
    truncated: int
    dropped: int


def tokenize(dataset: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int) -> TokenizedData:
    """
    Turn conversational prompt-completion examples into token ids by the tokenizer's chat template.

    Args:
        dataset: rows with `prompt` and `completion`, each a list of messages.
        tokenizer: with a chat template.
        max_length: longer examples are cut at the end.

    Raises:
        ValueError: if the tokenizer has no chat template, or if no example has a completion token left.
    """
    if tokenizer.chat_template is None:
        raise ValueError(
            f"the tokenizer {tokenizer.name_or_path!r} has no chat template; use an instruction-tuned model's, or set "
            "tokenizer.chat_template"
        )
    rows, truncated, dropped = [], 0, 0
    for row in dataset:
        prompt = _encode(tokenizer, row["prompt"], add_generation_prompt=True)
        whole = _encode(tokenizer, row["prompt"] + row["completion"])
        start = _common_prefix(prompt, whole)
        truncated += len(whole) > max_length
        if start >= min(len(whole), max_length):
            dropped += 1
            continue
        labels = [IGNORE] * start + whole[start:]
        rows.append({"input_ids": whole[:max_length], "labels": labels[:max_length]})
    if not rows:
        raise ValueError(
            f"none of the {len(dataset)} examples has a completion left after cutting to max_length={max_length}; "
            "raise max_length or use other data"
        )
    return TokenizedData(
        dataset=Dataset.from_list(rows),
        tokens=sum(len(row["input_ids"]) for row in rows),
        completion_tokens=sum(label != IGNORE for row in rows for label in row["labels"]),
        truncated=truncated,
        dropped=dropped,
    )


def batches(
    dataset: Dataset, batch_size: int, pad_token_id: int, device: torch.device | str = "cpu"
) -> Iterator[dict[str, torch.Tensor]]:
    """Right-padded batches of `input_ids`, `attention_mask` and `labels`, each (batch, length), in order."""
    for first in range(0, len(dataset), batch_size):
        rows = dataset[first : first + batch_size]
        yield {
            "input_ids": _pad(rows["input_ids"], pad_token_id).to(device),
            "attention_mask": _pad([[1] * len(ids) for ids in rows["input_ids"]], 0).to(device),
            "labels": _pad(rows["labels"], IGNORE).to(device),
        }


def _encode(tokenizer: PreTrainedTokenizerBase, messages: list[dict], **kwargs: bool) -> list[int]:
    return list(tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **kwargs)["input_ids"])


def _common_prefix(first: list[int], second: list[int]) -> int:
    """Tokens may merge across the boundary, so the completion starts where the two differ."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((index for index, (a, b) in pairs if a != b), min(len(first), len(second)))


def _pad(rows: list[list[int]], value: int) -> torch.Tensor:
    rows = [torch.tensor(row) for row in rows]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)
