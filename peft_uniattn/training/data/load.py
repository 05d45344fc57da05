"""From the data arguments to what the trainer takes."""

from __future__ import annotations

import json
import random
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from accelerate import PartialState
from datasets import Dataset, IterableDataset, concatenate_datasets
from transformers import PreTrainedTokenizerBase

from .arguments import DataArguments
from .encoding import EXCLUDED, FACTS, FEATURES, ID_COLUMNS, TOKENS, RowEncoder
from .files import reading
from .formats import converter
from .prompt import check_tokenizer
from .report import DataReport
from .sources import check_file, read
from .stream import load_stream

Splits = Mapping[str, Dataset] | Mapping[str, IterableDataset]


@dataclass(frozen=True)
class LoadedData:
    """
    Attributes:
        train: `input_ids` and `labels` (-100 on the prompt), at most `max_length` long, in random order: what
            `SFTTrainer` takes.
        test: the same of held-out rows, never a stream; None if nothing was held out.
        report: what became of the rows.
    """

    train: Dataset | IterableDataset
    test: Dataset | None
    report: DataReport


def load_data(
    arguments: DataArguments,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    seed: int,
    num_proc: int | None = None,
    splits: Splits | None = None,
) -> LoadedData:
    """
    Read, check, tokenize, cut, split and shuffle.

    Args:
        arguments: see [`DataArguments`].
        tokenizer: the model's.
        max_length: tokens per example; longer ones are cut at the end, which is counted.
        seed: decides order, split and choice.
        num_proc: processes that tokenize; not for streams.
        splits: rows that are in memory already, used instead of `arguments.dataset_name`.

    Raises:
        FileNotFoundError: a data set is named like a file, but there is none.
        ValueError: a data set cannot be read or has other columns, more rows are bad than `max_bad_rows` (of a
            stream: while it is read), or nothing is left to train on.
    """
    check_tokenizer(tokenizer, arguments.prompt_style)
    if splits is None and not arguments.dataset_name:
        raise ValueError("dataset_name is missing; give a name on the Hub or a local file")
    excluded = _excluded(arguments.exclude_ids)

    def encoder(columns: Sequence[str]) -> RowEncoder:
        if excluded and arguments.dataset_streaming:
            _check_ids(arguments, [columns])
        convert = converter(arguments.dataset_format, columns, list_choices=arguments.list_choices)
        return RowEncoder(convert, tokenizer, arguments.prompt_style, max_length, excluded)

    # One process tokenizes, and the others of its machine find the result in the cache.
    with PartialState().local_main_process_first():
        sources = _read_all(arguments) if splits is None else {"data": splits}
        if excluded and not arguments.dataset_streaming:
            _check_ids(arguments, [rows.column_names for found in sources.values() for rows in found.values()])
        train, test, report = (load_stream if arguments.dataset_streaming else _load)(
            sources, arguments, encoder, seed, num_proc
        )
    if excluded and not arguments.dataset_streaming and EXCLUDED not in report.skipped:
        warnings.warn(
            f"exclude_ids={arguments.exclude_ids!r} names {len(excluded)} ids, and no row that was read has one of "
            f"them as its {' or '.join(map(repr, ID_COLUMNS))}: nothing is left out",
            stacklevel=2,
        )
    return LoadedData(train, test, report)


def check_files(arguments: DataArguments) -> None:
    """
    Refuse local files that are not there, before anything takes time.

    Raises:
        FileNotFoundError: naming the argument and the file.
    """
    for name in arguments.dataset_name or ():
        check_file(name)
    if arguments.exclude_ids is not None and not Path(arguments.exclude_ids).expanduser().is_file():
        raise FileNotFoundError(f"exclude_ids={arguments.exclude_ids!r}: there is no such file; check its path")


def _read_all(arguments: DataArguments) -> dict[str, Splits]:
    settings = {"config": arguments.dataset_config, "streaming": arguments.dataset_streaming}
    return {name: read(name, **settings) for name in arguments.dataset_name}


def _check_ids(arguments: DataArguments, columns: Sequence[Sequence[str]]) -> None:
    """Raise ValueError unless a data set has ids; of several that are mixed, others may have none to exclude."""
    if not any(set(ID_COLUMNS) & set(names) for names in columns):
        raise ValueError(
            f"exclude_ids={arguments.exclude_ids!r} needs a column {' or '.join(map(repr, ID_COLUMNS))}, but the "
            f"columns are {', '.join(map(str, map(list, columns)))}"
        )


def _excluded(path: str | None) -> frozenset[str]:
    if path is None:
        return frozenset()
    with reading(f"exclude_ids={path!r}"):
        ids = json.loads(Path(path).expanduser().read_text())
        if not isinstance(ids, list | dict) or not all(isinstance(one, str | int) for one in ids):
            raise ValueError("it holds neither a list of ids nor an object whose keys they are")
    return frozenset(map(str, ids))


def _load(
    sources: Mapping[str, Mapping[str, Dataset]],
    arguments: DataArguments,
    encoder: Callable[[Sequence[str]], RowEncoder],
    seed: int,
    num_proc: int | None,
) -> tuple[Dataset, Dataset | None, DataReport]:
    report = DataReport()

    def encoded(split: str, limit: int | None) -> Dataset | None:
        parts = []
        for name, splits in sources.items():
            if split in splits:
                rows, numbers = _sample(splits[split], limit, seed)
                source = f"{Path(name).name} [{split}]"
                parts.append(encode_rows(rows, encoder(rows.column_names), report, source, numbers, num_proc))
        return concatenate_datasets(parts) if parts else None

    train = encoded(arguments.dataset_train_split, arguments.max_rows)
    test = encoded(arguments.dataset_test_split, int(arguments.test_size) or None) if arguments.test_size else None
    report.check(arguments.max_bad_rows)
    if train is None or len(train) == 0:
        raise ValueError(
            f"dataset_train_split={arguments.dataset_train_split!r} of {', '.join(sources)} leaves nothing to train "
            f"on ({report})"
        )
    if test is None and arguments.test_size:
        train, test = _hold_out(train, arguments.test_size, seed)
    return train.shuffle(seed=seed), test, report


def encode_rows(
    rows: Dataset,
    encoder: RowEncoder,
    report: DataReport,
    source: str,
    numbers: Sequence[int] | None = None,
    num_proc: int | None = None,
) -> Dataset:
    """
    The examples among `rows`, in order.

    Args:
        rows: rows as they come from file or Hub.
        encoder: what makes them into tokens.
        report: counts them.
        source: what to call the data set in the report.
        numbers: the number of every row in its data set; default: counted from 0.
        num_proc: processes that tokenize.
    """
    encoded = rows.map(
        encoder,
        batched=True,
        with_indices=True,
        remove_columns=rows.column_names,
        features=FEATURES,
        num_proc=num_proc,
        desc=f"Tokenizing {source}",
    )
    facts = encoded.select_columns(list(FACTS)).with_format("arrow")[:].to_pylist()
    usable = [fact["row"] for fact in facts if fact["tokens"]]
    if numbers is not None:
        facts = [{**fact, "row": numbers[fact["row"]]} for fact in facts]
    report.add(facts, source)
    return encoded.select(usable).select_columns(list(TOKENS))


def _sample(rows: Dataset, limit: int | None, seed: int) -> tuple[Dataset, Sequence[int]]:
    """At most `limit` rows, and their numbers."""
    if limit is None or limit >= len(rows):
        return rows, range(len(rows))
    numbers = sorted(random.Random(seed).sample(range(len(rows)), limit))
    return rows.select(numbers), numbers


def _hold_out(train: Dataset, test_size: float, seed: int) -> tuple[Dataset, Dataset]:
    count = max(1, round(test_size * len(train))) if test_size < 1 else int(test_size)
    if count >= len(train):
        raise ValueError(
            f"test_size={test_size:g} would hold out {count} of {len(train)} examples and leave nothing to train on; "
            "use a smaller one, or 0"
        )
    parts = train.train_test_split(test_size=count, seed=seed)
    return parts["train"], parts["test"]
