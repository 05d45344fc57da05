"""Batches without a trainer."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from datasets import Dataset

from .encoding import IGNORE


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


def _pad(rows: list[list[int]], value: int) -> torch.Tensor:
    rows = [torch.tensor(row) for row in rows]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)
