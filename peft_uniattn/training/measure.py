"""What is measured of every model on the way, the same way for all of them."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from transformers import PreTrainedTokenizerBase

from .data import IGNORE, LoadedData, batches
from .evaluation import Evaluation, held_out_loss, sample_answer
from .receipt import measured_kv_bytes_per_token


class Measurements:
    """
    Args:
        data: whose held-out examples are used.
        tokenizer: the models'.
        examples: at most so many held-out examples.
        batch_size: rows per forward pass; it does not change results.
        evaluation: further numbers that the user wants of every model; may be None.
    """

    def __init__(
        self,
        data: LoadedData,
        tokenizer: PreTrainedTokenizerBase,
        *,
        examples: int,
        batch_size: int,
        evaluation: Evaluation | None,
    ) -> None:
        test = data.test
        self.test: Dataset | None = test.select(range(min(examples, len(test)))) if test and examples else None
        self._tokenizer = tokenizer
        self._batch_size = batch_size
        self._evaluation = evaluation

    def of(self, model: nn.Module, name: str, *, answer: bool = True) -> dict[str, Any]:
        """Held-out loss, bytes of the KV cache, an answer and the user's evaluation, as JSON types."""
        return {
            "loss": self.loss(model, name),
            "kv_bytes": measured_kv_bytes_per_token(model),
            "answer": sample_answer(model, self._tokenizer, self._prompt) if answer and self._prompt else None,
            "evaluation": self._evaluation(model, self._tokenizer) if self._evaluation else {},
        }

    def loss(self, model: nn.Module, name: str) -> float | None:
        """Held-out loss in nats per completion token; None if nothing is held out."""
        if self.test is None:
            return None
        pad = self._tokenizer.pad_token_id
        return held_out_loss(model, self.test, pad, batch_size=self._batch_size, name=f"held-out loss, {name}")

    @torch.no_grad()
    def logits(self, model: nn.Module, device: torch.device) -> torch.Tensor | None:
        """Logits of the first two held-out examples, (2, length, vocabulary), on the CPU; None if there are none."""
        if self.test is None:
            return None
        batch = next(batches(self.test, 2, self._tokenizer.pad_token_id, device))
        del batch["labels"]
        return model.eval()(**batch, use_cache=False).logits.cpu()

    @property
    def prompt(self) -> str:
        """The question of the first held-out example; empty if there is none."""
        return self._tokenizer.decode(self._prompt, skip_special_tokens=True).strip()

    @property
    def _prompt(self) -> list[int]:
        if self.test is None:
            return []
        first = self.test[0]
        return [token for token, label in zip(first["input_ids"], first["labels"], strict=True) if label == IGNORE]


def fingerprint(data: LoadedData) -> str | None:
    """A hash of all training tokens in their order; None for a stream, which is not read in advance."""
    if not isinstance(data.train, Dataset):
        return None
    digest = hashlib.sha256()
    for table in data.train.select_columns(["input_ids", "labels"]).with_format("arrow").iter(1000):
        for column in table.columns:
            tokens = column.combine_chunks()
            digest.update(tokens.value_lengths().to_numpy(zero_copy_only=False).tobytes())
            digest.update(tokens.flatten().to_numpy(zero_copy_only=False).tobytes())
    return digest.hexdigest()
