"""Instruction data in TRL's conversational prompt-completion format, split into a train and a test part."""

import random
import warnings
from collections.abc import Iterable

from datasets import Dataset, DatasetDict, Features, Value

from ..training.data.formats import BadRow, Example, SkippedRow, converter
from ..training.data.sources import read
from .python_manual import examples_by_topic

MESSAGES = [{"role": Value("string"), "content": Value("string")}]
FEATURES = Features({"prompt": MESSAGES, "completion": MESSAGES})


def load_examples(
    dataset: str | None = None, *, seed: int = 0, held_out: float = 0.1, max_examples: int | None = None
) -> DatasetDict:
    """Load instruction data: the reference manual of the running Python, a local file, or a dataset of the Hub.

    The built-in data is split by topic, so held-out topics are unseen in training. A dataset that brings a "test" or
    "validation" part keeps its own split; others are split at random.

    Args:
        dataset: a file or a name on the Hub, of any format that `DataArguments.dataset_name` may have; None: the
            built-in data.
        seed: decides the split and the choice under `max_examples`.
        held_out: the share of examples for the test part, between 0 and 1.
        max_examples: at most so many examples in both parts together; None: all.

    Returns:
        A `DatasetDict` with "train" and "test", columns "prompt" and "completion", both lists of messages.

    Raises:
        FileNotFoundError: `dataset` is named like a file, but there is none.
        ValueError: the columns are not understood, fewer than two examples are usable, or an argument is out of range.
    """
    if not 0 < held_out < 1:
        raise ValueError(f"held_out={held_out} is not a share between 0 and 1; 0.1 holds out every tenth example")
    if max_examples is not None and max_examples < 2:
        raise ValueError(f"max_examples={max_examples} leaves nothing to train or to test on; use 2 or more, or None")
    parts = _manual(seed, held_out) if dataset is None else _converted(dataset, seed, held_out)
    if max_examples is not None:
        tests = min(max(1, round(max_examples * held_out)), max_examples - 1)
        parts["train"] = _at_most(parts["train"], max_examples - tests, seed)
        parts["test"] = _at_most(parts["test"], tests, seed)
    return parts


def _at_most(dataset: Dataset, count: int, seed: int) -> Dataset:
    return dataset if len(dataset) <= count else dataset.shuffle(seed=seed).select(range(count))


def _manual(seed: int, held_out: float) -> DatasetDict:
    try:
        from pydoc_data.topics import topics
    except ImportError as error:  # some minimal installations of Python leave it out
        raise ValueError(
            "this Python comes without pydoc_data.topics, the text of the built-in examples; install the full standard"
            " library, or pass dataset= (a file, or a name on the Hub)"
        ) from error
    examples = examples_by_topic(topics)
    names = sorted(examples)
    random.Random(seed).shuffle(names)
    wanted = round(held_out * sum(map(len, examples.values())))
    test: list[tuple[str, str]] = []
    train: list[tuple[str, str]] = []
    for name in names:
        (test if len(test) + len(examples[name]) <= max(1, wanted) else train).extend(examples[name])
    # Some sentences stand in several topics ("break" and "continue"): what was read in training isn't held out.
    tested = set().union(*(_runs(answer) for _, answer in test))
    train = [pair for pair in train if len(_runs(pair[1]) & tested) * 4 <= len(_runs(pair[1]))]
    return DatasetDict(train=_from_pairs(train), test=_from_pairs(test))


def _runs(text: str, length: int = 8) -> set[tuple[str, ...]]:
    """The runs of `length` words in a text, by which copied passages are recognised."""
    words = text.split()
    return {tuple(words[i : i + length]) for i in range(max(1, len(words) - length + 1))}


def _from_pairs(pairs: Iterable[tuple[str, str]]) -> Dataset:
    return Dataset.from_list([_conversation(Example("", *pair)) for pair in pairs], features=FEATURES)


def _conversation(example: Example) -> dict[str, list[dict[str, str]]]:
    return {"prompt": example.prompt_messages, "completion": example.completion_messages}


def _converted(name: str, seed: int, held_out: float) -> DatasetDict:
    parts = read(name)
    train = _usable(parts["train"] if "train" in parts else next(iter(parts.values())), name)
    for test in ("test", "validation"):
        if test in parts and "train" in parts:
            return DatasetDict(train=train, test=_usable(parts[test], name))
    if len(train) < 2:
        raise ValueError(f"dataset={name!r} has {len(train)} usable examples; two or more are needed, one to hold out")
    tests = min(max(1, round(held_out * len(train))), len(train) - 1)
    return train.train_test_split(test_size=tests, seed=seed)


def _usable(dataset: Dataset, name: str) -> Dataset:
    convert = converter("auto", dataset.column_names)

    def conversation(row: dict) -> dict:
        try:
            return _conversation(convert(row))
        except (BadRow, SkippedRow):
            return {"prompt": [], "completion": []}

    converted = dataset.map(conversation, remove_columns=dataset.column_names, features=FEATURES)
    kept = converted.filter(lambda row: bool(row["prompt"] and row["completion"]))
    if dropped := len(converted) - len(kept):
        message = f"dataset={name!r}: {dropped} of {len(converted)} rows have no prompt or no answer, left out"
        warnings.warn(message, stacklevel=4)  # the caller of load_examples
    return kept
