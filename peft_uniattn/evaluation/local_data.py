"""The paper's five evaluation sets from the files that their authors publish, in the columns of the Hub's copies."""

from __future__ import annotations

import gzip
import json
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict

from ..training.data.files import reading

Row = dict[str, Any]


@dataclass(frozen=True)
class LocalSet:
    """
    How to read one evaluation set.

    Attributes:
        test: name of the published file with the evaluation questions.
        splits: reads the set from a directory into lists of rows by split; "train" is left out where no training
            file lies in that directory.
    """

    test: str
    splits: Callable[[Path], dict[str, list[Row]]]

    def load(self, directory: str | Path) -> DatasetDict:
        """
        The set as the official task definitions expect it, with the splits "test", "validation" and, where there is
        a training file, "train".

        Raises:
            FileNotFoundError: if the published file is not in `directory` or below it.
            ValueError: if a file cannot be read, or is not as it was published.
        """
        rows = self.splits(Path(directory))
        rows["validation"] = rows["test"]
        return DatasetDict({split: Dataset.from_list(rows[split]) for split in rows})


def find(directory: Path, name: str) -> Path | None:
    """The file `name`, or `name`.gz, in `directory` or anywhere below it; None if there is none."""
    return next((path for end in ("", ".gz") for path in sorted(directory.rglob(name + end))), None)


def find_or_raise(directory: Path, name: str) -> Path:
    """Like [`find`], but raises FileNotFoundError with the name of the missing file."""
    if (path := find(directory, name)) is None:
        raise FileNotFoundError(
            f"data_dir={str(directory)!r} has no {name} or {name}.gz; put the published file there, or leave out "
            "data_dir to take the set from the Hub"
        )
    return path


def _content(path: Path) -> bytes:
    content = path.read_bytes()
    return gzip.decompress(content) if path.suffix == ".gz" else content


def _rows(path: Path, convert: Callable[[Row], Row]) -> list[Row]:
    """The rows of a file of JSON lines; errors name the file, and the line that is wrong."""
    rows = []
    with reading(f"data_dir: {str(path)!r}"):
        # Of bytes: a text has more ends of lines than JSON, some of which may stand inside its strings.
        lines = _content(path).splitlines()
    for number, line in enumerate(lines, start=1):
        if line.strip():
            with reading(f"data_dir: line {number} of {str(path)!r}"):
                rows.append(convert(json.loads(line)))
    if not rows:
        raise ValueError(f"data_dir: {str(path)!r} is empty; put the published file there")
    return rows


def _pubmedqa(directory: Path) -> dict[str, list[Row]]:
    columns = ("QUESTION", "CONTEXTS", "final_decision")
    path, ids = find_or_raise(directory, "ori_pqal.json"), find_or_raise(directory, "test_ground_truth.json")
    with reading(f"data_dir: {str(path)!r}"):
        articles = json.loads(_content(path))
        rows = {key: _columns(article, *columns) for key, article in articles.items()}
    with reading(f"data_dir: {str(ids)!r}"):
        held_out = json.loads(_content(ids))
        return {
            "test": [row for key, row in rows.items() if key in held_out],
            "train": [row for key, row in rows.items() if key not in held_out],
        }


def _medmcqa(directory: Path) -> dict[str, list[Row]]:
    # The published files count the options from 1, the Hub's copy from 0.
    def convert(row: Row) -> Row:
        return {**_columns(row, "question", "opa", "opb", "opc", "opd"), "cop": int(row["cop"]) - 1}

    splits = {"test": _rows(find_or_raise(directory, "dev.json"), convert)}
    if train := find(directory, "medmcqa/train.json"):
        splits["train"] = _rows(train, convert)
    return splits


def _medqa(directory: Path) -> dict[str, list[Row]]:
    def convert(row: Row) -> Row:
        return {
            "sent1": row["question"],
            **{f"ending{index}": row["options"][letter] for index, letter in enumerate("ABCD")},
            "label": list("ABCD").index(row["answer_idx"]),
        }

    splits = {"test": _rows(find_or_raise(directory, "phrases_no_exclude_test.jsonl"), convert)}
    if train := find(directory, "phrases_no_exclude_train.jsonl"):
        splits["train"] = _rows(train, convert)
    return splits


def _social_iqa(directory: Path) -> dict[str, list[Row]]:
    columns = ("context", "question", "answerA", "answerB", "answerC")

    def convert(row: Row) -> Row:
        return {**_columns(row, *columns), "label": str(list("ABC").index(row["correct"]) + 1)}

    splits = {"test": _rows(find_or_raise(directory, "socialIQa_v1.4_dev.jsonl"), convert)}
    if archive := find(directory, "socialiqa-train-dev.zip"):
        with reading(f"data_dir: {str(archive)!r}"), zipfile.ZipFile(archive) as files:
            questions = files.read("socialiqa-train-dev/train.jsonl").splitlines()
            labels = files.read("socialiqa-train-dev/train-labels.lst").decode().split()
            splits["train"] = [
                {**_columns(row, *columns), "label": label}
                for row, label in zip(map(json.loads, questions), labels, strict=True)
            ]
    return splits


def _commonsense_qa(directory: Path) -> dict[str, list[Row]]:
    def convert(row: Row) -> Row:
        return {
            "question": row["question"]["stem"],
            "choices": {
                "label": [choice["label"] for choice in row["question"]["choices"]],
                "text": [choice["text"] for choice in row["question"]["choices"]],
            },
            "answerKey": row["answerKey"],
        }

    splits = {"test": _rows(find_or_raise(directory, "dev_rand_split.jsonl"), convert)}
    if train := find(directory, "train_rand_split.jsonl"):
        splits["train"] = _rows(train, convert)
    return splits


def _columns(row: Row, *names: str) -> Row:
    return {name: row[name] for name in names}


LOCAL_SETS: dict[str, LocalSet] = {
    "pubmedqa": LocalSet("ori_pqal.json", _pubmedqa),
    "medmcqa": LocalSet("dev.json", _medmcqa),
    "medqa_4options": LocalSet("phrases_no_exclude_test.jsonl", _medqa),
    "social_iqa": LocalSet("socialIQa_v1.4_dev.jsonl", _social_iqa),
    "commonsense_qa": LocalSet("dev_rand_split.jsonl", _commonsense_qa),
}
