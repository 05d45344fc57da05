"""Prompt-completion conversations as token ids, with the loss on the completion only."""

from __future__ import annotations

from dataclasses import dataclass

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from .encoding import RowEncoder
from .formats import converter
from .load import encode_rows
from .prompt import check_tokenizer
from .report import DataReport


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
    Turn conversational prompt-completion examples into token ids by the tokenizer's chat template, in order.

    Args:
        dataset: rows with `prompt` and `completion`, each a list of messages.
        tokenizer: with a chat template.
        max_length: longer examples are cut at the end.

    Raises:
        ValueError: if the tokenizer has no chat template, or if no example has a completion token left.
    """
    check_tokenizer(tokenizer, "chat")
    report = DataReport()
    encoder = RowEncoder(converter("instruction", dataset.column_names), tokenizer, "chat", max_length)
    examples = encode_rows(dataset, encoder, report, "data")
    if not report.kept:
        raise ValueError(
            f"none of the {len(dataset)} examples has a completion left after cutting to max_length={max_length}; "
            "raise max_length or use other data"
        )
    return TokenizedData(
        dataset=examples,
        tokens=report.tokens,
        completion_tokens=report.completion_tokens,
        truncated=report.truncated,
        dropped=sum(report.bad.values()),
    )
