"""Rows to token ids, and what is wrong with the rows of which there are none."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Features, List, Value
from transformers import PreTrainedTokenizerBase

from .formats import NOT_ONE_ROUND, BadRow, Example, Row, SkippedRow
from .prompt import encode

IGNORE = -100
ID_COLUMNS = ("id", "pubid")
# Why a row with one of these ids is left out.
EXCLUDED = "excluded id"
TOKENS = {"input_ids": List(Value("int64")), "labels": List(Value("int64"))}
# Beside the tokens: what `DataReport` counts.
FACTS = {
    "row": Value("int64"),
    "bad": Value("string"),
    "skipped": Value("string"),
    "truncated": Value("bool"),
    "tokens": Value("int64"),
    "completion_tokens": Value("int64"),
}
FEATURES = Features(TOKENS | FACTS)


@dataclass(frozen=True)
class RowEncoder:
    """
    A function for `Dataset.map` with `batched=True` and `with_indices=True`.

    Attributes:
        convert: from a row to an `Example`, as `converter` returns it.
        tokenizer: the model's.
        prompt_style: see `DataArguments`.
        max_length: tokens per example; longer ones are cut at the end.
        excluded: ids of rows to leave out.
    """

    convert: Callable[[Row], Example]
    tokenizer: PreTrainedTokenizerBase
    prompt_style: str
    max_length: int
    excluded: frozenset[str] = frozenset()

    def __call__(self, batch: Mapping[str, Sequence[Any]], indices: Sequence[int]) -> dict[str, list[Any]]:
        """Columns of `FEATURES`; a row without an example has no tokens, and a reason in "bad" or "skipped"."""
        columns = list(batch)
        rows = [dict(zip(columns, values, strict=True)) for values in zip(*batch.values(), strict=True)]
        results = [self._facts(row, index) for row, index in zip(rows, indices, strict=True)]
        usable = [result for result in results if "example" in result]
        examples = [result.pop("example") for result in usable]
        for result, encoded in zip(usable, encode(examples, self.tokenizer, self.prompt_style), strict=True):
            result.update(self._cut(encoded.ids, encoded.start))
        return {name: [result[name] for result in results] for name in FEATURES}

    def _facts(self, row: Row, index: int) -> dict[str, Any]:
        facts = {
            "input_ids": [],
            "labels": [],
            "row": index,
            "bad": "",
            "skipped": "",
            "truncated": False,
            "tokens": 0,
            "completion_tokens": 0,
        }
        try:
            if self.excluded and _id(row) in self.excluded:
                raise SkippedRow(EXCLUDED)
            example = self.convert(row)
            if example.history and self.prompt_style == "paper":  # it has no place for earlier messages
                raise SkippedRow(NOT_ONE_ROUND)
            facts["example"] = example
        except BadRow as reason:
            facts["bad"] = str(reason)
        except SkippedRow as reason:
            facts["skipped"] = str(reason)
        return facts

    def _cut(self, ids: list[int], start: int) -> dict[str, Any]:
        if start >= min(len(ids), self.max_length):
            return {"bad": f"nothing of the answer left within max_length={self.max_length}"}
        labels = ([IGNORE] * start + ids[start:])[: self.max_length]
        return {
            "input_ids": ids[: self.max_length],
            "labels": labels,
            "truncated": len(ids) > self.max_length,
            "tokens": len(labels),
            "completion_tokens": len(labels) - start,
        }


def _id(row: Row) -> str | None:
    return next((str(row[name]) for name in ID_COLUMNS if name in row), None)
