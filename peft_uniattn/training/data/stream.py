"""Data that is read while it is trained on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, IterableDataset

from .arguments import DataArguments
from .encoding import FACTS, FEATURES, TOKENS, RowEncoder
from .files import reading
from .report import DataReport

SHUFFLE_BUFFER = 1000


class Counter:
    """
    A function for `IterableDataset.filter` that keeps rows with an example, and counts all of them once.

    Trainers read the first rows of a stream more than once, and an epoch reads all of them again: a row counts when
    its number is reached for the first time.
    """

    def __init__(self, report: DataReport, source: str, max_bad_rows: float) -> None:
        self.report = report
        self.source = source
        self.max_bad_rows = max_bad_rows
        self._next = 0

    def __call__(self, row: Mapping[str, Any]) -> bool:
        if row["row"] >= self._next:
            self._next = row["row"] + 1
            self.report.add([row], self.source)
            self.report.check(self.max_bad_rows, so_far=True)
        return row["tokens"] > 0


def load_stream(
    sources: Mapping[str, Mapping[str, IterableDataset]],
    arguments: DataArguments,
    encoder: Callable[[Sequence[str]], RowEncoder],
    seed: int,
    _num_proc: int | None,
) -> tuple[IterableDataset, Dataset | None, DataReport]:
    """
    As for data in memory, except that the report grows while the stream is read.

    Held-out examples are the first `test_size` ones (of the test split where there is one) and are read at once.
    """
    ((name, splits),) = sources.items()
    report = DataReport()

    def examples(split: str) -> IterableDataset:
        rows = splits[split]
        if arguments.max_rows is not None and split == arguments.dataset_train_split:
            rows = rows.take(arguments.max_rows)
        with reading(f"dataset_name={name!r}"):
            columns = rows.column_names or list(next(iter(rows)))
        encoded = rows.map(
            encoder(columns), batched=True, with_indices=True, remove_columns=columns, features=FEATURES
        )
        counter = Counter(report, f"{Path(name).name} [{split}]", arguments.max_bad_rows)
        return encoded.filter(counter).remove_columns(list(FACTS))

    if arguments.dataset_train_split not in splits:
        raise ValueError(
            f"dataset_train_split={arguments.dataset_train_split!r} is not in {name}, which has {', '.join(splits)}; "
            "choose one of them"
        )
    train, held_out = examples(arguments.dataset_train_split), int(arguments.test_size)
    test = None
    if held_out:
        own = arguments.dataset_test_split in splits
        first = (examples(arguments.dataset_test_split) if own else train).take(held_out)
        test = Dataset.from_list(list(first), features=Features(TOKENS))
        train = train if own else train.skip(held_out)
    return train.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER), test, report
