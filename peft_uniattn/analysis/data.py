"""Data to measure on: running text in pieces of one length, or instruction examples."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from datasets import Dataset, load_dataset
from transformers import PreTrainedTokenizerBase

from ..quickstart.data import load_examples
from ..training.data import batches, tokenize
from ..training.data.sources import read

TEXT_ENDINGS = (".txt", ".raw", ".md")


@dataclass(frozen=True)
class Sequences:
    """
    Attributes:
        fit: rows of `input_ids` and `labels` to calibrate and to measure on.
        held_out: other rows, for losses; empty if none were asked for.
        name: what to call the data in results, without folders.
        pad_token_id: for filling up batches.
    """

    fit: Dataset
    held_out: Dataset
    name: str
    pad_token_id: int

    def batches(
        self, batch_size: int, device: torch.device, part: Literal["fit", "held_out"] = "fit"
    ) -> list[dict[str, torch.Tensor]]:
        """Right-padded batches of one part."""
        return list(batches(getattr(self, part), batch_size, self.pad_token_id, device))

    def describe(self) -> dict[str, str | int]:
        """What the data are, as JSON types."""
        return {
            "name": self.name,
            "sequences": len(self.fit),
            "tokens": sum(map(len, self.fit["input_ids"])),
            "held_out_sequences": len(self.held_out),
        }


def load_sequences(
    dataset: str | None,
    tokenizer: PreTrainedTokenizerBase,
    *,
    length: int,
    sequences: int,
    held_out: int = 0,
    seed: int = 0,
) -> Sequences:
    """
    Load sequences of at most `length` tokens.

    Text (a .txt, .raw or .md file, also with .gz, or a data set with a column "text") is cut into pieces of exactly
    `length` tokens, of which some are chosen at random; every token carries loss. Other data are taken as instruction
    data, see [`~peft_uniattn.quickstart.data.load_examples`]; answers carry loss.

    Args:
        dataset: a local file or a name on the Hub; None: Python's own reference manual.
        tokenizer: the model's.
        length: tokens per sequence.
        sequences: how many at most to measure on.
        held_out: how many at most to hold out.
        seed: decides which.

    Raises:
        FileNotFoundError: `dataset` is named like a file, but there is none.
        ValueError: there are too few sequences, or the data are not understood.
    """
    rows = None if dataset is None else _read_text(dataset)
    name = "Python's reference manual (pydoc_data.topics)" if dataset is None else _name(dataset)
    if rows is None:
        parts = load_examples(dataset, seed=seed)
        fit = _examples(parts["train"], tokenizer, length, sequences, seed)
        rest = _examples(parts["test"], tokenizer, length, held_out, seed) if held_out else fit.select([])
    else:
        pieces = _pieces(dataset, rows, tokenizer, length, sequences + held_out, seed)
        if len(pieces) < 1 + bool(held_out):
            raise ValueError(
                f"dataset={dataset!r} holds {len(pieces)} pieces of length={length} tokens, and {1 + bool(held_out)} "
                "are needed; use a longer text or a smaller length"
            )
        # Where there are too few pieces, the share of each part stays.
        kept = max(1, round(len(pieces) * held_out / (sequences + held_out))) if held_out else 0
        fit, rest = pieces.select(range(kept, len(pieces))), pieces.select(range(kept))
    return Sequences(fit, rest, name, tokenizer.pad_token_id)


def _name(dataset: str) -> str:
    """A file's name without its folders; a name on the Hub as it is."""
    path = Path(dataset).expanduser()
    return path.name if path.exists() else dataset


def _read_text(dataset: str) -> Dataset | None:
    """Rows with a column "text"; None if the data set is not text."""
    path = Path(dataset).expanduser()
    if path.name.removesuffix(".gz").endswith(TEXT_ENDINGS):
        if not path.is_file():
            raise FileNotFoundError(f"dataset={dataset!r}: there is no such file; check its path")
        return load_dataset("text", data_files=str(path), sample_by="document", split="train")
    parts = read(dataset)
    rows = parts["train"] if "train" in parts else next(iter(parts.values()))
    return rows if "text" in rows.column_names else None


def _pieces(
    dataset: str, rows: Dataset, tokenizer: PreTrainedTokenizerBase, length: int, wanted: int, seed: int
) -> Dataset:
    ids: list[int] = []
    # As much text as is needed to choose from, and not a whole corpus.
    for number, row in enumerate(rows):
        if not isinstance(row["text"], str):
            raise ValueError(
                f"dataset={dataset!r}: 'text' of row {number} (from 0) is no text but {type(row['text']).__name__}; "
                "repair that row"
            )
        ids.extend(tokenizer(row["text"], add_special_tokens=False, verbose=False)["input_ids"])
        if len(ids) >= 50 * wanted * length:
            break
    pieces = [ids[first : first + length] for first in range(0, len(ids) - length + 1, length)]
    whole = Dataset.from_dict({"input_ids": pieces, "labels": pieces})
    return whole.shuffle(seed=seed).select(range(min(wanted, len(whole))))


def _examples(rows: Dataset, tokenizer: PreTrainedTokenizerBase, length: int, wanted: int, seed: int) -> Dataset:
    rows = rows.shuffle(seed=seed)
    # Some are dropped because nothing of their answer is left at this length.
    tokenized = tokenize(rows.select(range(min(2 * wanted, len(rows)))), tokenizer, length).dataset
    return tokenized.select(range(min(wanted, len(tokenized))))
