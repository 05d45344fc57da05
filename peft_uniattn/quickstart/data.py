"""Instruction data in TRL's conversational prompt-completion format, split into a train and a test part."""

import random
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path

from datasets import Dataset, DatasetDict, Features, Value, load_dataset

from .python_manual import examples_by_topic

FILE_KINDS = {
    ".json": "json",
    ".jsonl": "json",
    ".csv": "csv",
    ".json.gz": "json",
    ".jsonl.gz": "json",
    ".csv.gz": "csv",
    ".parquet": "parquet",
}
PROMPT_COLUMNS = ("prompt", "instruction", "question", "input")
ANSWER_COLUMNS = ("completion", "output", "response", "answer")
ACCEPTED_COLUMNS = (
    f"'messages' (role and content), or one of {PROMPT_COLUMNS} with one of {ANSWER_COLUMNS}"
    "; an 'input' beside an 'instruction' is appended to it"
)
MESSAGES = [{"role": Value("string"), "content": Value("string")}]
FEATURES = Features({"prompt": MESSAGES, "completion": MESSAGES})


def load_examples(
    dataset: str | None = None, *, seed: int = 0, held_out: float = 0.1, max_examples: int | None = None
) -> DatasetDict:
    """Load instruction data: the reference manual of the running Python, a local file, or a dataset of the Hub.

    The built-in data is split by topic, so held-out topics are unseen in training. A dataset that brings a "test" or
    "validation" part keeps its own split; others are split at random.

    Args:
        dataset: a .json, .jsonl or .csv file (plain or .gz), a .parquet file, or a name on the Hub; None: the
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
    rows = [
        {"prompt": _turns(question, "user"), "completion": _turns(answer, "assistant")} for question, answer in pairs
    ]
    return Dataset.from_list(rows, features=FEATURES)


def _converted(name: str, seed: int, held_out: float) -> DatasetDict:
    parts = _load(name)
    train = _usable(parts["train"] if "train" in parts else next(iter(parts.values())), name)
    for test in ("test", "validation"):
        if test in parts and "train" in parts:
            return DatasetDict(train=train, test=_usable(parts[test], name))
    if len(train) < 2:
        raise ValueError(f"dataset={name!r} has {len(train)} usable examples; two or more are needed, one to hold out")
    tests = min(max(1, round(held_out * len(train))), len(train) - 1)
    return train.train_test_split(test_size=tests, seed=seed)


def _load(name: str) -> DatasetDict:
    path = Path(name).expanduser()
    kind = next((kind for ending, kind in FILE_KINDS.items() if path.name.endswith(ending)), None)
    if path.is_file():
        if kind is None:
            raise ValueError(f"dataset={name!r} is none of these kinds of file: {', '.join(FILE_KINDS)}")
        return load_dataset(kind, data_files=str(path))
    if kind is not None:
        raise FileNotFoundError(f"dataset={name!r}: there is no such file")
    return load_dataset(name)


def _usable(dataset: Dataset, name: str) -> Dataset:
    convert = _converter(dataset.column_names, name)
    converted = dataset.map(convert, remove_columns=dataset.column_names, features=FEATURES)
    kept = converted.filter(lambda row: bool(row["prompt"] and row["completion"]))
    if dropped := len(converted) - len(kept):
        message = f"dataset={name!r}: {dropped} of {len(converted)} rows have no prompt or no answer, left out"
        warnings.warn(message, stacklevel=4)  # the caller of load_examples
    return kept


def _converter(columns: list[str], name: str) -> Callable[[dict], dict]:
    """The function from one row to {"prompt": messages, "completion": messages}; empty lists where a part is empty."""
    prompt = next((column for column in PROMPT_COLUMNS if column in columns), None)
    answer = next((column for column in ANSWER_COLUMNS if column in columns), None)
    if "messages" in columns and not {"prompt", "completion"} <= set(columns):
        return lambda row: _split_dialogue(_turns(row["messages"], "user"))
    if prompt is None or answer is None:
        raise ValueError(f"dataset={name!r} has the columns {columns}; accepted are {ACCEPTED_COLUMNS}")

    def convert(row: dict) -> dict:
        question = _turns(row[prompt], "user")
        if question and prompt == "instruction" and (extra := _text(row.get("input"))):
            question[-1]["content"] += f"\n\n{extra}"
        return {"prompt": question, "completion": _turns(row[answer], "assistant")}

    return convert


def _split_dialogue(messages: list[dict]) -> dict:
    """The last answer of the assistant is the completion; everything before it is the prompt."""
    while messages and messages[-1]["role"] != "assistant":
        messages = messages[:-1]
    return {"prompt": messages[:-1], "completion": messages[-1:]}


def _turns(value: object, role: str) -> list[dict[str, str]]:
    """Messages without the empty ones; a plain text becomes one message of `role`."""
    turns = value if isinstance(value, list) else [{"role": role, "content": value}]
    return [{"role": turn["role"], "content": text} for turn in turns if (text := _text(turn["content"]))]


def _text(value: object) -> str:
    text = "" if value is None else str(value)
    return text if text.strip() else ""
